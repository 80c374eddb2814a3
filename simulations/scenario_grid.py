"""ScenarioGrid: plays a scenario over any other Grid, on a simulated clock.

What comes of a message is decided when it is sent, by draws that depend on seed, site, round and
how often it was asked; so every engine, and a resumed run, plays the same. Only messages whose
reply will come go to the grid within, which computes them as it always does: a site that drops out
trains nothing here, and its privacy ledger is not charged, as a real one's may be.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.seeds import generator
from intramural.core.wire import RECORD, payload_bytes
from intramural.server.lost import Again
from intramural.server.setting import Setting
from intramural.simulations.fate import Errand, Fate, fate_of
from intramural.simulations.hostile import check_attacks, honest_update, spoil
from intramural.simulations.presence import Presence
from intramural.simulations.scenario import COLLUSIVE, Group, Scenario
from intramural.simulations.sim_clock import SimClock
from intramural.simulations.under_way import Sent, UnderWay, key_of

ASKED = (MessageType.TRAIN, MessageType.EVALUATE)
HAPPENINGS = ("unavailable", "drop_outs", "crashes", "left", "expired", "hostile")
"""What is counted, each round: sites not connected when it began; training requests that were never
answered; that killed the app; requests whose site was cut off over them; replies later than Flower
keeps a message; hostile updates delivered."""
LOOK_S = 0.002
"""Pause between two looks for a reply that an engine still computes; of the real clock."""


@dataclass(frozen=True, kw_only=True)
class _Site:
    number: int
    """Its node's."""
    group: Group
    presence: Presence


@dataclass(frozen=True, kw_only=True)
class _Parcel:
    """A message under way."""

    message: Message
    site: _Site
    key: tuple[str, int]
    """What is asked, and in which round."""
    place: int
    """Among all messages."""
    fate: Fate
    is_again: bool
    """A restarted run repeats it."""


class ScenarioGrid(Grid):
    """Delays, loses and spoils what another grid delivers, and lets the clock say when."""

    def __init__(
        self,
        inner: Grid,
        scenario: Scenario,
        clock: SimClock,
        federation: FederationConfig,
        *,
        world: dict[str, Any] | None = None,
    ) -> None:
        """Play `scenario` over `inner`; the federation's seed decides who and when.

        `world` is what `world()` returned when the checkpoint was written that a run goes on from.

        Raises:
            ConfigError: The scenario's attacks do not go with the federation, or with its sites.
        """
        check_attacks(scenario, federation)
        self.scenario = scenario
        self.clock = clock
        self._inner = inner
        self._seed = federation.federation.seed
        self._deadline_s = federation.sites.deadline_s
        self._greeting_s = inf
        self._pause_s = Again().pause_s
        self._sites = _sites_of(scenario, sorted(inner.get_node_ids()), seed=self._seed)
        self._parcels: dict[str, _Parcel] = {}
        self._under_way = UnderWay(world or {}, clock)
        self._happened: Counter[str] = Counter()
        self._early: dict[str, Message] = {}
        self._known: dict[tuple[Any, ...], Vector] = {}
        self._begun_real_s: float | None = None
        self._measured_s: float | None = None
        clock.follow(self._next_change)

    def adapt(self, setting: Setting) -> Setting:
        """Return what the coordinator works with, on this clock; for `run_federation`."""
        self._greeting_s = setting.greeting_s
        return replace(
            setting,
            clock=self.clock.monotonic,
            sleep=self.clock.sleep,
            again=Again() if self.scenario.ask_again else None,
            added=self.added,
            world=self.world,
            crowd=None,  # who is there changes: the sites are greeted, however many
        )

    def added(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what a committed round's record says beside: simulated times and happenings."""
        begun_s, self._begun_real_s = self._begun_real_s, None
        happened, self._happened = self._happened, Counter()
        return {
            "seconds": round(time.monotonic() - begun_s, 3) if begun_s is not None else 0.0,
            "simulated_seconds": record["seconds"],
            "scenario": {"at_s": round(self.clock.now_s, 3)}
            | {name: happened[name] for name in HAPPENINGS},
        }

    def world(self) -> dict[str, Any]:
        """Return what a resumed run needs to play on as this one does."""
        return self._under_way.to_json()

    def groups(self) -> dict[str, int]:
        """Return the number of sites by group."""
        counts = Counter(site.group.name for site in self._sites.values())
        return {group.name: counts[group.name] for group in self.scenario.groups}

    def set_run(self, run: Run) -> None:
        """Pass on."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the grid within."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as Flower's deprecated call does."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected at this time."""
        now_s = self.clock.now_s
        return [node for node, site in self._sites.items() if site.presence.is_here(now_s)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Decide what comes of each message; those with a reply go on to the grid within."""
        parcels = self._parcels_of(list(messages))
        # in the order of their replies, so that an engine with few slots makes none it must keep
        answered = sorted((p for p in parcels if p.fate.error is None), key=_by_arrival)
        pushed = self._inner.push_messages([p.message for p in answered])
        ids = {p.place: i for p, i in zip(answered, pushed, strict=True)}
        found = []
        for parcel in parcels:
            lost = parcel.fate.error is not None
            message_id = f"scenario-{parcel.place}" if lost else ids[parcel.place]
            parcel.message.metadata.__dict__["_message_id"] = message_id  # what its reply names
            self._parcels[message_id] = parcel
            self.clock.alarm(parcel.fate.at_s)
            if lost:
                self.clock.alarm(parcel.fate.at_s + self._pause_s)  # when it may be asked anew
                self._happened[parcel.fate.cause] += not parcel.is_again
            found.append(message_id)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies that have come by now, in the order in which they came.

        Each is computed when it is asked for, if the grid within works so.
        """
        now_s = self.clock.now_s
        known = (self._parcels.get(message_id) for message_id in message_ids)
        here = [p for p in known if p is not None and p.fate.at_s <= now_s]
        for parcel in sorted(here, key=_by_arrival):
            del self._parcels[parcel.message.metadata.message_id]
            yield from self._delivered(parcel)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that come within so many simulated seconds, as a list."""
        until_s = self.clock.now_s + (inf if timeout is None else timeout)
        waiting, replies = set(self.push_messages(messages)), []
        while waiting:
            for reply in self.pull_messages(sorted(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if not waiting or self.clock.now_s >= until_s:
                break
            self.clock.alarm(until_s)
            self.clock.sleep(0.0)
        return replies

    def _parcels_of(self, messages: list[Message]) -> list[_Parcel]:
        now_s, kinds = self.clock.now_s, {m.metadata.message_type for m in messages}
        if MessageType.TRAIN in kinds and self._begun_real_s is None:
            self._begun_real_s = time.monotonic()
            self._happened["unavailable"] += len(self._sites) - len(list(self.get_node_ids()))
        parcels = [self._parcel(message, beside=len(messages)) for message in messages]
        alarm = self.clock.alarm
        if all(parcel.is_again for parcel in parcels):
            return parcels  # the process before set the alarms
        if kinds & set(ASKED):
            alarm(now_s + self._deadline_s)
        else:  # greetings: when they are given up, and when a lost request may be asked
            alarm(now_s + min(self._deadline_s, self._greeting_s))
            alarm(now_s + self._pause_s)
        return parcels

    def _parcel(self, message: Message, *, beside: int) -> _Parcel:
        """Return a message with its fate; `beside` messages share the coordinator's line."""
        site = self._sites[message.metadata.dst_node_id]
        key, node, known = key_of(message), site.number, self._under_way
        sent = known.again(node, key)
        if sent is None:
            times = known.times[node, *key]
            known.times[node, *key] += 1
            rng = generator(self._seed, "scenario-fate", *key, node, times)
            fate = fate_of(self._errand(message, site, beside), site.group, site.presence, rng)
            known.busy[node] = fate.busy_until_s
            place, now_s = known.next_place(), self.clock.now_s
            sent = known.note(node, key, Sent(round=key[1], sent_s=now_s, place=place, fate=fate))
        return _Parcel(
            message=message,
            site=site,
            key=key,
            place=sent.place,
            fate=sent.fate,
            is_again=sent.is_again,
        )

    def _errand(self, message: Message, site: _Site, beside: int) -> Errand:
        kind = message.metadata.message_type
        size = payload_bytes(message.content)
        trains = kind == MessageType.TRAIN
        work_s = self.scenario.evaluate_s if kind == MessageType.EVALUATE else 0.0
        if trains:
            measured = self._measured_s if self.scenario.measured else None
            work_s = self.scenario.train_s if measured is None else measured
        return Errand(
            now_s=self.clock.now_s,
            down_bytes=size,
            # the reply is not computed yet: an update is as large as the arrays, others have none
            up_bytes=size if trains else message.content[RECORD].count_bytes(),
            work_s=work_s,
            ttl_s=message.metadata.ttl,
            line_mbps=(self.scenario.coordinator_mbps or inf) / beside,
            busy_until_s=self._under_way.busy.get(site.number, 0.0),
            trains=trains,
        )

    def _delivered(self, parcel: _Parcel) -> Iterator[Message]:
        """Yield what comes in reply to a message; then let the grid within have its memory back."""
        if parcel.key[0] == MessageType.QUERY:
            self._under_way.greeted(parcel.site.number, parcel.place)
        if parcel.fate.error is not None:
            failure = Error(code=parcel.fate.error, reason="scenario")
            yield Message(failure, reply_to=parcel.message)
            return
        kind, round_ = parcel.key
        group = parcel.site.group
        colludes = group.hostile in COLLUSIVE and kind == MessageType.TRAIN
        known = self._colluded(parcel) if colludes else []
        for reply in self._computed(parcel):
            if group.hostile is not None and kind == MessageType.TRAIN:
                rng = generator(self._seed, "scenario-hostile", parcel.site.number, round_)
                if spoil(reply, group.hostile, strength=group.strength, rng=rng, known=known):
                    self._happened["hostile"] += 1
            yield reply
            del reply

    def _colluded(self, parcel: _Parcel) -> list[Vector]:
        """Return the honest updates of this round that the site's group has or will have.

        Those under way are computed now, before their time; their replies wait for it. Which they
        are follows from the simulated clock alone, so every engine plays the same.
        """
        group, round_ = parcel.site.group, (parcel.key, parcel.site.group.name)
        self._known = {key: known for key, known in self._known.items() if key[0] == parcel.key}
        for other in [parcel, *self._parcels.values()]:
            key = (*round_, other.site.number)
            if other.key == parcel.key and other.site.group is group and other.fate.error is None:
                for reply in [] if key in self._known else list(self._computed(other)):
                    self._early[other.message.metadata.message_id] = reply
                    update = honest_update(reply)
                    if update is not None:
                        self._known[key] = update
        return [self._known[key] for key in sorted(self._known) if key[:2] == round_]

    def _computed(self, parcel: _Parcel) -> Iterator[Message]:
        """Yield the site's own reply, however long the engine takes for it."""
        early = self._early.pop(parcel.message.metadata.message_id, None)
        if early is not None:
            yield early
            return
        begun_s, message_id = time.monotonic(), parcel.message.metadata.message_id
        found = False
        while not found:
            for reply in self._inner.pull_messages([message_id]):
                found = True
                if parcel.key[0] == MessageType.TRAIN:
                    self._measured_s = time.monotonic() - begun_s
                yield reply
                del reply
            if not found:
                time.sleep(LOOK_S)

    def _next_change(self, after_s: float) -> float:
        changes = (site.presence.next_change(after_s) for site in self._sites.values())
        return min(changes, default=inf)


def _by_arrival(parcel: _Parcel) -> tuple[float, int]:
    return parcel.fate.at_s, parcel.place


def _sites_of(scenario: Scenario, nodes: list[int], *, seed: int) -> dict[int, _Site]:
    """Return each node's site: its group, and when it is connected."""
    seen: Counter[str] = Counter()
    sites = {}
    for node, group in zip(nodes, scenario.groups_of(len(nodes), seed=seed), strict=True):
        offset_h = group.offset_hours[seen[group.name] % len(group.offset_hours)]
        seen[group.name] += 1
        presence = Presence(
            group,
            offset_h=offset_h,
            start_hour=scenario.start_hour,
            rng=generator(seed, "scenario-presence", node),
        )
        sites[node] = _Site(number=node, group=group, presence=presence)
    return sites
