"""Where the second moment starts: what of GI-Adam is its schedule, and what its v_0.

    python recipes/studies/second_moment_study.py            # the runs that are missing, then the table and the plot
    python recipes/studies/second_moment_study.py --table    # these from results/second_moment_study.csv alone

GI-Adam against AdamW × √(1-β2^t), its own schedule; v_0 of the batch of step 1 or of another (the authors' code);
v_0 = α g_0²; all without other warmup.
"""

from matplotlib.figure import Figure

import figures
from evidence import (
    EQUAL,
    Claim,
    Curve,
    Row,
    Seeds,
    at_best,
    average,
    best,
    claims_table,
    count,
    curve,
    difference,
    groups,
    is_at_edge,
    loss_claim,
    spread,
    table,
    verdict,
)
from grid import command
from warmup_cases import OTHER_BATCH

NAME = "second_moment_study"
CONTROL = "AdamW × √(1-β2^t)"
NAMES = {
    "AdamW": "AdamW",
    CONTROL: CONTROL,
    "GIAdamW": "GI-Adam",
    OTHER_BATCH: "GI-Adam, v_0 of another batch",
    "GIAdamW, 10 v0": "GI-Adam, v_0 = 10 g_0²",
    "GIAdamW, 100 v0": "GI-Adam, v_0 = 100 g_0²",
}


def method(row: Row) -> str:
    return CONTROL if "sqrt" in row["rule"] else row["optimizer"]


def by_beta2(rows: list[Row]) -> dict[float, dict[str, Curve]]:
    """The losses by β2 and method."""
    return {
        beta2: {name: curve(runs) for name, runs in groups(chosen, method).items()}
        for beta2, chosen in sorted(groups(rows, lambda row: row["beta2"]).items())
    }


def explained(text: str, where: str, adam: Seeds, control: Seeds, gi: Seeds) -> Claim:
    """Whether the schedule alone has more than half of GI-Adam's gain over AdamW.

    Not by the ratio of each seed, which is anything where its gain is near 0: by the part minus half of the gain.
    """
    parts, gains = difference(adam, control), difference(adam, gi)
    if verdict(gains, low=0.0) != "holds":
        return Claim(text, where, "ours", NAME, f"no sure gain: {spread(gains, '+')} nats{count(gains)}", "unclear")
    more = [part - gain / 2 for part, gain in zip(parts, gains, strict=True)]
    measured = f"{sum(parts) / sum(gains):.0%} of {spread(gains, '+')} nats{count(gains)}"
    return Claim(text, where, "ours", NAME, measured, verdict(more, low=0.0))


def summary(rows: list[Row]) -> str:
    lines = []
    for beta2, of in by_beta2(rows).items():
        adam = of["AdamW"]
        for name, label in NAMES.items():
            losses = of[name]
            edge = " (edge of the grid)" if is_at_edge(losses) else ""
            lines.append(
                {
                    "β2": f"{beta2:g}",
                    "optimizer": label,
                    "best loss": spread(at_best(losses).values()),
                    "at η_trgt": f"{best(losses):g}{edge}",
                    "minus AdamW's best": spread(difference(at_best(losses), at_best(adam)), "+"),
                    "minus AdamW, mean over η_trgt": spread(difference(average(losses), average(adam)), "+"),
                }
            )
    return table(lines)


def claims(rows: list[Row]) -> list[Claim]:
    made = []
    for beta2, of in by_beta2(rows).items():
        case = f"β2 = {beta2:g}"
        for where, take in (("at the best η_trgt", at_best), ("over the grid of η_trgt", average)):
            text = f"The automatic ramp explains more than half of GI-Adam's gain {where}"
            made.append(explained(text, case, take(of["AdamW"]), take(of[CONTROL]), take(of["GIAdamW"])))
        gi = at_best(of["GIAdamW"])
        for name, text in (
            (OTHER_BATCH, "v_0 from another batch makes no difference"),
            ("GIAdamW, 10 v0", "v_0 = 10 g_0² makes no difference"),
            ("GIAdamW, 100 v0", "v_0 = 100 g_0² makes no difference"),
        ):
            made.append(loss_claim(text, case, "ours", NAME, difference(at_best(of[name]), gi), -EQUAL, EQUAL))
    return made


def report(rows: list[Row]) -> str:
    return f"{summary(rows)}\n\n{claims_table(claims(rows))}"


def plot(rows: list[Row]) -> Figure:
    """Loss against η_trgt, a panel per β2."""
    of_beta2 = by_beta2(rows)
    figure = figures.new(3.8)
    panels = figure.subplots(1, len(of_beta2), squeeze=False, sharey=True)[0]
    for axes, (beta2, of) in zip(panels, of_beta2.items(), strict=True):
        looks = {name: figures.style("no warmup" if name == "AdamW" else label) for name, label in NAMES.items()}
        figures.curves(axes, {NAMES[name]: (of[name], look) for name, look in looks.items()})
        axes.set_title(f"no warmup, β2 = {beta2:g}", fontsize=10)
    panels[-1].set_ylabel("")
    figures.legend(figure)
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
