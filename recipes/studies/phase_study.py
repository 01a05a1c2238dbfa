"""Phase diagram: the validation loss over η_trgt and T_wrm, and from which η_trgt on training fails.

    python recipes/studies/phase_study.py            # the runs that are missing, then the table and the heat maps
    python recipes/studies/phase_study.py --table    # these from results/phase_study.csv alone

AdamW, GI-Adam, RAdam and AdamW × √(1-β2^t) on a GPT, SGD on a CNN (grids/phase_study.yml); the paper's Fig. 3 and 4
without images of a dataset.
"""

import math
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import figures
from evidence import (
    EQUAL,
    Claim,
    Curve,
    Row,
    Seeds,
    at_best,
    best,
    boundary,
    claims_table,
    curve,
    difference,
    factor_claim,
    failure_level,
    groups,
    is_at_edge,
    loss_claim,
    ratio,
    select,
    spread,
    table,
    times,
)
from grid import command

NAME = "phase_study"
WORSE = 0.25  # nats above the best of the panel's network and β2: a boundary that is met earlier than failure
GRID_STEP = 2.0  # factor between neighbouring η_trgt
SHADE = 0.2  # nats above the boundary of failure: everything beyond has one colour
CONTROL = "AdamW × √(1-β2^t)"


def method(row: Row) -> str:
    return CONTROL if "sqrt" in row["rule"] else row["optimizer"]


def panel(row: Row) -> tuple[str, float, str]:
    """Network, β2 and method."""
    return row["family"], row["beta2"], method(row)


def by_fraction(rows: list[Row]) -> dict[float, Curve]:
    """The losses of a panel, by the fraction that warmup has of the steps."""
    return {fraction: curve(chosen) for fraction, chosen in sorted(groups(rows, lambda r: r["fraction"]).items())}


def warmed(rows: list[Row]) -> Seeds:
    """The losses of the best warmup and the best target."""
    return min((at_best(losses) for losses in by_fraction(rows).values()), key=lambda s: statistics.mean(s.values()))


def lowest(rows: list[Row], row: Row) -> float:
    """The best mean loss of any method on the network and with the β2 of `row`."""
    same = groups(select(rows, family=row["family"], beta2=row["beta2"]), panel).values()
    return min(statistics.mean(warmed(chosen).values()) for chosen in same)


def summary(rows: list[Row]) -> str:
    """A line per panel and T_wrm."""
    lines = []
    for (family, beta2, name), chosen in groups(rows, panel).items():
        worse = lowest(rows, chosen[0]) + WORSE
        for fraction, losses in by_fraction(chosen).items():
            edge = " (edge of the grid)" if is_at_edge(losses) else ""
            lines.append(
                {
                    "network": family.upper(),
                    "β2": "" if name == "SGD" else f"{beta2:g}",
                    "optimizer": name,
                    "T_wrm": f"{fraction:.0%}",
                    "best loss": spread(at_best(losses).values()),
                    "at η_trgt": f"{best(losses):g}{edge}",
                    f"{WORSE} worse from": times(boundary(losses, worse).values()),
                    "fails from": times(boundary(losses, failure_level(chosen)).values()),
                }
            )
    return table(lines)


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper and we say, against the runs."""
    made = []
    for beta2, chosen in sorted(groups(select(rows, family="gpt"), lambda row: row["beta2"]).items()):
        of = groups(chosen, method)
        levels = {"fails": failure_level(chosen), f"is {WORSE} worse": lowest(rows, chosen[0]) + WORSE}
        for word, level in levels.items():
            made += _boundary_claims({name: by_fraction(runs) for name, runs in of.items()}, word, level, beta2)
        made += _loss_claims(of, beta2)
    for family, chosen in groups(select(rows, optimizer="SGD"), lambda row: row["family"]).items():
        losses, level = by_fraction(chosen), failure_level(chosen)
        factors = ratio(boundary(losses[max(losses)], level), boundary(losses[min(losses)], level))
        text = f"With {max(losses):.0%} warmup SGD fails only from a higher η_trgt on"
        made.append(factor_claim(text, family.upper(), "paper", NAME, factors, 1.0))
    return made


def _boundary_claims(of: dict[str, dict[float, Curve]], word: str, level: float, beta2: float) -> list[Claim]:
    adam, gi = ({f: boundary(losses, level) for f, losses in of[name].items()} for name in ("AdamW", "GIAdamW"))
    none, most = min(adam), max(adam)

    def claim(text: str, a: Seeds, b: Seeds, low: float = 1.0, high: float = math.inf) -> Claim:
        return factor_claim(text, f"GPT, β2 = {beta2:g}", "paper", NAME, ratio(a, b), low, high)

    higher = f"{word} only from a higher η_trgt on"
    same = f"With {most:.0%} warmup GI-Adam {word} from the same η_trgt on as AdamW, within a step of the grid"
    return [
        claim(f"Without warmup GI-Adam {higher} than AdamW", gi[none], adam[none]),
        claim(f"AdamW with {most:.0%} warmup {higher} than without", adam[most], adam[none]),
        claim(same, gi[most], adam[most], 1 / GRID_STEP, GRID_STEP),
    ]


def _loss_claims(of: dict[str, list[Row]], beta2: float) -> list[Claim]:
    def claim(text: str, source: str, a: Seeds, b: Seeds, most: float) -> Claim:
        return loss_claim(text, f"GPT, β2 = {beta2:g}", source, NAME, difference(a, b), high=most)

    def plain(name: str) -> Seeds:
        losses = by_fraction(of[name])
        return at_best(losses[min(losses)])

    adam, gi, radam, control = map(plain, ("AdamW", "GIAdamW", "RAdam", CONTROL))
    best_warmed = warmed(of["AdamW"])
    return [
        claim("Without warmup GI-Adam is better than AdamW", "paper", gi, adam, 0.0),
        claim("Without warmup RAdam is better than AdamW", "RAdam", radam, adam, 0.0),
        claim("Without warmup GI-Adam is better than RAdam", "paper", gi, radam, 0.0),
        claim("GI-Adam without warmup is as good as the best-warmed AdamW", "ours", gi, best_warmed, EQUAL),
        claim("RAdam without warmup is as good as the best-warmed AdamW", "ours", radam, best_warmed, EQUAL),
        claim(f"{CONTROL} without warmup is as good as GI-Adam", "ours", control, gi, EQUAL),
    ]


def report(rows: list[Row]) -> str:
    failed = "Fails: within .1 nats of, or above, a model that knows only how frequent symbols are. "
    worse = f"{WORSE} worse: than the best of the network and β2."
    return f"{summary(rows)}\n\n{failed}{worse}\n\n{claims_table(claims(rows))}"


def draw(axes: Axes, rows: list[Row], low: float, high: float) -> Any:
    """A heat map, and the boundary of failure as a line over it."""
    of = by_fraction(rows)
    targets = sorted({target for losses in of.values() for target in losses})
    values = [[statistics.mean(of[f][t].values()) for f in of] for t in targets]
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis_r", vmin=low, vmax=high)
    places = {f: boundary(losses, failure_level(rows)) for f, losses in of.items()}
    heights = [[_place(value, targets) for value in places[f].values()] for f in of]
    spreads = [statistics.stdev(of_f) if len(of_f) > 1 else 0.0 for of_f in heights]
    style = {"color": "red", "marker": "o", "markersize": 3, "capsize": 2}
    axes.errorbar(range(len(of)), list(map(statistics.mean, heights)), spreads, label="fails above", **style)
    axes.set_xticks(range(len(of)), [f"{f:.0%}" for f in of], fontsize=7)
    axes.set_yticks(range(0, len(targets), 2), [f"{t:g}" for t in targets[::2]], fontsize=7)
    axes.set(xlabel="T_wrm", ylim=(-0.5, len(targets) - 0.5), xlim=(-0.5, len(of) - 0.5))
    axes.set_title(method(rows[0]), fontsize=9)
    return image


def _place(target: float, targets: list[float]) -> float:
    """Where a target lies among the rows of a heat map; beyond the grid, half a row outside."""
    if not 0 < target < math.inf:
        return len(targets) - 0.5 if target else -0.5
    step = math.log(targets[-1] / targets[0]) / max(1, len(targets) - 1)
    return math.log(target / targets[0]) / step if step else 0.0


def plot(rows: list[Row]) -> Figure:
    """A row of heat maps for each network and β2, in one colour scale."""
    bands = groups(rows, lambda row: (row["family"], row["beta2"]))
    of = {band: list(groups(chosen, panel).values()) for band, chosen in bands.items()}
    figure = figures.new(2.8 * len(of))
    for parts, ((family, beta2), panels) in zip(figure.subfigures(len(of), squeeze=False), of.items(), strict=True):
        subplots = parts[0].subplots(1, max(map(len, of.values())), squeeze=False, sharey=True)[0]
        level = failure_level(panels[0])
        low = min(statistics.mean(warmed(chosen).values()) for chosen in panels)
        for axes, chosen in zip(subplots, panels, strict=False):
            image = draw(axes, chosen, low, max(level, low) + SHADE)
        for axes in subplots[len(panels) :]:
            axes.set_axis_off()
        of_beta2 = "" if family == "cnn" else f", β2 = {beta2:g}"
        subplots[0].set_ylabel(f"{family.upper()}{of_beta2}\nη_trgt")
        subplots[0].legend(fontsize=7, loc="upper left")
        parts[0].colorbar(image, ax=list(subplots), label="validation loss")
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
