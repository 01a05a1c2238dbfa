"""Guided warmup against tuned linear warmup and what else needs no tuning, on settings that did not choose its rule.

    python recipes/studies/warmup_study.py            # every part that is not finished, then the tables
    python recipes/studies/warmup_study.py gpt random # these parts
    python recipes/studies/warmup_study.py --table    # the tables and the plot from the CSVs alone

Every method's target, the length of linear warmup and the growth of the exponential ramp are chosen on the seeds of
`TUNING`; what is reported are the runs of others, `SEEDS`, and of `bert`, `long` and `longest` also those of
`FRESH`: of the first two the rule was changed after a look at their runs on the former, of the BERT twice.

A run that is in results/warmup_<part>.csv is not repeated. Parts: `gpt` and `gi` (AdamW and GI-Adam on a GPT),
`bert` and `modernbert`, `long` and, on word pieces, `bpe_long` (5 times the steps), `modernbert_long` (4 times),
`longest` (20 times the steps, few targets and two seeds that choose),
`short` (fewer steps: how many reach the loss of tuned linear warmup), `random` (200 random settings: which runs
fail), `guess` (the settings of the other parts, with a target that bounds nothing), and on a GPU `gpu` (a GPT of 14M
parameters, on which seed 0 chooses).
"""

import argparse
import csv
import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tabulate import tabulate
from tqdm import tqdm

from hf_warmup.guided import EVERY

import evidence
from evidence import Claim
from warmup_cases import DEVELOPMENT, Setting, make_stream, train, unigram_entropy
from warmup_rules import RULES

NAME = "warmup_study"
RESULTS = Path(__file__).parent / "results"
TUNING = (0, 1, 2)
SEEDS = (10, 11, 12)
FRESH = {"bert": (20, 21, 22, 30, 31, 32), "long": (30, 31, 32), "longest": (30, 31, 32)}
REPORTED = (*SEEDS, *FRESH["bert"])
FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
GPU_FRACTION = 0.3  # of the lengths that were tried on seed 0 the best one
NEAR = 0.05  # nats
NO_TURN = {"turn": False}  # the momentum's turn is not looked for
GUESS = {"ceiling": False}  # the target is where the first search begins
UNTUNED = ("sqrt(1-b2^t)", "untuned linear", "untuned exponential", "ramp", "guided")

GPT = Setting("GPT", text="code", width=48, depth=2, beta2=0.95, weight_decay=0.1, clip=1.0)
# LayerNorm behind the residual: in 600 steps it hardly leaves the unigram entropy, whatever its warmup.
BERT = replace(DEVELOPMENT["BERT"], width=48, depth=3, steps=2400)
# LayerNorm before the blocks, rotary positions: one that learns in 600 steps.
MODERN = replace(BERT, name="modernbert", family="modernbert", steps=600)
LONG = replace(GPT, name="long", steps=5 * GPT.steps)
LONGEST = replace(GPT, name="longest", steps=20 * GPT.steps)
BPE_LONG = replace(LONG, name="bpe_long", tokens="bpe", width=64, depth=3)
MODERN_LONG = replace(MODERN, name="modernbert_long", steps=4 * MODERN.steps)
# 14M parameters, 8,192 tokens a step.
GPU = Setting(
    "gpu",
    tokens="bpe8192",
    text="packages",
    width=384,
    depth=6,
    head=64,
    context=256,
    batch=32,
    steps=1000,
    beta2=0.95,
    weight_decay=0.1,
    clip=1.0,
    device="cuda",
)

TITLES = {
    "gpt": "GPT, AdamW (β2 = .95)",
    "gi": "GPT, GI-Adam (β2 = .95)",
    "bert": "BERT, AdamW (β2 = .98)",
    "modernbert": "ModernBERT, AdamW (β2 = .98)",
    "modernbert_long": "ModernBERT, 4 times the steps",
    "long": "GPT, 5 times the steps",
    "bpe_long": "GPT on word pieces, 5 times the steps",
}


# The setting and optimizer of a part, and the target that is the best one of tuned linear warmup there.
COMPARED = {
    "gpt": (GPT, "AdamW", 2e-2),
    "gi": (GPT, "GIAdamW", 2e-2),
    "long": (LONG, "AdamW", 1e-2),
    "modernbert": (MODERN, "AdamW", 8e-3),
    "bpe_long": (BPE_LONG, "AdamW", 1e-2),
    "bert": (BERT, "AdamW", 8e-3),
    "modernbert_long": (MODERN_LONG, "AdamW", 8e-3),
}
GUESSES = (1e-3, 0.25, 8.0)  # times that


class Job(NamedTuple):
    """A run."""

    setting: Setting
    optimizer: str
    rule: str
    options: dict[str, Any]
    target: float
    seed: int

    def key(self) -> tuple[str, ...]:
        """What tells it from the others in a CSV."""
        different = {k: v for k, v in asdict(self.setting).items() if v != getattr(Setting(self.setting.name), k)}
        return (
            json.dumps(different),
            self.optimizer,
            self.rule,
            json.dumps(self.options),
            f"{self.target:.6g}",
            str(self.seed),
        )


KEYS = ("setting", "optimizer", "rule", "options", "target", "seed")


def targets(first: float, count: int) -> list[float]:
    """Each twice the last."""
    return [first * 2**i for i in range(count)]


def grid(
    setting: Setting,
    optimizer: str,
    rules: dict[str, list[dict]],
    lrs: list[float],
    seeds: tuple[int, ...] = (*TUNING, *SEEDS),
) -> Iterator[Job]:
    for seed in seeds:
        for rule, options in rules.items():
            for target in lrs:
                for chosen in options:
                    yield Job(setting, optimizer, rule, chosen, target, seed)


def jobs(part: str) -> Iterator[Job]:
    """The runs of a part."""
    tuned = {"linear": [{"fraction": f} for f in FRACTIONS]}
    if part == "gpt":
        lrs = targets(1.25e-3, 8)
        yield from grid(GPT, "AdamW", tuned | {rule: [{}] for rule in UNTUNED}, lrs)
        yield from grid(GPT, "AdamW", {"guided": [{"until": "end"}, NO_TURN], "persistent": [{}]}, lrs)
        yield from grid(GPT, "AdamW", {"ramp": [{"growth": g} for g in (1.03, 1.1)]}, lrs)
        yield from grid(GPT, "RAdam", {"linear": [{}]}, lrs)
        # Far beyond what anybody would ask for.
        absurd = targets(0.32, 3)
        yield from grid(GPT, "AdamW", {"guided": [{}], "linear": [{"fraction": 0.3}]}, absurd)
        yield from grid(GPT, "RAdam", {"linear": [{}]}, absurd)
        # How often to try, at a sensible target and at one that is too high.
        often = {"guided": [{"every": k} for k in (1, 2, 3, 10, 20)]}
        yield from grid(GPT, "AdamW", often, [1e-2, 8e-2], SEEDS)
    if part == "gi":
        lrs = targets(1.25e-3, 8)
        yield from grid(GPT, "GIAdamW", {"ramp": [{}], **tuned}, lrs, TUNING)
        yield from grid(GPT, "GIAdamW", {"guided": [{}], "linear": [{"fraction": f} for f in (0.0, 0.3)]}, lrs)
    if part == "bert":
        lrs = targets(2e-3, 6)
        yield from grid(BERT, "AdamW", {"linear": [{"fraction": f} for f in (0.1, 0.3)]}, lrs[:3], TUNING[:2])
        yield from grid(BERT, "AdamW", {"guided": [{}]}, lrs[1:4], TUNING)
        yield from grid(BERT, "AdamW", {"guided": [{}], "linear": [{"fraction": 0.3}]}, lrs, (*SEEDS, *FRESH[part]))
        yield from grid(BERT, "RAdam", {"linear": [{}]}, lrs[:3], TUNING[:2])
        yield from grid(BERT, "RAdam", {"linear": [{}]}, lrs, (*SEEDS, *FRESH[part]))
    if part == "modernbert":
        tuned = {"linear": [{"fraction": f} for f in (0.0, 0.1, 0.3)]}
        lrs = targets(1e-3, 8)
        yield from grid(MODERN, "AdamW", {"ramp": [{}]}, lrs, TUNING)
        yield from grid(MODERN, "AdamW", {"guided": [{}], **tuned}, lrs)
        yield from grid(MODERN, "RAdam", {"linear": [{}]}, lrs)
        yield from grid(MODERN, "AdamW", {"guided": [{}], "linear": [{"fraction": 0.3}]}, [0.256])
    if part == "modernbert_long":
        lrs = targets(1e-3, 7)
        tuned = {"linear": [{"fraction": f} for f in (0.1, 0.3)]}
        yield from grid(MODERN_LONG, "AdamW", {"guided": [{}], **tuned}, lrs[2:5], TUNING[:2])
        yield from grid(MODERN_LONG, "AdamW", {"guided": [{}], "linear": [{"fraction": 0.3}]}, lrs, SEEDS)
    if part == "long":
        lrs = [5e-3, 1e-2, 4e-2]
        yield from grid(LONG, "AdamW", {"ramp": [{}], "linear": [{"fraction": f} for f in (0.02, 0.3)]}, lrs, TUNING)
        both = {"guided": [{}], "linear": [{"fraction": 0.1}]}
        yield from grid(LONG, "AdamW", both, lrs, TUNING)
        wide = targets(2.5e-3, 6)
        yield from grid(LONG, "AdamW", both, wide, (*SEEDS, *FRESH[part]))
        yield from grid(LONG, "RAdam", {"linear": [{}]}, wide, (*TUNING, *SEEDS, *FRESH[part]))
    if part == "longest":
        lengths = [{"fraction": f} for f in (0.03, 0.1, 0.3)]
        yield from grid(LONGEST, "AdamW", {"linear": lengths}, [5e-3, 1e-2], TUNING[:2])
        yield from grid(LONGEST, "AdamW", {"linear": lengths[1:]}, [2.5e-3], TUNING[:2])
        yield from grid(LONGEST, "AdamW", {"guided": [GUESS]}, [1e-5], (*SEEDS, *FRESH[part]))
        yield from grid(LONGEST, "AdamW", {"linear": lengths[2:]}, [5e-3], (*SEEDS, *FRESH[part]))
        yield from grid(LONGEST, "AdamW", {"guided": [{}]}, [2e-2], SEEDS)
    if part == "bpe_long":
        rules = {"guided": [{}], "linear": [{"fraction": f} for f in (0.1, 0.3)]}
        lrs = targets(2.5e-3, 6)
        yield from grid(BPE_LONG, "AdamW", rules, lrs[:5])
        yield from grid(BPE_LONG, "AdamW", rules, lrs[5:], SEEDS)
        yield from grid(BPE_LONG, "RAdam", {"linear": [{}]}, lrs)
    if part == "short":
        for steps in (180, 210, 240, 270):
            yield from grid(replace(GPT, name="short", steps=steps), "AdamW", {"guided": [{}]}, [1e-2, 2e-2], SEEDS)
    if part == "guess":
        for times in GUESSES[::-1]:
            for of, (setting, optimizer, best) in COMPARED.items():
                yield from grid(setting, optimizer, {"guided": [GUESS]}, [times * best], (*SEEDS, *FRESH.get(of, ())))
    if part == "gpu":
        lrs = targets(5e-4, 7)
        lengths = {"linear": [{"fraction": f} for f in (0.02, 0.1, 0.3)]}
        yield from grid(GPU, "AdamW", {"guided": [{}], **lengths}, lrs, TUNING[:1])
        yield from grid(GPU, "AdamW", {"guided": [{}]}, lrs, SEEDS)
        yield from grid(GPU, "AdamW", {"guided": [GUESS]}, [1e-5, 1.6e-2], (*TUNING[:1], *SEEDS))
        yield from grid(GPU, "AdamW", {"linear": [{"fraction": GPU_FRACTION}]}, lrs, SEEDS)
    if part == "random":
        generator = torch.Generator().manual_seed(2026)

        def pick(values: tuple) -> Any:
            return values[int(torch.randint(len(values), (), generator=generator))]

        for seed in range(200):
            setting = Setting(
                "random",
                text=pick(("shakespeare", "code")),
                width=pick((32, 48, 64)),
                depth=pick((1, 2, 4, 6)),
                context=32,
                steps=150,
                beta2=pick((0.95, 0.98, 0.999)),
                weight_decay=pick((0.0, 0.1)),
                clip=pick((0.0, 1.0)),
                init_scale=pick((0.5, 1.0, 4.0)),
            )
            target = 10 ** (-4 + 4 * float(torch.rand((), generator=generator)))
            for optimizer, rule, options in (
                ("AdamW", "guided", {}),
                ("AdamW", "guided", GUESS),
                ("AdamW", "linear", {"fraction": 0.1}),
                ("AdamW", "linear", {"fraction": 0.0}),
                ("RAdam", "linear", {"fraction": 0.0}),
            ):
                yield Job(setting, optimizer, rule, options, target, seed)


PARTS = (
    *("gpt", "random", "gi", "long", "longest", "short"),
    *("bert", "modernbert", "modernbert_long", "bpe_long", "guess", "gpu"),
)


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    rule = RULES[job.rule](job.setting, job.optimizer, job.target, **job.options)
    made = train(job.setting, job.optimizer, rule, job.seed)
    numbers = {k: f"{v:.6g}" for k, v in made.items()}
    return dict(zip(KEYS, job.key(), strict=True)) | numbers | {"entropy": f"{unigram_entropy(job.setting):.6g}"}


def read(part: str) -> list[dict[str, str]]:
    path = RESULTS / f"warmup_{part}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finish(part: str, processes: int) -> None:
    """Make the runs that are missing."""
    done = {tuple(row[key] for key in KEYS) for row in read(part)}
    missing = list({job.key(): job for job in jobs(part) if job.key() not in done}.values())
    if not missing:
        return
    if part == "gpu":
        if not torch.cuda.is_available():
            raise ValueError("part gpu needs a GPU, and torch finds none")
        make_stream(GPU)
    path = RESULTS / f"warmup_{part}.csv"
    # Threads that wait for work by spinning would slow down the other processes.
    with get_context("spawn").Pool(processes) as pool, open(path, "a", newline="") as file:
        for row in tqdm(pool.imap_unordered(run, missing), total=len(missing), desc=part):
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()


class Curve(NamedTuple):
    """The losses of one method at every target, a list over the seeds that are reported."""

    optimizer: str
    rule: str
    options: dict[str, Any]
    losses: dict[float, list[float]]
    first: float  # the loss before training, over the seeds
    probes: float
    tuning: dict[float, list[float]]  # the losses on the seeds that choose

    def mean(self, target: float) -> float:
        return statistics.mean(self.losses[target])

    @property
    def chosen(self) -> float:
        """The target of the smallest mean loss on the seeds that choose."""
        return min(self.tuning, key=lambda target: statistics.mean(self.tuning[target]))

    def excess(self, over: list[float]) -> list[float]:
        """The mean loss at each of the targets `over`, at most that before training, minus the best at any."""
        best = min(map(self.mean, self.losses))
        return [(min(loss, self.first) if math.isfinite(loss := self.mean(t)) else self.first) - best for t in over]

    @property
    def near(self) -> list[float]:
        """The targets about the best with a mean loss within `NEAR` of it, without a gap."""
        targets = list(self.losses)
        best = min(range(len(targets)), key=lambda i: self.mean(targets[i]))
        far = [i for i, t in enumerate(targets) if not self.mean(t) <= self.mean(targets[best]) + NEAR]
        below, above = [i for i in far if i < best], [i for i in far if i > best]
        return targets[max(below, default=-1) + 1 : min(above, default=len(targets))]


def curves(rows: list[dict[str, str]]) -> list[Curve]:
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["optimizer"], row["rule"], row["options"]), []).append(row)
    made = []
    for (optimizer, rule, options), chosen in groups.items():
        reported, tuning = ([row for row in chosen if int(row["seed"]) in seeds] for seeds in (REPORTED, TUNING))
        numbers = [statistics.mean([float(row[name]) for row in reported or tuning]) for name in ("first", "probes")]
        made.append(Curve(optimizer, rule, json.loads(options), _losses(reported), *numbers, _losses(tuning)))
    return made


def _losses(rows: list[dict[str, str]]) -> dict[float, list[float]]:
    losses: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: (float(row["target"]), int(row["seed"]))):
        losses.setdefault(float(row["target"]), []).append(float(row["loss"]))
    return losses


def tuned(made: list[Curve]) -> Curve:
    """The linear warmup with the best of all fractions and targets on the seeds that choose."""
    linear = [c for c in made if c.rule == "linear" and c.optimizer != "RAdam"]
    return min(linear, key=lambda c: statistics.mean(c.tuning[c.chosen]))


def ours(made: list[Curve]) -> Curve:
    """Guided warmup as it is by default."""
    return next(curve for curve in made if curve.rule == "guided" and not curve.options)


def words(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def name(rule: str, options: dict[str, Any]) -> str:
    """A method in words."""
    if rule == "linear":
        fraction = options.get("fraction", 0.0)
        return f"linear over {fraction:.0%}" if fraction else "no warmup"
    off = {"turn": "without the turn", "ceiling": "the target a guess"}
    chosen = ", ".join(off[k] if k in off else f"{k} {v}" for k, v in options.items())
    return f"{rule}, {chosen}" if chosen else rule


def window(made: list[Curve]) -> list[float]:
    """The targets from 1/4 to 8 times the best of tuned linear warmup, as far as the grid has them."""
    reference = tuned(made)
    return [t for t in reference.losses if 0.24 < t / reference.chosen < 8.1]


def part_table(part: str) -> str:
    """A line per method; its loss at the target that was chosen, and how it stands against the target."""
    made = [curve for curve in curves(read(part)) if "every" not in curve.options]
    reference, over = tuned(made), window(made)
    linear = [curve for curve in made if curve.rule == "linear" and curve.optimizer == reference.optimizer]
    tried = ", ".join(
        f"{name(curve.rule, curve.options)} {statistics.mean(curve.tuning[curve.chosen]):.3f} at {curve.chosen:g}"
        for curve in sorted(linear, key=lambda curve: curve.options.get("fraction", 0.0))
    )
    made = [curve for curve in made if curve.losses]  # others were run on the seeds that choose, and not chosen
    lines = []
    for curve in sorted(made, key=lambda c: (c.optimizer, c.rule, str(c.options))):
        excess = curve.excess(over)
        lines.append(
            {
                "optimizer": curve.optimizer,
                "warmup": name(curve.rule, curve.options) + (" (tuned)" if curve is reference else ""),
                "loss": words(curve.losses[curve.chosen]),
                "at η_trgt": f"{curve.chosen:g}",
                "minus tuned linear": _difference(curve, reference),
                "worst over the range": f"+{max(excess):.3f}",
                f"within {NEAR:g} of the best": f"{curve.near[0]:g} to {curve.near[-1]:g}",
                "sensitivity": f"{statistics.mean(excess):.3f}",
                "forward passes": f"{curve.probes:.0f}" if curve.probes else "",
            }
        )
    note = f"Range: η_trgt from {min(over):g} to {max(over):g} ({max(over) / min(over):.0f} times). On the seeds that "
    note += f"choose: {tried}."
    return f"{tabulate(lines, headers='keys', tablefmt='github', disable_numparse=True)}\n\n{note}"


def summary_table() -> str:
    """A line per setting: guided against tuned linear warmup, and how both and RAdam stand against the target."""
    lines = []
    for part, title in TITLES.items():
        rows = read(part)
        made = curves(rows)
        linear, over, guided = tuned(made), window(made), ours(made)
        radam = next((curve for curve in made if curve.optimizer == "RAdam"), None)
        steps = json.loads(rows[0]["setting"]).get("steps", Setting("").steps)
        excess = [[] if curve is None else curve.excess(over) for curve in (guided, linear, radam)]
        lines.append(
            {
                "setting": title,
                "steps": steps,
                "linear, tuned": f"{words(linear.losses[linear.chosen])} ({linear.options['fraction']:.0%})",
                "guided": words(guided.losses[guided.chosen]),
                "difference": _difference(guided, linear),
                "η_trgt": f"{min(over):g} to {max(over):g}",
                "largest excess: guided, linear, RAdam": ", ".join(f"{max(e):.3f}" if e else "-" for e in excess),
                "mean excess": ", ".join(f"{statistics.mean(e):.3f}" if e else "-" for e in excess),
            }
        )
    note = f"{_seeds()} Excess: the mean loss at a target minus the best at any, over the targets from 1/4 to 8 times "
    note += "the best of tuned linear warmup on the seeds that choose."
    return f"{tabulate(lines, headers='keys', tablefmt='github', disable_numparse=True)}\n\n{note}"


def _seeds() -> str:
    seeds, tuning, bert, long = (", ".join(map(str, those)) for those in (SEEDS, TUNING, FRESH["bert"], FRESH["long"]))
    return (
        f"Means ± standard deviations over seeds {seeds} (BERT also {bert}; GPT, 5 and 20 times the steps, also "
        f"{long}); targets and the length of linear warmup are those of the smallest mean over seeds {tuning} (of the "
        f"masked models of {BERT.steps} steps and the GPT of {LONGEST.steps}, linear warmup's over 0 and 1)."
    )


def _difference(curve: Curve, reference: Curve) -> str:
    pairs = zip(curve.losses[curve.chosen], reference.losses[reference.chosen], strict=True)
    values = [a - b for a, b in pairs]
    return signed(values) if all(map(math.isfinite, values)) and any(values) else ""


def signed(values: list[float]) -> str:
    """The mean of differences, with its sign, and their standard deviation."""
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}"


def guesses(part: str) -> dict[float, dict[int, float]]:
    """The losses of a setting whose target is a guess, by guess and seed."""
    setting, optimizer, best = COMPARED[part]
    whose = Job(setting, optimizer, "guided", GUESS, best, SEEDS[0]).key()[:2]
    made: dict[float, dict[int, float]] = {}
    for row in read("guess"):
        if (row["setting"], row["optimizer"]) == whose:
            made.setdefault(float(row["target"]), {})[int(row["seed"])] = float(row["loss"])
    return dict(sorted(made.items()))


def guess_table() -> str:
    """A line per setting: the loss with every guess, the largest excess, and against tuned linear warmup."""
    lines = []
    for part, title in TITLES.items():
        made, linear = guesses(part), tuned(curves(read(part)))
        means = [statistics.mean(of.values()) for of in made.values()]
        seeds = sorted(next(iter(made.values())))
        every = [statistics.mean(of[seed] for of in made.values()) for seed in seeds]
        differences = [a - b for a, b in zip(every, linear.losses[linear.chosen], strict=True)]
        lines.append(
            {
                "setting": title,
                "guesses": ", ".join(f"{guess:g}" for guess in made),
                "losses": ", ".join(f"{mean:.3f}" for mean in means),
                "largest excess": f"{max(means) - min(means):.3f}",
                "mean of all": words(every),
                "linear, tuned": words(linear.losses[linear.chosen]),
                "difference": signed(differences),
            }
        )
    note = "The guesses are 1/1000, 1/4 and 8 times the best target of tuned linear warmup. Means over the seeds; "
    note += "then the mean of a seed's three runs, and its difference from that seed's run of tuned linear warmup."
    return f"{tabulate(lines, headers='keys', tablefmt='github', disable_numparse=True)}\n\n{note}"


def length_table() -> str:
    """The same GPT trained for longer, its target a guess, against tuned linear warmup."""
    lines = []
    for part, setting in {"gpt": GPT, "long": LONG, "longest": LONGEST}.items():
        linear = tuned(curves(read(part)))
        whose = Job(setting, "AdamW", "guided", GUESS, 1.0, 0).key()[:4]
        made = _losses([r for r in read("guess") + read(part) if tuple(r[k] for k in KEYS[:4]) == whose])
        guess = min(made)
        lines.append(
            {
                "steps": setting.steps,
                "linear, tuned": f"{words(linear.losses[linear.chosen])} ({linear.options['fraction']:.0%})",
                "at η_trgt": f"{linear.chosen:g}",
                "guided": words(made[guess]),
                "guess": f"{guess:g}",
                "difference": signed([a - b for a, b in zip(made[guess], linear.losses[linear.chosen], strict=True)]),
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def trials_table() -> str:
    """The loss against how often guided warmup tries."""
    lines, made = [], [row for row in read("gpt") if row["rule"] == "guided" and int(row["seed"]) in SEEDS]
    chosen = [curve for curve in curves(made) if curve.options.keys() <= {"every"}]
    for curve in sorted(chosen, key=lambda c: c.options.get("every", EVERY)):
        rows = [row for row in made if json.loads(row["options"]) == curve.options]
        line = {"steps between trials": curve.options.get("every", EVERY)}
        for target in (1e-2, 8e-2):
            passes = statistics.mean(float(r["probes"]) for r in rows if float(r["target"]) == target)
            line[f"η_trgt = {target:g}: forward passes"] = f"{passes:.0f}"
            line[f"{target:g}: loss"] = words(curve.losses[target])
        lines.append(line)
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def short_table() -> str:
    """Fewer steps with guided warmup against all steps with tuned linear warmup."""
    reference = tuned(curves(read("gpt")))
    goal = reference.mean(reference.chosen)
    lines = []
    rows = [r for r in read("short") + read("gpt") if r["rule"] == "guided" and r["options"] == "{}"]
    rows = [r for r in rows if int(r["seed"]) in SEEDS]
    for target in (1e-2, 2e-2):
        for steps in (180, 210, 240, 270, 300):
            chosen = [
                row
                for row in rows
                if float(row["target"]) == target and json.loads(row["setting"]).get("steps", 300) == steps
            ]
            losses = [float(row["loss"]) for row in chosen]
            probes = statistics.mean(float(row["probes"]) for row in chosen)
            lines.append(
                {
                    "η_trgt": f"{target:g}",
                    "steps": steps,
                    "of the steps": f"{steps / GPT.steps:.2f}",
                    "of the compute": f"{(steps + probes / 3) / GPT.steps:.2f}",
                    "loss": words(losses),
                    "minus tuned linear over 300": f"{statistics.mean(losses) - goal:+.3f}",
                }
            )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def gpu_table() -> str:
    """A line per method and target, with the loss of every seed that was run."""
    made: dict[str, dict[str, Any]] = {}
    for row in sorted(read("gpu"), key=lambda row: (row["rule"], row["options"], float(row["target"]))):
        warmup = name(row["rule"], json.loads(row["options"]))
        line = made.setdefault(f"{warmup} {row['target']}", {"warmup": warmup, "η_trgt": row["target"]})
        line[f"seed {row['seed']}: loss"] = f"{float(row['loss']):.3f}"
        line[f"seed {row['seed']}: largest η"] = f"{float(row['peak']):.5f}"
    seeds = sorted({int(row["seed"]) for row in read("gpu")})
    columns = ["warmup", "η_trgt", *(f"seed {seed}: {what}" for seed in seeds for what in ("loss", "largest η"))]
    lines = [{column: line.get(column, "") for column in columns} for line in made.values()]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def random_table() -> str:
    """How many of 200 runs fail."""
    lines = []
    for curve in ("guided", name("guided", GUESS), "linear 10%", "none", "RAdam"):
        rows = [row for row in read("random") if method(row) == curve]
        line = {"warmup": curve}
        for label, low, high in (
            ("all", 0.0, 2.0),
            ("η_trgt < 1e-3", 0.0, 1e-3),
            ("1e-3 to 1e-2", 1e-3, 1e-2),
            ("1e-2 to 1e-1", 1e-2, 1e-1),
            ("> 1e-1", 1e-1, 2.0),
        ):
            chosen = [row for row in rows if low <= float(row["target"]) < high]
            failed = [row for row in chosen if not float(row["loss"]) <= float(row["entropy"])]
            line[label] = f"{len(failed)} of {len(chosen)}"
        line["not finite"] = str(sum(not math.isfinite(float(row["loss"])) for row in rows))
        lines.append(line)
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def claims() -> list[Claim]:
    """What we say of guided warmup, against the runs that are there."""
    made, guessed = [], _is_complete("guess")
    for part, title in TITLES.items():
        if _is_complete(part):
            tail = f"({title.replace(' (', ', ').replace(')', '')})"
            made += _part_claims(part, tail)
            if guessed:
                made.append(_guess_claim(part, tail))
    if _is_complete("random"):
        random = [row for row in read("random") if float(row["target"]) >= 1e-3]
        failed = {
            name: sum(not float(row["loss"]) <= float(row["entropy"]) for row in random if method(row) == name)
            for name in ("guided", "linear 10%", "none", "RAdam")
        }
        guided, *others = failed.values()
        text = "With guided warmup fewer random trainings fail than over 10% of the steps, without it, or with RAdam"
        total = sum(method(row) == "guided" for row in random)
        measured = f"{guided} against {', '.join(map(str, others))} of {total}"
        verdict = "holds" if guided < min(others) else "does not hold"
        made.append(Claim(f"{text} (GPT, η_trgt from 1e-3 to 1)", "ours", NAME, measured, verdict))
    return made


def _guess_claim(part: str, tail: str) -> Claim:
    made = list(guesses(part).values())
    apart = [max(of[seed] for of in made) - min(of[seed] for of in made) for seed in made[0]]
    text = "With the target a guess, from 1/1000 to 8 times the best, guided warmup ends within .05 nats"
    return evidence.loss_claim(f"{text} {tail}", "asked", NAME, apart, high=0.05)


def _is_complete(part: str) -> bool:
    return {job.key() for job in jobs(part)} <= {tuple(row[key] for key in KEYS) for row in read(part)}


def _part_claims(part: str, tail: str) -> list[Claim]:
    rows = [row for row in read(part) if row["optimizer"] != "RAdam"]  # whose rule is that of no warmup
    made_curves = curves(rows)
    reference, over, default = tuned(made_curves), window(made_curves), ours(made_curves)

    def losses(of: Curve) -> evidence.Curve:
        chosen = [row for row in rows if (row["rule"], json.loads(row["options"])) == (of.rule, of.options)]
        numbers = [{k: float(row[k]) for k in ("target", "seed", "loss", "first")} for row in chosen]
        return evidence.curve(row for row in numbers if row["seed"] in REPORTED)

    guided, best_linear = losses(default), losses(reference)
    text = "Guided warmup is as good as linear warmup tuned over target and length on other seeds"
    difference = evidence.difference(guided[default.chosen], best_linear[reference.chosen])
    made = [evidence.loss_claim(f"{text} {tail}", "ours", NAME, difference, high=evidence.EQUAL)]
    if max(over) / min(over) > 30:
        worst = [
            max(guided[target][seed] for target in over) - min(of[seed] for of in guided.values())
            for seed in evidence.at_best(guided)
        ]
        text = "Guided warmup is within .05 nats of its best over a factor of 32 in η_trgt"
        made.append(evidence.loss_claim(f"{text} {tail}", "asked", NAME, worst, high=0.05))
        ratios = [
            _sensitivity(guided, over, seed) / _sensitivity(best_linear, over, seed)
            for seed in evidence.at_best(guided)
        ]
        text = "Its mean excess over that range is at most a quarter of tuned linear warmup's"
        made.append(evidence.factor_claim(f"{text} {tail}", "asked", NAME, ratios, high=0.25))
    return made


def _sensitivity(losses: evidence.Curve, over: list[float], seed: int) -> float:
    return statistics.mean(losses[target][seed] for target in over) - min(of[seed] for of in losses.values())


def method(row: dict[str, str]) -> str:
    if row["optimizer"] == "RAdam" or row["rule"] == "guided":
        return "RAdam" if row["optimizer"] == "RAdam" else name("guided", json.loads(row["options"]))
    return "linear 10%" if json.loads(row["options"])["fraction"] else "none"


def plot(path: Path) -> None:
    """Loss against the target: guided, tuned linear, the ramp alone, RAdam."""
    parts = [part for part in ("gpt", "gi", "bert", "modernbert") if read(part)]
    figure = Figure(figsize=(4 * len(parts), 3.4), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        made = curves(read(part))
        reference = tuned(made)
        none = [c for c in made if c.options == {"fraction": 0.0} and c.optimizer != "RAdam"]
        shown = [
            ("guided", ours(made), "o-"),
            (f"{name(reference.rule, reference.options)} (tuned)", reference, "s--"),
            ("exponential ramp", next((c for c in made if c.rule == "ramp" and not c.options), None), "^:"),
            ("no warmup", next(iter(none), None), "v:"),
            ("RAdam", next((c for c in made if c.optimizer == "RAdam"), None), "x-."),
        ]
        for label, curve, style in shown:
            if curve is not None and curve.losses:
                axes.plot(list(curve.losses), [curve.mean(t) for t in curve.losses], style, label=label, markersize=4)
        title, _, _ = TITLES[part].partition(" (")
        axes.set(xscale="log", xlabel="target learning rate", ylabel="validation loss", title=title)
        axes.xaxis.set_minor_formatter(NullFormatter())  # of a short range they overlap
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def report() -> str:
    """Everything, as a page."""
    parts = [f"## {title}\n\n{part_table(part)}" for part, title in TITLES.items() if read(part)]
    if _is_complete("guess"):
        parts.append(f"## Where the target is a guess\n\n{guess_table()}")
        if _is_complete("longest"):
            parts.append(f"## The same GPT, more steps\n\n{length_table()}")
    parts.append(f"## How often to try\n\n{trials_table()}")
    if read("gpu"):
        note = (
            "AdamW (β2 = .95), bf16; one NVIDIA H100, torch 2.11.0, transformers 5.24.0, commits 57d796c and bf5f515 "
            "(of the same rule); what half an hour there was enough for. `warmup_study.py gpu` makes the other runs."
        )
        parts.append(f"## GPT of 14M parameters on a GPU, 1000 steps\n\n{gpu_table()}\n\n{note}")
    if read("short"):
        parts.append(f"## Steps to the loss of tuned linear warmup\n\n{short_table()}")
    if read("random"):
        parts.append(f"## 200 random settings\n\n{random_table()}")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return "\n\n".join(
        [
            f"## All settings\n\n{summary_table()}",
            *parts,
            f"{_seeds()} {versions}; one thread of a CPU per run. `python recipes/studies/warmup_study.py`\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = [part for part in PARTS if part != "gpu" or torch.cuda.is_available()]
    parser.add_argument("parts", nargs="*", default=here)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true", help="make no runs")
    args = parser.parse_args()
    for part in () if args.table else args.parts:
        finish(part, args.processes)
    (RESULTS / "warmup_study.md").write_text(report())
    plot(RESULTS / "warmup_study.png")


if __name__ == "__main__":
    main()
