"""What watching the sharpness costs a training: recipes/tiny/gpt.yaml with and without it.

    python recipes/studies/bench_watching.py

They take turns, in every other round the other way round. Writes results/bench_watching.csv (a row per run) and
results/bench_watching.md.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from bench_throughput import measure
from reporting import RESULTS, conditions, current_commit, torch_threads, write

WAYS = {
    "not watched": [],
    "critical, every 10 steps": ["--sharpness_every=10"],
    "preconditioned, every 100 steps": ["--sharpness_every=100", "--sharpness_kind=preconditioned"],
}


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way in every round."""
    made = []
    progress = tqdm(total=len(WAYS) * args.rounds)
    for number in range(args.rounds):
        for way in list(WAYS) if number % 2 else reversed(WAYS):
            options = argparse.Namespace(recipe_options=[*args.recipe_options, *WAYS[way]], skip=args.skip)
            made.append({"round": number, **measure("recipe", "tiny", args.steps, options), "way": way})
            progress.update()
    progress.close()
    return made


def table(made: list[dict[str, Any]]) -> str:
    """A line per way: medians over the rounds; ratios are of runs of the same round."""
    lines = []
    for way in WAYS:
        chosen, plain = ([row for row in made if row["way"] == name] for name in (way, "not watched"))
        chosen, plain = (sorted(runs, key=lambda row: row["round"]) for runs in (chosen, plain))
        ratios = [
            row["step CPU seconds"] / other["step CPU seconds"] for row, other in zip(chosen, plain, strict=True)
        ]
        seconds = [row["step seconds"] / other["step seconds"] for row, other in zip(chosen, plain, strict=True)]
        lines.append(
            {
                "sharpness": way,
                "step, ms": f"{1000 * statistics.median(row['step seconds'] for row in chosen):.1f}",
                "CPU time of a step": f"{statistics.median(ratios):.3f}",
                "CPU, lowest to highest": f"{min(ratios):.3f} to {max(ratios):.3f}",
                "time of a step": f"{statistics.median(seconds):.3f}",
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def explanation(made: list[dict[str, Any]], args: argparse.Namespace, commit: str) -> str:
    """How the table was made."""
    return f"""\
GPT-2 of {made[0]["parameters"] / 1e6:.2f}M parameters, {made[0]["tokens per step"]:,} tokens per step, \
{args.steps} steps of `recipes/tiny/gpt.yaml` without evaluations; {args.rounds} rounds of a run of each. Without the \
first {args.skip} steps, in which the first measurement looks for where to begin. Times are in steps that are not \
watched, measurements included: medians of the ratios to the run of the same round. CPU time is that of all threads; \
other processes of a machine disturb it less.

{conditions(["torch", "transformers"], commit)} `{args.command}`
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--skip", type=int, default=10, help="steps at the start of a run that are left out")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("recipe_options", nargs="*", help="options for the recipe in all ways, behind --")
    args = parser.parse_args(argv)
    typed = sys.argv[1:] if argv is None else argv
    args.command = " ".join(["python recipes/studies/bench_watching.py", *typed])
    commit = current_commit()
    with torch_threads(args.threads):
        made = rows(args)
        text = f"{table(made)}\n\n{explanation(made, args, commit)}"
    write(args.out, "bench_watching", made, text)


if __name__ == "__main__":
    main()
