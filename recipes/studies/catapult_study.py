"""What it saves and costs to start linear warmup at the critical learning rate, a threshold, or a fixed fraction.

    python recipes/studies/catapult_study.py            # the runs that are missing, then the table and the plot
    python recipes/studies/catapult_study.py --table    # these from results/catapult_study.csv alone

A run is shorter by the steps that its start saves (`warmup_starts.py`), so the saving is free if the loss is that of
warmup from 0 over all steps: "cost" is the one minus the other, averaged over η_trgt and T_wrm, seed by seed.
"""

import statistics

from matplotlib.figure import Figure

import figures
from evidence import (
    EQUAL,
    Claim,
    Row,
    Seeds,
    claims_table,
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
    return max(1, round(row["fraction"] * row["steps"]))


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
        zero = select(chosen, start="zero")
        for start, source in (("critical", "paper"), ("20/λ", "paper"), ("capped", "ours")):
            runs = select(chosen, start=start)
            part = 1 - statistics.mean(map(reach, runs))
            text = f"Starting at {STARTS[start]} costs less than {EQUAL} nats"
            where = f"{case_name(chosen[0])}, saves {part:.0%} of T_wrm"
            made.append(loss_claim(text, where, source, NAME, costs(runs + zero), high=EQUAL))
    return made


def report(rows: list[Row]) -> str:
    words = f"Cost: loss minus that of warmup from 0 over all steps, nats. Free: its 95% interval is below {EQUAL}."
    return f"{summary(rows)}\n\n{words}\n\n{default(rows)}\n\n{claims_table(claims(rows))}"


def plot(rows: list[Row]) -> Figure:
    """By case and start: T_reach / T_wrm, and what the saving costs."""
    of = groups(rows, case)
    starts = list(groups(rows, lambda row: row["start"]))
    figure = figures.new(7.5)
    left, right = figure.subplots(1, 2, sharey=True)
    for j, start in enumerate(starts):
        look = {"color": figures.CYCLE[j], "marker": "os^DPXv*"[j], "markersize": 4}
        for i, chosen in enumerate(of.values()):
            height = i + 0.8 * (j / len(starts) - 0.5)
            if runs := select(chosen, start=start):
                label = start_name(start, "AdamW") if i == 0 else None
                left.plot(statistics.mean(map(reach, runs)), height, linestyle="", label=label, **look)
                if start != "zero":
                    values = costs(runs + select(chosen, start="zero"))
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    right.errorbar(statistics.mean(values), height, xerr=spread, capsize=2, **look)
    names = [case_name(chosen[0]).replace(", β2", "\nβ2") for chosen in of.values()]
    left.set_yticks(range(len(of)), names, fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="T_reach / T_wrm", xlim=(0, 1.03))
    right.set_xscale("symlog", linthresh=EQUAL)
    right.set_xticks(
        ticks := (-0.3, -0.1, -EQUAL, 0.0, EQUAL, 0.1, 0.3, 1.0), [f"{tick:g}" for tick in ticks], fontsize=8
    )
    right.set_xlabel("cost: loss minus that of warmup from 0, nats")
    right.axvspan(-EQUAL, EQUAL, color="#777777", alpha=0.15, linewidth=0)
    for axes in (left, right):
        axes.hlines([i + 0.5 for i in range(len(of) - 1)], *axes.get_xlim(), color="#cccccc", linewidth=0.5)
    figures.legend(figure)
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
