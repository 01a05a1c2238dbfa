"""What guided warmup takes beside a training step: the slope along the momentum, and the norm of the gradients.

    python recipes/studies/bench_guided.py
    python recipes/studies/bench_guided.py --device cuda --width 768 --layers 12 --vocab 50257 --context 1024

A GPT-2 with random tokens, AdamW, clipped gradients; on a GPU with bf16 autocast. Step and slope take turns. Writes
results/bench_guided.csv (a row per turn) and results/bench_guided.md, or bench_guided_cuda of both.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_warmup import momentum_slope
from hf_warmup.warmup import GuidedWarmup

import evidence
import reporting
from bench_optimizer import seconds_of
from reporting import conditions, current_commit, parsed, torch_threads, write

LENGTHS = (300, 1000, 10_000, 100_000)


def make_turns(args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], int]:
    """What takes turns, and the number of parameters."""
    torch.manual_seed(0)
    sizes = {"n_layer": args.layers, "n_embd": args.width, "vocab_size": args.vocab, "n_positions": args.context}
    config = AutoConfig.for_model("gpt2", **sizes, n_head=max(1, args.width // 64), bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).to(args.device)
    ids = torch.randint(args.vocab, (args.batch, args.context), device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def slope() -> float:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return momentum_slope(optimizer, 1e-4) / max(1.0, norm.item())

    return {"training step": step, "slope": slope}, sum(p.numel() for p in model.parameters())


def num_slopes(num_steps: int) -> int:
    """Slopes of a run of N steps: one in each of the t* steps to the valley."""
    return round(GuidedWarmup.usual_ramp_steps(num_steps, decoder=True))


def report(made: list[dict[str, Any]], num_params: int, args: argparse.Namespace, commit: str) -> str:
    medians = {
        what: statistics.median(row["seconds"] for row in made if row["what"] == what)
        for what in ("training step", "slope")
    }
    step = medians["training step"]
    table = [
        {"what": what, "ms": f"{1000 * value:.2f}", "training steps": f"{value / step:.3f}"}
        for what, value in medians.items()
    ]
    whole = [
        {
            "steps": num_steps,
            "slopes": num_slopes(num_steps),
            "of the run's time": f"{num_slopes(num_steps) * medians['slope'] / step / num_steps:.3%}",
        }
        for num_steps in LENGTHS
    ]
    words = (
        f"A GPT-2 of {num_params / 1e6:.1f}M parameters, {args.batch} × {args.context} tokens; medians of "
        f"{args.rounds} turns. What that makes of a run whose valley comes after t* steps:"
    )
    where = conditions(["torch", "transformers"], commit, args.device)
    return f"{evidence.table(table)}\n\n{words}\n\n{evidence.table(whole)}\n\n{where} `{args.command}`\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = reporting.parser(__doc__, rounds=20, width=128, layers=4, vocab=512, context=128, batch=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
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
