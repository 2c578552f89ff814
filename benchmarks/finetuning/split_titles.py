"""Articles of a SQuAD file apart: `python split_titles.py SQUAD.json TITLE… --without REST.json --only TITLES.json`.

With --answerable the rest has the questions alone that have an answer; with --plausible those without one have what was
noted as plausible for them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("squad", type=Path)
    parser.add_argument("titles", nargs="+")
    parser.add_argument("--without", type=Path, required=True)
    parser.add_argument("--only", type=Path, required=True)
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--answerable", action="store_true")
    questions.add_argument("--plausible", action="store_true")
    args = parser.parse_args()
    whole = json.loads(args.squad.read_text(encoding="utf-8"))
    known = [article["title"] for article in whole["data"]]
    if missing := set(args.titles) - set(known):
        parser.error(f"{', '.join(sorted(missing))}: not among {', '.join(known)}")
    for path, inside in ((args.without, False), (args.only, True)):
        chosen = [article for article in whole["data"] if (article["title"] in args.titles) == inside]
        for paragraph in (paragraph for article in chosen for paragraph in article["paragraphs"] if not inside):
            if args.plausible:
                for qa in paragraph["qas"]:
                    qa.update(answers=qa["answers"] or qa["plausible_answers"], is_impossible=False)
            if args.answerable:
                paragraph["qas"] = [qa for qa in paragraph["qas"] if qa["answers"]]
        path.write_text(json.dumps({**whole, "data": chosen}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
