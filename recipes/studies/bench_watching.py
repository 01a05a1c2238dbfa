"""What watching the sharpness costs a training: recipes/tiny/gpt.yaml with and without it.

    python recipes/studies/bench_watching.py

They take turns, in every other round the other way round. Writes results/bench_watching.csv (a row per run) and
results/bench_watching.md.
"""

import argparse
import statistics
from typing import Any

from tqdm import tqdm

import evidence
import reporting
from bench_throughput import measure
from reporting import conditions, current_commit, parsed, ratios, torch_threads, write

WAYS = {
    "not watched": [],
    "critical, every 10 steps": ["--sharpness_every=10"],
    "preconditioned, every 100 steps": ["--sharpness_every=100", "--sharpness_kind=preconditioned"],
}


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way in every round."""
    made = []
    for number, way in tqdm(list(reporting.turns(WAYS, args.rounds))):
        options = argparse.Namespace(recipe_options=[*args.recipe_options, *WAYS[way]], skip=args.skip)
        made.append({"round": number, **measure("recipe", "tiny", args.steps, options), "way": way})
    return made


def table(made: list[dict[str, Any]]) -> str:
    """A line per way: medians over the rounds; ratios are of runs of the same round."""
    lines = []
    for way in WAYS:
        cpu, seconds = (ratios(made, way, "not watched", what) for what in ("step CPU seconds", "step seconds"))
        step = statistics.median(row["step seconds"] for row in made if row["way"] == way)
        lines.append(
            {
                "sharpness": way,
                "step, ms": f"{1000 * step:.1f}",
                "CPU time of a step": f"{statistics.median(cpu):.3f}",
                "CPU, lowest to highest": f"{min(cpu):.3f} to {max(cpu):.3f}",
                "time of a step": f"{statistics.median(seconds):.3f}",
            }
        )
    return evidence.table(lines)


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
    parser = reporting.parser(__doc__, rounds=5, steps=210)
    parser.add_argument("--skip", type=int, default=10, help="steps at the start of a run that are left out")
    parser.add_argument("recipe_options", nargs="*", help="options for the recipe in all ways, behind --")
    args = parsed(parser, argv, "bench_watching.py")
    commit = current_commit()
    with torch_threads(args.threads):
        made = rows(args)
        text = f"{table(made)}\n\n{explanation(made, args, commit)}"
    write(args.out, "bench_watching", made, text)


if __name__ == "__main__":
    main()
