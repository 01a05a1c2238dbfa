"""In how few steps guided warmup may make the first descent, by the size of the model.

    python recipes/studies/descent_study.py            # the runs that are missing, then the table and the plot
    python recipes/studies/descent_study.py --table    # these from results/descent_study.csv alone

A run is damaged if it ends more than 0.2 nats above the mean of the best number of steps of its model. What a model
needs is the smallest number of steps from which on, up to the best, no run is damaged.
"""

import statistics

from matplotlib.figure import Figure

from hf_warmup import GuidedWarmup

import figures
from evidence import Claim, Row, ended, groups, table
from grid import command, weights_of

NAME = "descent_study"
DAMAGED = 0.2  # nats

Runs = dict[float, list[float]]  # losses by t*


def models(rows: list[Row]) -> dict[int, tuple[str, Runs]]:
    """By the number of weights: the name of the model and its losses by t*."""
    made = {}
    for (family, width, depth), of in groups(rows, lambda row: (row["family"], row["width"], row["depth"])).items():
        losses = {t: [ended(row) for row in runs] for t, runs in groups(of, lambda row: row["ramp_steps"]).items()}
        kind = {"gpt": "GPT", "llama": "Llama"}[family]
        made[weights_of(of[0])] = (f"{kind}, {depth} x {width}", dict(sorted(losses.items())))
    return dict(sorted(made.items()))


def least(runs: Runs) -> float:
    return min(map(statistics.mean, runs.values()))


def damaged(runs: Runs) -> dict[float, int]:
    """How many runs, by t*."""
    return {t: sum(loss > least(runs) + DAMAGED for loss in losses) for t, losses in runs.items()}


def needed(runs: Runs) -> float:
    """The smallest t* from which on none is, up to the best."""
    most = min(runs, key=lambda t: statistics.mean(runs[t]))
    harmed = [t for t, count in damaged(runs).items() if count and t < most]
    return min(t for t in runs if t > max(harmed, default=0))


def report(rows: list[Row]) -> str:
    lines = []
    for size, (name, runs) in models(rows).items():
        line = {"model": name, "weights": f"{size / 1e6:.2f}M"}
        counts = damaged(runs)
        for t, losses in runs.items():
            words = f"{statistics.mean(losses) - least(runs):+.2f}, worst {max(losses) - least(runs):+.2f}"
            line[f"{t:g} steps"] = words + f" ({counts[t]} of {len(losses)})" * (counts[t] > 0)
        lines.append(line | {"needs": f"{needed(runs):g}"})
    words = (
        "Loss above that of the best number of steps, mean and worst of the seeds, and in brackets how many runs are "
        "damaged."
    )
    return "\n\n".join([__doc__.split("\n\n")[-1].strip(), words, table(lines)])


def claims(rows: list[Row]) -> list[Claim]:
    """Whether guided warmup has as many as each model needs."""
    of = [needed(runs) for _, runs in models(rows).values()]
    most = GuidedWarmup.STEPS
    verdict = "holds" if max(of) <= most else "does not hold"
    text = f"The first descent needs no more than {most:g} steps"
    return [Claim(text, f"{len(of)} models", "ours", NAME, f"{min(of):g} to {max(of):g}", verdict)]


def plot(rows: list[Row]) -> Figure:
    """Loss above the best over t*, a line per model."""
    figure = figures.new(3.6)
    axes = figure.subplots()
    for color, (size, (name, runs)) in zip(figures.CYCLE, models(rows).items(), strict=False):
        axes.plot(runs.keys(), [statistics.mean(losses) - least(runs) for losses in runs.values()], color=color)
        for t, losses in runs.items():
            label = {"label": f"{name}, {size / 1e6:.2f}M"} if t == min(runs) else {}
            axes.plot([t] * len(losses), [loss - least(runs) for loss in losses], "o", ms=4, color=color, **label)
    axes.axhline(DAMAGED, color="gray", linestyle=":")
    axes.set(xlabel="t*, steps of the first descent", ylabel="loss above that of the best t*")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    command(NAME, report, plot, __doc__)
