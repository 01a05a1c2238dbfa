"""Others that say warmup need not be tuned, beside linear warmup, GI-Adam and guided warmup.

    python recipes/studies/baselines_study.py            # the runs that are missing, then the table and the plot
    python recipes/studies/baselines_study.py --table    # these from results/baselines_study.csv alone

Untuned linear and exponential warmup (arXiv:1910.04209), RAdam, schedule-free RAdam, Prodigy, Muon. Schedule-free
RAdam needs `schedulefree`, Prodigy `prodigyopt`; where they are not installed their runs are skipped, and their rows
missing.
"""

import statistics

from matplotlib.figure import Figure

import figures
from evidence import (
    EQUAL,
    Claim,
    Curve,
    Row,
    at_best,
    average,
    best,
    claims_table,
    curve,
    difference,
    groups,
    is_at_edge,
    loss_claim,
    spread,
    table,
)
from grid import command

NAME = "baselines_study"
LABELS = {"GIAdamW": "GI-Adam", "RAdamScheduleFree": "schedule-free RAdam"}


def method(row: Row) -> str:
    """Optimizer and warmup, in words."""
    optimizer = LABELS.get(row["optimizer"], row["optimizer"])
    if row["rule"] == "constant":
        return f"{optimizer}, no schedule"
    if row["rule"] != "linear":
        return f"{optimizer}, {row['rule']} warmup" + ", auto_lr" * bool(row.get("auto_lr"))
    return f"{optimizer}, linear over {row['fraction']:.0%}" if row["fraction"] else f"{optimizer}, no warmup"


def curves(rows: list[Row]) -> dict[str, Curve]:
    return {name: curve(chosen) for name, chosen in groups(rows, method).items()}


def tuned(of: dict[str, Curve]) -> str:
    """The linear warmup of AdamW whose best mean loss is the smallest."""
    linear = [name for name in of if name.startswith(("AdamW, linear over", "AdamW, no"))]
    return min(linear, key=lambda name: statistics.mean(at_best(of[name]).values()))


def summary(rows: list[Row]) -> str:
    of = curves(rows)
    reference = tuned(of)
    lines = []
    for name, losses in of.items():
        # Of one target: a method that asks for none.
        at = f"{best(losses):g}" if len(losses) > 1 else "found"
        edge = " (edge of the grid)" if len(losses) > 1 and is_at_edge(losses) else ""
        excess = statistics.mean(average(losses).values()) - statistics.mean(at_best(losses).values())
        lines.append(
            {
                "method": name + (" (tuned)" if name == reference else ""),
                "best loss": spread(at_best(losses).values()),
                "at η_trgt": at + edge,
                "minus tuned linear": spread(difference(at_best(losses), at_best(of[reference])), "+"),
                "sensitivity": f"{excess:.3f}",
            }
        )
    return table(lines)


def claims(rows: list[Row]) -> list[Claim]:
    of = curves(rows)
    reference = at_best(of[tuned(of)])
    made = []
    for name, losses in of.items():
        who, _, how = name.partition(", ")
        if who == "AdamW" and how.startswith(("linear over", "no")):
            continue
        if how.startswith("guided"):
            who, how = "Guided warmup", "auto_lr" if "auto_lr" in how else "η_trgt as its bound"
        elif how.startswith("untuned"):
            who, how = "Untuned warmup", how.removeprefix("untuned ").removesuffix(" warmup")
        text = f"{who} is as good as tuned linear warmup of AdamW (GPT, β2 = 0.95)"
        source = {"Guided warmup": "ours", "GI-Adam": "paper"}.get(who, "its authors")
        made.append(loss_claim(text, how, source, NAME, difference(at_best(losses), reference), high=EQUAL))
    return made


def report(rows: list[Row]) -> str:
    words = "Sensitivity: the mean loss over the grid of η_trgt minus the best."
    return f"{summary(rows)}\n\n{words}\n\n{claims_table(claims(rows))}"


def plot(rows: list[Row]) -> Figure:
    """Loss against η_trgt; of the lengths of linear warmup the tuned one."""
    of = curves(rows)
    shown = {}
    for name, losses in of.items():
        who, _, how = name.partition(", ")
        kind = how.partition(" over")[0].partition(" warmup,")[0] if who == "AdamW" else who
        kind = kind if kind == "no warmup" else kind.removesuffix(" warmup")
        if kind != "linear" or name == tuned(of):
            shown[name] = (losses, figures.style(kind, dashed=who == "Muon" and how != "no warmup"))
    figure = figures.new(5)
    figures.curves(figure.subplots(), shown)
    figures.legend(figure)
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
