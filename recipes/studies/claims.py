"""Every claim of the paper's and of ours as a row of a table, with the cases in which it holds, from the CSVs.

    python recipes/studies/claims.py             # prints the table
    python recipes/studies/claims.py --write     # puts it into the README of this folder, between its markers
    python recipes/studies/claims.py --smoke     # of the runs of `make studies-smoke`
    python recipes/studies/claims.py --all       # behind it every table of results/, those of costs too

A study that has no runs has no rows. `evidence.py` says when a claim holds; what was measured in each case is in the
page of its study.
"""

import argparse
from pathlib import Path

import baselines_study
import catapult_study
import cliff_study
import descent_study
import phase_study
import remedies_study
import reporting
import second_moment_study
import sharpness_study
import warmup_study
from evidence import overview
from grid import SMOKE, complete, load

STUDIES = (phase_study, catapult_study, second_moment_study, baselines_study, cliff_study, descent_study)
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- python recipes/studies/claims.py --write -->\n", "<!-- end of claims -->"


def text(folder: Path) -> str:
    """The table."""
    runs = {study: complete(load(study.NAME, folder == SMOKE), folder) for study in STUDIES}
    made = [claim for study, rows in runs.items() if rows for claim in study.claims(rows)]
    if folder != SMOKE:
        made += warmup_study.claims(folder) + remedies_study.claims(folder)
    if rows := sharpness_study.finished(folder):
        made += sharpness_study.claims(rows)
    return overview(made)


def tables(folder: Path) -> str:
    """All that studies and benchmarks have written, each under its name."""
    return "\n\n".join(f"# {path.stem}\n\n{path.read_text().strip()}" for path in sorted(folder.glob("*.md")))


def put(page: str, made: str) -> str:
    """The page with the table between the markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have the markers {BEGIN.strip()} and {END}, once each")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    parser.add_argument("--smoke", action="store_true", help="from runs/studies-smoke")
    parser.add_argument("--all", action="store_true", help="and the tables of every study and benchmark")
    args = parser.parse_args()
    folder = SMOKE if args.smoke else reporting.RESULTS
    made = text(folder)
    print(made)
    if args.all:
        print(f"\n{tables(folder)}")
    if args.write:
        README.write_text(put(README.read_text(), made))


if __name__ == "__main__":
    main()
