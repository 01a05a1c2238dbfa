"""Plots of runs: learning rate and loss against the optimizer step, and the search for η_c."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from hf_warmup.trainer.report import SHARPNESS_NAMES, SharpnessKind, evaluation_prefix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]


def run_figure(history: History) -> "Figure":
    """Learning rate and loss of one run; with the critical learning rates, or the search, that were.

    Args:
        history: The trainer's log history.

    Returns:
        The figure.
    """
    evals: list[Any] = next((e["warmup/evals"] for e in reversed(history) if "warmup/evals" in e), [])
    search = sorted((lr, loss) for lr, loss in evals if lr > 0 and loss is not None)
    kind = next((k for k in get_args(SharpnessKind) if any(f"sharpness/{k}" in e for e in history)), None)
    rows = 2 + (kind is not None)
    heights = [2.5 * rows] + [2.0] * (len(search) > 1)
    figure = _new_figure(sum(heights))
    runs: Any = figure
    if len(search) > 1:
        runs, below = cast(Any, figure.subfigures(2, height_ratios=heights))
        _draw_search(below.subplots(), search, evals[0][1])
    upper, lower, *others = runs.subplots(rows, sharex=True)
    _curve(upper, history, "learning_rate", "-", label="learning rate")
    if sum("warmup/critical_lr" in e for e in history) > 1:
        _curve(upper, history, "warmup/critical_lr", ".", label="critical learning rate")
        upper.set_yscale("log")
        upper.legend()
    _curve(lower, history, "loss", "-", label="training")
    for key in dict.fromkeys(f"{prefix}_loss" for e in history if (prefix := evaluation_prefix(e)) is not None):
        # `$` would begin a formula.
        label = "validation" if key == "eval_loss" else key.removeprefix("eval_").replace("$", r"\$")
        _curve(lower, history, key, "o", label=label)
    _name(upper, lower)
    for axes in others:
        assert kind is not None
        lower.set_xlabel("")
        _curve(axes, history, f"sharpness/{kind}", ".-", label=SHARPNESS_NAMES[kind])
        if kind == "critical":  # against the learning rate of every step
            edge = [{"step": e["step"], "edge": 2 / e["learning_rate"]} for e in history if e.get("learning_rate")]
            _curve(axes, edge, "edge", "k:", label="2/η")
        else:
            _curve(axes, history, "sharpness/threshold", "k:", label="threshold of stability")
        axes.set(yscale="log", ylabel="sharpness", xlabel="optimizer step")
        axes.legend()
    return figure


def _new_figure(height: float) -> "Figure":
    # A tenth of the time that a process takes to start, and of many processes one draws.
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained")


def _draw_search(axes: Any, search: list[tuple[float, float]], before: float) -> None:
    drop = before - min(loss for _, loss in search)
    if drop > 0:  # trials far too high would hide where the curve crosses
        search = [(lr, loss) for lr, loss in search if loss <= before + 2 * drop] or search
    axes.plot(*zip(*search, strict=True), "o-", markersize=4)
    axes.axhline(before, color="gray", linestyle=":", label="before the first step")
    axes.set(xscale="log", xlabel="learning rate of the first step", ylabel="loss after it")
    axes.legend()


def runs_figure(histories: Mapping[str, History]) -> "Figure":
    """Learning rate and loss of several runs: training loss thin, validation loss with dots.

    Args:
        histories: Log histories by the names of their runs.

    Returns:
        The figure.
    """
    figure = _new_figure(6.0)
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
