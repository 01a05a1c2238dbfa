"""What the measurements of guided warmup take beside a training step: a trial, and a slope of the momentum.

    python recipes/studies/bench_guided.py
    python recipes/studies/bench_guided.py --device cuda --width 768 --layers 12 --vocab 50257 --context 1024

A GPT-2 with random tokens, AdamW, clipped gradients; on a GPU with bf16 autocast. Step, trial and slope take turns.
Writes results/bench_guided.csv (a row per turn) and results/bench_guided.md, or bench_guided_cuda of both.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoConfig, AutoModelForCausalLM

from hf_warmup import loss_after_step, momentum_slope
from hf_warmup.guided import EVERY, ramp_rate, trial_interval

from bench_optimizer import seconds_of
from reporting import conditions, current_commit, device_parser, parsed, torch_threads, write

LENGTHS = (300, 1000, 10_000, 100_000)
TURN = 0.25  # of the ramp's 2/ρ steps: about where the momentum turns, in every setting of warmup_study


def make_turns(args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], int]:
    """What takes turns, and the number of parameters."""
    torch.manual_seed(0)
    sizes = {"n_layer": args.layers, "n_embd": args.width, "vocab_size": args.vocab, "n_positions": args.context}
    config = AutoConfig.for_model("gpt2", **sizes, n_head=max(1, args.width // 64), bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).to(args.device)
    ids = torch.randint(args.vocab, (args.batch, args.context), device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True)

    def loss_fn() -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            return model(input_ids=ids, labels=ids).loss

    def step() -> None:
        optimizer.zero_grad()
        loss_fn().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    turns = {
        "training step": step,
        "trial": lambda: loss_after_step(optimizer, loss_fn, 1e-4, module=model),
        "slope": lambda: momentum_slope(optimizer, 1e-4),
    }
    return turns, sum(p.numel() for p in model.parameters())


def counts(num_steps: int) -> tuple[int, int]:
    """Trials and slopes of a run of N steps whose ramp takes all of its 2/ρ steps and turns at `TURN` of them."""
    ramp = min(round(2 / ramp_rate(num_steps)), num_steps // 2)
    trials, step = 0, EVERY
    while step < ramp:
        trials, step = trials + 1, step + trial_interval(step, EVERY)
    return trials + 8, round(TURN * ramp)  # 8: the search at the first step


def report(made: list[dict[str, Any]], num_params: int, args: argparse.Namespace, commit: str) -> str:
    medians = {
        what: statistics.median(row["seconds"] for row in made if row["what"] == what)
        for what in ("training step", "trial", "slope")
    }
    step = medians["training step"]
    table = [
        {"what": what, "ms": f"{1000 * value:.2f}", "training steps": f"{value / step:.3f}"}
        for what, value in medians.items()
    ]
    whole = []
    for num_steps in LENGTHS:
        trials, slopes = counts(num_steps)
        spent = (trials * medians["trial"] + slopes * medians["slope"]) / step
        whole.append(
            {"steps": num_steps, "trials": trials, "slopes": slopes, "of the run's time": f"{spent / num_steps:.2%}"}
        )
    first, second = (
        tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True) for lines in (table, whole)
    )
    words = (
        f"A GPT-2 of {num_params / 1e6:.1f}M parameters, {args.batch} × {args.context} tokens; medians of "
        f"{args.rounds} turns. What that makes of a run, whose ramp takes 2/ρ steps and turns at a quarter of them:"
    )
    where = conditions(["torch", "transformers"], commit, args.device)
    return f"{first}\n\n{words}\n\n{second}\n\n{where} `{args.command}`\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = device_parser(__doc__, rounds=20)
    for name, default in (("width", 128), ("layers", 4), ("vocab", 512), ("context", 128), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parsed(parser, argv, "bench_guided.py")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    commit = current_commit()
    with torch_threads(args.threads):
        turns, num_params = make_turns(args)
        for _ in range(3):
            for turn in turns.values():
                turn()
        made = [
            {"round": number, "what": what, "seconds": seconds_of(turn, args.device)}
            for number in range(args.rounds)
            for what, turn in turns.items()
        ]
        text = report(made, num_params, args, commit)
    write(args.out, "bench_guided" + "_cuda" * (args.device == "cuda"), made, text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
