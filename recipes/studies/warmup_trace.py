"""The critical learning rate along the run, with guided warmup and with warmup that is too short.

    python recipes/studies/warmup_trace.py

A staircase as in `hf_warmup.guided` measures η_c every 3 steps without acting on it; all trials are of the step's
own batch. Writes results/warmup_trace.csv
and results/warmup_trace.png: geometric means over the seeds.
"""

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from hf_warmup import GuidedWarmup

from warmup_cases import LossAt, Rule, train
from warmup_rules import RULES
from warmup_study import GPT, SEEDS

RESULTS = Path(__file__).parent / "results"
RUNS = (("guided", 0.16, {}), ("linear", 0.02, {"fraction": 0.3}), ("linear", 0.02, {"fraction": 0.05}))


class Observed:
    """A rule, with the critical learning rate of every step beside it."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.rows = rule, []
        self.meter = GuidedWarmup(1e9, GPT.steps, every=3, until="end")

    def begin(self, *begun: Any) -> None:
        """What the rule wants to know."""
        if hasattr(self.rule, "begin"):
            self.rule.begin(*begun)

    def __call__(self, step: int, loss_at: LossAt) -> float | None:
        """η of the rule."""
        # From step 100 on the meter would try ever more rarely.
        self.meter.next_trial = min(self.meter.next_trial, step + 2 - (step - 1) % 3)
        self.meter.step(loss_at)
        lr = self.rule(step, loss_at)
        self.rows.append({"step": step, "lr": lr, "critical_lr": self.meter.critical_lr, "loss": loss_at(0.0)})
        return lr


def trace(rule: str, target: float, options: dict, seed: int) -> list[dict]:
    """One run, a row per step."""
    observed = Observed(RULES[rule](GPT, "AdamW", target, **options))
    train(GPT, "AdamW", observed, seed)
    name = "guided" if rule == "guided" else f"linear over {options['fraction']:.0%}"
    return [{"warmup": name, "target": target, "seed": seed, **row} for row in observed.rows]


def plot(rows: list[dict]) -> None:
    names = list(dict.fromkeys((row["warmup"], row["target"]) for row in rows))
    figure = Figure(figsize=(3.4 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, sharey="row", height_ratios=(2, 1))
    for column, (name, target) in enumerate(names):
        chosen = [row for row in rows if row["warmup"] == name and row["target"] == target]
        steps = sorted({row["step"] for row in chosen})

        def mean(key: str, chosen: list[dict] = chosen, steps: list[int] = steps) -> list[float]:
            at = {step: [math.log(row[key]) for row in chosen if row["step"] == step] for step in steps}
            return [math.exp(statistics.mean(at[step])) for step in steps]

        axes[0][column].plot(steps, mean("critical_lr"), label="critical learning rate")
        axes[0][column].plot(steps, mean("lr"), label="learning rate")
        axes[0][column].set(yscale="log", title=f"{name}, η_trgt = {target:g}")
        axes[1][column].plot(steps, mean("loss"), color="black")
        axes[1][column].set(xlabel="optimizer step")
    axes[0][0].set_ylabel("learning rate")
    axes[1][0].set_ylabel("training loss")
    axes[0][0].legend()
    figure.savefig(RESULTS / "warmup_trace.png", dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for rule, target, options in RUNS for seed in SEEDS for row in trace(rule, target, options, seed)]
    with open(RESULTS / "warmup_trace.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    plot(rows)


if __name__ == "__main__":
    main()
