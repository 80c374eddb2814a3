"""Site: a simulated member: its node, its resident worker with a real desk, and its accidents."""

import random
from functools import cache, partial
from pathlib import Path

from flwr.app import Message

from intramural.client.approval import Approvals
from intramural.client.audit import AuditLog
from intramural.client.desk import Admits, Seals
from intramural.client.replies import ReplyStore, question_of
from intramural.client.thin import AWAY, SENDS_MAX, WAIT_S
from intramural.core.canonical import digest_bytes
from intramural.core.errors import AwaitsApproval, IntramuralError
from intramural.core.federation import FederationConfig
from intramural.core.letter import Letter, read_reply, write_letter
from intramural.core.messages import Refusal, Update
from intramural.core.site import SiteConfig, SiteData, SiteIdentity, SitePolicy
from intramural.core.wire import to_letter, to_records
from intramural.trust.envelope import MANIFEST_TYPE, open_envelope
from intramural.trust.keys import public_bytes
from intramural.trust.seal import COORDINATOR, check_seal, sealer, site_role
from tests.server.fakes import LAYOUT
from tests.simworld.clock import Clock, WallClock
from tests.simworld.disk import Disk, Killed
from tests.simworld.hostile import Draft, spoilt
from tests.simworld.net import Link, Parcel
from tests.simworld.pupil import Classroom, Lessons, School
from tests.trust.members import signing_key

COORDINATORS = signing_key("coordinator")
PUBLIC = public_bytes(COORDINATORS)
USUAL_S = {"query": (0.1, 2.0), "train": (3.0, 40.0), "evaluate": (0.5, 8.0)}
"""How long an answer takes."""
START_S = 5.0
"""From a supervisor's look to the next."""


@cache
def opened(envelope: str) -> bytes:
    """Return a manifest, verified once: it is the same all along."""
    return open_envelope(envelope, payload_type=MANIFEST_TYPE, key=PUBLIC)


class Everything:
    """Admits every manifest."""

    def admit(self, envelope: str, federation: FederationConfig) -> None:
        """Let it in."""


class SimSite:
    """One site; whoever kills it leaves its disk alone."""

    def __init__(
        self,
        name: str,
        home: Path,
        *,
        clock: Clock,
        link: Link,
        rng: random.Random,
        lessons: Lessons,
        manifest: str,
        asks_people: bool,
        wall: WallClock,
        train_s: tuple[float, float],
    ) -> None:
        self.name = name
        self.home = home
        self.disk = Disk(rng)
        self.wall = wall
        self.node: int | None = None
        self.desk: Classroom | None = None
        self.hostile: str | None = None
        self.hung = False
        self.available_s = 0.0
        """Since when node and worker are up, not cut off and not hung; infinite: they are not."""
        self.answers: dict[str, set[str]] = {}
        """What left for each question: the letters' digests, vectors included."""
        self.loses_power = False
        """The worker's next death is the whole site's, and what was not fsynced is lost."""
        self._clock = clock
        self._link = link
        self._rng = rng
        self._manifest = manifest
        self._durations = USUAL_S | {"train": train_s}
        self._queue: list[tuple[Parcel, Message]] = []
        self._life = 0
        self._at_work: tuple[Parcel, Message] | None = None
        self._cut = False
        self.school = School(
            lessons=lessons, rng=rng, now=wall.now, ledger_file=home / "ledger.jsonl"
        )
        self._admits: Admits = Everything()
        self._asks_people = asks_people

    @property
    def journal(self) -> Path:
        """The site's audit journal."""
        return self.home / "state" / "journal.jsonl"

    def start(self) -> None:
        """Bring up worker and node."""
        self.start_worker()
        self.node = self._link.join(self.name, self)
        self._note()

    def start_worker(self) -> None:
        """Open the desk; a supervisor tries again when that fails."""
        if self.desk is not None:
            return
        self.disk.revive()
        site = SiteConfig(
            site=SiteIdentity(name=self.name),
            data=SiteData(path=Path("records.jsonl"), text="title"),
            policy=SitePolicy(require_privacy=False),
        )
        state = self.home / "state"
        key = signing_key(self.name)
        try:
            with self.disk.acting():
                replies = ReplyStore(state / "replies")
                audit = AuditLog(self.journal, now=self.wall.now)
                if self._asks_people:
                    self._admits = Approvals(
                        state, policy=site.policy, journal=self.journal, now=self.wall.now
                    )
                self.desk = Classroom(
                    site,
                    seals=Seals(
                        open_manifest=opened,
                        check=partial(check_seal, role=COORDINATOR, public=PUBLIC),
                        seal=sealer(site_role(self.name), key),
                    ),
                    approvals=self._admits,
                    replies=replies,
                    audit=audit,
                )
                self.desk.school = self.school
        except (Killed, OSError, IntramuralError):
            self._clock.after(START_S, self.start_worker)
        self._note()

    def approve(self, federation: FederationConfig) -> None:
        """Have the site's people look at the manifest and approve it."""
        try:
            assert isinstance(self._admits, Approvals), "the site has not begun yet"
            with self.disk.acting():
                try:
                    self._admits.admit(self._manifest, federation)
                except AwaitsApproval:
                    self._admits.approve(federation.digest, by="a. person")
        except (Killed, OSError, IntramuralError, AssertionError):
            self.disk.revive()  # whoever types `client approve` types it again
            self._clock.after(START_S, partial(self.approve, federation))

    def receive(self, parcel: Parcel, message: Message) -> None:
        """Take a message in; a node handles one at a time."""
        self._queue.append((parcel, message))
        self._next()

    def _next(self) -> None:
        if self._at_work or self.hung or not self._queue:
            return
        parcel, message = self._at_work = self._queue.pop(0)
        lasts_s = self._rng.uniform(*self._durations[parcel.asks])
        act = partial(self._work, parcel, message, self._life, self._clock.now_s, 1)
        self._clock.after(lasts_s, act)

    def _work(
        self, parcel: Parcel, message: Message, life: int, since_s: float, sends: int
    ) -> None:
        """Hand the letter to the worker, as the thin process does."""
        if life != self._life:
            return
        again = partial(self._work, parcel, message, life)
        if self.hung:
            self._clock.after(START_S, partial(again, since_s, sends))
            return
        question = to_letter(message.content)
        if self.desk is None:
            if self._clock.now_s - since_s < WAIT_S and sends <= SENDS_MAX:
                self._clock.after(START_S, partial(again, since_s, sends))
                return
            refusal = Refusal(site="unknown", reason=AWAY, detail="away")
            self._send(parcel, write_letter(refusal, answers=question.digest), question)
        else:
            answer = self._answered(question)
            if answer is None:
                self._clock.after(START_S, partial(again, self._clock.now_s, sends + 1))
                return
            self._send(parcel, answer, question)
        self._at_work = None
        self._next()

    def _answered(self, question: Letter) -> Letter | None:
        """Return the desk's answer, or None when the worker died over it."""
        assert self.desk is not None
        try:
            with self.disk.acting():
                answer = self.desk.answer(self._manifest, question)
        except Killed:
            if self.loses_power:
                self.dies(away_s=2 * START_S, same=False, power=True)
            else:
                self.worker_dies(START_S)
            return None
        self._witness(question, answer)
        return answer

    def _witness(self, question: Letter, answer: Letter) -> None:
        """Check that the journal says what leaves, and that one question has one answer."""
        assert self.desk is not None
        reply = _read(answer)
        last = self.desk._audit.entries[-1] if self.desk._audit.entries else None
        if isinstance(reply, Refusal):
            told = last is not None and last.kind == "refused"
            assert told or not self.disk.is_good, f"{self.name} refused and did not say so"
            return
        assert last is not None, "an answer left unjournalled"
        assert last.kind in ("sent", "resent"), "an answer left unjournalled"
        assert last.body["answer"] == answer.digest
        if isinstance(reply, Update):
            assert answer.vector is not None
            known = self.answers.setdefault(question_of(question, manifest=""), set())
            known.add(f"{answer.digest} {digest_bytes(answer.vector)}")
            assert len(known) == 1, f"{self.name} gave one question two answers"

    def _send(self, parcel: Parcel, answer: Letter, question: Letter) -> None:
        content = to_records(answer)
        if self.hostile is not None and answer.seal is not None:
            reply = _read(answer)
            draft = Draft(site=self.name, reply=reply, answers=question.digest)
            instead = spoilt(self.hostile, draft)
            if instead is not None:
                content = instead
                parcel.spoilt.append(content)
        self._link.reply(parcel, content)

    def worker_dies(self, away_s: float) -> None:
        """Let the worker die; it is started again after a while."""
        if self.desk is not None:
            self.desk.close()
            self.desk = None
            self._clock.after(away_s, self.start_worker)
        self._note()

    def dies(self, *, away_s: float, same: bool, power: bool) -> None:
        """Let the whole site die; it comes back as another node, or much later as the same."""
        if self.node is None:
            return
        self.loses_power = False
        self._life += 1
        self._at_work, self._queue = None, []
        node, self.node = self.node, None
        self._link.leave(node, forgets=True)
        self.worker_dies(away_s)
        if power:
            self.disk.cut()
        self._clock.after(max(away_s, 60.0) if same else away_s, partial(self._back, node, same))
        self._note()

    def dies_at_work(self, *, operation: int, how: str) -> None:
        """Let the worker come to a point of its work and die there; or else the answer is sent."""
        if self._at_work is None or self.desk is None:
            return
        parcel, message = self._at_work
        self.disk.die(after=operation, how=how)
        question = to_letter(message.content)
        answer = self._answered(question)
        if answer is not None:
            self._send(parcel, answer, question)

    def _back(self, node: int, same: bool) -> None:
        self.start_worker()
        self.node = node if same else self._link.join(self.name, self)
        if same:
            self._link.come_back(node)
        self._note()

    def cut_off(self, lasts_s: float) -> None:
        """Cut the line to the coordinator."""
        if self.node is None or self._cut:
            return
        self._cut = True
        self._link.leave(self.node, forgets=False)
        self._clock.after(lasts_s, partial(self._connect, self.node))
        self._note()

    def _connect(self, node: int) -> None:
        self._cut = False
        if self.node == node:
            self._link.come_back(node)
        self._note()

    def hang(self, *, hung: bool) -> None:
        """Stop answering while the node looks alive, or go on."""
        self.hung = hung
        self._note()
        self._next()

    def heal(self) -> None:
        """Be well, and honest."""
        self.disk.heal()
        self.disk.revive()
        self.wall.skew_s = 0.0
        self.hostile = None
        self.hang(hung=False)

    def _note(self) -> None:
        well = self.node is not None and self.desk is not None and not self.hung and not self._cut
        since_s = self.available_s if self.available_s < float("inf") else self._clock.now_s
        self.available_s = since_s if well else float("inf")


def _read(answer: Letter) -> object:
    return read_reply(answer, layout=LAYOUT if answer.vector is not None else None)
