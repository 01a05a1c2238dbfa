"""A published number, and guided warmup beside it: nanoGPT's shakespeare_char for a CPU, reported to end at 1.88.

    python recipes/studies/char_study.py --text tinyshakespeare.txt   # the runs that are missing, then the table
    python recipes/studies/char_study.py --table                      # the table from results/char_study.csv alone

Runs of recipes/char_gpt.yaml as it is, with guided warmup to its learning rate, and with `auto_lr`. Nothing
was chosen here. The text is Karpathy's, which is not ours to ship.
"""

import argparse
import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import evidence
import pretrain
import reporting
from evidence import difference, spread
from grid import appending, lines, results

RECIPES = Path(__file__).parents[1]
NAME = "char_study"
FOLDER = Path("runs/char-study")
SEEDS = (1, 2, 3)
WAYS = {
    "Trainer, linear over 100 steps to 1e-3": [],
    "guided to 1e-3": ["--warmup", "guided", "--warmup_steps", "0"],
    "auto_lr": ["--warmup", "guided", "--warmup_steps", "0", "--auto_lr"],
}
KEYS = ("way", "seed")


class Job(NamedTuple):
    """A run."""

    way: str
    seed: int


def run(job: Job, text: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = FOLDER / f"{list(WAYS).index(job.way)}-{job.seed}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    options = ["--text", text, "--seed", str(job.seed), "--output_dir", str(folder), "--overwrite"]
    options += ["--use_cpu", "--disable_tqdm", "true", *WAYS[job.way]]
    with open(folder.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            stopped = pretrain.run([str(RECIPES / "char_gpt.yaml"), *options])
    if stopped:  # by a signal
        raise SystemExit(stopped)
    report = json.loads((folder / "warmup.json").read_text())
    peak = max(entry["learning_rate"] for entry in report["log_history"] if "learning_rate" in entry)
    return {**job._asdict(), "loss": f"{report['final_eval_loss']:.5f}", "peak": f"{peak:.3g}"}


def table() -> str:
    """The loss of each way, and its difference from the recipe's, seed by seed."""
    losses: dict[str, evidence.Seeds] = {}
    peaks: dict[str, list[float]] = {}
    for row in lines(reporting.RESULTS, NAME, KEYS).values():
        losses.setdefault(row["way"], {})[int(row["seed"])] = float(row["loss"])
        peaks.setdefault(row["way"], []).append(float(row["peak"]))
    reference = losses[next(iter(WAYS))]
    rows = []
    for way in (way for way in WAYS if way in losses):
        row = {"warmup": way, "highest learning rate": f"{min(peaks[way]):.2g} to {max(peaks[way]):.2g}"}
        row |= {"loss": spread(losses[way].values()), "minus the Trainer's": ""}
        if losses[way] is not reference:
            row["minus the Trainer's"] = spread(difference(losses[way], reference), "+")
        rows.append(row)
    return evidence.table(rows)


def page() -> str:
    return (
        "# nanoGPT's shakespeare_char on a CPU, published: 1.88\n\n"
        "Loss in nats a character on the last tenth of Tiny Shakespeare, after 2,000 steps of 768 characters "
        f"(mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}).\n\n{table()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--text", help="the file tinyshakespeare.txt")
    parser.add_argument("--table", action="store_true", help="make no runs")
    args = parser.parse_args()
    if not args.table:
        if not args.text:
            parser.error("--text must name tinyshakespeare.txt")
        done = lines(reporting.RESULTS, NAME, KEYS)
        missing = [Job(way, seed) for seed in SEEDS for way in WAYS if (way, str(seed)) not in done]
        with appending(reporting.RESULTS / f"{NAME}.csv", (*KEYS, "loss", "peak")) as write:
            for line in tqdm(results(partial(run, text=args.text), missing, args.processes), total=len(missing)):
                write(line)
    (reporting.RESULTS / f"{NAME}.md").write_text(page())
    print(page())


if __name__ == "__main__":
    main()
