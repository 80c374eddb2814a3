"""Meddler: sits on the plain line between a SuperNode and its gate, records it, and forges replies.

It has what an attacker there has: Flower's signed headers, which cover a time and no body, for 300
seconds. It has no key.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from flwr.app import Message
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from intramural.core.letter import Letter
from intramural.core.wire import to_letter, to_records

HELD = "held"
"""Session of a reply that the meddler keeps to itself."""
WAIT_S = 60.0
PROTOBUF = "application/protobuf"

Forge = Callable[[Letter], Letter | None]
"""Takes a genuine reply to a training request; returns what is sent instead, None for itself."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request of the node and its answer, as they passed."""

    verb: str
    headers: dict[str, str]
    """Those that are Flower's."""
    body: bytes
    status: int
    answer: bytes


@dataclass
class Meddler:
    """An ASGI application: the gate, as far as the node can tell."""

    gate: int
    """Port of the site's gate."""
    forge: Forge = lambda letter: None
    exchanges: list[Exchange] = field(default_factory=list)
    """What passed, in order."""
    forged: list[tuple[int, bool]] = field(default_factory=list)
    """By forged reply: the gate's status, and whether SuperLink stored all of it."""
    _held: tuple[PushMessagesRequest, dict[str, str]] | None = None
    _objects: dict[str, bytes] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        headers = {k: v for k, v in request.headers.items() if k.startswith("flwr-")}
        verb = request.url.path.rpartition("/")[2]
        status, answer = await asyncio.to_thread(self._answer, verb, headers, body)
        await Response(answer, status, media_type=PROTOBUF)(scope, receive, send)

    def saw(self, verb: str) -> bool:
        """Return whether a request of a kind has passed."""
        return any(one.verb == verb for one in list(self.exchanges))

    def headers_of(self, verb: str) -> dict[str, str]:
        """Return the headers of the last request of a kind: captured, and signed by the node."""
        return next(one.headers for one in reversed(self.exchanges) if one.verb == verb)

    def post(self, verb: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Ask the gate; return its status and answer."""
        url = f"http://127.0.0.1:{self.gate}/v1/fleet/{verb}"
        headers = headers | {"content-type": PROTOBUF, "accept": PROTOBUF}
        with httpx.Client(trust_env=False, timeout=WAIT_S) as client:
            try:
                answer = client.post(url, headers=headers, content=body)
            except httpx.TransportError:
                return 503, b"the gate is away"
        return answer.status_code, answer.content

    def requests(self) -> list[Letter]:
        """Return the letters that the node pulled so far, in order."""
        contents: dict[str, bytes] = {}
        for one in self.exchanges:
            if one.verb == "pull-object" and one.status == 200:
                found = PullObjectResponse.FromString(one.answer)
                name = PullObjectRequest.FromString(one.body).object_id
                contents[name] = found.object_content
        letters = []
        for one in self.exchanges:
            if one.verb == "pull-messages" and one.status == 200:
                for tree in PullMessagesResponse.FromString(one.answer).message_object_trees:
                    if contents.keys() >= set(_names(tree)):  # the node may have dropped it
                        letters.append(to_letter(_inflated(tree.object_id, contents).content))
        return letters

    def _answer(self, verb: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if verb == "push-messages":
            request = PushMessagesRequest.FromString(body)
            message = request.messages_list[0]
            if message.metadata.message_type == "train" and not message.HasField("error"):
                return 200, self._hold(request, headers)
        if verb == "push-object":
            pushed = PushObjectRequest.FromString(body)
            if pushed.session_id == HELD:
                with self._turn:  # a node pushes two objects at once
                    self._objects[pushed.object_id] = pushed.object_content
                    self._pass_on()
                return 200, bytes(PushObjectResponse(stored=True).SerializeToString())
        status, answer = self.post(verb, headers, body)
        self.exchanges.append(
            Exchange(verb=verb, headers=headers, body=body, status=status, answer=answer)
        )
        return status, answer

    def _hold(self, request: PushMessagesRequest, headers: dict[str, str]) -> bytes:
        """Let the node believe that its reply goes out, and have all of it."""
        self._held, self._objects = (request, headers), {}
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        answer = PushMessagesResponse(
            results={metadata.message_id: 0}, objects_to_push=_names(tree), session_id=HELD
        )
        return bytes(answer.SerializeToString())

    def _pass_on(self) -> None:
        """Once the held reply is whole, send it, or what is forged from it, under its headers."""
        if self._held is None:
            return
        request, headers = self._held
        tree = request.message_object_trees[0]
        if set(_names(tree)) - set(self._objects):
            return
        self._held = None
        genuine = _inflated(tree.object_id, self._objects)
        forged = self.forge(to_letter(genuine.content))
        content = genuine.content if forged is None else to_records(forged)
        message = make_message(metadata=genuine.metadata, content=content)
        message.metadata.__dict__["_message_id"] = message.object_id
        status, is_stored = self._push(message, request, headers)
        if forged is not None:
            self.forged.append((status, is_stored))

    def _push(
        self, message: Message, request: PushMessagesRequest, headers: dict[str, str]
    ) -> tuple[int, bool]:
        """Push a message as the node would; return the gate's status and whether it is stored."""
        pushing = PushMessagesRequest(
            node=request.node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=request.clientapp_runtime_list,
        )
        status, answer = self.post("push-messages", headers, pushing.SerializeToString())
        if status != 200:
            return status, False
        told = PushMessagesResponse.FromString(answer)
        objects, stored = get_all_nested_objects(message), []
        for name in told.objects_to_push:
            one = PushObjectRequest(
                node=request.node,
                run_id=message.metadata.run_id,
                object_id=name,
                object_content=objects[name].deflate(),
                session_id=told.session_id,
            )
            _, answer = self.post("push-object", headers, one.SerializeToString())
            stored.append(PushObjectResponse.FromString(answer).stored)
        return status, all(stored)


def _names(tree: ObjectTree) -> list[str]:
    return list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))


def _inflated(name: str, contents: dict[str, bytes]) -> Message:
    found = inflate_object_from_contents(name, dict(contents))
    assert isinstance(found, Message)
    return found
