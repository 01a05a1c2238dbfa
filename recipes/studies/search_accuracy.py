"""How many forward passes the search for η_c takes on real networks, and whether its brackets are true.

    python recipes/studies/search_accuracy.py

GPT, BERT and a CNN, with SGD, AdamW and GI-Adam, at initialization and after 100 steps: a dense scan finds the first
crossing of the loss curve; then each method searches from a guess that is 100 times too large and 100 times too
small. Every bracket's ends are evaluated again, and the scan says whether an earlier crossing lies below it.
Writes results/search_accuracy.csv (a row per search) and results/search_accuracy.md.
"""

import math
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from hf_warmup import find_critical_lr, loss_after_step, update_slope

import evidence
import reporting
from search_cases import MODELS, OPTIMIZERS, Case, make_case

SCAN = 240  # learning rates over six decades: 6% apart
METHODS = ("secant", "secant without slope", "paper")


def scan(case: Case, optimizer: str) -> list[tuple[float, float]]:
    """The loss at 0 and at `SCAN` learning rates."""
    low = 1e-3 if optimizer == "SGD" else 1e-5
    lrs = [0.0, *(low * 10 ** (6 * i / SCAN) for i in range(SCAN))]
    return [(lr, loss_after_step(case.optimizer, case.loss_fn, lr, module=case.model)) for lr in lrs]


def search(case: Case, method: str, guess: float) -> dict[str, Any]:
    """One search, and its cost: CPU time in steps of training is added by the caller."""

    def loss_at(lr: float) -> float:
        return loss_after_step(case.optimizer, case.loss_fn, lr, module=case.model)

    begin = time.process_time()
    slope = update_slope(case.optimizer, guess) if method == "secant" else None
    name = "paper" if method == "paper" else "secant"
    # 0.01 is what the paper advises for Adam.
    found = find_critical_lr(loss_at, guess=guess, slope=slope, start=case.loss, method=name, delta=0.01, max_evals=60)
    seconds = time.process_time() - begin
    start = loss_at(0.0)
    narrow = found.upper <= found.lower * (1 + 1 / 16) * (1 + 1e-9)
    return {
        "status": found.status,
        "evals": found.num_evals,
        "lower": found.lower,
        "upper": found.upper,
        "value": found.value,
        "true": found.status == "found" and loss_at(found.lower) <= start and not loss_at(found.upper) <= start,
        "narrow": narrow,
        "seconds": seconds,
    }


def step_seconds(case: Case) -> float:
    """CPU time of a training step: the median of five, gradients only, so that nothing moves."""
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        case.loss_fn().backward()
        loss_after_step(case.optimizer, lambda: 0.0, 1e-6)  # the optimizer's step
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def rows(seeds: list[int]) -> list[dict[str, Any]]:
    """All searches."""
    made = []
    cases = [(m, o, n, s) for m in MODELS for o in OPTIMIZERS for n in (0, 100) for s in seeds]
    for model, optimizer, steps, seed in tqdm(cases):
        case = make_case(model, optimizer, steps, seed)
        (_, start), *curve = scan(case, optimizer)
        risen = [lr for lr, loss in curve if not loss <= start]
        if not risen:
            continue
        state = torch.get_rng_state()
        grads = [p.grad.clone() for p in case.model.parameters()]
        seconds = step_seconds(case)
        for p, grad in zip(case.model.parameters(), grads, strict=True):
            p.grad = grad
        for method in METHODS:
            for factor in (100.0, 0.01):
                torch.set_rng_state(state)  # the same dropout masks as in the scan
                row = search(case, method, risen[0] * factor)
                row["first"] = not any(lr < row["lower"] for lr in risen)
                row["training steps"] = row.pop("seconds") / seconds
                names = {"model": model, "optimizer": optimizer, "steps": steps, "seed": seed, "method": method}
                made.append({**names, "guess / first crossing": factor, "first crossing": risen[0], **row})
    return made


def table(made: list[dict[str, Any]]) -> str:
    """A line per method, overall and from either side."""
    lines = []
    for method in METHODS:
        for factor in (None, 100.0, 0.01):
            chosen = [r for r in made if r["method"] == method and factor in (None, r["guess / first crossing"])]
            evals, steps = sorted(r["evals"] for r in chosen), [r["training steps"] for r in chosen]
            lines.append(
                {
                    "method": method,
                    "guess": "both" if factor is None else f"{factor:g} × too " + ("large" if factor > 1 else "small"),
                    "searches": len(chosen),
                    "forward passes: median": statistics.median(evals),
                    "90%": evals[math.ceil(0.9 * len(evals)) - 1],
                    "max": evals[-1],
                    "training steps of CPU time: median": f"{statistics.median(steps):.1f}",
                    "bracket true": sum(r["true"] for r in chosen),
                    "within 1/16": sum(r["narrow"] for r in chosen),
                    "no earlier crossing in the scan": sum(r["first"] for r in chosen),
                }
            )
    return evidence.table(lines)


def main() -> None:
    parser = reporting.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.set_defaults(threads=1)
    args = reporting.parsed(parser, None, "search_accuracy.py")
    commit = reporting.current_commit()
    with reporting.torch_threads(args.threads):
        made = rows(args.seeds)
        how = f"{reporting.conditions(['torch', 'transformers'], commit)} `{args.command}`"
    words = "The loss before the step is known from the step itself and not counted."
    text = f"{table(made)}\n\nSeeds {', '.join(map(str, args.seeds))}. {words} {how}\n"
    reporting.write(args.out, "search_accuracy", made, text)


if __name__ == "__main__":
    main()
