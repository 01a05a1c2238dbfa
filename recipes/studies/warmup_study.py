"""Guided warmup against tuned linear warmup and what else needs no tuning, on settings that did not choose its rule.

    python recipes/studies/warmup_study.py            # every part that is not finished, then the tables
    python recipes/studies/warmup_study.py gpt random # these parts
    python recipes/studies/warmup_study.py --table    # the tables and the plot from the CSVs alone

The target of every method, the length of linear warmup and the growth of the exponential ramp are chosen on the
seeds of `TUNING`; what is reported are the runs of others, `SEEDS`, and of some parts also those of `FRESH`. Guided
warmup has nothing to choose: it is reported with `auto_lr`, which finds the learning rate, and with one that bounds
it, which is the best of tuned linear warmup or 8 times that.

A run that is in results/warmup_<part>.csv is not repeated. Parts: `gpt`, `gi` and `muon` (AdamW, GI-Adam and Muon
on a GPT), `llama` and `muon_llama` (a Llama with grouped queries and tied embeddings, on word pieces), `qwen3`,
`cnn` and `vit`, `bert` and `modernbert`, `long` and, on word pieces, `bpe_long` (5 times the steps),
`modernbert_long` (4 times), `longest` (20 times the steps, two seeds that choose), `random` (200 random settings:
which runs fail), `ablation` (every constant of guided warmup halved and doubled), and on a GPU `gpu` (a GPT of 14M
parameters, on which seed 0 chooses).
"""

import argparse
import csv
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tabulate import tabulate
from tqdm import tqdm

from hf_warmup import GuidedWarmup

import evidence
from evidence import Claim, Seeds
from warmup_cases import DEVELOPMENT, Setting, make_stream, train, unigram_entropy
from warmup_rules import RULES

NAME = "warmup_study"
RESULTS = Path(__file__).parent / "results"
TUNING = (0, 1, 2)
SEEDS = (10, 11, 12)
FRESH = {"bert": (20, 21, 22, 30, 31, 32), "long": (30, 31, 32), "longest": (30, 31, 32)}
ABLATION_SEEDS = (40, 41, 42)
REPORTED = (*SEEDS, *FRESH["bert"])
FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
AUTO = {"auto_lr": True}  # the target bounds nothing
TIMES = 8  # the best target of tuned linear warmup: a learning rate that is much too high

GPT = Setting("GPT", text="code", width=48, depth=2, beta2=0.95, weight_decay=0.1, clip=1.0)
# LayerNorm behind the residual: in 600 steps it hardly leaves the unigram entropy, whatever its warmup.
BERT = replace(DEVELOPMENT["BERT"], width=48, depth=3, steps=2400)
# LayerNorm before the blocks, rotary positions: one that learns in 600 steps.
MODERN = replace(BERT, name="modernbert", family="modernbert", steps=600)
LONG = replace(GPT, name="long", steps=5 * GPT.steps)
LONGEST = replace(GPT, name="longest", steps=20 * GPT.steps)
BPE_LONG = replace(LONG, name="bpe_long", tokens="bpe", width=64, depth=3)
MODERN_LONG = replace(MODERN, name="modernbert_long", steps=4 * MODERN.steps)
# RMSNorm, SwiGLU, 6 heads of queries on 3 of keys and values, tied embeddings.
LLAMA = Setting(
    "llama",
    family="llama-gqa",
    tokens="bpe1024",
    text="code",
    width=96,
    depth=4,
    steps=400,
    beta2=0.95,
    weight_decay=0.1,
    clip=1.0,
)
# The same with a norm on queries and keys, and as many heads as the width has of 16.
QWEN = replace(LLAMA, name="qwen3", family="qwen3", width=64, depth=3)
# Noisy gratings in ten orientations; the CNN of the other studies, and a ViT.
CNN = Setting("cnn", family="cnn", width=48, depth=3, batch=64, steps=200, weight_decay=0.01, noise=1.5)
VIT = Setting("vit", family="vit", width=48, depth=3, batch=64, steps=300, weight_decay=0.05, clip=1.0)
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

ABLATED_SETTINGS = (GPT, LONG, MODERN)

TITLES = {
    "gpt": "GPT, AdamW (β2 = .95)",
    "gi": "GPT, GI-Adam (β2 = .95)",
    "long": "GPT, 5 times the steps",
    "longest": "GPT, 20 times the steps",
    "bpe_long": "GPT on word pieces, 5 times the steps",
    "llama": "Llama on word pieces, AdamW (β2 = .95)",
    "muon": "GPT, Muon",
    "muon_llama": "Llama on word pieces, Muon",
    "qwen3": "Qwen3 on word pieces, AdamW (β2 = .95)",
    "cnn": "CNN, AdamW (β2 = .999)",
    "vit": "ViT, AdamW (β2 = .999)",
    "bert": "BERT, AdamW (β2 = .98)",
    "modernbert": "ModernBERT, AdamW (β2 = .98)",
    "modernbert_long": "ModernBERT, 4 times the steps",
    "gpu": "GPT of 14M parameters on a GPU, 1000 steps",
}
PARTS = (*TITLES, "random", "ablation")
ABLATED = {
    "DISTANCE": (0.15, 0.6),
    "SHARE": (0.11, 0.44),
    "MOST_STEPS": (60, 240),
    "SLOPES": (3, 12),
    "POWER": (1, 4),
    "PEAK": (0.075, 0.3),
    "FALL": (0.05, 0.2),
    "STEEPEST": (1.5, 6),
}


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


def lengths(*fractions: float) -> dict[str, list[dict]]:
    """Linear warmup over these fractions of the steps."""
    return {"linear": [{"fraction": f} for f in fractions]}


def guided(
    setting: Setting, optimizer: str, bounds: list[float], seeds: tuple[int, ...] = SEEDS, fresh: tuple[int, ...] = ()
) -> Iterator[Job]:
    """Guided warmup without a learning rate, also on fresh seeds, and with one as a bound."""
    yield from grid(setting, optimizer, {"guided": [AUTO]}, [1.0], (*seeds, *fresh))
    yield from grid(setting, optimizer, {"guided": [{}]}, bounds, seeds)


def jobs(part: str) -> Iterator[Job]:
    """The runs of a part."""
    if part == "random":
        yield from random_jobs()
        return
    if part == "ablation":
        varied = [AUTO, *(AUTO | {name: value} for name, values in ABLATED.items() for value in values)]
        for setting in ABLATED_SETTINGS:
            yield from grid(setting, "AdamW", {"guided": varied}, [1.0], ABLATION_SEEDS)
        return
    every = (*TUNING, *SEEDS, *FRESH.get(part, ()))
    none = {"linear": [{}]}
    if part == "gpt":
        lrs, absurd = targets(1.25e-3, 8), targets(0.32, 3)
        yield from guided(GPT, "AdamW", [*lrs, *absurd])
        others = ("sqrt(1-b2^t)", "untuned linear", "untuned exponential", "persistent")
        yield from grid(GPT, "AdamW", lengths(*FRACTIONS) | {rule: [{}] for rule in others}, lrs)
        yield from grid(GPT, "AdamW", {"ramp": [{}, {"growth": 1.03}, {"growth": 1.1}]}, lrs)
        yield from grid(GPT, "AdamW", lengths(0.5), lrs[3:6])
        yield from grid(GPT, "AdamW", lengths(0.5), lrs[7:], SEEDS)
        yield from grid(GPT, "AdamW", lengths(0.3), absurd)
        yield from grid(GPT, "RAdam", none, [*lrs, *absurd])
    if part == "gi":
        lrs = targets(1.25e-3, 8)
        yield from guided(GPT, "GIAdamW", lrs)
        yield from grid(GPT, "GIAdamW", {"ramp": [{}], **lengths(*FRACTIONS)}, lrs, TUNING)
        yield from grid(GPT, "GIAdamW", lengths(0.0, 0.3), lrs, SEEDS)
    if part == "bert":
        lrs = targets(2e-3, 6)
        yield from guided(BERT, "AdamW", lrs, fresh=FRESH[part])
        yield from grid(BERT, "AdamW", {"guided": [{}]}, [lrs[2], lrs[5]], FRESH[part])
        yield from grid(BERT, "AdamW", lengths(0.1, 0.3), lrs[:3], TUNING[:2])
        yield from grid(BERT, "AdamW", lengths(0.3), lrs, (*SEEDS, *FRESH[part]))
        yield from grid(BERT, "RAdam", none, lrs[:3], TUNING[:2])
        yield from grid(BERT, "RAdam", none, lrs, (*SEEDS, *FRESH[part]))
    if part == "modernbert":
        lrs = targets(1e-3, 8)
        yield from guided(MODERN, "AdamW", [*lrs, 0.256])
        yield from grid(MODERN, "AdamW", {"ramp": [{}]}, lrs, TUNING)
        yield from grid(MODERN, "AdamW", lengths(0.0, 0.1, 0.3), lrs)
        yield from grid(MODERN, "AdamW", lengths(0.3), [0.256])
        yield from grid(MODERN, "AdamW", lengths(0.5), lrs[2:5])
        yield from grid(MODERN, "AdamW", lengths(0.5), [lrs[6]], SEEDS)
        yield from grid(MODERN, "RAdam", none, lrs)
    if part == "modernbert_long":
        lrs = targets(1e-3, 7)
        yield from guided(MODERN_LONG, "AdamW", lrs)
        yield from grid(MODERN_LONG, "AdamW", lengths(0.1, 0.3), lrs[2:5], TUNING[:2])
        yield from grid(MODERN_LONG, "AdamW", lengths(0.3), lrs, SEEDS)
    if part == "long":
        lrs = targets(2.5e-3, 6)
        yield from guided(LONG, "AdamW", lrs, fresh=FRESH[part])
        yield from grid(LONG, "AdamW", {"guided": [{}]}, [lrs[2], lrs[5]], FRESH[part])
        tried = [lrs[1], lrs[2], lrs[4]]
        yield from grid(LONG, "AdamW", {"ramp": [{}], **lengths(0.02, 0.1, 0.3)}, tried, TUNING)
        yield from grid(LONG, "AdamW", lengths(0.1), lrs, (*SEEDS, *FRESH[part]))
        yield from grid(LONG, "AdamW", lengths(0.5), lrs[1:4], every)
        yield from grid(LONG, "AdamW", lengths(0.5), lrs[5:], SEEDS)
        yield from grid(LONG, "RAdam", none, lrs, every)
    if part == "longest":
        lrs = targets(2.5e-3, 3)
        yield from guided(LONGEST, "AdamW", [lrs[1], TIMES * lrs[1]], fresh=FRESH[part])
        yield from grid(LONGEST, "AdamW", lengths(0.03), lrs[1:], TUNING[:2])
        yield from grid(LONGEST, "AdamW", lengths(0.1, 0.3), lrs, TUNING[:2])
        yield from grid(LONGEST, "AdamW", lengths(0.3), lrs[1:2], (*SEEDS, *FRESH[part]))
    if part == "bpe_long":
        lrs = targets(2.5e-3, 6)
        yield from guided(BPE_LONG, "AdamW", lrs)
        yield from grid(BPE_LONG, "AdamW", lengths(0.1, 0.3), lrs[:5])
        yield from grid(BPE_LONG, "AdamW", lengths(0.1, 0.3), lrs[5:], SEEDS)
        yield from grid(BPE_LONG, "AdamW", lengths(0.5), lrs[1:4])
        yield from grid(BPE_LONG, "AdamW", lengths(0.5), lrs[5:], SEEDS)
        yield from grid(BPE_LONG, "RAdam", none, lrs)
    if part == "llama":
        lrs = targets(3e-3, 3)
        yield from guided(LLAMA, "AdamW", [*lrs[1:], *(TIMES * lr for lr in lrs[1:])])
        yield from grid(LLAMA, "AdamW", lengths(0.1, 0.3, 0.5), lrs)
        yield from grid(LLAMA, "AdamW", lengths(0.1, 0.3, 0.5), [TIMES * lrs[1]], SEEDS)
    if part in ("muon", "muon_llama"):
        setting, lrs = (GPT if part == "muon" else LLAMA), targets(5e-3, 4)
        yield from guided(setting, "Muon", [lrs[2], TIMES * lrs[2]])
        yield from grid(setting, "Muon", lengths(0.0, 0.03, 0.1), lrs, TUNING[:2])
        yield from grid(setting, "Muon", lengths(0.0, 0.03, 0.1), lrs[1:3], SEEDS)
        yield from grid(setting, "Muon", lengths(0.1), [TIMES * lrs[2]], SEEDS)
    if part == "qwen3":
        lrs = targets(3e-3, 3)
        yield from guided(QWEN, "AdamW", [*lrs[1:], *(TIMES * lr for lr in lrs[1:])])
        yield from grid(QWEN, "AdamW", lengths(0.1, 0.3, 0.5), lrs, (*TUNING[:2], *SEEDS))
    if part in ("cnn", "vit"):
        setting, lrs = (CNN, targets(2.5e-3, 4)) if part == "cnn" else (VIT, targets(1e-3, 4))
        yield from guided(setting, "AdamW", [*lrs[1:], *(TIMES * lr for lr in lrs[1:3])])
        yield from grid(setting, "AdamW", lengths(0.0, 0.1, 0.3, 0.5), lrs, (*TUNING[:2], *SEEDS))
    if part == "gpu":
        lrs = targets(5e-4, 5)
        yield from guided(GPU, "AdamW", [lrs[2], TIMES * lrs[2]])
        yield from grid(GPU, "AdamW", lengths(0.02, 0.1, 0.3), lrs, TUNING[:1])
        yield from grid(GPU, "AdamW", lengths(0.3), lrs[1:4], SEEDS)


def random_jobs() -> Iterator[Job]:
    """A random setting, and a random target for all that ask for one, per seed."""
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
        yield Job(setting, "AdamW", "guided", AUTO, 1.0, seed)
        yield Job(setting, "AdamW", "guided", {}, target, seed)
        for optimizer, fraction in (("AdamW", 0.1), ("AdamW", 0.0), ("RAdam", 0.0)):
            yield Job(setting, optimizer, "linear", {"fraction": fraction}, target, seed)


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    rule = RULES[job.rule](job.setting, job.optimizer, job.target, **job.options)
    try:
        made = train(job.setting, job.optimizer, rule, job.seed)
    except (
        RuntimeError
    ) as error:  # guided warmup has found nothing that bounds it: counted as a run that learned nothing
        if "nothing bounds" not in str(error):
            raise
        start = unigram_entropy(job.setting)
        made = {"loss": start, "first": start, "peak": 0.0, "probes": 0}
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


@dataclass(frozen=True)
class Method:
    """A warmup with an optimizer, and the losses of its runs by target and seed.

    A run that ended above the loss before training, or diverged, counts as one that ended there.
    """

    optimizer: str
    rule: str
    options: dict[str, Any]
    tuning: evidence.Curve  # on the seeds that choose
    reported: evidence.Curve
    peaks: evidence.Curve  # the largest η of the reported runs

    @property
    def name(self) -> str:
        """In words."""
        if self.rule != "linear":
            return ", ".join([self.rule, *(k if v is True else f"{k} {v}" for k, v in self.options.items())])
        fraction = self.options.get("fraction", 0.0)
        warmup = f"linear over {fraction:.0%}" if fraction else "no warmup"
        return f"RAdam, {warmup}" if self.optimizer == "RAdam" else warmup

    @property
    def chosen(self) -> float:
        """The target of the smallest mean loss on the seeds that choose."""
        return evidence.best(self.tuning)

    @property
    def at_chosen(self) -> float:
        """That mean loss."""
        return statistics.mean(self.tuning[self.chosen].values())


def methods(rows: list[dict[str, str]]) -> list[Method]:
    """What the rows of a part are runs of."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        numbers = {"target": float(row["target"]), "seed": int(row["seed"]), "first": float(row["first"])}
        # min keeps its first argument beside NaN.
        numbers |= {"loss": min(numbers["first"], float(row["loss"])), "peak": float(row["peak"])}
        groups.setdefault((row["optimizer"], row["rule"], row["options"]), []).append(numbers)
    made = []
    for (optimizer, rule, options), runs in groups.items():
        tuning, reported = ([run for run in runs if run["seed"] in seeds] for seeds in (TUNING, REPORTED))
        peaks = [run | {"loss": run["peak"], "first": math.inf} for run in reported]
        losses = (evidence.curve(tuning), evidence.curve(reported), evidence.curve(peaks))
        made.append(Method(optimizer, rule, json.loads(options), *losses))
    return made


def is_linear(method: Method) -> bool:
    """Whether it is linear warmup, or none."""
    return method.rule == "linear" and method.optimizer != "RAdam"


def tuned(made: list[Method]) -> Method:
    """The linear warmup with the best of all fractions and targets on the seeds that choose."""
    return min((m for m in made if is_linear(m) and m.tuning), key=lambda m: m.at_chosen)


class Line(NamedTuple):
    """What a method did on the seeds that are reported."""

    name: str
    target: str
    losses: Seeds


SAME, HIGHER, AUTOMATIC = "guided", f"guided, {TIMES} times the target", "guided, auto_lr"
LINEAR_HIGHER = f"linear, {TIMES} times the target"


def compared(made: list[Method]) -> dict[str, Line]:
    """Tuned linear warmup, and what nothing was chosen for, as far as it has been run."""
    reference = tuned(made)
    best = reference.chosen
    lines = {"tuned": Line(f"{reference.name} (tuned)", f"{best:g}", reference.reported.get(best, {}))}
    ours = {method.name: method for method in made if method.rule == "guided"}
    if auto := ours.get("guided, auto_lr"):
        (losses,), (peaks,) = auto.reported.values(), auto.peaks.values()
        low, high = min(peaks.values()), max(peaks.values())
        lines[AUTOMATIC] = Line(AUTOMATIC, f"finds {low:.2g} to {high:.2g}", losses)
    guides = [method for method in made if method.rule == "guided" and not method.options]
    warmups = [method for method in made if is_linear(method) and method.options.get("fraction")]
    for label, target, which in (
        (SAME, best, guides),
        (HIGHER, TIMES * best, guides),
        (LINEAR_HIGHER, TIMES * best, warmups),
    ):
        if line := _nearest(label, target, which):
            lines[label] = line
    return lines


def _nearest(label: str, target: float, made: list[Method]) -> Line | None:
    """The runs whose target is at most a factor of 2 away; of several methods those of the smallest loss."""
    runs = {
        (round(abs(math.log2(at / target)), 2), statistics.mean(losses.values()), at): losses
        for method in made
        for at, losses in method.reported.items()
    }
    (off, _, at), losses = min(runs.items(), default=((math.inf, 0.0, 0.0), {}), key=lambda item: item[0])
    return Line(label, f"{at:g}", losses) if off <= 1 else None


def part_table(made: list[Method]) -> str:
    """What nothing was chosen for, and of every other kind of warmup the best on the seeds that choose."""
    reference = tuned(made)
    lines = list(compared(made).values())
    kinds: dict[tuple[str, bool], list[Method]] = {}
    for method in made:
        kind = f"{method.optimizer} {method.rule}", bool(method.options.get("fraction"))
        if method.rule != "guided" and method.tuning and method.chosen in method.reported:
            kinds.setdefault(kind, []).append(method)
    best = [min(those, key=lambda method: method.at_chosen) for those in kinds.values()]
    for method in sorted(best, key=lambda method: method.name):
        if method.name != reference.name:
            lines.append(Line(method.name, f"{method.chosen:g}", method.reported[method.chosen]))
    table = _table(
        {
            "warmup": line.name,
            "η_trgt": line.target,
            "loss": evidence.spread(line.losses.values()) if line.losses else "",
            "minus tuned linear": _difference(line.losses, lines[0].losses),
        }
        for line in lines
    )
    linear = sorted((m for m in made if is_linear(m) and m.tuning), key=lambda m: m.options.get("fraction", 0.0))
    tried = ", ".join(f"{method.name} {method.at_chosen:.3f} at {method.chosen:g}" for method in linear)
    return f"{table}\n\nOn the seeds that choose: {tried}."


def summary_table(made: dict[str, list[Method]]) -> str:
    """A line per part: tuned linear warmup, and the difference of what nothing was chosen for."""
    lines = []
    for part, of in made.items():
        there = compared(of)
        linear = there.pop("tuned")
        others = (AUTOMATIC, SAME, HIGHER, LINEAR_HIGHER)
        differences = {k: _difference(there[k].losses, linear.losses) if k in there else "" for k in others}
        loss = evidence.spread(linear.losses.values()) if linear.losses else ""
        name = linear.name.removeprefix("linear ").removesuffix(" (tuned)")
        lines.append({"setting": TITLES[part], "linear, tuned": f"{loss} ({name} to {linear.target})"} | differences)
    return _table(lines)


def _table(lines: Iterable[dict[str, Any]]) -> str:
    return tabulate(list(lines), headers="keys", tablefmt="github", disable_numparse=True)


def _difference(losses: Seeds, reference: Seeds) -> str:
    values = evidence.difference(losses, reference)
    return evidence.spread(values, "+") if any(values) else ""


def random_table() -> str:
    """How many of 200 runs fail."""
    lines = []
    for name, rows in _random_rows().items():
        line = {"warmup": name}
        for label, low, high in (
            ("all", 0.0, 2.0),
            ("η_trgt < 1e-3", 0.0, 1e-3),
            ("1e-3 to 1e-2", 1e-3, 1e-2),
            ("1e-2 to 1e-1", 1e-2, 1e-1),
            ("> 1e-1", 1e-1, 2.0),
        ):
            chosen = [row for row in rows if low <= float(row["target"]) < high]
            line[label] = f"{sum(map(has_failed, chosen))} of {len(chosen)}"
            if name == AUTOMATIC and label != "all":  # there is no target
                line[label] = ""
        line["not finite"] = str(sum(not math.isfinite(float(row["loss"])) for row in rows))
        lines.append(line)
    return _table(lines)


def has_failed(row: dict[str, str]) -> bool:
    """Whether a run has not learned more than how often each token comes."""
    return not float(row["loss"]) <= float(row["entropy"])


def _random_rows() -> dict[str, list[dict[str, str]]]:
    """The runs of the random settings, by method; what has none is left out."""
    made: dict[str, list[dict[str, str]]] = {name: [] for name in (AUTOMATIC, SAME)}
    for row in read("random"):
        method = Method(row["optimizer"], row["rule"], json.loads(row["options"]), {}, {}, {})
        made.setdefault(method.name, []).append(row)
    return {name: rows for name, rows in made.items() if rows}


def ablation_table() -> str:
    """The rule with one constant halved or doubled, minus the rule as it is, seed by seed."""
    losses: dict[tuple[str, str], Seeds] = {}
    settings: dict[str, str] = {}  # what tells a setting from the others, and its title
    named = {setting.name: TITLES[setting.name.lower()] for setting in ABLATED_SETTINGS}
    for row in read("ablation"):
        name = next(job.setting.name for job in jobs("ablation") if job.key()[0] == row["setting"])
        settings[row["setting"]] = named[name]
        end = min(float(row["first"]), float(row["loss"]))
        losses.setdefault((row["setting"], row["options"]), {})[int(row["seed"])] = end
    lines = []
    for constant, values in ABLATED.items():
        for value in values:
            line = {"constant": f"`{constant}` {getattr(GuidedWarmup, constant)}", "instead": f"{value:g}"}
            for setting, title in settings.items():
                varied = losses.get((setting, json.dumps(AUTO | {constant: value})), {})
                line[title] = _difference(varied, losses.get((setting, json.dumps(AUTO)), {}))
            lines.append(line)
    return _table(lines)


def claims() -> list[Claim]:
    """What we say of guided warmup, of the parts that are finished."""
    made = []
    for part, title in TITLES.items():
        if _is_complete(part):
            made += part_claims(methods(read(part)), f"({title.replace(' (', ', ').replace(')', '')})")
    if _is_complete("random"):
        made.append(_random_claim())
    return made


def part_claims(made: list[Method], tail: str) -> list[Claim]:
    """Guided warmup against tuned linear warmup, whatever its learning rate."""
    lines = compared(made)
    texts = {
        AUTOMATIC: "Without a learning rate",
        SAME: "With the learning rate of tuned linear warmup",
        HIGHER: f"With {TIMES} times the learning rate of tuned linear warmup",
    }
    claimed = []
    for label, text in texts.items():
        if label in lines:
            text = (
                f"{text} guided warmup is as good as linear warmup tuned over target and length on other seeds {tail}"
            )
            values = evidence.difference(lines[label].losses, lines["tuned"].losses)
            claimed.append(evidence.loss_claim(text, "ours", NAME, values, high=evidence.EQUAL))
    return claimed


def _random_claim() -> Claim:
    rows = {name: [row for row in rows if float(row["target"]) >= 1e-3] for name, rows in _random_rows().items()}
    bounded, *others = (sum(map(has_failed, those)) for name, those in rows.items() if name != AUTOMATIC)
    text = "With guided warmup fewer random trainings fail than over 10% of the steps, without it, or with RAdam"
    measured = f"{bounded} against {', '.join(map(str, others))} of {len(rows[SAME])}; with auto_lr "
    measured += f"{sum(map(has_failed, rows[AUTOMATIC]))} of {len(rows[AUTOMATIC])}"
    verdict = "holds" if bounded < min(others) else "does not hold"
    return Claim(f"{text} (GPT, η_trgt from 1e-3 to 1)", "ours", NAME, measured, verdict)


def _is_complete(part: str) -> bool:
    return {job.key() for job in jobs(part)} <= {tuple(row[key] for key in KEYS) for row in read(part)}


def plot(path: Path) -> None:
    """Loss against the target: guided, tuned linear, the ramp alone, RAdam; and guided without one."""
    parts = [part for part in ("gpt", "gi", "bert", "modernbert") if read(part)]
    figure = Figure(figsize=(4 * len(parts), 3.4), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        made = methods(read(part))
        by_name = {method.name: method for method in made}
        shown = [
            ("guided", by_name.get("guided"), "o-"),
            (f"{tuned(made).name} (tuned)", tuned(made), "s--"),
            ("exponential ramp", by_name.get("ramp"), "^:"),
            ("no warmup", by_name.get("no warmup"), "v:"),
            ("RAdam", by_name.get("RAdam, no warmup"), "x-."),
        ]
        for label, method, style in shown:
            if method is not None and method.reported:
                means = [statistics.mean(of.values()) for of in method.reported.values()]
                axes.plot(list(method.reported), means, style, label=label, markersize=4)
        if auto := by_name.get(AUTOMATIC):
            (losses,) = auto.reported.values()
            axes.axhline(statistics.mean(losses.values()), color="black", linewidth=1, label=AUTOMATIC)
        title, _, _ = TITLES[part].partition(" (")
        axes.set(xscale="log", xlabel="target learning rate", ylabel="validation loss", title=title)
        axes.xaxis.set_minor_formatter(NullFormatter())  # of a short range they overlap
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def report() -> str:
    """Everything, as a page."""
    made = {part: methods(rows) for part in TITLES if (rows := read(part))}
    made = {part: of for part, of in made.items() if any(is_linear(m) and m.tuning for m in of)}
    parts = [f"## {TITLES[part]}\n\n{part_table(of)}" for part, of in made.items()]
    if read("random"):
        parts.append(f"## 200 random settings\n\nRuns that fail.\n\n{random_table()}")
    if read("ablation"):
        parts.append(f"## The constants of the rule, halved and doubled\n\nWith auto_lr.\n\n{ablation_table()}")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    how = f"{versions}; one thread of a CPU per run, the last setting bf16 on one NVIDIA H100 with torch 2.11.0."
    return f"## All settings\n\n{summary_table(made)}\n\n{_notes()}\n\n" + "\n\n".join(
        [*parts, f"Means ± standard deviations. {how} `python recipes/studies/warmup_study.py`\n"]
    )


def _notes() -> str:
    seeds, tuning, bert, long = (", ".join(map(str, those)) for those in (SEEDS, TUNING, FRESH["bert"], FRESH["long"]))
    return (
        f"Losses of tuned linear warmup and differences from it, seed by seed, over seeds {seeds} (BERT also {bert}; "
        f"GPT, 5 and 20 times the steps, also {long}). The length and target of linear warmup are those of the "
        f"smallest mean over seeds {tuning} (of the masked models of {BERT.steps} steps and the GPT of "
        f"{LONGEST.steps} over 0 and 1, on the GPU over 0). Nothing is chosen for guided warmup: it has that target, "
        f"or {TIMES} times that, or auto_lr. Linear warmup to {TIMES} times its target has the best of its lengths "
        "there. A run that diverges, or ends above the loss it began with, counts as one that ended where it began."
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
