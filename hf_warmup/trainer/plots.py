"""Plots of runs: learning rate and loss against the optimizer step, and the search for η_c."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from hf_warmup.trainer.report import evaluation_prefix, sharpness_kind
from hf_warmup.trainer.words import SHARPNESS_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]


def run_figure(history: History, title: str = "") -> "Figure":
    """Learning rate and loss of one run, with what warmup found marked; and the search for η_c, if there was one."""
    evals: list[Any] = next((e["warmup/evals"] for e in reversed(history) if "warmup/evals" in e), [])
    search = sorted((lr, loss) for lr, loss in evals if lr > 0 and loss is not None)
    kind = sharpness_kind(history)
    rows = 2 + (kind is not None)
    heights = [2.5 * rows] + [2.0] * (len(search) > 1)
    figure = new_figure(sum(heights))
    if title:
        figure.suptitle(_literal(title))
    runs: Any = figure
    if len(search) > 1:
        runs, below = cast(Any, figure.subfigures(2, height_ratios=heights))
        _draw_search(below.subplots(), search, evals[0][1])
    upper, lower, *others = runs.subplots(rows, sharex=True)
    _draw_lrs(upper, history)
    _mark(upper, history)
    _curve(lower, history, "loss", "-", label="training")
    for key in dict.fromkeys(f"{prefix}_loss" for e in history if (prefix := evaluation_prefix(e)) is not None):
        label = "validation" if key == "eval_loss" else _literal(key.removeprefix("eval_"))
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


def _literal(text: str) -> str:
    """`$` would begin a formula."""
    return text.replace("$", r"\$")


def _lrs(history: History) -> list[tuple[int, float]]:
    """Step and learning rate: those of warmup as the rule decided them, the others as they were logged."""
    noted = [(int(step), float(lr)) for e in history for step, lr in e.get("warmup/lrs", ())]
    steps = range(noted[0][0], noted[-1][0] + 1) if noted else ()
    # Logged is the learning rate of the step that comes next. A run that was resumed noted its second part.
    return sorted(
        noted + [(e["step"], e["learning_rate"]) for e in history if "learning_rate" in e and e["step"] not in steps]
    )


def _draw_lrs(axes: Any, history: History, **options: Any) -> None:
    if lrs := _lrs(history):
        axes.plot(*zip(*lrs, strict=True), marker="." if len(lrs) == 1 else "", **options)


def _mark(axes: Any, history: History) -> None:
    """What warmup found: where it started, η_c, the valley, its end."""
    starts = [e for e in history if "warmup/init_lr" in e]
    if not starts:
        return
    start, later = starts[-1], history[history.index(starts[-1]) :]
    axes.plot(
        start["step"], start["warmup/init_lr"], "o", color="black", markerfacecolor="none", label="start (η_init)"
    )
    rates = [lr for _, lr in _lrs(history)] or [0.0]
    critical = [(e["step"], e["warmup/critical_lr"]) for e in later if "warmup/critical_lr" in e]
    if len(critical) > 1:
        axes.plot(*zip(*critical, strict=True), "k.", label="critical learning rate (η_c)")
    elif critical and critical[0][1] <= 2 * max(rates):
        axes.axhline(critical[0][1], color="black", linestyle=":", label="critical learning rate (η_c) of step 1")
    # The valley may be the end.
    for key, style, size, label in (("valley_lr", "C3v", 10, "valley"), ("peak_lr", "C1s", 5, "end of warmup")):
        at = [(e["step"], e[f"warmup/{key}"]) for e in later if f"warmup/{key}" in e]
        if at:
            axes.plot(*zip(*at[-1:], strict=True), style, markersize=size, label=label)
    axes.legend()


def new_figure(height: float, width: float = 7.0) -> "Figure":
    """A figure to draw on, in inches."""
    # A tenth of the time that a process takes to start, and of many processes one draws.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib, or 'hf-warmup[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_search(axes: Any, search: list[tuple[float, float]], before: float) -> None:
    drop = before - min(loss for _, loss in search)
    if drop > 0:  # trials far too high would hide where the curve crosses
        search = [(lr, loss) for lr, loss in search if loss <= before + 2 * drop] or search
    axes.plot(*zip(*search, strict=True), "o-", markersize=4)
    axes.axhline(before, color="gray", linestyle=":", label="before the first step")
    axes.set(xscale="log", xlabel="learning rate of the first step", ylabel="loss after it")
    axes.legend()


def runs_figure(histories: Mapping[str, History]) -> "Figure":
    """Learning rate and loss of several runs by their names: training loss thin, validation loss with dots."""
    figure = new_figure(6.0)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    highest = []
    for i, (name, history) in enumerate(histories.items()):
        # Dashes, so that a run that lies upon another does not hide it.
        color, style = f"C{i}", ("-", "--", "-.", ":")[i % 4]
        _draw_lrs(upper, history, label=_literal(name), color=color, linestyle=style)
        highest += [max(lr for _, lr in lrs)] if (lrs := _lrs(history)) else []
        _curve(lower, history, "loss", style, color=color, linewidth=0.6, alpha=0.6)
        _curve(lower, history, "eval_loss", f"o{style}", color=color)
    if _are_apart(highest, 10):
        upper.set(yscale="log", ylim=(min(highest) / 10, None))
    if _are_apart([loss for line in lower.lines for loss in line.get_ydata()], 100):  # one has diverged
        lower.set_yscale("log")
    _name(upper, lower)
    lower.set_ylabel("loss (dots: validation)")
    if upper.lines:
        # Above, as many in a row as the names leave room for: inside it would hide the curves.
        columns = max(1, 88 // (max(map(len, histories)) + 7))
        figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=columns)
    return figure


def _are_apart(values: Sequence[float], times: float) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite, default=0.0) > 0 and max(finite) > times * min(finite)


def _curve(axes: Any, history: History, key: str, style: str, **options: Any) -> None:
    points = [(e["step"], e[key]) for e in history if key in e]
    if points:
        axes.plot(*zip(*points, strict=True), style, markersize=4, **options)


def _name(upper: Any, lower: Any) -> None:
    upper.set_ylabel("learning rate")
    lower.set(ylabel="loss", xlabel="optimizer step")
    if lower.get_legend_handles_labels()[0]:
        lower.legend()
