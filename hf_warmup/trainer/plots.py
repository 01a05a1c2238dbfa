"""Plots of runs: learning rate and loss against the optimizer step, and the search for η_c."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]


def run_figure(history: History) -> Figure:
    """Learning rate and loss of one run; with the critical learning rates, or the search, that were.

    Args:
        history: The trainer's log history.

    Returns:
        The figure.
    """
    evals: list[Any] = next((e["warmup/evals"] for e in reversed(history) if "warmup/evals" in e), [])
    search = sorted((lr, loss) for lr, loss in evals if lr > 0 and loss is not None)
    figure = Figure(figsize=(7, 7 if len(search) > 1 else 5), layout="constrained")
    if len(search) > 1:
        subfigures: Any = figure.subfigures(2, height_ratios=(5, 2))
        runs, below = subfigures
        axes = below.subplots()
        before, least = evals[0][1], min(loss for _, loss in search)
        drop = before - least
        if drop > 0:  # trials far too high would hide where the curve crosses
            search = [(lr, loss) for lr, loss in search if loss <= before + 2 * drop] or search
        axes.plot(*zip(*search, strict=True), "o-", markersize=4)
        axes.axhline(before, color="gray", linestyle=":", label="before the first step")
        axes.set(xscale="log", xlabel="learning rate of the first step", ylabel="loss after it")
        axes.legend()
    else:
        runs = figure
    upper, lower = runs.subplots(2, sharex=True)
    _curve(upper, history, "learning_rate", "-", label="learning rate")
    if sum("warmup/critical_lr" in e for e in history) > 1:
        _curve(upper, history, "warmup/critical_lr", ".", label="critical learning rate")
        upper.set_yscale("log")
        upper.legend()
    _curve(lower, history, "loss", "-", label="training")
    _curve(lower, history, "eval_loss", "o", label="validation")
    _name(upper, lower)
    return figure


def runs_figure(histories: Mapping[str, History]) -> Figure:
    """Learning rate and loss of several runs: training loss thin, validation loss with dots.

    Args:
        histories: Log histories by the names of their runs.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    for i, (name, history) in enumerate(histories.items()):
        color = f"C{i}"
        _curve(upper, history, "learning_rate", "-", label=name, color=color)
        _curve(lower, history, "loss", "-", color=color, linewidth=0.6, alpha=0.6)
        _curve(lower, history, "eval_loss", "o-", label=f"{name}, validation", color=color)
    _name(upper, lower)
    if upper.lines:
        upper.legend()
    return figure


def _curve(axes: Any, history: History, key: str, style: str, **options: Any) -> None:
    points = [(e["step"], e[key]) for e in history if key in e]
    if points:
        axes.plot(*zip(*points, strict=True), style, markersize=4, **options)


def _name(upper: Any, lower: Any) -> None:
    upper.set_ylabel("learning rate")
    lower.set(ylabel="loss", xlabel="optimizer step")
    if lower.get_legend_handles_labels()[0]:
        lower.legend()
