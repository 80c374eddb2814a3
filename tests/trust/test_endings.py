"""Endings: a certificate's end is told of a month before, once a day, until there is a new one."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from intramural.core.errors import TrustError
from intramural.trust.alerts import Alerts
from intramural.trust.endings import Endings
from tests.trust.pki import DAY, NOW, Authority, Papers

HOUR = timedelta(hours=1)


def der(papers: Papers) -> bytes:
    pem = x509.load_pem_x509_certificate(papers.certificate.read_bytes())
    return pem.public_bytes(Encoding.DER)


class Watch:
    """Endings with a clock to set, and what they told."""

    def __init__(self, **own: Path) -> None:
        self.now: datetime = NOW
        self.alerts: list[dict[str, Any]] = []
        self.endings = Endings(own, alerts=Alerts(self.alerts.append, now=lambda: self.now))

    def days_told(self, *, after: timedelta) -> list[tuple[str, int]]:
        """Look after some time; return whom it told of, with the days left."""
        self.now = NOW + after
        self.alerts.clear()
        self.endings.look()
        return [(one["peer"], one["days"]) for one in self.alerts]


def test_an_end_is_told_of_a_month_before_and_once_a_day(tmp_path: Path) -> None:
    ca, watch = Authority(tmp_path), Watch()
    watch.endings.watch("a", der(ca.site("a", ends=90 * DAY)))
    watch.endings.watch("b", der(ca.site("b", ends=80 * DAY)))
    assert watch.days_told(after=0 * DAY) == []
    assert watch.days_told(after=50 * DAY - HOUR) == []
    assert watch.days_told(after=50 * DAY + HOUR) == [("b", 29)]
    assert watch.days_told(after=50 * DAY + 2 * HOUR) == []
    assert watch.days_told(after=51 * DAY + 2 * HOUR) == [("b", 28)]
    assert watch.days_told(after=79 * DAY + HOUR) == [("a", 10), ("b", 0)]
    assert watch.days_told(after=82 * DAY - HOUR) == [("a", 8), ("b", 0)]  # it ended


def test_a_new_certificate_ends_the_warning_and_an_old_one_in_use_brings_it_back(
    tmp_path: Path,
) -> None:
    ca, watch = Authority(tmp_path), Watch()
    old, new = der(ca.site("old", ends=5 * DAY)), der(ca.site("new", ends=90 * DAY))
    for certificate, told in ((old, 1), (old, 0), (new, 0), (old, 1)):
        watch.endings.watch("a", certificate)
        assert len(watch.days_told(after=HOUR)) == told


def test_a_gate_s_own_certificates_are_watched_by_file(tmp_path: Path) -> None:
    mine = Authority(tmp_path).site("a", ends=5 * DAY + HOUR).certificate
    assert Watch(mine=mine).days_told(after=0 * DAY) == [("mine", 5)]
    (tmp_path / "none.pem").write_text("none")
    with pytest.raises(TrustError, match="theirs is not one certificate"):
        Watch(theirs=tmp_path / "none.pem")
