"""What cannot come up is refused at once, and not started again for ever."""

import threading
from pathlib import Path

import pytest

from intramural.client.up import site_up
from intramural.core.errors import ConfigError
from tests.tiny import rows, site


def test_a_folder_too_deep_for_the_worker_s_socket_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    deep = site(tmp_path / ("d" * 100), "mine", rows()[:4])
    with pytest.raises(ConfigError, match=r"at most 107 bytes.*move the site's folder"):
        site_up(deep, stop=threading.Event())
    assert not (deep.parent / "state" / "logs").exists()
