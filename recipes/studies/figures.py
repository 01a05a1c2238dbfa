"""How the plots of the studies look: 900 pixels wide, a colour and marker per method, error bars over the seeds."""

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from evidence import Curve

WIDTH = 7.5  # inches, at `grid.save`'s 120 dots
# The same method looks the same in every plot. Colours that the colour-blind can tell, by Okabe and Ito and by Tol.
STYLES = {
    "guided": ("#0072B2", "o"),
    "linear": ("#D55E00", "s"),
    "no warmup": ("#777777", "v"),
    "ramp": ("#117733", "^"),
    "RAdam": ("#AA4499", "D"),
    "GI-Adam": ("#E69F00", "P"),
    "AdamW × √(1-β2^t)": ("#56B4E9", "X"),
    "untuned linear": ("#8C564B", "<"),
    "untuned exponential": ("#C49C94", ">"),
    "Muon": ("#000000", "*"),
    "schedule-free RAdam": ("#44AA99", "h"),
    "ScheduleFree+": ("#CC79A7", "d"),
    "Prodigy": ("#999933", "p"),
    "GI-Adam, v_0 of another batch": ("#332288", "<"),
    "GI-Adam, v_0 = 10 g_0²": ("#CC6677", "p"),
    "GI-Adam, v_0 = 100 g_0²": ("#882255", "*"),
}
CYCLE = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#777777",
    "#000000",
]  # of what is no method


def new(height: float) -> Figure:
    """An empty figure, its texts readable at its width."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def style(name: str, dashed: bool = False) -> dict[str, Any]:
    """The look of a method; dashed if it is another form of one that is in the same plot."""
    color, marker = STYLES[name]
    look = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2, "linestyle": "--" if dashed else "-"}
    return look | {"markerfacecolor": "white"} if dashed else look


def curves(axes: Axes, shown: dict[str, tuple[Curve, dict[str, Any]]]) -> None:
    """Mean and standard deviation over the seeds against η_trgt, a line per method; a level if it has one target.

    The methods stand a little beside each other, so that none hides another's bars.
    """
    for i, (label, (losses, look)) in enumerate(shown.items()):
        means = [statistics.mean(seeds.values()) for seeds in losses.values()]
        spreads = [statistics.stdev(seeds.values()) if len(seeds) > 1 else 0.0 for seeds in losses.values()]
        if len(losses) == 1:
            axes.axhspan(means[0] - spreads[0], means[0] + spreads[0], color=look["color"], alpha=0.15, linewidth=0)
            axes.axhline(means[0], color=look["color"], linestyle=":", label=label)
        else:
            beside = 1.05 ** (i - len(shown) / 2)
            targets = [target * beside for target in losses]
            axes.errorbar(targets, means, spreads, capsize=2, elinewidth=0.8, label=label, **look)
    axes.set(xscale="log", xlabel="target learning rate", ylabel="validation loss")
    axes.xaxis.set_minor_formatter(NullFormatter())  # of a short range they overlap


def legend(figure: Figure) -> None:
    """One for all panels, below them."""
    handles = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)
