"""Guided warmup against tuned linear warmup and what else needs no tuning, on settings that did not choose its rule.

    python recipes/studies/warmup_study.py            # every part that is not finished, then the tables
    python recipes/studies/warmup_study.py gpt random # these parts
    python recipes/studies/warmup_study.py --table    # the tables and the plot from the CSVs alone

A run that is in results/warmup_<part>.csv is not repeated. Parts: `gpt` and `gi` (AdamW and GI-Adam on a GPT),
`bert`, `long` (5 times the steps), `short` (fewer steps: how many reach the loss of tuned linear warmup), `random`
(200 random settings: which runs fail).
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from warmup_cases import Setting, train, unigram_entropy
from warmup_rules import RULES

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
UNTUNED = ("sqrt(1-b2^t)", "untuned linear", "untuned exponential", "ramp", "guided")

GPT = Setting("GPT", text="code", width=48, depth=2, beta2=0.95, weight_decay=0.1, clip=1.0)
BERT = Setting(
    "BERT",
    family="bert",
    text="code",
    width=48,
    depth=3,
    context=32,
    batch=32,
    beta2=0.98,
    weight_decay=0.01,
    clip=1.0,
    dropout=0.1,
    steps=600,
)
LONG = replace(GPT, name="long", steps=5 * GPT.steps)


class Job(NamedTuple):
    """A run."""

    setting: Setting
    optimizer: str
    rule: str
    options: dict[str, Any]
    target: float
    seed: int

    def key(self) -> tuple[str, ...]:
        """What tells it from the others in a CSV."""
        different = {k: v for k, v in asdict(self.setting).items() if v != getattr(Setting(self.setting.name), k)}
        return (
            json.dumps(different),
            self.optimizer,
            self.rule,
            json.dumps(self.options),
            f"{self.target:.6g}",
            str(self.seed),
        )


KEYS = ("setting", "optimizer", "rule", "options", "target", "seed")


def targets(first: float, count: int) -> list[float]:
    """Each twice the last."""
    return [first * 2**i for i in range(count)]


def grid(setting: Setting, optimizer: str, rules: dict[str, list[dict]], lrs: list[float]) -> Iterator[Job]:
    for seed in SEEDS:
        for rule, options in rules.items():
            for target in lrs:
                for chosen in options:
                    yield Job(setting, optimizer, rule, chosen, target, seed)


def jobs(part: str) -> Iterator[Job]:
    """The runs of a part."""
    tuned = {"linear": [{"fraction": f} for f in FRACTIONS]}
    if part == "gpt":
        lrs = targets(1.25e-3, 8)
        yield from grid(GPT, "AdamW", {"guided": [{}], **tuned} | {rule: [{}] for rule in UNTUNED}, lrs)
        yield from grid(GPT, "AdamW", {"guided": [{"until": "end"}], "persistent": [{}]}, lrs)
        yield from grid(GPT, "AdamW", {"ramp": [{"growth": g} for g in (1.03, 1.1)]}, lrs)
        yield from grid(GPT, "RAdam", {"linear": [{}]}, lrs)
    if part == "gi":
        yield from grid(GPT, "GIAdamW", {"guided": [{}], "ramp": [{}], **tuned}, targets(1.25e-3, 8))
    if part == "bert":
        tuned = {"linear": [{"fraction": f} for f in (0.0, 0.05, 0.1, 0.3)]}
        lrs = targets(5e-4, 8)
        yield from grid(BERT, "AdamW", {"guided": [{}], "ramp": [{}], **tuned}, lrs)
        yield from grid(BERT, "RAdam", {"linear": [{}]}, lrs)
    if part == "long":
        tuned = {"linear": [{"fraction": f} for f in (0.02, 0.1, 0.3)]}
        lrs = [2.5e-3, 5e-3, 1e-2, 4e-2]
        yield from grid(LONG, "AdamW", {"guided": [{}], "ramp": [{}], **tuned}, lrs)
    if part == "short":
        for steps in (180, 210, 240, 270):
            yield from grid(replace(GPT, name="short", steps=steps), "AdamW", {"guided": [{}]}, [1e-2, 2e-2])
    if part == "random":
        generator = torch.Generator().manual_seed(2026)

        def pick(values: tuple) -> Any:
            return values[int(torch.randint(len(values), (), generator=generator))]

        for seed in range(200):
            setting = Setting(
                "random",
                text=pick(("shakespeare", "code")),
                width=pick((32, 48, 64)),
                depth=pick((1, 2, 4, 6)),
                context=32,
                steps=200,
                beta2=pick((0.95, 0.98, 0.999)),
                weight_decay=pick((0.0, 0.1)),
                clip=pick((0.0, 1.0)),
                init_scale=pick((0.5, 1.0, 4.0)),
            )
            target = 10 ** (-4 + 4 * float(torch.rand((), generator=generator)))
            for optimizer, rule, options in (
                ("AdamW", "guided", {}),
                ("AdamW", "linear", {"fraction": 0.1}),
                ("AdamW", "linear", {"fraction": 0.0}),
                ("RAdam", "linear", {"fraction": 0.0}),
            ):
                yield Job(setting, optimizer, rule, options, target, seed)


PARTS = ("gpt", "random", "gi", "long", "short", "bert")


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    rule = RULES[job.rule](job.setting, job.optimizer, job.target, **job.options)
    made = train(job.setting, job.optimizer, rule, job.seed)
    numbers = {k: f"{v:.6g}" for k, v in made.items()}
    return dict(zip(KEYS, job.key(), strict=True)) | numbers | {"entropy": f"{unigram_entropy(job.setting):.6g}"}


def read(part: str) -> list[dict[str, str]]:
    path = RESULTS / f"warmup_{part}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finish(part: str, processes: int) -> None:
    """Make the runs that are missing."""
    done = {tuple(row[key] for key in KEYS) for row in read(part)}
    missing = list({job.key(): job for job in jobs(part) if job.key() not in done}.values())
    if not missing:
        return
    path = RESULTS / f"warmup_{part}.csv"
    # Threads that wait for work by spinning would slow down the other processes.
    with get_context("spawn").Pool(processes) as pool, open(path, "a", newline="") as file:
        for row in tqdm(pool.imap_unordered(run, missing), total=len(missing), desc=part):
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for part in args.parts:
        finish(part, args.processes)


if __name__ == "__main__":
    main()
