"""What a step of GIAdamW takes beside torch's AdamW and RAdam, on the parameters of GPT-2 124M, without a model.

    pip install -e '.[bench]'    # for pytorch_optimizer's RAdam and ADOPT, if they are to be there
    python recipes/studies/bench_optimizer.py
    python recipes/studies/bench_optimizer.py --device cuda

All optimizers, with torch's fused and foreach kernels where they have them, share the parameters and random
gradients; each has its own state. They take turns, in every other round the other way round, and all states are made
anew several times, as where in memory they lie matters too. Writes results/bench_optimizer.csv (a row per step) and
results/bench_optimizer.md, or bench_optimizer_cuda of both.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from hf_warmup import GIAdamW

import evidence
import reporting
from reporting import conditions, current_commit, parsed, torch_threads, write

LOOP = "loop"  # of Python, over the parameters
CLASSES: dict[str, dict[str, Callable[..., torch.optim.Optimizer]]] = {
    kernel: {
        "AdamW": torch.optim.AdamW,
        "GIAdamW": GIAdamW,
        "AdamW, another": torch.optim.AdamW,  # how far the measurement is off
    }
    for kernel in ("fused", "foreach")
}
CLASSES["foreach"]["RAdam"] = partial(torch.optim.RAdam, decoupled_weight_decay=True)
if find_spec("pytorch_optimizer"):
    import pytorch_optimizer

    # ADOPT starts v as GI-Adam does, and skips the first update.
    CLASSES[LOOP] = {
        "AdamW": partial(torch.optim.AdamW, foreach=False),
        "RAdam, pytorch_optimizer": pytorch_optimizer.RAdam,
        "ADOPT, pytorch_optimizer": pytorch_optimizer.ADOPT,
    }
# A learning rate at which many steps along random gradients leave the parameters what they are.
OPTIONS = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.1}


def shapes(args: argparse.Namespace) -> list[torch.Size]:
    """Of a GPT-2's parameters, the tied ones once."""
    sizes = {"n_layer": args.layers, "n_embd": args.width, "vocab_size": args.vocab, "n_head": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=0))
    return [p.shape for p in model.parameters()]


def make_params(args: argparse.Namespace) -> list[Tensor]:
    """Parameters with gradients; for 124M 0.5 GB each."""
    generator = torch.Generator(args.device).manual_seed(0)
    made = []
    for shape in shapes(args):
        made.append((0.02 * torch.randn(shape, device=args.device, generator=generator)).requires_grad_())
        made[-1].grad = 1e-3 * torch.randn(shape, device=args.device, generator=generator)
    return made


def make_optimizer(name: str, kernel: str, params: list[Tensor]) -> torch.optim.Optimizer:
    return CLASSES[kernel][name](params, **OPTIONS, **({} if kernel == LOOP else {kernel: True}))


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """From an idle device to an idle device."""
    wait = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    wait()
    begin = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begin


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most that is held in a step beyond what was held before it."""
    if device == "cpu":
        return reporting.peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(params: list[Tensor], device: str) -> dict[tuple[str, str], dict[str, float]]:
    """State, and the peaks of the first and the second step with it, in multiples of the parameters' bytes."""
    whole = sum(p.nbytes for p in params)
    taken = {}
    for kernel, classes in CLASSES.items():
        for name in classes:
            optimizer = make_optimizer(name, kernel, params)
            first = peak_bytes(optimizer.step, device)
            state = sum(t.nbytes for values in optimizer.state.values() for t in values.values())
            second = state + peak_bytes(optimizer.step, device)
            peaks = {"state": state, "peak of first step": first, "peak of later steps": second}
            taken[name, kernel] = {what: size / whole for what, size in peaks.items()}
    return taken


def rows(params: list[Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every step's seconds; round 0 is the first step of a state."""
    made = []
    which = [(name, kernel) for kernel, classes in CLASSES.items() for name in classes]
    progress = tqdm(total=args.states * (args.rounds + 1) * len(which))
    for number in range(args.states):
        optimizers = {key: make_optimizer(*key, params) for key in (reversed(which) if number % 2 else which)}
        for turn in range(args.rounds + 1):
            for name, kernel in reversed(which) if (number + turn) % 2 else which:
                seconds = seconds_of(optimizers[name, kernel].step, args.device)
                progress.update()
                made.append({"optimizer": name, "kernel": kernel, "state": number, "round": turn, "seconds": seconds})
        del optimizers
    progress.close()
    return made


def table(made: list[dict[str, Any]], taken: dict[tuple[str, str], dict[str, float]]) -> str:
    """A line per optimizer: medians over all steps but the first of each state; ratios are of the same rounds."""
    lines = []
    for name, kernel in taken:
        times = {
            other: {
                (r["state"], r["round"]): r["seconds"]
                for r in made
                if (r["optimizer"], r["kernel"]) == (other, kernel)
            }
            for other in ("AdamW", name)
        }
        first = [seconds for (_, turn), seconds in times[name].items() if turn == 0]
        later = [seconds for (_, turn), seconds in times[name].items() if turn > 0]
        ratios = [seconds / times["AdamW"][key] for key, seconds in times[name].items() if key[1] > 0]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(
            {
                "optimizer": name,
                "kernel": kernel,
                "step, ms": f"{1000 * statistics.median(later):.3f}",
                "of AdamW's": f"{middle:.3f}",
                "quartiles": f"{low:.3f} to {high:.3f}",
                "first step, ms": f"{1000 * statistics.median(first):.3f}",
                **{what: f"{size:.2f}" for what, size in taken[name, kernel].items()},
            }
        )
    return evidence.table(lines)


def explanation(params: list[Tensor], args: argparse.Namespace, commit: str) -> str:
    """How the table was made, and how to read it."""
    waits = ", from an idle GPU to an idle GPU" * (args.device != "cpu")
    return f"""\
The parameters of a GPT-2, {sum(p.numel() for p in params) / 1e6:.1f}M in {len(params)} tensors, with random \
gradients, float32, without a model. {args.states} × {args.rounds} steps of each, one after another in turns.

* Step: median of all steps but the first of each state{waits}. Of AdamW's: the ratio to AdamW's step with the same \
kernel in the same round, median and quartiles; that of another AdamW is what the measurement itself is off. The \
first step makes the state, and of GIAdamW v_0: median of {args.states}.
* Memory is in multiples of the parameters' bytes, beyond parameters and gradients: the state, and the most that a \
step holds at a time, state included.

{conditions(["torch", "transformers"], commit, args.device)} `{args.command}`
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = reporting.parser(__doc__, rounds=15, width=768, layers=12, vocab=50257)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--states", type=int, default=5, help="times that all states are made anew")
    return parsed(parser, argv, "bench_optimizer.py")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    commit = current_commit()
    with torch_threads(args.threads):
        params = make_params(args)
        taken = memory(params, args.device)
        made = rows(params, args)
        text = f"{table(made, taken)}\n\n{explanation(params, args, commit)}"
    write(args.out, "bench_optimizer" + "_cuda" * (args.device == "cuda"), made, text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
