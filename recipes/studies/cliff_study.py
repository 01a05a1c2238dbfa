"""How many runs a warmup that is too short loses, and whether guided warmup loses any.

    python recipes/studies/cliff_study.py            # the runs that are missing, then the tables and the heat map
    python recipes/studies/cliff_study.py --table    # these from results/cliff_study.csv alone

A run is lost if half of its steps would have done as well: it ends above the mean loss of the best linear warmup
(length and learning rate) of the same model in half of the steps (grids/cliff_study.yml).
"""

import math
import operator
import statistics
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_warmup import GuidedWarmup

import figures
from evidence import Claim, Curve, Row, at_best, best, curve, ended, groups, select, table
from grid import command

NAME = "cliff_study"
SIZES = {64: ".28M", 96: "1.1M", 160: "4.2M"}
OPTIMIZERS = {"GIAdamW": "GI-Adam", "RAdam": "RAdam", "Muon": "Muon"}  # without warmup
AUTO = "auto_lr"
OTHERS = ("guided", AUTO, *OPTIMIZERS.values())
LENGTH = operator.itemgetter("length")
MOST = 0.5  # nats: everything beyond has one colour


def model(row: Row) -> str:
    """Architecture and size."""
    kind = {"llama": "Llama", "qwen3": "Qwen3, zero" if row["zero_out"] else "Qwen3"}[row["family"]]
    return f"{kind}, {SIZES.get(row['width'], row['width'])}"


def method(row: Row) -> str:
    """The length of linear warmup, or what has none."""
    if row["rule"] == "guided":
        return AUTO if row.get("auto_lr") else "guided"
    return OPTIMIZERS.get(row["optimizer"]) or (f"linear over {row['length']}" if row["length"] else "no warmup")


def lengths(rows: list[Row]) -> dict[str, list[Row]]:
    """Linear warmup in the order of its length, then what has none."""
    return groups(sorted(rows, key=lambda row: math.inf if method(row) in OTHERS else row["length"]), method)


def linear(rows: list[Row]) -> dict[int, Curve]:
    """The losses of AdamW with linear warmup, by its length."""
    return {length: curve(of) for length, of in groups(select(rows, rule="linear", optimizer="AdamW"), LENGTH).items()}


def tuned(rows: list[Row]) -> tuple[float, int, float]:
    """The loss, length and target of the best of them."""
    return min(
        (statistics.mean(at_best(losses).values()), length, best(losses)) for length, losses in linear(rows).items()
    )


def judged(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """By model and number of steps, of which there are runs of half the steps; a row has whether it is `lost`."""
    of = groups(rows, lambda row: (model(row), row["steps"]))
    made = {}
    for (name, steps), runs in of.items():
        if half := of.get((name, steps // 2)):
            line, (least, _, _) = tuned(half)[0], tuned(runs)
            made[name, steps] = [row | {"lost": ended(row) > line, "excess": ended(row) - least} for row in runs]
    return made


def from_best(rows: list[Row]) -> list[Row]:
    """Those whose target is the best of linear warmup or higher."""
    target = tuned(rows)[2]
    return [row for row in rows if row["target"] >= target]


def lost(rows: list[Row]) -> str:
    return f"{sum(row['lost'] for row in rows)} of {len(rows)}"


def worst(rows: list[Row]) -> str:
    return f"{max(row['excess'] for row in rows):+.2f}"


def warmup_table(of: dict[tuple[str, int], list[Row]], say: Callable[[list[Row]], str]) -> str:
    """What is said of the runs of each warmup at targets from the best of linear warmup on."""
    counted = {place: from_best(rows) for place, rows in of.items()}
    every = lengths([row for rows in counted.values() for row in rows])
    lines = {how: {"warmup": how, "all": say(runs)} for how, runs in every.items()}
    for (name, steps), rows in counted.items():
        for how, runs in lengths(rows).items():
            lines[how][f"{name}, {steps} steps"] = say(runs)
    return table(list(lines.values()))


def edge_table(of: dict[tuple[str, int], list[Row]]) -> str:
    """The shortest linear warmup that loses no run, at multiples of the best target."""
    lines = []
    for (name, steps), rows in of.items():
        loss, length, target = tuned(rows)
        line = {"model": name, "steps": str(steps), "tuned linear": f"{loss:.2f} (over {length} to {target:g})"}
        for times in (1, 2, 4, 8):
            cells = groups(select(rows, rule="linear", optimizer="AdamW", target=times * target), LENGTH)
            safe = [length for length, cell in sorted(cells.items()) if not any(row["lost"] for row in cell)]
            line[f"{times} x"] = str(safe[0]) if safe else f"> {max(cells)}" if cells else ""
        ramp = GuidedWarmup.usual_ramp_steps(steps, decoder=True)
        lines.append(line | {"guided's ramp": f"{ramp:.0f}"})
    return table(lines)


def claims(rows: list[Row]) -> list[Claim]:
    """Whether guided warmup loses runs where others do."""
    made = []
    for (name, steps), runs in judged(rows).items():
        counted = lengths(from_best(runs))
        of = {how: counted[how] for how in ("guided", AUTO, "no warmup") if how in counted}
        counts = {how: sum(row["lost"] for row in those) for how, those in of.items()}
        measured = ", ".join(f"{how} {lost(those)}" for how, those in of.items())
        held = not counts["guided"] + counts.get(AUTO, 0)
        verdict = "unclear" if held and not counts["no warmup"] else "holds" if held else "does not hold"
        text = "Guided warmup loses no run at the best learning rate and above, where training without warmup does"
        made.append(Claim(text, f"{name}, {steps} steps", "ours", NAME, measured, verdict))
    return made


def report(rows: list[Row]) -> str:
    of = judged(rows)
    words = "Runs lost, at targets from the best of linear warmup to the end of the grid (auto_lr has none)."
    edges = (
        "Steps of the shortest linear warmup that loses no run, at 1, 2, 4 and 8 times the best target where the grid "
        "has it, and the steps in which guided warmup makes the first descent."
    )
    ends = "How far the worst of these runs ends above the mean of tuned linear warmup, in nats."
    parts = [words, warmup_table(of, lost), ends, warmup_table(of, worst), edges, edge_table(of)]
    return "\n\n".join([__doc__.split("\n\n")[-1].strip(), *parts])


def draw(axes: Axes, rows: list[Row]) -> Any:
    """How far above tuned linear warmup a cell ends, and how many of its runs are lost."""
    targets = sorted({row["target"] for row in rows if method(row) != AUTO})
    of = lengths(rows)
    cells = [[runs if how == AUTO else select(runs, target=t) for t in targets] for how, runs in of.items()]
    values = [[statistics.mean(row["excess"] for row in c) if c else math.nan for c in line] for line in cells]
    image = axes.imshow(values, aspect="auto", cmap="viridis_r", vmin=0, vmax=MOST)
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            if num := sum(row["lost"] for row in cell):
                axes.text(x, y, f"{num}/{len(cell)}", color="red", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(targets)), [f"{t:g}" for t in targets], fontsize=7)
    axes.set_yticks(range(len(of)), of, fontsize=7)
    return image


def plot(rows: list[Row]) -> Figure:
    """A heat map for each model and number of steps."""
    of = judged(rows)
    count = max(1, math.ceil(len(of) / 2))
    figure = figures.new(2.6 * count)
    panels = list(figure.subplots(count, 2, squeeze=False).flat)
    for axes, ((name, steps), runs) in zip(panels, of.items(), strict=False):
        image = draw(axes, runs)
        axes.set_title(f"{name}, {steps} steps", fontsize=9)
    for axes in panels[len(of) :]:
        axes.set_axis_off()
    if of:
        words = "loss minus tuned linear warmup; red: runs lost"
        figure.colorbar(image, ax=panels, label=words, location="bottom", shrink=0.5)
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
