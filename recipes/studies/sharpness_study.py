"""Sharpness along training: the edge of stability, Adam's and GI-Adam's start, and what warmup does to λ.

    python recipes/studies/sharpness_study.py            # what is missing, then the tables and the plots
    python recipes/studies/sharpness_study.py --table    # these from results/sharpness_study.csv alone

Four parts, which `--parts` chooses among:

* `edge`: gradient descent with constant η on a small network. λ^H rises and then stays at 2/η.
* `initial`: λ^(P⁻¹H) of AdamW and GIAdamW before the first step of the small GPT, against what theory says.
* `warmup`: that GPT trained with constant η after linear warmup over T_wrm steps: λ against the threshold of
  stability, from two initializations.
* `diagnose`: whether `hf_warmup.sharpness.diagnose` knew before these trainings, and what it costs.

A line of the CSV is a measurement. Those of a run are written together, and a run that is there is not made again.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from hf_warmup.sharpness import Sharpness, adam_preconditioner, diagnose, sharpness, stability_threshold

import figures
from evidence import (
    Claim,
    Row,
    claims_table,
    difference,
    factor_claim,
    groups,
    select,
    spread,
    table,
    times,
)
from grid import SMALL, SMOKE, Line, appending, lines, made_with, results
from reporting import RESULTS, conditions, current_commit, torch_threads
from warmup_cases import A, Setting, evaluate, losses, make_model, make_optimizer

NAME = "sharpness_study"
EDGE_LRS = (0.05, 0.1, 0.2)  # 2/η above λ at initialization, about 9
EDGE_EVERY = 40  # of the largest η; others make as many measurements in as much ηt
BETA2S = (0.95, 0.999)
EPS, SMALL_EPS = 1e-8, 1e-12  # torch's default, and one that no gradient is below
EARLY = (0, 1, 2, 5)  # measured besides every tenth step, as λ changes most there
DENSE, EVERY = 100, 10  # steps; behind the first ones a third as often
NUMBERS = (
    *("beta2", "target_lr", "warmup_steps", "seed", "step", "lr", "loss", "sharpness", "threshold", "held_out_loss"),
    *("before", "after", "training_steps", "share"),
)
# Of all parts together; what a part does not know is left empty.
COLUMNS = ("run", "part", "optimizer", "init", *NUMBERS, "needs_warmup", "regime", "conditions")


class Case(NamedTuple):
    """What is trained from where, and how long warmup takes."""

    optimizer: str
    init: str  # standard or flat
    target: float
    warmups: tuple[int, ...]
    part: float = 1.0  # of the steps: λ^H has come to its threshold early

    @property
    def names(self) -> dict[str, str]:
        """What tells it from the others."""
        return {"optimizer": self.optimizer, "init": self.init}


CASES = (
    Case("AdamW", "standard", 1e-2, (1, 30, 100)),
    Case("GIAdamW", "standard", 1e-2, (1, 30, 100)),
    Case("AdamW", "flat", 1e-2, (1, 100)),
    Case("SGD", "standard", 0.5, (1, 100), 0.5),
    Case("SGD", "flat", 0.5, (1, 100), 0.5),
)


class Run(NamedTuple):
    """A name, and what gives its rows."""

    name: str
    make: Callable[[], list[Row]]


def runs(part: str, smoke: bool) -> list[Run]:
    """The runs of a part."""
    setting, steps = (replace(A, **SMALL), 800) if smoke else (A, 4000)
    seeds = range(1 if smoke else 3)
    if part == "edge":
        return [Run(f"edge {lr:g} {seed}", partial(descend, lr, seed, steps)) for lr in EDGE_LRS for seed in seeds]
    if part == "initial":
        return [Run(f"initial {seed}", partial(initial, setting, seed)) for seed in range(len(seeds) + 2)]
    made = []
    for case, seed in itertools.product(CASES, seeds):
        name = f"{case.optimizer} {case.init}"
        if part == "diagnose":
            made.append(Run(f"diagnose {name} {seed}", partial(foretell, case, setting, seed)))
        else:
            made += [Run(f"warmup {name} {t} {seed}", partial(train, case, t, setting, seed)) for t in case.warmups]
    return made


PARTS = ("edge", "initial", "warmup", "diagnose")


def mlp(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network with two hidden layers, and its mean squared error on 256 points of a smooth function."""
    torch.manual_seed(seed)
    x = 2 * torch.rand(256, 2) - 1
    y = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return model, lambda: (model(x) - y).square().mean()


def descend(lr: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """Gradient descent on all points, over the same ηt as `steps` with the largest η."""
    longer = round(max(EDGE_LRS) / lr)
    model, loss_fn = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    rows, vector = [], None
    for step in range(longer * steps):
        optimizer.zero_grad()
        loss = loss_fn()
        if step % (longer * EDGE_EVERY) == 0:
            found = sharpness(loss_fn, model.parameters(), tol=1e-2, start=vector)
            vector = found.vector
            named = {"part": "edge", "optimizer": "SGD", "target_lr": lr, "seed": seed, "step": step, "lr": lr}
            edge = stability_threshold(optimizer)
            rows.append({**named, "loss": loss.item(), "sharpness": found.value, "threshold": edge})
        loss.backward()
        optimizer.step()
    return rows


def initial(setting: Setting, seed: int) -> list[dict[str, Any]]:
    """λ^(P⁻¹H) before the first step: AdamW, GIAdamW, and what explains the second."""
    torch.manual_seed(seed)
    model = make_model(setting)
    batches = losses(setting, model, False, seed)
    other, loss_fn = next(batches), next(batches)
    params = list(model.parameters())
    before = dict(zip(params, torch.autograd.grad(other(), params), strict=True))
    rows = []
    for beta2 in BETA2S:
        for name, eps in epsilons(beta2).items():
            optimizer = make_optimizer(name.partition(",")[0], replace(setting, beta2=beta2), model)
            for group in optimizer.param_groups:
                group["eps"] = eps
            # Not in the order of the model's.
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if "another" in name:
                optimizer.seed_second_moment([before[p] for p in params])
            optimizer.zero_grad()
            loss = loss_fn()
            loss.backward()
            found = measure(optimizer, loss_fn, tol=1e-3, max_hvps=200)
            named = {"part": "initial", "optimizer": name, "init": "standard", "beta2": beta2, "seed": seed, "step": 0}
            named["share"] = found.vector.square().max().item()
            rows.append({**named, "loss": loss.item(), "sharpness": found.value})
    return rows


def epsilons(beta2: float) -> dict[str, float]:
    """What is measured before the first step."""
    return {
        "AdamW": EPS,
        "AdamW, ε √(1-β2)": EPS * math.sqrt(1 - beta2),
        "GIAdamW": EPS,
        "GIAdamW, g_0 of another batch": EPS,
        f"AdamW, ε = {SMALL_EPS:g}": SMALL_EPS,
        f"GIAdamW, ε = {SMALL_EPS:g}": SMALL_EPS,
    }


def measure(optimizer: Optimizer, loss_fn: Callable[[], Tensor], **options: Any) -> Sharpness:
    """λ^H for SGD, λ^(P⁻¹H) for the others, whose gradients must be there."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    plain = isinstance(optimizer, torch.optim.SGD)
    return sharpness(loss_fn, params, preconditioner=None if plain else adam_preconditioner(optimizer), **options)


def start(case: Case, setting: Setting, seed: int) -> tuple[nn.Module, Optimizer, Iterable[Callable[[], Tensor]]]:
    """Model, optimizer and batches: the same for every T_wrm."""
    torch.manual_seed(seed)
    model = make_model(setting)
    if case.init == "flat":
        with torch.no_grad():
            # A norm follows: its gain falls with the size of what it norms.
            model.transformer.wte.weight.mul_(10)
            model.transformer.wpe.weight.mul_(10)
            # The output layer is `wte` too. This makes the logits as small as before.
            model.transformer.ln_f.weight.mul_(0.1)
    model.train()
    return model, make_optimizer(case.optimizer, setting, model), losses(setting, model, False, seed)


def train(case: Case, warmup_steps: int, setting: Setting, seed: int) -> list[Row]:
    """Linear warmup to a constant learning rate: a row per measurement."""
    model, optimizer, batches = start(case, setting, seed)
    steps = max(1, round(case.part * setting.steps))
    wanted = {*EARLY, warmup_steps, steps - 1, *range(0, DENSE, EVERY), *range(DENSE, steps, 3 * EVERY)}
    named = {"part": "warmup", **case.names, "beta2": setting.beta2}
    named |= {"target_lr": case.target, "warmup_steps": warmup_steps, "seed": seed}
    rows: list[Row] = []
    vector = None
    for step, loss_fn in zip(range(steps), batches, strict=False):
        lr = case.target * min(1.0, (step + 1) / warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        if step in wanted:
            found = measure(optimizer, loss_fn, tol=0.1, max_hvps=20, start=vector)
            vector = found.vector
            edge = stability_threshold(optimizer)
            row = {**named, "step": step, "lr": lr, "loss": loss.item()}
            rows.append({**row, "sharpness": found.value, "threshold": edge})
        optimizer.step()
    rows[-1]["held_out_loss"] = evaluate(setting, model)
    return rows


def step_seconds(case: Case, setting: Setting, seed: int) -> float:
    """CPU time of a training step, the median of twenty."""
    _, optimizer, batches = start(case, setting, seed)
    for group in optimizer.param_groups:
        group["lr"] = case.target / case.warmups[-1]
    seconds = []
    for _, loss_fn in zip(range(20), batches, strict=False):
        begin = time.process_time()
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def foretell(case: Case, setting: Setting, seed: int) -> list[Row]:
    """What `diagnose` says before training, and what it costs."""
    model, optimizer, batches = start(case, setting, seed)
    loss_fns = list(itertools.islice(batches, 6))
    begin = time.process_time()
    told = diagnose(optimizer, loss_fns, case.target, module=model)
    seconds = time.process_time() - begin
    row = {"part": "diagnose", **case.names, "beta2": setting.beta2, "target_lr": case.target, "seed": seed}
    row |= {"sharpness": told.sharpness, "threshold": told.sharpness / told.stability_ratio}
    row |= {"before": told.before, "after": told.after, "needs_warmup": told.needs_warmup, "regime": told.regime}
    return [row | {"training_steps": seconds / step_seconds(case, setting, seed)}]


def geometric(values: Iterable[float]) -> float:
    """NaN as soon as one has no logarithm."""
    values = list(values)
    return math.exp(statistics.mean(map(math.log, values))) if min(values) > 0 else math.nan


def by_seed(rows: list[Row]) -> list[list[Row]]:
    """The rows of every seed."""
    return [of for _, of in sorted(groups(rows, lambda row: row["seed"]).items())]


def make(run: Run, conditions: str) -> list[Line]:
    """Its lines of the CSV."""
    torch.set_num_threads(1)
    made = [{"run": run.name, **row, "conditions": conditions} for row in run.make()]
    return [{column: _shown(row.get(column, "")) for column in COLUMNS} for row in made]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finished(folder: Path) -> list[Row]:
    """The rows of the CSV, numbers as numbers, without the columns that their part does not know."""
    made = lines(folder, NAME, ("run", "optimizer", "beta2", "step")).values()
    known = ({k: v for k, v in line.items() if v != ""} for line in made)
    return [{k: float(v) if k in NUMBERS else v for k, v in line.items()} for line in known]


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper and others say, against the rows."""
    made = []

    def claim(
        text: str, where: str, source: str, values: list[float], low: float = 0.0, high: float = math.inf
    ) -> None:
        made.append(factor_claim(text, where, source, NAME, values, low, high))

    for lr in EDGE_LRS:
        text = "Gradient descent ends at the edge of stability, λη/2 within 5% of 1"
        claim(
            text, f"MLP, η = {lr:g}", "Cohen et al.", late_ratios(select(rows, part="edge", target_lr=lr)), 0.95, 1.05
        )
    for beta2, eps in itertools.product(BETA2S, (EPS, SMALL_EPS)):
        tail = "" if eps == EPS else f", ε = {eps:g}"
        adam, gi = (
            [row["sharpness"] for row in select(rows, part="initial", beta2=beta2, optimizer=f"{name}{tail}")]
            for name in ("AdamW", "GIAdamW")
        )
        ratios = [a / g * math.sqrt(1 - beta2) for a, g in zip(adam, gi, strict=True)]
        text = "Before the first step λ^(P⁻¹H) of AdamW is √(1-β2)⁻¹ times GI-Adam's, within 10%"
        claim(text, f"GPT, β2 = {beta2:g}, ε = {eps:g}", "paper", ratios, 0.9, 1.1)
    for init, regime, low, high in (
        ("standard", "sharpness reduction", 0.0, 1 / 1.25),
        ("flat", "progressive sharpening", 1.25, math.inf),
    ):
        told = select(rows, part="diagnose", optimizer="SGD", init=init)
        text = f"From a {init} initialization SGD begins with {regime}: λ^H changes by more than a quarter"
        claim(text, "GPT", "paper", [row["after"] / row["before"] for row in told], low, high)
    for case in CASES:
        shortest, longest = (
            [geometric(later(run)) for run in by_seed(select(rows, part="warmup", warmup_steps=steps, **case.names))]
            for steps in (case.warmups[0], case.warmups[-1])
        )
        text = f"With warmup over {case.warmups[-1]} steps λ is lower against its threshold than without, in the mean"
        ratios = [long / short for long, short in zip(longest, shortest, strict=True)]
        claim(text, f"GPT, {case.optimizer}, {case.init} initialization", "paper", ratios, high=1.0)
    return made


def late_ratios(rows: list[Row]) -> list[float]:
    """λ over the threshold, the mean of the last third of each seed's run."""
    ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in by_seed(rows)]
    return [statistics.mean(run[-max(1, len(run) // 3) :]) for run in ratios]


def later(run: list[Row]) -> list[float]:
    """λ over the threshold from step 5 on, or of the last measurement."""
    return [row["sharpness"] / row["threshold"] for row in run if row["step"] >= 5 or row is run[-1]]


def edge_table(rows: list[Row]) -> str:
    """A line per learning rate."""
    made = []
    for lr in EDGE_LRS:
        runs = by_seed(select(rows, target_lr=lr))
        ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in runs]
        made.append(
            {
                "η": f"{lr:g}",
                "2/η": f"{2 / lr:g}",
                "λη/2 at the start": spread((run[0] for run in ratios), digits=2),
                "highest": spread(map(max, ratios), digits=2),
                "last third, mean": spread(late_ratios(select(rows, target_lr=lr))),
                "final loss": f"{statistics.mean(run[-1]['loss'] for run in runs):.4f}",
            }
        )
    return table(made)


def initial_table(rows: list[Row]) -> str:
    """A line per β2; ratios are of the same seed."""
    made = []
    for beta2 in BETA2S:
        found = {name: select(rows, beta2=beta2, optimizer=name) for name in epsilons(beta2)}
        adam, scaled, gi, other, *small = ([row["sharpness"] for row in runs] for runs in found.values())
        predicted = [math.sqrt(1 - beta2) * value for value in scaled]
        made.append(
            {
                "β2": f"{beta2:g}",
                "λ of AdamW": times(adam),
                "λ of GIAdamW": times(gi),
                "ratio": times(a / g for a, g in zip(adam, gi, strict=True)),
                "√(1-β2)⁻¹": f"{1 / math.sqrt(1 - beta2):.4g}",
                "error of theory with ε": f"{max(abs(g / p - 1) for g, p in zip(gi, predicted, strict=True)):.1e}",
                f"ratio, ε = {SMALL_EPS:g}": times(a / g for a, g in zip(*small, strict=True)),
                "ratio, g_0 of another batch": times(a / o for a, o in zip(adam, other, strict=True)),
                "share of one weight": ", ".join(
                    f"{statistics.mean(row['share'] for row in found[name]):.2f}" for name in ("AdamW", "GIAdamW")
                ),
            }
        )
    return table(made)


def warmup_table(rows: list[Row]) -> str:
    """A line per case and warmup: means over the seeds, of λ geometric."""
    made = []
    for case, steps in ((c, steps) for c in CASES for steps in c.warmups):
        runs = by_seed(select(rows, warmup_steps=steps, **case.names))

        def at(step: float, runs: list[list[Row]] = runs) -> str:
            """Of the first measurement from there on, or the last."""
            found = (next((row for row in run if row["step"] >= step), run[-1]) for run in runs)
            return f"{geometric(row['sharpness'] for row in found):.2g}"

        ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in runs]
        made.append(
            {
                "optimizer": case.optimizer,
                "init": case.init,
                "η_trgt": f"{case.target:g}",
                "T_wrm": steps,
                "held-out loss": spread((run[-1]["held_out_loss"] for run in runs), digits=2),
                "λ at the start": at(0),
                "after 5 steps": at(5),
                "after warmup": at(steps),
                "at the end": at(math.inf),
                "λ over threshold, first step": f"{geometric(run[0] for run in ratios):.2g}",
                "most from step 5 on": f"{geometric(max(later(run)) for run in runs):.2g}",
                "above 1": f"{statistics.mean(v > 1 for run in ratios for v in run):.0%}",
            }
        )
    return table(made)


def diagnose_table(rows: list[Row]) -> str:
    """A line per case: what was said, and what happened."""
    made = []
    for case in CASES:
        told = select(rows, part="diagnose", **case.names)
        shortest, longest = (
            {run[0]["seed"]: run[-1]["held_out_loss"] for run in by_seed(of)}
            for of in (
                select(rows, part="warmup", warmup_steps=t, **case.names)
                for t in case.warmups[:: len(case.warmups) - 1]
            )
        )
        made.append(
            {
                "optimizer": case.optimizer,
                "init": case.init,
                "stability ratio": f"{geometric(row['sharpness'] / row['threshold'] for row in told):.2g}",
                "needs_warmup": counted(row["needs_warmup"] for row in told),
                "loss, T_wrm = 1 less longest": spread(difference(shortest, longest), digits=2),
                "λ": f"{geometric(row['sharpness'] for row in told):.2g}",
                "with the later P": f"{geometric(row['before'] for row in told):.2g}",
                "and after training": f"{geometric(row['after'] for row in told):.2g}",
                "regime": counted(row["regime"] for row in told),
                "CPU time, training steps": f"{statistics.median(row['training_steps'] for row in told):.0f}",
            }
        )
    return table(made)


def counted(values: Iterable[str]) -> str:
    """Each value with how often it comes."""
    values = list(values)
    return ", ".join(f"{value} ({values.count(value)})" for value in dict.fromkeys(values))


def edge_figure(rows: list[Row]) -> Figure:
    """λ and the loss; a line per seed."""
    figure = figures.new(5.5)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for color, lr in zip(figures.CYCLE, EDGE_LRS, strict=False):
        for number, run in enumerate(by_seed(select(rows, target_lr=lr))):
            steps = [row["step"] * lr for row in run]
            label = None if number else f"η = {lr:g}"
            upper.plot(steps, [row["sharpness"] for row in run], color=color, linewidth=0.9, label=label)
            lower.plot(steps, [row["loss"] for row in run], color=color, linewidth=0.9)
        upper.axhline(2 / lr, color=color, linestyle=":", label=f"2/η = {2 / lr:g}")
    upper.set(yscale="log", ylabel="sharpness λ^H")
    lower.set(yscale="log", ylabel="loss", xlabel="steps of gradient descent times η")
    upper.legend(ncols=3, fontsize=8)
    return figure


def warmup_figure(rows: list[Row]) -> Figure:
    """Loss of the step and λ over its threshold: a row per case, a colour per warmup, its seeds' range shaded."""
    figure = figures.new(2.2 * len(CASES))
    for axes, case in zip(figure.subplots(len(CASES), 2, squeeze=False), CASES, strict=True):
        for color, warmup in zip(figures.CYCLE, case.warmups, strict=False):
            measured = list(zip(*by_seed(select(rows, warmup_steps=warmup, **case.names)), strict=True))
            steps = [of[0]["step"] for of in measured]
            losses = [[row["loss"] for row in of] for of in measured]
            ratios = [[row["sharpness"] / row["threshold"] for row in of] for of in measured]
            for panel, values in zip(axes, (losses, ratios), strict=True):
                panel.plot(steps, list(map(geometric, values)), color=color, linewidth=1, label=f"T_wrm = {warmup}")
                panel.fill_between(steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15)
        axes[1].axhline(1.0, color="black", linestyle=":")
        axes[1].set(yscale="log", ylabel="λ over its threshold")
        axes[0].set_ylabel("training loss")
        axes[0].set_title(f"{case.optimizer}, {case.init} initialization", fontsize=9)
        axes[1].legend(fontsize=7)
    for panel in axes:
        panel.set_xlabel("optimizer step")
    return figure


HOW_EDGE = """\
Full-batch gradient descent with constant η on a network of 2 inputs, two hidden layers of 32 tanh and one output, \
mean squared error on 256 points of sin(3 x_1) cos(2 x_2); 4,000 steps with the largest η, with others as many more \
as η is smaller. λ^H is measured 100 times to a residual of 1%. λη/2 is λ over the threshold: below 1 it rises \
(progressive sharpening), at 1 it is at the edge of stability."""

HOW_INITIAL = """\
λ^(P⁻¹H) on the batch of the first step, residual 0.1%. With g_1 = g_0

    AdamW      v_1/(1-β2) = g²            P_1 = (1-β1) (|g| + ε), whatever β2
    GIAdamW    v_1 = g², not corrected    P_1 = (1-β1) (|g|/√(1-β2) + ε) = (1-β1) (|g| + ε √(1-β2)) / √(1-β2)

so λ_GI(ε) = √(1-β2) λ_Adam(ε √(1-β2)), exactly; `error of theory with ε` is the largest measured. The ratio of both \
is √(1-β2)⁻¹ if all |g| are far above ε, and less otherwise. ε = 1e-08 is not small here: the eigenvector is mostly a \
single weight, whose gradient happens to be near zero (`share of one weight`: its largest squared element, of AdamW \
and GIAdamW). `g_0 of another batch` is as in the authors' code: v_1 = β2 g_0² + (1-β2) g_1²."""

HOW_WARMUP = f"""\
The GPT of 4 layers, d = 64, on bytes of Shakespeare, 300 steps of 1,024 tokens (SGD half as many); β = (0.9, 0.999), \
no weight decay; constant η after warmup. λ is λ^(P⁻¹H) of AdamW and GIAdamW and λ^H of SGD, on the step's own batch, \
before steps 1, 2, 3, 6, every {EVERY} to {DENSE}, then every {3 * EVERY}; residual 10% or 20 products.

* Init: `standard` is GPT-2's; `flat` has embeddings 10 times as large, which are normed at once, and the gain of the \
last norm 0.1, so that the logits are as small.
* λ: geometric means; after warmup is before the step T_wrm + 1. Above 1: the part of all measurements in which λ is \
above `stability_threshold`."""

HOW_DIAGNOSE = """\
`hf_warmup.sharpness.diagnose` before the run, on its first batches. The numbers in brackets count seeds. Whether \
`needs_warmup` is true, the held-out losses say. Of AdamW and GIAdamW most of the fall of λ is P's: `with the later \
P` is λ at the start with the P of a few steps later, `and after training` is λ after these steps, at a stable \
learning rate; `regime` compares these two."""


def report(rows: list[Row]) -> str:
    """The page, of the parts that there are."""
    of = groups(rows, lambda row: row["part"])
    texts = []
    if edge := of.get("edge"):
        texts.append(f"## Edge of stability\n\n{edge_table(edge)}\n\n{HOW_EDGE}\n\n![λ and loss](sharpness_edge.png)")
    if first := of.get("initial"):
        texts.append(f"## Before the first step\n\n{initial_table(first)}\n\n{HOW_INITIAL}")
    if warmed := of.get("warmup"):
        texts.append(f"## Warmup\n\n{warmup_table(warmed)}\n\n{HOW_WARMUP}\n\n![loss, λ](sharpness_warmup.png)")
        if told := of.get("diagnose"):
            texts.append(f"## What diagnose said\n\n{diagnose_table(warmed + told)}\n\n{HOW_DIAGNOSE}")
    if of.keys() >= {*PARTS}:
        texts.append(f"## Claims\n\n{claims_table(claims(rows))}")
    seeds = "Mean ± standard deviation over seeds 0 to 2 (before the first step 0 to 4), of factors geometric."
    return "\n\n".join([*texts, f"{seeds} {made_with(rows)}. `python recipes/studies/{NAME}.py`\n"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true", help="one seed of small sizes, to runs/studies-smoke")
    parser.add_argument("--table", action="store_true", help="make no runs")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)
    folder = args.out or (SMOKE if args.smoke else RESULTS)
    if not args.table:
        with torch_threads(1):
            how = conditions(["torch", "transformers"], current_commit())
            with appending(folder / f"{NAME}.csv", COLUMNS) as write:
                done = {row["run"] for row in finished(folder)}
                todo = [run for part in args.parts for run in runs(part, args.smoke) if run.name not in done]
                for made in tqdm(results(partial(make, conditions=how), todo, args.processes), total=len(todo)):
                    write(*made)
    rows = finished(folder)
    of = groups(rows, lambda row: row["part"])
    for part, draw in (("edge", edge_figure), ("warmup", warmup_figure)):
        if part in of:
            draw(of[part]).savefig(folder / f"sharpness_{part}.png", dpi=120)
    (folder / f"{NAME}.md").write_text(report(rows))
    print(folder / f"{NAME}.md")


if __name__ == "__main__":
    main()
