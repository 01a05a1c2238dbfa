"""What learning-rate finders cost and what they leave behind: this package's search and three others, side by side.

    pip install -e '.[bench]'
    python recipes/studies/bench_search.py

One GPT on one text, from a fresh initialization with Adam. Every tool runs as its own documentation shows, with its
defaults. What they answer is not the same: the others suggest a learning rate to train with, this package says where
one step stops lowering the loss. Writes results/bench_search.csv (a row per tool and seed) and
results/bench_search.md.
"""

import argparse
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from hf_warmup import find_critical_lr, loss_after_step, update_slope

import evidence
import reporting
from reporting import conditions, current_commit, parsed, quiet, torch_threads, write

TEXT = Path(__file__).parents[1] / "tiny" / "shakespeare.txt"
GUESS = 1e-3  # the learning rate of the optimizer, and where this package's search starts
RANGE_TEST = {"start_lr": 1e-7, "num_iter": 100}  # torch-lr-finder's README; ignite has no default of its own
NUM_USUAL = 3  # training steps whose memory is the usual one: from the second on, Adam's state is there
# The tool's name on the command line: the package that pip installs, and the module that is imported.
PEERS = {
    "torch-lr-finder": ("torch-lr-finder", "torch_lr_finder"),
    "lightning": ("lightning", "lightning.pytorch"),
    "ignite": ("pytorch-ignite", "ignite.handlers"),
}


class LanguageModel(nn.Module):
    """Token numbers to logits: one input and one output, as the finders want it."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        self.gpt = GPT2LMHeadModel(
            GPT2Config(vocab_size=512, n_positions=context, n_embd=width, n_layer=layers, n_head=4, **ends)
        )
        # A frozen part of a model is often in eval mode: a finder that calls model.train() shows.
        self.gpt.transformer.drop.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt(input_ids=ids).logits


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass
class Training:
    """A training run before its first step, and the numbers of passes its model has made."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    scratch: Path  # where a tool may put files
    passes: dict[str, int]
    before: dict[str, Any] | None = field(default_factory=dict)  # None: nothing is remembered

    def loss(self, batch: list[Tensor]) -> Tensor:
        inputs, labels = batch
        return criterion(self.model(inputs), labels)

    def step(self, batch: list[Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss

    def hand_over(self) -> None:
        """Remember everything as it is when the tool gets it."""
        if self.before is not None:
            self.before = self.state(copy=True)

    def state(self, copy: bool = False) -> dict[str, Any]:
        taken = {
            "weights": self.model.state_dict(),
            "gradients": [p.grad for p in self.model.parameters()],
            "optimizer state": self.optimizer.state_dict()["state"],
            "optimizer options": self.optimizer.state_dict()["param_groups"],
            "torch RNG": torch.get_rng_state(),
            "Python RNG": random.getstate(),
            "numpy RNG": np.random.get_state(),
            "train/eval flags": [m.training for m in self.model.modules()],
        }
        return deepcopy(taken) if copy else taken

    def changed(self, batches: Iterable[list[Tensor]], expected: list[Tensor]) -> list[str]:
        """What differs from `before`; `batches` are those training goes on with, `expected` their inputs before."""
        before = self.before or {}
        names = [name for name, value in self.state().items() if not _equal(value, before[name])]
        inputs = [batch[0] for batch in islice(batches, len(expected))]
        return names if _equal(inputs, expected) else [*names, "data order"]


def make_training(seed: int, args: argparse.Namespace, scratch: Path) -> Training:
    """The seed sets the initialization, the dropout masks and the order of the data."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    windows = text[: len(text) // (args.context + 1) * (args.context + 1)].view(-1, args.context + 1)
    model = LanguageModel(args.width, args.layers, args.context)
    passes = {"forwards": 0, "backwards": 0}
    # Its own generator: the order of the data does not hang on the random numbers that the tools draw.
    loader = DataLoader(
        TensorDataset(windows[:, :-1], windows[:, 1:]),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )

    def count(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        passes["forwards"] += 1
        if logits.requires_grad:
            logits.register_hook(count_backward)

    def count_backward(_gradient: Tensor) -> None:
        passes["backwards"] += 1

    model.register_forward_hook(count)
    return Training(model, torch.optim.Adam(model.parameters(), GUESS), loader, scratch, passes)


@dataclass
class Answer:
    """A learning rate, and the batches that training would go on with."""

    suggestion: float
    batches: Iterable[list[Tensor]]


Tool = Callable[[Training], Answer]


def ours(method: str, *, with_slope: bool = False, target: float | None = None) -> Tool:
    def run(training: Training) -> Answer:
        batches = iter(training.loader)
        batch = next(batches)
        loss_fn = lambda: training.loss(batch)  # noqa: E731  As the README has it.
        loss_fn().backward()  # Training's own: its gradient and its random numbers stay.
        training.hand_over()
        slope = update_slope(training.optimizer, GUESS) if with_slope else None
        found = find_critical_lr(
            lambda lr: loss_after_step(training.optimizer, loss_fn, lr, module=training.model),
            guess=GUESS if target is None else None,
            target=target,
            slope=slope,
            method=method,
        )
        return Answer(found.value, chain([batch], batches))

    return run


def torch_lr_finder(training: Training) -> Answer:
    from matplotlib.figure import Figure
    from torch_lr_finder import LRFinder

    training.hand_over()
    finder = LRFinder(training.model, training.optimizer, criterion)
    finder.range_test(training.loader, **RANGE_TEST)
    _, suggestion = finder.plot(ax=Figure().subplots())  # Only the plot has a suggestion.
    finder.reset()
    return Answer(float(suggestion), training.loader)


def lightning(training: Training) -> Answer:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner import Tuner

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = training.model

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return training.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

    training.hand_over()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_model_summary=False,
        default_root_dir=training.scratch,
        **quiet,
    )
    # Not into the optimizer: a learning rate that is set on purpose is no trace.
    finder = Tuner(trainer).lr_find(Module(), train_dataloaders=training.loader, update_attr=False)
    suggestion = finder.suggestion()
    return Answer(float("nan") if suggestion is None else float(suggestion), training.loader)


def ignite(training: Training) -> Answer:
    from ignite.engine import Engine
    from ignite.handlers import FastaiLRFinder

    training.hand_over()
    trainer = Engine(lambda _engine, batch: training.step(batch).item())
    finder = FastaiLRFinder()
    saved = {"model": training.model, "optimizer": training.optimizer}
    with finder.attach(trainer, to_save=saved, **RANGE_TEST) as with_finder:
        with_finder.run(training.loader)
    return Answer(float(finder.lr_suggestion()), training.loader)


TOOLS: dict[str, dict[str, Tool]] = {
    "ours": {
        "hf-warmup": ours("secant"),
        "hf-warmup, slope given": ours("secant", with_slope=True),
        "hf-warmup, up to a target": ours("secant", target=GUESS),  # what the Trainer asks
        "hf-warmup, paper": ours("paper"),
    },
    "torch-lr-finder": {"torch-lr-finder": torch_lr_finder},
    "lightning": {"Lightning": lightning},
    "ignite": {"ignite": ignite},
}


def timed(tool: Tool, training: Training, expected: list[Tensor]) -> dict[str, Any]:
    """Cost, answer and traces of one search."""
    begin = time.process_time()
    answer = tool(training)
    seconds = time.process_time() - begin
    passes = dict(training.passes)  # before the next batches are drawn
    changed = training.changed(answer.batches, expected)
    return {**passes, "seconds": seconds, "suggestion": answer.suggestion, "changed": changed}


def peak(run: Callable[[], Any], training: Training) -> float:
    """The most memory that `run` held at once, in multiples of the parameters' bytes."""
    training.before = None  # our own copies must not count
    return reporting.peak_bytes(run) / sum(p.nbytes for p in training.model.parameters())


def training_steps(training: Training, num_steps: int = 10) -> list[float]:
    """CPU time of each of the first training steps."""
    seconds = []
    for batch in islice(training.loader, num_steps):
        begin = time.process_time()
        training.step(batch)
        seconds.append(time.process_time() - begin)
    return seconds


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every tool with every seed; memory with the first one, as sizes do not depend on it."""
    tools = {name: tool for choice in args.tools for name, tool in TOOLS[choice].items()}
    made = []
    for seed in tqdm(args.seeds):
        first = seed == args.seeds[0]
        with quiet() as scratch:
            # It also pays for what torch loads late, before any tool's time counts.
            step = statistics.median(training_steps(make_training(seed, args, scratch)))
            expected = [batch[0] for batch in islice(make_training(seed, args, scratch).loader, 2)]
            training = make_training(seed, args, scratch)
            usual = peak(partial(training_steps, training, NUM_USUAL), training) if first else math.nan
        for name, tool in tools.items():
            with quiet() as scratch:
                row = timed(tool, make_training(seed, args, scratch), expected)
                training = make_training(seed, args, scratch)
                most = peak(partial(tool, training), training) if first else math.nan
            row |= {"training steps": row["seconds"] / step, "peak": most}
            row |= {"training step seconds": step, "training step peak": usual}
            made.append({"tool": name, "seed": seed, **row})
    return made


def table(made: list[dict[str, Any]]) -> str:
    """A line per tool: medians over the seeds, and everything that any seed left changed."""
    lines = []
    for name, chosen in evidence.groups(made, lambda row: row["tool"]).items():
        first = chosen[0]  # the seed whose memory was measured
        median = {
            key: statistics.median(row[key] for row in chosen)
            for key in ("forwards", "backwards", "training steps", "suggestion")
        }
        changed = dict.fromkeys(what for row in chosen for what in row["changed"])
        lines.append(
            {
                "tool": name,
                "forwards": f"{median['forwards']:g}",
                "backwards": f"{median['backwards']:g}",
                "CPU time, training steps": f"{median['training steps']:.1f}",
                "peak memory beyond training's": f"{first['peak'] - first['training step peak']:+.1f}",
                "suggestion": f"{median['suggestion']:.2g}",
                "left changed": ", ".join(changed) or "nothing",
            }
        )
    return evidence.table(lines)


def explanation(made: list[dict[str, Any]], args: argparse.Namespace, commit: str) -> str:
    """How the table was made, and how to read it."""
    packages = ["torch", "transformers", *(PEERS[tool][0] for tool in args.tools if tool in PEERS)]
    # Not a training: only to count.
    num = sum(p.numel() for p in LanguageModel(args.width, args.layers, args.context).parameters())
    step = statistics.median(row["training step seconds"] for row in made)
    return f"""\
GPT-2 of {num / 1e6:.2f}M parameters ({args.layers} layers, width {args.width}), batches of {args.batch} × \
{args.context} bytes of `recipes/tiny/shakespeare.txt`, dropout 0.1, Adam, before the first step. Medians over seeds \
{", ".join(map(str, args.seeds))} (initialization, dropout and data order).

* CPU time (`time.process_time`) is in training steps of the same model, {step:.2f} s each. Ours has the forward and \
the backward pass in it that training makes anyway.
* Memory is in multiples of the trainable parameters' bytes, by the record of torch's CPU allocator, with the first \
seed. That of training's first {NUM_USUAL} steps is subtracted: {made[0]["training step peak"]:.0f} ×, nearly all of \
it activations. A negative peak: Adam's state is not there yet.
* The suggestions are not the same quantity: ours is η_c, above which the next step raises the loss of its batch; the \
others suggest a learning rate to train with.
* Left changed: against the moment the tool is called, in any seed; weights, gradients, optimizer state and options, \
random numbers (torch, Python, numpy), train/eval flags and the next two batches were compared. One dropout layer was \
in eval mode. Ours searches on the batch that training then uses; the others iterate over the loader, whose next pass \
has another order. torch-lr-finder's `reset()` is called, and Lightning is asked not to set the learning rate.

{conditions(packages, commit)} `{args.command}`
"""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = reporting.parser(__doc__, width=128, layers=4, context=64, batch=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.set_defaults(threads=1)
    return parsed(parser, argv, "bench_search.py")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    reporting.need(PEERS[tool] for tool in args.tools if tool in PEERS)
    os.environ["MPLBACKEND"] = "Agg"
    commit = current_commit()
    with torch_threads(args.threads):
        made = rows(args)
        text = f"{table(made)}\n\n{explanation(made, args, commit)}"
    write(args.out, "bench_search", [{**row, "changed": ", ".join(row["changed"])} for row in made], text)


if __name__ == "__main__":
    main()
