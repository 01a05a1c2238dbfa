"""One run of guided warmup, step by step: the picture of hf_warmup/README.md.

    python recipes/studies/guided_run.py

The GPT of grids/warmup_gpt.yml, AdamW, `auto_lr`, seed 10. Writes results/guided_run.png.
"""

from typing import Any, cast

import torch
from matplotlib.figure import Figure

from hf_warmup import GuidedWarmup

import grid
import reporting
from warmup_cases import LossAt, train
from warmup_rules import Ruled, guided

GPT = grid.load("warmup_gpt").jobs[0].setting


class Observed(Ruled):
    """The rule, with what it knew in each step beside it."""

    def __init__(self) -> None:
        self.guided = cast(GuidedWarmup, guided(GPT, "AdamW", 1.0, auto_lr=True).rule)
        super().__init__(GPT, self.guided)
        self.rows: list[dict[str, float]] = []

    def __call__(self, step: int, loss_at: LossAt) -> float:
        """η of the step."""
        lr, guided = super().__call__(step, loss_at), self.guided
        expected = guided.expected_peak / guided.PEAK if guided.valley_step is None else guided.valley_path
        self.rows.append({"lr": lr, "path": guided.path, "expected": expected, "loss": loss_at(0.0)})
        return lr


def plot(observed: Observed) -> Figure:
    """Learning rate, path and loss against the step."""
    rows, guided = observed.rows, observed.guided
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, middle, lower = figure.subplots(3, sharex=True, height_ratios=(3, 3, 2))
    steps = range(len(rows))
    upper.plot(steps, [row["lr"] for row in rows])
    upper.set_ylabel("learning rate η")
    end = guided.num_steps
    middle.plot(range(1, end), [row["expected"] for row in rows[1:end]], label="Ŝ: expected length of the way")
    middle.plot(range(end), [row["path"] for row in rows[:end]], label="s: way made so far")
    middle.set(yscale="log", ylabel="sum of learning rates")
    lower.plot(steps, [row["loss"] for row in rows], color="black", linewidth=0.8)
    lower.set(xlabel="optimizer step", ylabel="training loss")
    for axes in (upper, middle, lower):
        axes.axvline(guided.valley_step, color="C3", linestyle=":", label="valley")
        axes.axvline(end - 1, color="C2", linestyle="--", label="peak")
    middle.legend(loc="lower right")
    return figure


def main() -> None:
    torch.set_num_threads(1)
    observed = Observed()
    made: dict[str, Any] = train(GPT, "AdamW", observed, 10)
    plot(observed).savefig(reporting.RESULTS / "guided_run.png", dpi=120, bbox_inches="tight")
    print(f"valley in step {observed.guided.valley_step}, S = {observed.guided.valley_path:.3g}, {made}")


if __name__ == "__main__":
    main()
