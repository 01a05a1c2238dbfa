"""Sharpness along training: what warmup does to λ, and whether that was known before.

    python recipes/studies/sharpness_study.py            # what is missing, then the tables and the plots
    python recipes/studies/sharpness_study.py --table    # these from results/sharpness_study.csv alone

Two parts, which `--parts` chooses among:

* `warmup`: the small GPT trained with constant η after linear warmup over T_wrm steps: λ against the threshold of
  stability, from two initializations.
* `diagnose`: whether `hf_warmup.sharpness.diagnose` knew before these trainings, and what it costs.

A line of the CSV is a measurement. Those of a run are written together, and a run that is there is not made again.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from hf_warmup.sharpness import Sharpness, adam_preconditioner, diagnose, sharpness, stability_threshold

import figures
from evidence import (
    Claim,
    Row,
    claims_table,
    difference,
    factor_claim,
    groups,
    select,
    spread,
    table,
)
from grid import SMALL, SMOKE, Line, appending, lines, made_with, results
from reporting import RESULTS, conditions, current_commit, torch_threads
from warmup_cases import A, Setting, evaluate, losses, make_model, make_optimizer

NAME = "sharpness_study"
EARLY = (0, 1, 2, 5)  # measured besides every tenth step, as λ changes most there
DENSE, EVERY = 100, 10  # steps; behind the first ones a third as often
NUMBERS = (
    *("beta2", "target_lr", "warmup_steps", "seed", "step", "lr", "loss", "sharpness", "threshold", "held_out_loss"),
    *("before", "after", "training_steps"),
)
# Of all parts together; what a part does not know is left empty.
COLUMNS = ("run", "part", "optimizer", "init", *NUMBERS, "needs_warmup", "regime", "conditions")


class Case(NamedTuple):
    """What is trained from where, and how long warmup takes."""

    optimizer: str
    init: str  # standard or flat
    target: float
    warmups: tuple[int, ...]
    part: float = 1.0  # of the steps: λ^H has come to its threshold early

    @property
    def names(self) -> dict[str, str]:
        """What tells it from the others."""
        return {"optimizer": self.optimizer, "init": self.init}


CASES = (
    Case("AdamW", "standard", 1e-2, (1, 30, 100)),
    Case("GIAdamW", "standard", 1e-2, (1, 30, 100)),
    Case("AdamW", "flat", 1e-2, (1, 100)),
    Case("SGD", "standard", 0.5, (1, 100), 0.5),
    Case("SGD", "flat", 0.5, (1, 100), 0.5),
)


class Run(NamedTuple):
    """A name, and what gives its rows."""

    name: str
    make: Callable[[], list[Row]]


def runs(part: str, smoke: bool) -> list[Run]:
    """The runs of a part."""
    setting, seeds = (replace(A, **SMALL), range(1)) if smoke else (A, range(3))
    made = []
    for case, seed in itertools.product(CASES, seeds):
        name = f"{case.optimizer} {case.init}"
        if part == "diagnose":
            made.append(Run(f"diagnose {name} {seed}", partial(foretell, case, setting, seed)))
        else:
            made += [Run(f"warmup {name} {t} {seed}", partial(train, case, t, setting, seed)) for t in case.warmups]
    return made


PARTS = ("warmup", "diagnose")


def measure(optimizer: Optimizer, loss_fn: Callable[[], Tensor], **options: Any) -> Sharpness:
    """λ^H for SGD, λ^(P⁻¹H) for the others, whose gradients must be there."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    plain = isinstance(optimizer, torch.optim.SGD)
    return sharpness(loss_fn, params, preconditioner=None if plain else adam_preconditioner(optimizer), **options)


def start(case: Case, setting: Setting, seed: int) -> tuple[nn.Module, Optimizer, Iterable[Callable[[], Tensor]]]:
    """Model, optimizer and batches: the same for every T_wrm."""
    torch.manual_seed(seed)
    model = make_model(setting)
    if case.init == "flat":
        with torch.no_grad():
            # A norm follows: its gain falls with the size of what it norms.
            model.transformer.wte.weight.mul_(10)
            model.transformer.wpe.weight.mul_(10)
            # The output layer is `wte` too. This makes the logits as small as before.
            model.transformer.ln_f.weight.mul_(0.1)
    model.train()
    return model, make_optimizer(case.optimizer, setting, model), losses(setting, model, False, seed)


def train(case: Case, warmup_steps: int, setting: Setting, seed: int) -> list[Row]:
    """Linear warmup to a constant learning rate: a row per measurement."""
    model, optimizer, batches = start(case, setting, seed)
    steps = max(1, round(case.part * setting.steps))
    wanted = {*EARLY, warmup_steps, steps - 1, *range(0, DENSE, EVERY), *range(DENSE, steps, 3 * EVERY)}
    named = {"part": "warmup", **case.names, "beta2": setting.beta2}
    named |= {"target_lr": case.target, "warmup_steps": warmup_steps, "seed": seed}
    rows: list[Row] = []
    vector = None
    for step, loss_fn in zip(range(steps), batches, strict=False):
        lr = case.target * min(1.0, (step + 1) / warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        if step in wanted:
            found = measure(optimizer, loss_fn, tol=0.1, max_hvps=20, start=vector)
            vector = found.vector
            edge = stability_threshold(optimizer)
            row = {**named, "step": step, "lr": lr, "loss": loss.item()}
            rows.append({**row, "sharpness": found.value, "threshold": edge})
        optimizer.step()
    rows[-1]["held_out_loss"] = evaluate(setting, model)
    return rows


def step_seconds(case: Case, setting: Setting, seed: int) -> float:
    """CPU time of a training step, the median of twenty."""
    _, optimizer, batches = start(case, setting, seed)
    for group in optimizer.param_groups:
        group["lr"] = case.target / case.warmups[-1]
    seconds = []
    for _, loss_fn in zip(range(20), batches, strict=False):
        begin = time.process_time()
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def foretell(case: Case, setting: Setting, seed: int) -> list[Row]:
    """What `diagnose` says before training, and what it costs."""
    model, optimizer, batches = start(case, setting, seed)
    loss_fns = list(itertools.islice(batches, 6))
    begin = time.process_time()
    told = diagnose(optimizer, loss_fns, case.target, module=model)
    seconds = time.process_time() - begin
    row = {"part": "diagnose", **case.names, "beta2": setting.beta2, "target_lr": case.target, "seed": seed}
    row |= {"sharpness": told.sharpness, "threshold": told.sharpness / told.stability_ratio}
    row |= {"before": told.before, "after": told.after, "needs_warmup": told.needs_warmup, "regime": told.regime}
    return [row | {"training_steps": seconds / step_seconds(case, setting, seed)}]


def geometric(values: Iterable[float]) -> float:
    """NaN as soon as one has no logarithm."""
    values = list(values)
    return math.exp(statistics.mean(map(math.log, values))) if min(values) > 0 else math.nan


def by_seed(rows: list[Row]) -> list[list[Row]]:
    """The rows of every seed."""
    return [of for _, of in sorted(groups(rows, lambda row: row["seed"]).items())]


def make(run: Run, conditions: str) -> list[Line]:
    """Its lines of the CSV."""
    torch.set_num_threads(1)
    made = [{"run": run.name, **row, "conditions": conditions} for row in run.make()]
    return [{column: _shown(row.get(column, "")) for column in COLUMNS} for row in made]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finished(folder: Path) -> list[Row]:
    """The rows of the CSV, numbers as numbers, without the columns that their part does not know."""
    made = lines(folder, NAME, ("run", "optimizer", "beta2", "step")).values()
    known = ({k: v for k, v in line.items() if v != ""} for line in made)
    return [{k: float(v) if k in NUMBERS else v for k, v in line.items()} for line in known]


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper and others say, against the rows."""
    made = []

    def claim(
        text: str, where: str, source: str, values: list[float], low: float = 0.0, high: float = math.inf
    ) -> None:
        made.append(factor_claim(text, where, source, NAME, values, low, high))

    for init, regime, low, high in (
        ("standard", "sharpness reduction", 0.0, 1 / 1.25),
        ("flat", "progressive sharpening", 1.25, math.inf),
    ):
        told = select(rows, part="diagnose", optimizer="SGD", init=init)
        text = f"From a {init} initialization SGD begins with {regime}: λ^H changes by more than a quarter"
        claim(text, "GPT", "paper", [row["after"] / row["before"] for row in told], low, high)
    for case in CASES:
        shortest, longest = (
            [geometric(later(run)) for run in by_seed(select(rows, part="warmup", warmup_steps=steps, **case.names))]
            for steps in (case.warmups[0], case.warmups[-1])
        )
        text = f"With warmup over {case.warmups[-1]} steps λ is lower against its threshold than without, in the mean"
        ratios = [long / short for long, short in zip(longest, shortest, strict=True)]
        claim(text, f"GPT, {case.optimizer}, {case.init} initialization", "paper", ratios, high=1.0)
    return made


def later(run: list[Row]) -> list[float]:
    """λ over the threshold from step 5 on, or of the last measurement."""
    return [row["sharpness"] / row["threshold"] for row in run if row["step"] >= 5 or row is run[-1]]


def warmup_table(rows: list[Row]) -> str:
    """A line per case and warmup: means over the seeds, of λ geometric."""
    made = []
    for case, steps in ((c, steps) for c in CASES for steps in c.warmups):
        runs = by_seed(select(rows, warmup_steps=steps, **case.names))

        def at(step: float, runs: list[list[Row]] = runs) -> str:
            """Of the first measurement from there on, or the last."""
            found = (next((row for row in run if row["step"] >= step), run[-1]) for run in runs)
            return f"{geometric(row['sharpness'] for row in found):.2g}"

        ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in runs]
        made.append(
            {
                "optimizer": case.optimizer,
                "init": case.init,
                "η_trgt": f"{case.target:g}",
                "T_wrm": steps,
                "held-out loss": spread((run[-1]["held_out_loss"] for run in runs), digits=2),
                "λ at the start": at(0),
                "after 5 steps": at(5),
                "after warmup": at(steps),
                "at the end": at(math.inf),
                "λ over threshold, first step": f"{geometric(run[0] for run in ratios):.2g}",
                "most from step 5 on": f"{geometric(max(later(run)) for run in runs):.2g}",
                "above 1": f"{statistics.mean(v > 1 for run in ratios for v in run):.0%}",
            }
        )
    return table(made)


def diagnose_table(rows: list[Row]) -> str:
    """A line per case: what was said, and what happened."""
    made = []
    for case in CASES:
        told = select(rows, part="diagnose", **case.names)
        shortest, longest = (
            {run[0]["seed"]: run[-1]["held_out_loss"] for run in by_seed(of)}
            for of in (
                select(rows, part="warmup", warmup_steps=t, **case.names)
                for t in case.warmups[:: len(case.warmups) - 1]
            )
        )
        made.append(
            {
                "optimizer": case.optimizer,
                "init": case.init,
                "stability ratio": f"{geometric(row['sharpness'] / row['threshold'] for row in told):.2g}",
                "needs_warmup": counted(row["needs_warmup"] for row in told),
                "loss, T_wrm = 1 less longest": spread(difference(shortest, longest), digits=2),
                "λ": f"{geometric(row['sharpness'] for row in told):.2g}",
                "with the later P": f"{geometric(row['before'] for row in told):.2g}",
                "and after training": f"{geometric(row['after'] for row in told):.2g}",
                "regime": counted(row["regime"] for row in told),
                "CPU time, training steps": f"{statistics.median(row['training_steps'] for row in told):.0f}",
            }
        )
    return table(made)


def counted(values: Iterable[str]) -> str:
    """Each value with how often it comes."""
    values = list(values)
    return ", ".join(f"{value} ({values.count(value)})" for value in dict.fromkeys(values))


def warmup_figure(rows: list[Row]) -> Figure:
    """Loss of the step and λ over its threshold: a row per case, a colour per warmup, its seeds' range shaded."""
    figure = figures.new(2.2 * len(CASES))
    for axes, case in zip(figure.subplots(len(CASES), 2, squeeze=False), CASES, strict=True):
        for color, warmup in zip(figures.CYCLE, case.warmups, strict=False):
            measured = list(zip(*by_seed(select(rows, warmup_steps=warmup, **case.names)), strict=True))
            steps = [of[0]["step"] for of in measured]
            losses = [[row["loss"] for row in of] for of in measured]
            ratios = [[row["sharpness"] / row["threshold"] for row in of] for of in measured]
            for panel, values in zip(axes, (losses, ratios), strict=True):
                panel.plot(steps, list(map(geometric, values)), color=color, linewidth=1, label=f"T_wrm = {warmup}")
                panel.fill_between(steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15)
        axes[1].axhline(1.0, color="black", linestyle=":")
        axes[1].set(yscale="log", ylabel="λ over its threshold")
        axes[0].set_ylabel("training loss")
        axes[0].set_title(f"{case.optimizer}, {case.init} initialization", fontsize=9)
        axes[1].legend(fontsize=7)
    for panel in axes:
        panel.set_xlabel("optimizer step")
    return figure


HOW_WARMUP = f"""\
The GPT of 4 layers, d = 64, on bytes of Shakespeare, 300 steps of 1,024 tokens (SGD half as many); β = (0.9, 0.999), \
no weight decay; constant η after warmup. λ is λ^(P⁻¹H) of AdamW and GIAdamW and λ^H of SGD, on the step's own batch, \
before steps 1, 2, 3, 6, every {EVERY} to {DENSE}, then every {3 * EVERY}; residual 10% or 20 products.

* Init: `standard` is GPT-2's; `flat` has embeddings 10 times as large, which are normed at once, and the gain of the \
last norm 0.1, so that the logits are as small.
* λ: geometric means; after warmup is before the step T_wrm + 1. Above 1: the part of all measurements in which λ is \
above `stability_threshold`."""

HOW_DIAGNOSE = """\
`hf_warmup.sharpness.diagnose` before the run, on its first batches. The numbers in brackets count seeds. Whether \
`needs_warmup` is true, the held-out losses say. Of AdamW and GIAdamW most of the fall of λ is P's: `with the later \
P` is λ at the start with the P of a few steps later, `and after training` is λ after these steps, at a stable \
learning rate; `regime` compares these two."""


def report(rows: list[Row]) -> str:
    """The page, of the parts that there are."""
    of = groups(rows, lambda row: row["part"])
    texts = []
    if warmed := of.get("warmup"):
        texts.append(f"## Warmup\n\n{warmup_table(warmed)}\n\n{HOW_WARMUP}\n\n![loss, λ](sharpness_warmup.png)")
        if told := of.get("diagnose"):
            texts.append(f"## What diagnose said\n\n{diagnose_table(warmed + told)}\n\n{HOW_DIAGNOSE}")
    if of.keys() >= {*PARTS}:
        texts.append(f"## Claims\n\n{claims_table(claims(rows))}")
    seeds = "Mean ± standard deviation over seeds 0 to 2, of factors geometric."
    return "\n\n".join([*texts, f"{seeds} {made_with(rows)}. `python recipes/studies/{NAME}.py`\n"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true", help="one seed of small sizes, to runs/studies-smoke")
    parser.add_argument("--table", action="store_true", help="make no runs")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)
    folder = args.out or (SMOKE if args.smoke else RESULTS)
    if not args.table:
        with torch_threads(1):
            how = conditions(["torch", "transformers"], current_commit())
            with appending(folder / f"{NAME}.csv", COLUMNS) as write:
                done = {row["run"] for row in finished(folder)}
                todo = [run for part in args.parts for run in runs(part, args.smoke) if run.name not in done]
                for made in tqdm(results(partial(make, conditions=how), todo, args.processes), total=len(todo)):
                    write(*made)
    rows = finished(folder)
    of = groups(rows, lambda row: row["part"])
    if "warmup" in of:
        warmup_figure(of["warmup"]).savefig(folder / "sharpness_warmup.png", dpi=120)
    (folder / f"{NAME}.md").write_text(report(rows))
    print(folder / f"{NAME}.md")


if __name__ == "__main__":
    main()
