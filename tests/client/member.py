"""A member site for tests: its folder with keys and kit, and letters as its coordinator seals them.

A program of its own too: `python -m tests.client.member echo SOCKET` is a worker whose desk sends
letters back; with 'nursery BASE' it loads the code once and forks a site's worker for each line
that it reads, since loading takes seconds.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from intramural.client import worker
from intramural.core.canonical import canonical_json
from intramural.core.errors import AwaitsApproval
from intramural.core.federation import FederationConfig
from intramural.core.files import write_json
from intramural.core.journal import scan, utc_now
from intramural.core.letter import Letter, read_reply, write_letter
from intramural.core.messages import EvaluateRequest, Hello, Reply, Request, Split, TrainRequest
from intramural.core.site import load_site
from intramural.trust.certificates import (
    certificate_digest,
    issue_site_certificate,
    new_authority,
)
from intramural.trust.envelope import MANIFEST_TYPE, sign, to_base64
from intramural.trust.keys import (
    new_signing_key,
    new_tls_key,
    private_folder,
    public_bytes,
    write_key,
)
from intramural.trust.kit import make_kit, make_request
from intramural.trust.roster import Roster, RosterEntry, sign_roster
from intramural.trust.seal import check_seal, sealer, site_role
from tests.tiny import Row, federation, rows, site

RUN = "run-1"
PRIVATE: dict[str, Any] = {
    "privacy": {
        "unit": "record",
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "nominal_records": 60,
    },
    "strategy": {"weights": "equal"},
    "site_sections": {"policy": {"require_privacy": True, "epsilon_run": 1000.0}},
}
"""Sections of a private federation, and of a site that takes part in it."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One site, and the coordinator's key."""

    site_file: Path
    config: FederationConfig
    coordinator: Ed25519PrivateKey = field(repr=False)
    public: bytes
    """The site's own key, its public half."""

    @property
    def state(self) -> Path:
        return self.site_file.parent / "state"

    @property
    def envelope(self) -> str:
        return canonical_json(
            sign(MANIFEST_TYPE, self.config.manifest().encode(), self.coordinator)
        ).decode()

    def sealed(self, letter: Letter) -> Letter:
        seal = sealer("coordinator", self.coordinator)
        return replace(letter, seal=seal(letter.header.encode(), letter.vector))

    def question(self, request: Request) -> Letter:
        return self.sealed(write_letter(request))

    def hello(self) -> Letter:
        return self.question(Hello(manifest=self.config.digest, run=RUN))

    def train(self, round_: int = 1, *, fill: float = 0.0, run: str = RUN) -> Letter:
        vector = np.full(self.layout.size, fill, dtype=np.float32)
        return self.question(
            TrainRequest(
                manifest=self.config.digest,
                run=run,
                round=round_,
                layout=self.layout.digest,
                vector=vector,
            )
        )

    def evaluation(self, round_: int = 1, *, split: Split = "validation") -> Letter:
        vector = np.zeros(self.layout.size, dtype=np.float32)
        return self.question(
            EvaluateRequest(
                manifest=self.config.digest,
                run=RUN,
                round=round_,
                layout=self.layout.digest,
                split=split,
                vector=vector,
            )
        )

    @property
    def layout(self) -> Any:
        from intramural.client.agent import SiteAgent

        return SiteAgent(load_site(self.site_file), self.config).layout

    def read(self, answer: Letter, question: Letter | None = None) -> Reply:
        """Return what an answer says, its seal verified."""
        role = site_role("mine")
        check_seal(
            answer.seal, answer.header.encode(), answer.vector, role=role, public=self.public
        )
        layout = self.layout if answer.vector is not None else None
        return read_reply(answer, layout=layout, answers=question.digest if question else None)

    def approve(self) -> None:
        """Propose the manifest and approve it, as the site's people would."""
        from intramural.client.approval import Approvals

        policy = load_site(self.site_file).policy
        store = Approvals(self.state, policy=policy, journal=self.state / "journal.jsonl")
        try:
            store.admit(self.envelope, self.config)
        except AwaitsApproval:
            store.approve(self.config.digest, by="a. person")

    def journal(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what the audit journal says, verified."""
        return [(e.kind, e.body) for e in scan(self.state / "journal.jsonl").entries]

    def kinds(self) -> list[str]:
        """Return the journal's kinds, without those of the approval."""
        ours = {"trained", "evaluated", "sent", "resent", "refused", "reply-damaged"}
        return [kind for kind, _ in self.journal() if kind in ours]


def member(
    folder: Path,
    base: Path,
    *,
    records: list[Row] | None = None,
    site_sections: dict[str, Any] | None = None,
    **sections: Any,
) -> Member:
    """Write a member site's folder: site.toml, records, keys and kit."""
    config = federation(base, **sections)
    site_file = site(folder, "mine", records or rows()[:60], **(site_sections or {}))
    home = site_file.parent
    coordinator, own, tls = new_signing_key(), new_signing_key(), new_tls_key()
    private_folder(home / "trust")
    write_key(home / "trust" / "signing.key", own)
    now = utc_now()
    authority = new_authority("tiny", new_tls_key(), now=now)
    request = make_request("mine", signing_key=own, tls_key=tls)
    certificate = issue_site_certificate(authority, request.csr, site="mine", now=now)
    entry = RosterEntry(
        name="mine",
        signing_key=to_base64(public_bytes(own)),
        certificates=(certificate_digest(certificate),),
        state="enrolled",
        since=(now - timedelta(days=1)).isoformat(timespec="seconds"),
    )
    roster = Roster(federation="tiny", version=1, sites=(entry,))
    kit = make_kit(
        site="mine",
        host="127.0.0.1",
        port=1,
        authority=authority.certificate,
        certificate=certificate,
        roster=roster,
        envelope=sign_roster(roster, coordinator),
        key=coordinator,
    )
    write_json(home / "trust" / "kit.json", kit.model_dump(mode="json"))
    return Member(
        site_file=site_file, config=config, coordinator=coordinator, public=public_bytes(own)
    )


class Echo:
    """A desk that sends each letter back; waits as many seconds as the manifest says, or dies."""

    def answer(self, manifest: str, letter: Letter) -> Letter:
        if manifest == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if manifest == "break":
            raise RuntimeError(f"cannot answer {letter.header}")
        time.sleep(float(manifest or 0))
        return letter

    def refuse(self, error: Exception, *, answers: str | None) -> Letter:
        return Letter(header=str(error), seal=answers)


def die_at(point: str) -> None:
    """Let this process kill itself at a point of its first answer."""
    from intramural.client.agent import SiteAgent
    from intramural.client.audit import AuditLog
    from intramural.client.replies import ReplyStore, Slot

    def at(here: str) -> None:
        if here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    records_of, append, keep = SiteAgent.records_of, AuditLog.append, ReplyStore.keep

    def records_then(self: SiteAgent, split: Split) -> Any:
        at("charged")  # under [privacy] the records are opened once the ledger was charged
        return records_of(self, split)

    def append_then(self: AuditLog, kind: str, **body: Any) -> Any:
        entry = append(self, kind, **body)
        at(kind)
        return entry

    def keep_then(self: ReplyStore, slot: Slot, answer: Letter) -> None:
        keep(self, slot, answer)
        at("stored")

    SiteAgent.records_of = records_then  # type: ignore[method-assign]
    AuditLog.append = append_then  # type: ignore[method-assign]
    ReplyStore.keep = keep_then  # type: ignore[method-assign]


def be_echo(place: Path, *, read_s: float) -> None:
    """Be a worker that sends letters back."""
    logging.basicConfig(level=logging.INFO)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = worker.WorkerSettings(
        socket=place,
        lock=place.with_suffix(".lock"),
        vector_bytes_max=100 << 20,
        read_s=read_s,
        grace_s=1.0,
    )
    worker.serve(settings, lambda: nullcontext(Echo()), stop=stop)


def be_nursery(base: Path) -> None:
    """Fork a worker for each line `[point, site.toml, log]`; for `pid`, wait and say its end."""
    from intramural.models import private_training, resident

    with TemporaryDirectory() as folder:
        assert member(Path(folder), base, **PRIVATE).layout.size  # loads all that building needs
    assert private_training
    resident._resident.clear()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, int):
            print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(be_forked(*order))
        print(pid, flush=True)


def be_forked(point: str, site_file: str, log: str) -> int:
    """Be a site's worker that kills itself at a point of its first answer."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(source, number)
    if point != "never":
        die_at(point)
    return worker.main(["--site", site_file])


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        be_echo(Path(sys.argv[2]), read_s=float(sys.argv[3]) if sys.argv[3:] else 60.0)
    else:
        be_nursery(Path(sys.argv[2]))
