"""What it saves and costs to start linear warmup at the critical learning rate, a threshold, or a fixed fraction.

    python recipes/studies/catapult_study.py            # the runs that are missing, then the table and the plot
    python recipes/studies/catapult_study.py --table    # these from results/catapult_study.csv alone

A run is shorter by the steps that its start saves (`warmup_starts.py`), so the saving is free if the loss is that of
warmup from 0 over all steps: "cost" is the one minus the other, averaged over η_trgt and T_wrm, seed by seed.
"""

import statistics
from typing import Any

from matplotlib.figure import Figure

from evidence import (
    EQUAL,
    Claim,
    Row,
    Seeds,
    claims_table,
    curve,
    difference,
    ended,
    groups,
    loss_claim,
    select,
    spread,
    table,
    verdict,
)
from grid import command

NAME = "catapult_study"
STARTS = {
    "zero": "0",
    "critical": "η_c of the first step (paper)",
    "capped": "min(η_c, η_trgt / 10) (default)",
    "20/λ": "20/λ",
    "38/λ": "38/λ",
}


def case(row: Row) -> tuple[str, str, float]:
    """Network, optimizer, β2."""
    return row["family"], row["optimizer"], row["beta2"]


def case_name(row: Row) -> str:
    beta2 = "" if row["optimizer"] == "SGD" or row["family"] == "cnn" else f", β2 = {row['beta2']:g}"
    return f"{row['family'].upper()}, {row['optimizer']}{beta2}"


def start_name(start: str | float, optimizer: str) -> str:
    if isinstance(start, float):
        return f"η_trgt × {start:g}"
    return "2/λ" if optimizer == "SGD" and "λ" in start else STARTS[start]


def losses(rows: list[Row]) -> Seeds:
    """The mean loss over η_trgt and T_wrm, by seed."""
    return {seed: statistics.mean(map(ended, of)) for seed, of in groups(rows, lambda row: row["seed"]).items()}


def costs(rows: list[Row]) -> list[float]:
    """The loss minus that of warmup from 0, seed by seed; `rows` are of one case and start, and of start zero."""
    zero = select(rows, start="zero")
    return difference(losses([row for row in rows if row["start"] != "zero"]), losses(zero))


def worst(rows: list[Row]) -> float:
    """The largest cost at one η_trgt and T_wrm, in the mean over seeds."""
    cells = groups(rows, lambda row: (row["target"], row["fraction"]))
    return max(statistics.mean(costs(chosen)) for chosen in cells.values())


def warmup_steps(row: Row) -> int:
    """T_wrm: the steps of warmup from 0, which has saved none."""
    return max(1, round(row["fraction"] * (row["steps"] + row["saved"])))


def reach(row: Row) -> float:
    """T_reach / T_wrm."""
    return 1 - row["saved"] / warmup_steps(row)


def net_saved(row: Row) -> float:
    """T_save, after the search is paid: two forward passes are a step, and a Hessian-vector product is about two."""
    return row["saved"] - (row["passes"] or 0) / 2 - 2 * (row["hvps"] or 0)


def summary(rows: list[Row]) -> str:
    lines = []
    for chosen in groups(rows, case).values():
        zero = select(chosen, start="zero")
        for start, runs in groups(chosen, lambda row: row["start"]).items():
            line = {
                "network, optimizer": case_name(chosen[0]),
                "η_init": start_name(start, chosen[0]["optimizer"]),
                "T_reach / T_wrm": f"{statistics.mean(map(reach, runs)):.2f}",
                "steps saved": f"{statistics.mean(row['saved'] for row in runs):.1f}",
                "after the search": f"{statistics.mean(map(net_saved, runs)):.1f}",
            }
            if start != "zero":
                line["cost"] = spread(costs(runs + zero), "+")
                line["worst"] = f"{worst(runs + zero):+.3f}"
                line["the saving"] = {"holds": "is free", "does not hold": "hurts"}.get(free(runs + zero), "unclear")
            lines.append(line)
    return table(lines)


def free(rows: list[Row]) -> str:
    """Whether the saving costs less than `EQUAL`."""
    return verdict(costs(rows), high=EQUAL)


def default(rows: list[Row]) -> str:
    """What default follows: the largest fixed fraction whose saving is free, by case and for all."""
    largest = {}
    for chosen in groups(rows, case).values():
        zero, safe = select(chosen, start="zero"), 0.0
        for fraction in sorted({row["start"] for row in chosen if isinstance(row["start"], float)}):
            if free(select(chosen, start=fraction) + zero) != "holds":
                break
            safe = fraction
        largest[case_name(chosen[0])] = safe
    of = "; ".join(f"{name}: {fraction:g}" for name, fraction in largest.items())
    return (
        f"Largest fraction of η_trgt to start at that costs less than {EQUAL} nats (every smaller one too): {of}. "
        f"In all of them: {min(largest.values()):g}."
    )


def claims(rows: list[Row]) -> list[Claim]:
    made = []
    for chosen in groups(rows, case).values():
        optimizer = chosen[0]["optimizer"]
        zero = select(chosen, start="zero")
        for start, source in (("critical", "paper"), ("20/λ", "paper"), ("capped", "ours")):
            runs = select(chosen, start=start)
            part = 1 - statistics.mean(map(reach, runs))
            text = f"Starting at {start_name(start, optimizer)} saves {part:.0%} of T_wrm at equal loss"
            made.append(loss_claim(f"{text} ({case_name(chosen[0])})", source, NAME, costs(runs + zero), high=EQUAL))
    return made


def report(rows: list[Row]) -> str:
    words = f"Cost: loss minus that of warmup from 0 over all steps, nats. Free: its 95% interval is below {EQUAL}."
    return f"{summary(rows)}\n\n{words}\n\n{default(rows)}\n\n{claims_table(claims(rows))}"


def plot(rows: list[Row]) -> Figure:
    """For each case the loss against η_trgt by start, at the longest T_wrm, and below it T_reach / T_wrm."""
    of = groups(select(rows, fraction=max(row["fraction"] for row in rows)), case)
    starts = list(groups(rows, lambda row: row["start"]))
    columns = 4
    bands = -(-len(of) // columns)
    figure = Figure(figsize=(3.2 * columns, 4.8 * bands), layout="constrained")
    axes: Any = figure.subplots(2 * bands, columns, squeeze=False)
    for i, chosen in enumerate(of.values()):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        for start, runs in groups(chosen, lambda row: row["start"]).items():
            j = starts.index(start)
            style = {"marker": "o", "markersize": 3, "color": f"C{j}", "linestyle": "-" if j < 2 else "--"}
            made = curve(runs)
            means = [statistics.mean(of_seed.values()) for of_seed in made.values()]
            above.plot(list(made), means, label=start_name(start, "AdamW"), **style)
            parts = groups(sorted(runs, key=lambda row: row["target"]), lambda row: row["target"])
            below.plot(list(parts), [statistics.mean(map(reach, part)) for part in parts.values()], **style)
        above.set_title(case_name(chosen[0]), fontsize=9)
        below.set(ylim=(-0.05, 1.05), xlabel="target learning rate")
        for panel in (above, below):
            panel.set_xscale("log")
            panel.set_xticks(list(made), [f"{target:g}" for target in made])
            panel.minorticks_off()
        if i % columns == 0:
            above.set_ylabel("validation loss")
            below.set_ylabel("T_reach / T_wrm")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
