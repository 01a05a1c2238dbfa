"""Does η_c carry a learning rate over: from full fine-tuning to LoRA, from rank to rank, from one model to another?

    python recipes/studies/lora_study.py            # the runs that are missing, then the table: 20 minutes
    python recipes/studies/lora_study.py --table    # the table from results/lora_study.csv alone

Five language models are trained here on Python's standard library. Each then learns to go on with Shakespeare, and
to tell his lines from lines whose words are shuffled: all weights, and LoRA of rank 8 and 64 at lora_alpha 32, 100
steps of AdamW that decay linearly from each learning rate of a grid. η_c is that of the first step, over batches of
their own. If it carries a learning rate over, then η_best(b) = η_best(a) η_c(b) / η_c(a).
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_warmup import find_critical_lr, loss_after_step

import evidence
import reporting
from defaults_study import SHAKESPEARE, blocks, code, sentences
from grid import Line, append, lacking, lines, made_with, results, save, small_parser
from warmup_cases import Setting, make_model
from warmup_rules import cosine

NAME = "lora_study"
BASES = Path("runs/lora-bases")
MODELS = {
    "GPT 64 x 2": Setting("", "gpt", width=64, depth=2),
    "GPT 96 x 4": Setting("", "gpt", width=96, depth=4),
    "Llama 64 x 3": Setting("", "llama", width=64, depth=3),
    "Llama 96 x 4": Setting("", "llama-gqa", width=96, depth=4),
    "Qwen3 64 x 3": Setting("", "qwen3", width=64, depth=3),
}
TASKS = ("language", "classification")
RANKS = (0, 8, 64)  # 0 trains all weights
SEEDS = (1, 2, 3)
FULL = tuple(1e-4 * 2**k for k in range(7))
LORA = tuple(1e-3 * 2**k for k in range(7))
STEPS, BATCH = 100, 8


class Job(NamedTuple):
    """A run."""

    model: str
    task: str
    rank: int
    lr: float
    seed: int


def jobs() -> list[Job]:
    """All runs."""
    places = itertools.product(SEEDS, MODELS, TASKS, RANKS)
    return [Job(m, t, rank, lr, seed) for seed, m, t, rank in places for lr in (LORA if rank else FULL)]


def make_base(name: str) -> None:
    """Train a model that the runs begin with."""
    folder = BASES / name.replace(" ", "")
    if (folder / "config.json").is_file():
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = make_model(MODELS[name])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.1)
    data = blocks(code(), 1500 * 16, 0)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-3 * ((step + 1) / 300 if step < 300 else cosine(step - 300, 1200))
        train_on(model, optimizer, data[16 * step : 16 * step + 16])
    model.config.pad_token_id = 0
    model.save_pretrained(folder)


def loss_of(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Of a batch."""
    ids, labels = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("input_ids", "labels"))
    return model(input_ids=ids, labels=labels).loss


def train_on(model: Any, optimizer: torch.optim.Optimizer, rows: list[dict[str, Any]]) -> None:
    """A step, with the gradient's norm at most 1."""
    optimizer.zero_grad()
    loss_of(model, rows).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def model_of(job: Job) -> Any:
    """What is trained: all of a base, or its adapter."""
    folder = BASES / job.model.replace(" ", "")
    if job.task == "language":
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.loss_type = "ForCausalLM"
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.train()
    if not job.rank:
        return model
    kind = "CAUSAL_LM" if job.task == "language" else "SEQ_CLS"
    config = LoraConfig(
        kind, r=job.rank, lora_alpha=32, target_modules="all-linear", fan_in_fan_out="GPT" in job.model
    )
    return get_peft_model(model, config)


def critical_lr(model: Any, data: list[dict[str, Any]]) -> float:
    """η_c of the first step, the geometric mean over four batches."""
    return statistics.geometric_mean(_critical_lr(model, data[i : i + 32]) for i in range(0, 128, 32))


def _critical_lr(model: Any, rows: list[dict[str, Any]]) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1.0, weight_decay=0.0)
    loss_of(model, rows).backward()
    found = find_critical_lr(lambda lr: loss_after_step(optimizer, lambda: loss_of(model, rows), lr))
    optimizer.zero_grad()
    return found.value


def run(job: Job) -> dict[str, Any]:
    """The loss of a run, and η_c before it."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    text = SHAKESPEARE.read_text()
    cut = int(0.9 * len(text))
    make = blocks if job.task == "language" else sentences
    data, held_out = make(text[:cut], STEPS * BATCH + 128, job.seed), make(text[cut:], 256, 99)
    model = model_of(job)
    # Once for all learning rates.
    critical = critical_lr(model, data[STEPS * BATCH :]) if job.lr == (LORA if job.rank else FULL)[0] else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], job.lr, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = job.lr * (1 - step / STEPS)
        train_on(model, optimizer, data[BATCH * step : BATCH * step + BATCH])
    model.eval()
    with torch.no_grad():
        loss = statistics.mean(float(loss_of(model, held_out[i : i + 32])) for i in range(0, 256, 32))
    return {
        **job._asdict(),
        "lr": f"{job.lr:g}",
        "loss": f"{loss:.5f}",
        "critical_lr": f"{critical:.5g}" if critical else "",
    }


class Place(NamedTuple):
    """What was found for a model, a task and a rank."""

    model: str
    task: str
    rank: int
    best: float  # η_best
    critical: float  # η_c
    loss: float
    at_edge: bool


def best_of(losses: dict[float, float]) -> float:
    """The learning rate of the smallest loss, by a parabola in ln η through the grid's best and its neighbours."""
    rates = sorted(losses)
    i = min(range(len(rates)), key=lambda k: losses[rates[k]])
    if i in (0, len(rates) - 1):
        return rates[i]
    before, at, behind = (losses[rates[k]] for k in (i - 1, i, i + 1))
    return rates[i] * (rates[i + 1] / rates[i]) ** (0.5 * (before - behind) / (before - 2 * at + behind))


def places(rows: Iterable[dict[str, str]]) -> list[Place]:
    """Of all finished runs."""
    made = []
    for key, of in evidence.groups(rows, lambda row: (row["model"], row["task"], int(row["rank"]))).items():
        by_rate = evidence.groups(of, lambda row: float(row["lr"]))
        losses = {lr: statistics.mean(float(row["loss"]) for row in runs) for lr, runs in by_rate.items()}
        best = min(losses, key=lambda lr: losses[lr])
        critical = statistics.geometric_mean(float(row["critical_lr"]) for row in of if row["critical_lr"])
        edge = best in (min(losses), max(losses))
        made.append(Place(*key, best_of(losses), critical, losses[best], edge))
    return made


def carried(found: list[Place], usual: float, *, same: tuple[str, ...], change: Any) -> dict[str, str]:
    """How far off the learning rate is that η_c carries over, and that of the usual rule, over all pairs."""
    pairs = [
        (a, b)
        for a, b in itertools.permutations(found, 2)
        if all(getattr(a, name) == getattr(b, name) for name in same) and change(a, b)
    ]
    line = {"pairs": str(len(pairs))}
    for name, factor in (("by η_c", None), ("by the rule", usual)):
        off = [a.best / b.best * (factor or b.critical / a.critical) for a, b in pairs]
        logs = [abs(math.log(value)) for value in off]
        within = sum(value <= math.log(2) for value in logs)
        line[name] = f"{math.exp(statistics.mean(logs)):.2f}, {math.exp(max(logs)):.2f}; {within / len(logs):.0%}"
    return line


def report(made: list[Line]) -> str:
    """Both tables."""
    found, lines = places(made), []
    for place in found:
        edge = " (edge of the grid)" if place.at_edge else ""
        what = f"LoRA of {place.rank}" if place.rank else "all weights"
        best, critical = f"{place.best:.2g}{edge}", f"{place.critical:.2g}"
        numbers = {"η_best": best, "η_c": critical, "η_best / η_c": f"{place.best / place.critical:.2g}"}
        lines.append(
            {"model": place.model, "task": place.task, "trained": what, "loss": f"{place.loss:.3f}"} | numbers
        )
    both = ("model", "task")
    full = {(place.model, place.task): place.best for place in found if not place.rank}
    hindsight = statistics.geometric_mean(p.best / full[p.model, p.task] for p in found if p.rank)
    kinds = {
        "from all weights to LoRA (usual: 10 times)": carried(
            found, 10, same=both, change=lambda a, b: not a.rank and b.rank
        ),
        f"from all weights to LoRA (in hindsight: {hindsight:.2g} times)": carried(
            found, hindsight, same=both, change=lambda a, b: not a.rank and b.rank
        ),
        "from LoRA's rank to another (usual: the same)": carried(
            found, 1, same=both, change=lambda a, b: a.rank and b.rank
        ),
        "from a model to another (usual: the same)": carried(
            found, 1, same=("task", "rank"), change=lambda a, b: a.model != b.model
        ),
        "from a task to the other (usual: the same)": carried(
            found, 1, same=("model", "rank"), change=lambda a, b: a.task != b.task
        ),
    }
    table = evidence.table([{"carried over": kind} | line for kind, line in kinds.items()])
    return (
        "# Does the critical learning rate carry a learning rate over in fine-tuning?\n\n"
        "How far off, as a factor: the geometric mean over pairs, the worst, and the share within a factor of 2.\n\n"
        f"{table}\n\n{evidence.table(lines)}\n\n"
        f"Means over seeds {', '.join(map(str, SEEDS))}. η_best is the bottom of a parabola through the best of a "
        f"grid of factors of 2 and its neighbours. {len(made)} runs; {made_with(made)}. "
        f"`python recipes/studies/{NAME}.py`\n"
    )


def main() -> None:
    args = small_parser(__doc__).parse_args()
    if not args.table:
        list(results(make_base, list(MODELS) if lacking(NAME, jobs()) else [], args.processes))
        append(NAME, (*Job._fields, "loss", "critical_lr"), jobs(), run, args.processes)
    save(reporting.RESULTS, NAME, report(list(lines(reporting.RESULTS, NAME, Job._fields).values())))


if __name__ == "__main__":
    main()
