"""Line coverage that core, data, strategies, trust and server must reach; run after the tests."""

import json
import sys
from collections import defaultdict
from pathlib import Path

FLOOR = 0.85
FLOORS = ("core", "data", "strategies", "trust", "server")


def main() -> int:
    report = json.loads(Path(".coverage.json").read_text())
    covered: defaultdict[str, int] = defaultdict(int)
    lines: defaultdict[str, int] = defaultdict(int)
    for file, facts in report["files"].items():
        floor = next((f for f in FLOORS if f"/{f}/" in f"/{file}"), None)
        if floor is not None:
            covered[floor] += facts["summary"]["covered_lines"]
            lines[floor] += facts["summary"]["num_statements"]
    shares = {floor: covered[floor] / lines[floor] for floor in FLOORS}
    print("line coverage:", "  ".join(f"{floor} {share:.1%}" for floor, share in shares.items()))
    return int(min(shares.values()) < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
