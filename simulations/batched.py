"""Batched Grid: the training requests of a round answered together, in one step for many sites.

The agents are the real ones; the ClientApp around them, which passes one message on at a time, is
left out. Other messages go the usual way.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from flwr.app import Message, MessageType, RecordDict

from intramural.client.agent import SiteAgent
from intramural.client.app import agent_for
from intramural.client.refusals import refusal_of
from intramural.client.together import Results, answer_together
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout, Vector
from intramural.core.letter import read_request
from intramural.core.messages import Reply, TrainRequest
from intramural.core.wire import encode, to_letter
from intramural.models.job import Job
from intramural.models.resident import Resident, resident_model
from intramural.simulations.inprocess import InProcessGrid

TOGETHER_MAX = 50
"""Sites whose updates are held at once."""


def check_batched(federation: FederationConfig, *, places: dict[str, str], device: str) -> None:
    """Do nothing if the federation's sites can be trained together.

    Raises:
        ConfigError: They cannot; the reason is named.
    """
    from intramural.models.batched_fit import unfit_reason

    resident = resident_model(federation, places=places, device=device)
    reason = unfit_reason(resident.loaded, resident.task, federation)
    if reason is not None:
        raise ConfigError(f"--engine batched: {reason}; use --engine inprocess or pool")


class BatchedGrid(InProcessGrid):
    """Delivers a round's training requests to many agents at once."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies in order; training is done for `TOGETHER_MAX` sites at a time."""
        found = [self._queue.pop(i) for i in message_ids if i in self._queue]
        for kind, group in groupby(found, key=lambda m: str(m.metadata.message_type)):
            messages = list(group)
            if kind != MessageType.TRAIN:
                yield from map(self._deliver, messages)
                continue
            for first in range(0, len(messages), TOGETHER_MAX):
                yield from self._deliver_together(messages[first : first + TOGETHER_MAX])

    def _deliver_together(self, messages: Sequence[Message]) -> Iterator[Message]:
        began_s = time.monotonic()
        asked: list[tuple[int, str, SiteAgent, TrainRequest]] = []
        replies: dict[int, Message] = {}
        read = _Reader()
        for place, message in enumerate(messages):
            error = self._prevented(message)
            if error is not None:
                replies[place] = Message(error, reply_to=message)
                continue
            answers = None
            try:
                answers = read.digest(message.content)
                agent = agent_for(self._home.context(message.metadata.dst_node_id))
                request = read.request(agent.layout)
            except Exception as problem:  # noqa: BLE001 (as the ClientApp)
                refused = refusal_of(problem, site="unknown")
                replies[place] = Message(encode(refused, answers=answers), reply_to=message)
                continue
            asked.append((place, answers, agent, request))
        told = _answer([(agent, request) for _, _, agent, request in asked])
        for (place, digest, _, _), answer in zip(asked, told, strict=True):
            content = encode(answer, answers=digest)
            replies[place] = Message(content, reply_to=messages[place])
        ended_s = time.monotonic()
        share_s = (ended_s - began_s) / len(messages)  # nobody can say whose time it was
        for place, message in enumerate(messages):
            begin_s = began_s + place * share_s
            reply = replies.pop(place)
            self._note(message, reply, worker=0, began_s=begin_s, ended_s=begin_s + share_s)
            yield reply


class _Reader:
    """Reads the letters of a round: its messages share one content, and its sites one layout."""

    def __init__(self) -> None:
        self._content: RecordDict | None = None
        self._requests: dict[Layout, TrainRequest] = {}

    def digest(self, content: RecordDict) -> str:
        """Take a message's content, and return its letter's digest.

        Raises:
            WireError: It is no letter.
        """
        if content is not self._content:
            letter = to_letter(content)
            self._digest = letter.digest
            self._content, self._letter, self._requests = content, letter, {}
        return self._digest

    def request(self, layout: Layout) -> TrainRequest:
        """Return what that letter asks for.

        Raises:
            WireError: It does not fit, or asks for no training.
        """
        if layout not in self._requests:
            request = read_request(self._letter, layout=layout)
            assert isinstance(request, TrainRequest)
            self._requests[layout] = request
        return self._requests[layout]


def _answer(asked: list[tuple[SiteAgent, TrainRequest]]) -> list[Reply]:
    """Return the agents' replies; all requests are of one round."""
    if not asked:
        return []
    agent, request = asked[0]
    resident, start = agent.resident(), request.vector

    def train(jobs: list[Job]) -> Results:
        return _train(resident, jobs, start)

    return answer_together(asked, train=train)


def _train(resident: Resident, jobs: list[Job], start: Vector) -> Results:
    loaded, task = resident.loaded, resident.task
    if jobs and jobs[0].private is not None:
        from intramural.models.batched_private import train_jobs_privately

        found = train_jobs_privately(loaded, task, jobs, start)
        return [one if isinstance(one, Exception) else (one, None) for one in found]
    from intramural.models.batched import train_jobs

    return train_jobs(loaded, task, jobs, start)
