"""From runs to claims: losses by target and seed, the boundary of failure, and what the seeds allow to say.

A claim says that a quantity lies between `low` and `high`. With one value per seed, mean m, standard deviation s and
n seeds, the 95% interval of Student's t is m ± t s / √n; the claim

    holds             if the interval lies inside,
    does not hold     if it lies outside,
    unclear           if it does neither, or there is one seed, or a value lies beyond the grid.

A run that diverges, or ends above the loss it began with, counts as one that ended where it began. A run has failed
if its loss is within `FAILED` of, or above, that of a model that knows only how frequent each symbol or class is.
(Like the paper's criterion, an accuracy below 1.5 times chance.)
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tabulate import tabulate

FAILED = 0.1  # nats
FLAT = 0.01  # nats: between neighbouring η_trgt
EQUAL = 0.03  # nats: about the standard deviation over seeds on these networks
# Two-sided 95% quantiles of Student's t by the number of seeds.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

Item = TypeVar("Item")
Row = dict[str, Any]
Curve = dict[float, dict[int, float]]  # loss by η_trgt and seed
Seeds = dict[int, float]  # a number per seed


@dataclass(frozen=True)
class Claim:
    """A sentence, who says it, what was measured in one case and whether it holds there."""

    text: str
    where: str
    source: str
    study: str
    measured: str
    verdict: str


def select(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def ended(row: Row) -> float:
    """The loss of a run, at most that before training."""
    return min(row["loss"], row["first"])


def failure_level(rows: list[Row]) -> float:
    """The loss above which a run has failed."""
    return rows[0]["entropy"] - FAILED


def curve(rows: Iterable[Row]) -> Curve:
    """The losses by target, in rising order, and seed."""
    made: Curve = {}
    for row in sorted(rows, key=lambda row: row["target"]):
        made.setdefault(row["target"], {})[row["seed"]] = ended(row)
    return made


def best(losses: Curve) -> float:
    """The target of the smallest mean loss."""
    return min(losses, key=lambda target: statistics.mean(losses[target].values()))


def at_best(losses: Curve) -> Seeds:
    """The losses there."""
    return losses[best(losses)]


def is_at_edge(losses: Curve) -> bool:
    """Whether the best target is the first or the last of the grid, so that a better one may lie outside.

    Not where its neighbour is as good to `FLAT`, as of a method that does not go above what it has found.
    """
    means = [statistics.mean(of.values()) for of in losses.values()]
    i = means.index(min(means))
    neighbours = means[:i][-1:] + means[i + 1 : i + 2]
    return len(neighbours) < 2 and all(mean - means[i] >= FLAT for mean in neighbours)


def average(losses: Curve) -> Seeds:
    """The mean over the targets, by seed."""
    return {seed: statistics.mean(of[seed] for of in losses.values()) for seed in next(iter(losses.values()))}


def difference(a: Seeds, b: Seeds) -> list[float]:
    """a - b, seed by seed."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def boundary(losses: Curve, level: float) -> Seeds:
    """The target where the loss goes above `level` for good, by seed, interpolated in ln η.

    Infinity where the last target of the grid does not fail, 0 where every target does.
    """
    made, targets = {}, list(losses)
    for seed in losses[targets[0]]:
        passed = [i for i, target in enumerate(targets) if losses[target][seed] <= level]
        if not passed:
            made[seed] = 0.0
        elif passed[-1] == len(targets) - 1:
            made[seed] = math.inf
        else:
            low, high = targets[passed[-1]], targets[passed[-1] + 1]
            part = (level - losses[low][seed]) / (losses[high][seed] - losses[low][seed])
            made[seed] = low * (high / low) ** part
    return made


def ratio(a: Seeds, b: Seeds) -> list[float]:
    """a / b, seed by seed; NaN where a boundary lies beyond the grid."""
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    return [x / y if 0 < x < math.inf and 0 < y < math.inf else math.nan for x, y in pairs]


def verdict(values: list[float], low: float = -math.inf, high: float = math.inf) -> str:
    """What the seeds allow to say of the claim that the quantity lies between `low` and `high`."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return "unclear"
    mean, half = statistics.mean(values), _T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    if low < mean - half and mean + half < high:
        return "holds"
    return "does not hold" if mean + half < low or mean - half > high else "unclear"


def spread(values: Iterable[float], sign: str = "", digits: int = 3) -> str:
    """Mean ± standard deviation."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return "beyond the grid"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def times(values: Iterable[float]) -> str:
    """Geometric mean, and the factor of a standard deviation."""
    values = list(values)
    if not all(0 < value < math.inf for value in values):
        return "beyond the grid"
    logs = [math.log(value) for value in values]
    mean = f"{math.exp(statistics.mean(logs)):.3g}"
    return f"{mean} ×/÷ {math.exp(statistics.stdev(logs)):.2f}" if len(values) > 1 else mean


def count(values: list[float]) -> str:
    """How many seeds, behind a comma."""
    return f", {len(values)} seed{'s' * (len(values) != 1)}"


def loss_claim(
    text: str, where: str, source: str, study: str, values: list[float], low: float = -math.inf, high: float = math.inf
) -> Claim:
    """A claim on a difference of losses."""
    measured = f"{spread(values, '+')} nats{count(values)}"
    return Claim(text, where, source, study, measured, verdict(values, low, high))


def factor_claim(
    text: str, where: str, source: str, study: str, values: list[float], low: float = 0.0, high: float = math.inf
) -> Claim:
    """A claim on a ratio, in its logarithm."""
    logs = [math.log(value) if value > 0 else math.nan for value in values]
    made = verdict(logs, math.log(low) if low > 0 else -math.inf, math.log(high))
    return Claim(text, where, source, study, f"factor {times(values)}{count(values)}", made)


def claims_table(claims: Iterable[Claim]) -> str:
    """A row per claim and case."""
    return table(
        [
            {"claim": c.text, "where": c.where, "whose": c.source, "measured": c.measured, "verdict": c.verdict}
            for c in claims
        ]
    )


def overview(claims: Iterable[Claim]) -> str:
    """A row per sentence: in which cases it holds, and in which not; of a single case what was measured.

    A sentence that the seeds decide in no case has none.
    """
    rows = [dict.fromkeys(("claim", "whose", "study", "holds", "does not hold", "unclear"), "---")]
    for (text, source, study), cases in groups(claims, lambda c: (c.text, c.source, c.study)).items():
        row = {"claim": text, "whose": source, "study": f"[{study}](results/{study}.md)"}
        for word in ("holds", "does not hold", "unclear"):
            said = [(c.where, c.measured) if len(cases) == 1 else (c.where,) for c in cases if c.verdict == word]
            row[word] = "; ".join(": ".join(filter(None, parts)) for parts in said)
        if row["holds"] or row["does not hold"]:
            rows.append(row)
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def groups(rows: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """The rows by a key, in the order of their first."""
    made: dict[Any, list[Item]] = {}
    for row in rows:
        made.setdefault(key(row), []).append(row)
    return made
