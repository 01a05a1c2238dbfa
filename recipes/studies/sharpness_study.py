"""Sharpness along training: the edge of stability, Adam's and GI-Adam's start, and what warmup does to λ.

    python recipes/studies/sharpness_study.py

Four parts, which `--parts` chooses among; of the others the rows are kept that are there already:

* `edge`: gradient descent with constant η on a small network. λ^H rises and then stays at 2/η.
* `initial`: λ^(P⁻¹H) of AdamW and GIAdamW before the first step of the small GPT, against what theory says.
* `warmup`: that GPT trained with constant η after linear warmup over T_wrm steps: λ against the threshold of
  stability, from two initializations.
* `diagnose`: whether `hf_warmup.diagnose` knew before these trainings, and what it costs.

Writes results/sharpness_study.csv (a row per measurement), results/sharpness_edge.png, results/sharpness_warmup.png
and results/sharpness_study.md.
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from hf_warmup.sharpness import Sharpness, adam_preconditioner, diagnose, sharpness, stability_threshold

from evidence import Claim, factor_claim
from reporting import RESULTS, conditions, current_commit, torch_threads, write
from warmup_cases import A, Setting, evaluate, losses, make_model, make_optimizer

EDGE_LRS = (0.05, 0.1, 0.2)  # 2/η above λ at initialization, about 9
EDGE_EVERY = 40  # of the largest η; others make as many measurements in as much ηt
BETA2S = (0.95, 0.999)
EPS, SMALL_EPS = 1e-8, 1e-12  # torch's default, and one that no gradient is below
EARLY = (0, 1, 2, 5)  # measured besides every tenth step, as λ changes most there
DENSE = 100  # steps; behind them one measurement of three is made
SPIKE = 0.3  # nats: batches of one model differ by about 0.1


@dataclass(frozen=True)
class Case:
    """What is trained from where, and how long warmup takes."""

    optimizer: str
    init: str  # standard or flat
    target: float
    warmups: tuple[int, ...]
    part: float = 1.0  # of the steps: λ^H has come to its threshold early


CASES = (
    Case("AdamW", "standard", 1e-2, (1, 30, 100)),
    Case("GIAdamW", "standard", 1e-2, (1, 30, 100)),
    Case("AdamW", "flat", 1e-2, (1, 100)),
    Case("SGD", "standard", 0.5, (1, 100), 0.5),
    Case("SGD", "flat", 0.5, (1, 100), 0.5),
)
# Of all parts together; what a part does not know is left empty.
COLUMNS = (
    *("part", "optimizer", "init", "beta2", "target_lr", "warmup_steps", "seed", "step", "lr", "loss", "sharpness"),
    *("threshold", "spikes", "highest_rise", "held_out_loss", "before", "after", "critical_lr"),
    *("needs_warmup", "regime", "cpu_seconds", "training_steps", "share", "gradient"),
    "commit",
)
WORDS = ("part", "optimizer", "init", "needs_warmup", "regime", "commit")
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
    rows, vectors = [], None
    for step in range(longer * steps):
        optimizer.zero_grad()
        loss = loss_fn()
        if step % (longer * EDGE_EVERY) == 0:
            found = sharpness(loss_fn, model.parameters(), tol=1e-2, start=vectors)
            vectors = found.vectors
            named = {"part": "edge", "optimizer": "SGD", "target_lr": lr, "seed": seed, "step": step, "lr": lr}
            edge = stability_threshold(optimizer)
            rows.append({**named, "loss": loss.item(), "sharpness": found.values[0], "threshold": edge})
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
            share, where = found.vectors[0].square().max(dim=0)
            gradient = abs(torch.cat([p.grad.flatten() for p in params])[where].item())
            named = {"part": "initial", "optimizer": name, "init": "standard", "beta2": beta2, "seed": seed, "step": 0}
            named |= {"share": share.item(), "gradient": gradient}
            rows.append({**named, "loss": loss.item(), "sharpness": found.values[0]})
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


@dataclass
class Run:
    """One training: a row per measurement, and the loss of every step."""

    rows: list[dict[str, Any]]
    losses: list[float]


def train(case: Case, warmup_steps: int, setting: Setting, seed: int, every: int) -> Run:
    """Linear warmup to a constant learning rate."""
    model, optimizer, batches = start(case, setting, seed)
    steps = max(1, round(case.part * setting.steps))
    wanted = {*EARLY, warmup_steps, steps - 1, *range(0, DENSE, every), *range(DENSE, steps, 3 * every)}
    held_out = {steps - 1, *(round(steps * part) - 1 for part in (1 / 3, 2 / 3))}
    named = {"part": "warmup", "optimizer": case.optimizer, "init": case.init, "beta2": setting.beta2}
    named |= {"target_lr": case.target, "warmup_steps": warmup_steps, "seed": seed}
    rows: list[dict[str, Any]] = []
    seen: list[float] = []
    vectors = None
    for step, loss_fn in zip(range(steps), batches, strict=False):
        lr = case.target * min(1.0, (step + 1) / warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        seen.append(loss.item())
        row = {**named, "step": step, "lr": lr, "loss": seen[-1]}
        if step in wanted:
            found = measure(optimizer, loss_fn, tol=0.1, max_hvps=20, start=vectors)
            vectors = found.vectors
            row |= {"sharpness": found.values[0], "threshold": stability_threshold(optimizer)}
        optimizer.step()
        if step in held_out:
            row["held_out_loss"] = evaluate(setting, model)
            model.train()
        if step in wanted | held_out:
            rise, spikes = rises(seen)
            rows.append({**row, "highest_rise": rise, "spikes": spikes})
    return Run(rows, seen)


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


def rises(seen: list[float]) -> tuple[float, int]:
    """How far the loss rose above the lowest before it, and how often by more than `SPIKE`."""
    # A loss that is not a number has risen.
    seen = [math.inf if math.isnan(loss) else loss for loss in seen]
    above = [loss - low for loss, low in zip(seen, itertools.accumulate(seen, min), strict=True)]
    high = [rise > SPIKE for rise in above]
    return max(above), sum(now and not before for before, now in zip([False, *high], high, strict=False))


def foretell(case: Case, setting: Setting, seed: int) -> dict[str, Any]:
    """What `diagnose` says before training, and what it costs."""
    model, optimizer, batches = start(case, setting, seed)
    loss_fns = list(itertools.islice(batches, 6))
    begin = time.process_time()
    told = diagnose(optimizer, loss_fns, case.target, module=model)
    seconds = time.process_time() - begin
    search = told.critical_lr
    return {
        "part": "diagnose",
        "optimizer": case.optimizer,
        "init": case.init,
        "beta2": setting.beta2,
        "target_lr": case.target,
        "seed": seed,
        "sharpness": told.sharpness,
        "threshold": told.sharpness / told.stability_ratio,
        "before": told.before,
        "after": told.after,
        # Above η_trgt the search ends.
        "critical_lr": search.value if math.isfinite(search.upper) else f">{search.lower:.4g}",
        "needs_warmup": told.needs_warmup,
        "regime": told.regime,
        "cpu_seconds": seconds,
        "training_steps": seconds / step_seconds(case, setting, seed),
    }


def mean_sd(values: Iterable[float], form: str = ".2f") -> str:
    values = list(values)
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {sd:{form}}"


def geometric(values: Iterable[float]) -> float:
    """NaN as soon as one has no logarithm."""
    values = list(values)
    return math.exp(statistics.mean(map(math.log, values))) if min(values) > 0 else math.nan


def select(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def by_seed(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [select(rows, seed=seed) for seed in dict.fromkeys(row["seed"] for row in rows)]


def finished(folder: Path) -> list[dict[str, Any]]:
    """The rows of the CSV, numbers as numbers, without the columns that their part does not know."""
    path = folder / "sharpness_study.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        lines = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return [{k: v if k in WORDS else _number(v) for k, v in line.items()} for line in lines]


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its numbers as the CSV has them: the report is then the same once they are read back."""
    return {key: value if key in WORDS else _number(str(shown(value))) for key, value in row.items()}


def _number(cell: str) -> int | float | str:
    try:
        return int(cell) if cell.isdigit() else float(cell)
    except ValueError:  # a learning rate above which the search did not look
        return cell


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What the paper and others say, against the rows."""
    made = []

    def claim(text: str, source: str, values: list[float], low: float = 0.0, high: float = math.inf) -> None:
        made.append(factor_claim(text, source, "sharpness_study", values, low, high))

    for lr in EDGE_LRS:
        text = f"Gradient descent with η = {lr:g} ends at the edge of stability, λη/2 within 5% of 1 (MLP)"
        claim(text, "Cohen et al.", late_ratios(select(rows, part="edge", target_lr=lr)), 0.95, 1.05)
    for beta2, eps in itertools.product(BETA2S, (EPS, SMALL_EPS)):
        tail = "" if eps == EPS else f", ε = {eps:g}"
        adam, gi = (
            [row["sharpness"] for row in select(rows, part="initial", beta2=beta2, optimizer=f"{name}{tail}")]
            for name in ("AdamW", "GIAdamW")
        )
        ratios = [a / g * math.sqrt(1 - beta2) for a, g in zip(adam, gi, strict=True)]
        text = "Before the first step λ^(P⁻¹H) of AdamW is √(1-β2)⁻¹ times GI-Adam's, within 10%"
        claim(f"{text} (GPT, β2 = {beta2:g}, ε = {eps:g})", "paper", ratios, 0.9, 1.1)
    for init, regime, low, high in (
        ("standard", "sharpness reduction", 0.0, 1 / 1.25),
        ("flat", "progressive sharpening", 1.25, math.inf),
    ):
        told = select(rows, part="diagnose", optimizer="SGD", init=init)
        text = f"From a {init} initialization SGD begins with {regime}: λ^H changes by more than a quarter (GPT)"
        claim(text, "paper", [row["after"] / row["before"] for row in told], low, high)
    for case in CASES:
        named = {"part": "warmup", "optimizer": case.optimizer, "init": case.init}
        shortest, longest = (
            [
                geometric(later([row for row in run if "sharpness" in row]))
                for run in by_seed(select(rows, **named, **steps))
            ]
            for steps in ({"warmup_steps": case.warmups[0]}, {"warmup_steps": case.warmups[-1]})
        )
        text = f"With warmup over {case.warmups[-1]} steps λ is lower against its threshold than without, in the mean"
        ratios = [long / short for long, short in zip(longest, shortest, strict=True)]
        claim(f"{text} (GPT, {case.optimizer}, {case.init} initialization)", "paper", ratios, high=1.0)
    return made


def late_ratios(rows: list[dict[str, Any]]) -> list[float]:
    """λ over the threshold, the mean of the last third of each seed's run."""
    ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in by_seed(rows)]
    return [statistics.mean(run[-max(1, len(run) // 3) :]) for run in ratios]


def markdown(lines: list[dict[str, Any]]) -> str:
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def edge_table(rows: list[dict[str, Any]]) -> str:
    """A line per learning rate."""
    lines = []
    for lr in EDGE_LRS:
        runs = by_seed(select(rows, target_lr=lr))
        ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in runs]
        late = [run[-max(1, len(run) // 3) :] for run in ratios]
        means = late_ratios(select(rows, target_lr=lr))
        lines.append(
            {
                "η": f"{lr:g}",
                "2/η": f"{2 / lr:g}",
                "λη/2 at the start": mean_sd(run[0] for run in ratios),
                "highest": mean_sd(max(run) for run in ratios),
                "last third, mean": mean_sd(means, ".3f"),
                "lowest to highest seed": f"{min(means):.3f} to {max(means):.3f}",
                "spread along a run": f"{statistics.mean(statistics.pstdev(run) for run in late):.3f}",
                "final loss": f"{statistics.mean(run[-1]['loss'] for run in runs):.4f}",
            }
        )
    return markdown(lines)


def initial_table(rows: list[dict[str, Any]]) -> str:
    """A line per β2; ratios are of the same seed."""
    lines = []
    for beta2 in BETA2S:
        chosen = select(rows, beta2=beta2)
        found = {name: select(chosen, optimizer=name) for name in epsilons(beta2)}
        adam, scaled, gi, other, *small = ([row["sharpness"] for row in runs] for runs in found.values())
        predicted = [math.sqrt(1 - beta2) * value for value in scaled]
        lines.append(
            {
                "β2": f"{beta2:g}",
                "λ of AdamW": f"{geometric(adam):.3g} ({min(adam):.2g} to {max(adam):.2g})",
                "λ of GIAdamW": f"{geometric(gi):.3g} ({min(gi):.2g} to {max(gi):.2g})",
                "ratio": mean_sd((a / g for a, g in zip(adam, gi, strict=True)), ".4g"),
                "√(1-β2)⁻¹": f"{1 / math.sqrt(1 - beta2):.4g}",
                "error of theory with ε": f"{max(abs(g / p - 1) for g, p in zip(gi, predicted, strict=True)):.1e}",
                f"ratio, ε = {SMALL_EPS:g}": mean_sd((a / g for a, g in zip(*small, strict=True)), ".4g"),
                "ratio, g_0 of another batch": mean_sd((a / o for a, o in zip(adam, other, strict=True)), ".4g"),
                "share of one weight": ", ".join(
                    f"{statistics.mean(row['share'] for row in found[name]):.2f}" for name in ("AdamW", "GIAdamW")
                ),
                "its gradient": f"{_mean(found['GIAdamW'], 'gradient'):.1e}",
            }
        )
    return markdown(lines)


def warmup_table(rows: list[dict[str, Any]]) -> str:
    """A line per case and warmup: means over the seeds, of λ geometric."""
    lines = []
    for case in CASES:
        for warmup_steps in case.warmups:
            named = {"optimizer": case.optimizer, "init": case.init, "warmup_steps": warmup_steps}
            runs = by_seed(select(rows, **named))
            measured = [[row for row in run if "sharpness" in row] for run in runs]
            held_out = [[row["held_out_loss"] for row in run if "held_out_loss" in row] for run in runs]

            def at(step: int, measured: list[list[dict[str, Any]]] = measured) -> str:
                """Of the first measurement from there on, or the last."""
                return (
                    f"{geometric(next((r for r in m if r['step'] >= step), m[-1])['sharpness'] for m in measured):.2g}"
                )

            ratios = [[row["sharpness"] / row["threshold"] for row in run] for run in measured]
            lines.append(
                {
                    "optimizer": case.optimizer,
                    "init": case.init,
                    "η_trgt": f"{case.target:g}",
                    "T_wrm": warmup_steps,
                    "held-out loss": mean_sd(run[-1] for run in held_out),
                    "best": f"{statistics.mean(map(min, held_out)):.2f}",
                    "λ at the start": at(0),
                    "after 5 steps": at(5),
                    "after warmup": at(warmup_steps),
                    "at the end": at(10**9),
                    "λ over threshold, first step": f"{geometric(run[0] for run in ratios):.2g}",
                    "most from step 5 on": f"{geometric(max(later(run)) for run in measured):.2g}",
                    "above 1": f"{statistics.mean(v > 1 for run in ratios for v in run):.0%}",
                    "spikes": f"{statistics.mean(run[-1]['spikes'] for run in runs):.1f}",
                    "highest rise": f"{statistics.mean(run[-1]['highest_rise'] for run in runs):.2f}",
                }
            )
    return markdown(lines)


def later(run: list[dict[str, Any]]) -> list[float]:
    """λ over the threshold from step 5 on, or of the last measurement."""
    return [row["sharpness"] / row["threshold"] for row in run if row["step"] >= 5 or row is run[-1]]


def diagnose_table(rows: list[dict[str, Any]]) -> str:
    """A line per case: what was said, and what happened."""
    lines = []
    for case in CASES:
        named = {"optimizer": case.optimizer, "init": case.init}
        told = select(rows, part="diagnose", **named)
        runs = {t: by_seed(select(rows, part="warmup", warmup_steps=t, **named)) for t in case.warmups}
        shortest, longest = (
            [run[-1]["held_out_loss"] for run in runs[t]] for t in (case.warmups[0], case.warmups[-1])
        )
        lines.append(
            {
                "optimizer": case.optimizer,
                "init": case.init,
                "η_trgt": f"{case.target:g}",
                "stability ratio": f"{geometric(row['sharpness'] / row['threshold'] for row in told):.2g}",
                "η_c": ", ".join(_short(row["critical_lr"]) for row in told),
                "needs_warmup": counted(row["needs_warmup"] for row in told),
                "loss, T_wrm = 1 less longest": mean_sd(a - b for a, b in zip(shortest, longest, strict=True)),
                "λ": f"{_mean(told, 'sharpness'):.2g}",
                "with the later P": f"{_mean(told, 'before'):.2g}",
                "and after training": f"{_mean(told, 'after'):.2g}",
                "regime": counted(row["regime"] for row in told),
                "CPU seconds": f"{statistics.median(row['cpu_seconds'] for row in told):.2f}",
                "in training steps": f"{statistics.median(row['training_steps'] for row in told):.0f}",
            }
        )
    return markdown(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return geometric(row[key] for row in rows)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2g}"


def counted(values: Iterable[Any]) -> str:
    values = list(values)
    return ", ".join(f"{value} ({values.count(value)})" for value in dict.fromkeys(values))


def edge_figure(rows: list[dict[str, Any]]) -> Figure:
    """λ and the loss; a line per seed."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for i, lr in enumerate(EDGE_LRS):
        for number, run in enumerate(by_seed(select(rows, target_lr=lr))):
            steps = [row["step"] * lr for row in run]
            label = None if number else f"η = {lr:g}"
            upper.plot(steps, [row["sharpness"] for row in run], color=f"C{i}", linewidth=0.9, label=label)
            lower.plot(steps, [row["loss"] for row in run], color=f"C{i}", linewidth=0.9)
        upper.axhline(2 / lr, color=f"C{i}", linestyle=":", label=f"2/η = {2 / lr:g}")
    upper.set(yscale="log", ylabel="sharpness λ^H")
    lower.set(yscale="log", ylabel="loss", xlabel="steps of gradient descent times η")
    upper.legend(ncols=2)
    return figure


def warmup_figure(runs: dict[tuple[Case, int], list[Run]]) -> Figure:
    """Learning rate, loss of every step and λ: a column per case, a colour per warmup."""
    figure = Figure(figsize=(3.6 * len(CASES), 8), layout="constrained")
    axes = figure.subplots(3, len(CASES), sharex=True, squeeze=False, height_ratios=(1, 2, 3))
    for column, case in zip(axes.T, CASES, strict=True):
        for i, warmup_steps in enumerate(case.warmups):
            chosen = runs[case, warmup_steps]
            color = f"C{i}"
            for run in chosen:
                column[1].plot(run.losses, color=color, linewidth=0.5, alpha=0.7)
            measured = [[row for row in run.rows if "sharpness" in row] for run in chosen]
            steps = [row["step"] for row in measured[0]]
            means = [geometric(row["sharpness"] for row in at) for at in zip(*measured, strict=True)]
            column[0].plot(steps, [row["lr"] for row in measured[0]], color=color, label=f"T_wrm = {warmup_steps}")
            column[2].plot(steps, means, ".-", color=color, markersize=4)
            column[2].plot(steps, [row["threshold"] for row in measured[0]], ":", color=color)
        column[0].set_title(f"{case.optimizer}, {case.init} init")
        column[0].legend()
        column[2].set(yscale="log", xlabel="optimizer step")
    for name, axis in zip(("learning rate", "training loss", "λ, and its threshold dotted"), axes[:, 0], strict=True):
        axis.set_ylabel(name)
    return figure


HOW_EDGE = """\
Full-batch gradient descent with constant η on a network of 2 inputs, two hidden layers of 32 tanh and one output, \
mean squared error on 256 points of sin(3 x_1) cos(2 x_2), {seeds} seeds (weights and points). {steps:,} steps with \
the largest η, with others as many more as η is smaller. λ^H is measured {num} times to a residual of 1%. λη/2 is λ \
over the threshold: below 1 it rises (progressive sharpening), at 1 it is at the edge of stability. Spread along a \
run is the standard deviation of the measurements of the last third."""

HOW_INITIAL = """\
λ^(P⁻¹H) on the batch of the first step, residual 0.1%, {seeds} seeds. With g_1 = g_0

    AdamW      v_1/(1-β2) = g²            P_1 = (1-β1) (|g| + ε), whatever β2
    GIAdamW    v_1 = g², not corrected    P_1 = (1-β1) (|g|/√(1-β2) + ε) = (1-β1) (|g| + ε √(1-β2)) / √(1-β2)

so λ_GI(ε) = √(1-β2) λ_Adam(ε √(1-β2)), exactly, and the ratio is

    λ_Adam(ε) / λ_GI(ε) = √(1-β2)⁻¹ λ_Adam(ε) / λ_Adam(ε √(1-β2)),

√(1-β2)⁻¹ if all |g| are far above ε, and less otherwise. `error of theory with ε` is the largest of λ_GI against \
√(1-β2) λ_Adam(ε √(1-β2)), measured. `g_0 of another batch` is as in the authors' code: v_1 = β2 g_0² + (1-β2) g_1². \
λ: geometric mean, lowest to highest; the other ratios are of the same seed, mean ± standard deviation.

ε = {eps:g} is not small here. The eigenvector is mostly a single weight, whose gradient happens to be near zero: \
`share of one weight` is its largest squared element, of AdamW and GIAdamW, `its gradient` |g| there, for GIAdamW."""

HOW_WARMUP = """\
{model}, batches of {batch} from `recipes/tiny/shakespeare.txt`, {steps} steps (SGD half as many), {seeds} seeds; \
β = (0.9, {beta2:g}), no weight decay; η_t = η_trgt min(1, t/T_wrm), constant after warmup. λ is λ^(P⁻¹H) of AdamW \
and GIAdamW and λ^H of SGD, on the step's own batch, before steps 1, 2, 3, 6, every {every} to {dense}, then every \
{rare}; residual 10% or 20 products.

* Init: `standard` is GPT-2's; `flat` has embeddings 10 times as large, which are normed at once, and the gain of the \
last norm 0.1, so that the logits are as small.
* Held-out loss: at the end, mean ± standard deviation over the seeds; best is that of a third, two thirds and the \
end. λ: geometric means; after warmup is before the step T_wrm + 1.
* Threshold: `stability_threshold`, with that of a first step there. Above 1: the part of all measurements.
* Spikes: how often the training loss rises more than {spike:g} nats above its lowest before; highest rise: how far \
at most. Means over the seeds."""

HOW_DIAGNOSE = """\
`hf_warmup.diagnose` before the run, on its first batches. The numbers in brackets count seeds.

* Whether `needs_warmup` is true: the held-out loss of the run with T_wrm = 1 less that of the longest warmup's, \
of the same seed.
* Whether `regime` is true: `λ at the start` and `after 5 steps` of the table above, at the learning rates of warmup. \
Of AdamW and GIAdamW most of that fall is P's: `with the later P` is λ at the start with the P of a few steps later, \
`and after training` is λ after these steps, at a stable learning rate. `regime` compares these two.
* Cost: `time.process_time` of the call, median over the seeds, and in training steps of the same seed (forward, \
backward and optimizer, median)."""


def study(args: argparse.Namespace, commit: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and the chapters of the report; writes the figures of the parts that are made."""
    setting = replace(A, width=args.width, depth=args.layers, context=args.context, steps=args.steps)
    seeds, made = range(args.seeds), dict[str, list[dict[str, Any]]]()
    args.out.mkdir(parents=True, exist_ok=True)
    if "edge" in args.parts:
        jobs = [(lr, seed, args.edge_steps) for lr in EDGE_LRS for seed in seeds]
        made["edge"] = [row for job in tqdm(jobs, "edge") for row in descend(*job)]
        edge_figure(made["edge"]).savefig(args.out / "sharpness_edge.png", dpi=120)
    if "initial" in args.parts:
        made["initial"] = [row for seed in tqdm(range(args.seeds + 2), "initial") for row in initial(setting, seed)]
    if "warmup" in args.parts:
        runs: dict[tuple[Case, int], list[Run]] = {}
        for case, seed in tqdm(list(itertools.product(CASES, seeds)), "warmup"):
            for warmup_steps in case.warmups:
                run = train(case, warmup_steps, setting, seed, args.every)
                runs.setdefault((case, warmup_steps), []).append(run)
        warmup_figure(runs).savefig(args.out / "sharpness_warmup.png", dpi=100)
        made["warmup"] = [row for of in runs.values() for run in of for row in run.rows]
    if "diagnose" in args.parts:
        jobs = list(itertools.product(CASES, seeds))
        made["diagnose"] = [foretell(case, setting, seed) for case, seed in tqdm(jobs, "diagnose")]
    for part, rows in made.items():
        made[part] = [as_written(row) | {"commit": commit} for row in rows]
    before = finished(args.out)
    of = {part: made.get(part, select(before, part=part)) for part in PARTS}
    return list(itertools.chain(*of.values())), chapters(of, setting, args)


def chapters(of: dict[str, list[dict[str, Any]]], setting: Setting, args: argparse.Namespace) -> list[str]:
    """The report, of the parts that there are."""
    texts = []
    if rows := of["edge"]:
        num = math.ceil(args.edge_steps / EDGE_EVERY)
        how = HOW_EDGE.format(steps=args.edge_steps, seeds=len(by_seed(rows)), num=num)
        texts.append(f"## Edge of stability\n\n{edge_table(rows)}\n\n{how}\n\n![λ and loss](sharpness_edge.png)")
    if rows := of["initial"]:
        how = HOW_INITIAL.format(seeds=len(by_seed(rows)), eps=EPS)
        texts.append(f"## Before the first step\n\n{initial_table(rows)}\n\n{how}")
    if rows := of["warmup"]:
        model = f"GPT-2 of {setting.depth} layers, d = {setting.width}, {setting.vocab} symbols, "
        how = HOW_WARMUP.format(
            model=f"{model}context {setting.context}",
            batch=setting.batch,
            steps=setting.steps,
            seeds=len(by_seed(rows)),
            beta2=setting.beta2,
            every=args.every,
            dense=DENSE,
            rare=3 * args.every,
            spike=SPIKE,
        )
        texts.append(f"## Warmup\n\n{warmup_table(rows)}\n\n{how}\n\n![learning rate, loss, λ](sharpness_warmup.png)")
        if told := of["diagnose"]:
            texts.append(f"## What diagnose said\n\n{diagnose_table(rows + told)}\n\n{HOW_DIAGNOSE}")
    return texts


def shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="of all parts; initial has two more")
    parser.add_argument("--steps", type=int, default=A.steps, help="of a run of warmup")
    parser.add_argument("--edge-steps", type=int, default=4000, help="of a run of edge")
    parser.add_argument("--every", type=int, default=10, help="steps between measurements of warmup")
    parser.add_argument("--width", type=int, default=A.width, help="of the GPT")
    parser.add_argument("--layers", type=int, default=A.depth, help="of the GPT")
    parser.add_argument("--context", type=int, default=A.context, help="of the GPT, in symbols")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    for name in ("seeds", "steps", "edge_steps", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    typed = sys.argv[1:] if argv is None else argv
    args.command = " ".join(["python recipes/studies/sharpness_study.py", *typed])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    commit = current_commit()
    with torch_threads(1):
        rows, texts = study(args, commit)
        parts = dict.fromkeys((row["commit"], row["part"]) for row in rows)
        made_with = ", ".join(f"{made_at} ({part})" for made_at, part in parts)
        made = f"{conditions(['torch', 'transformers'], made_with)} `{args.command}`"
    table = [{column: shown(row.get(column, "")) for column in COLUMNS} for row in rows]
    write(args.out, "sharpness_study", table, "\n\n".join([*texts, made]) + "\n")


if __name__ == "__main__":
    main()
