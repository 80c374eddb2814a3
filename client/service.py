"""Service: the files that keep a site's agent up: systemd units, or a container's description."""

import sys
from pathlib import Path

_UNIT = """\
# Keeps the site agent of {site} up. Made by `intramural client service`; edit site.toml, not this.
[Unit]
Description=Intramural site agent of {site}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={python} -m intramural client up {file}
WorkingDirectory={folder}
User={user}
Restart=always
RestartSec=15
StartLimitIntervalSec=0
KillMode=mixed
TimeoutStopSec=60
# The agent reads its folder and its records, writes its state, and dials the coordinator.
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadOnlyPaths={data}
ReadWritePaths={writable}
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LimitCORE=0
UMask=0077

[Install]
WantedBy=multi-user.target
"""

_CONTAINER = """\
# A rootless container of the site agent of {site}. Made by `intramural client service`.
#
#   podman build -t intramural-{site} -f Containerfile .
#   podman run --rm --read-only --tmpfs /tmp --cap-drop=all --security-opt=no-new-privileges \\
#     --userns=keep-id -v {data}:{data}:ro -v {folder}:{folder} intramural-{site}
FROM python:{version}-slim
RUN useradd --uid 1000 --create-home agent
COPY wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels intramural
USER agent
WORKDIR {folder}
ENV HF_HUB_OFFLINE=1 FLWR_TELEMETRY_ENABLED=0
ENTRYPOINT ["intramural", "client", "up", "{file}"]
"""


def service_files(
    site_file: Path, *, site: str, data: Path, ledger: Path, user: str
) -> dict[str, str]:
    """Return the files by name.

    Args:
        site_file: The site's site.toml.
        site: Its name.
        data: The records; mounted to be read alone.
        ledger: The privacy ledger, which is written.
        user: Whom the agent runs as.
    """
    folder = site_file.resolve().parent
    writable = sorted({str(folder / "state"), str(folder / "trust"), str(ledger.parent)})
    words = {
        "site": site,
        "python": sys.executable,
        "file": str(site_file.resolve()),
        "folder": str(folder),
        "data": str(data),
        "writable": " ".join(writable),
        "user": user,
        "version": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    return {
        f"intramural-{site}.service": _UNIT.format(**words),
        "Containerfile": _CONTAINER.format(**words),
    }
