"""Witness of a run with a buffer: who counts in a round; evaluations as in any other run."""

from typing import Any

from tests.simworld.witness import Witness


class BufferedWitness(Witness):
    """Training has no end of its own: a round takes what comes, and asks who is idle."""

    training: frozenset[str] = frozenset()
    """Sites at work, as far as the coordinator waits for them."""
    counted: frozenset[str] = frozenset()
    """Sites in the round under way."""

    @property
    def owed(self) -> list[str]:
        """Sites whose answer is still waited for."""
        if self.cohort:
            return super().owed
        return [] if self.waits else sorted(self.training)  # what comes then is held

    def opened(self, round_: int, sites: list[str]) -> None:
        """Note who is at work now."""
        self._end()
        self.waits = ""
        self.training = frozenset(sites)
        assert not self.training & self.counted, "who has counted is asked in the same round"
        self._say(f"opened {round_} {sites}")

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        """Check that a site counts once, and that what does not count has a reason."""
        if phase != "train":
            super().answered(site, phase, good=good, reason=reason)
            return
        self._say(f"answered {site} {phase} {'well' if good else reason}")
        if good:
            assert not self.cohort, f"{site} was counted while a round was evaluated"
            assert site in self.training, f"{site} was counted and is not waited for"
            assert site not in self.counted, f"{site} was counted twice"
            assert len(self.counted) < self._plan.buffer, "the buffer was full"
            self.counted |= {site}
        else:
            assert reason, f"{site} was refused for no reason"
            self.refused += 1
        if reason not in ("stale", "not-asked"):
            self.training -= {site}

    def committed(self, record: dict[str, Any]) -> None:
        """Check the round's sites."""
        assert record["sites"] == sorted(self.counted)
        assert len(self.counted) == self._plan.buffer
        self.counted = frozenset()
        super().committed(record)

    def noticed(self, line: str) -> None:
        """Nobody is at work, and the buffer is not full; what has counted stays."""
        self._say(f"noticed {line}")
