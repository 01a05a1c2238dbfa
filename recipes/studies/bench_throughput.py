"""How fast recipes/pretrain.py trains, beside transformers' run_clm.py and while the sharpness is watched.

    python recipes/studies/bench_throughput.py
    python recipes/studies/bench_throughput.py --ways recipe critical preconditioned --beside recipe --sizes tiny \\
        --steps 210 --out DIR   # results/bench_watching.md is of such a run
    python recipes/studies/bench_throughput.py --ways recipe compiled --beside recipe --sizes 10M --out DIR
    python recipes/studies/bench_throughput.py --ways recipe chunked --beside recipe --sizes 10M --steps 20 \\
        --out DIR -- --model.vocab_size=50304

Two sizes of GPT-2 on recipes/tiny/shakespeare.txt, in several ways: the recipe as recipes/tiny/gpt.yaml has it, the
same with `streaming: true`, the same with its sharpness watched, and run_clm.py's logic written anew: tokenize and
group with `map`, a plain Trainer with transformers' default collator and fused AdamW. They take turns, in every
other round the other way round. Writes bench_throughput.csv (a row per run) and bench_throughput.md.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports: nothing here is on the hub

from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

import evidence
import reporting
from arguments import RecipeArguments, make_config
from arguments import parse as parse_recipe
from data import load_text, load_tokenizer
from pretrain import make_trainer
from reporting import conditions, current_commit, parsed, quiet, ratios, torch_threads, write

RECIPE = Path(__file__).parents[1] / "tiny" / "gpt.yaml"
# 12 x layers x width^2 and the embeddings: 0.88M, as the recipe has it, and 10.1M.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_embd": 128, "n_layer": 4, "n_head": 4},
    "10M": {"n_embd": 320, "n_layer": 8, "n_head": 5},
}
STEPS = {"tiny": 300, "10M": 60}  # of a run: as the recipe has it, and about as long
# What the plain Trainer is told too; the rest of the recipe's options (logging_steps among them) is not.
SAME = [
    "output_dir",
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "adam_beta2",
    "weight_decay",
    "save_strategy",
    "report_to",
    "seed",
    "use_cpu",
]
CHUNKS = 8  # of the logits of a batch
MEDIANS = ("parameters", "steps", "step seconds", "tokens/s", "tokens/s, all steps", "data wait", "peak bytes")
WINDOW = 8  # batches of a stream that are shuffled together, so that every eighth step reads and tokenizes


class Stopwatch(TrainerCallback):
    """Wall and CPU time of all steps but the first ones, and how much of it passed between steps, as for data."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.steps = 0
        self.seconds = self.cpu_seconds = self.waited = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.skip:
            self.waited += time.perf_counter() - self.mark

    def on_step_end(self, args, state, control, **kwargs):
        now, cpu = time.perf_counter(), time.process_time()
        if state.global_step > self.skip:
            self.steps += 1
            self.seconds += now - self.mark
            self.cpu_seconds += cpu - self.cpu_mark
        self.mark, self.cpu_mark = now, cpu


def recipe(argv: list[str]) -> Trainer:
    return make_trainer(*parse_recipe(argv))[0]


def streaming(argv: list[str]) -> Trainer:
    batch = parse_recipe(argv)[0].per_device_train_batch_size
    return recipe([*argv, "--streaming", "--shuffle_blocks", str(WINDOW * batch)])


def run_clm(argv: list[str]) -> Trainer:
    args, told = parse_recipe(argv)
    set_seed(args.seed)
    blocks, tokenizer = grouped_text(told)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return Trainer(
        AutoModelForCausalLM.from_config(make_config(told, len(tokenizer), **special)),
        TrainingArguments(**{name: getattr(args, name) for name in SAME}),
        train_dataset=blocks,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )


def grouped_text(told: RecipeArguments) -> tuple[Dataset, Any]:
    """Blocks with labels, and their tokenizer."""
    lines, _ = load_text(told)
    tokenizer = load_tokenizer(told, lines)

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["text"], verbose=False)

    def group(batch: dict) -> dict:
        joined = {name: list(itertools.chain.from_iterable(parts)) for name, parts in batch.items()}
        full = len(joined["input_ids"]) // told.context * told.context
        made = {
            name: [column[i : i + told.context] for i in range(0, full, told.context)]
            for name, column in joined.items()
        }
        return {**made, "labels": made["input_ids"].copy()}

    tokens = lines.map(tokenize, batched=True, remove_columns=["text"])
    # At once: no block is cut off at the end of every 1,000 lines, so these are the recipe's blocks.
    return tokens.map(group, batched=True, batch_size=None), tokenizer


WAYS: dict[str, Callable[[list[str]], Trainer]] = {
    "recipe": recipe,
    "streaming": streaming,
    "run_clm": run_clm,
    "compiled": lambda argv: recipe([*argv, "--torch_compile"]),
    "chunked": lambda argv: recipe([*argv, f"--loss_chunks={CHUNKS}"]),
    "critical": lambda argv: recipe([*argv, "--sharpness_every=10"]),
    "preconditioned": lambda argv: recipe([*argv, "--sharpness_every=100", "--sharpness_kind=preconditioned"]),
}


def recipe_argv(size: str, steps: int, args: argparse.Namespace, folder: Path) -> list[str]:
    """What is changed in the recipe, for all ways alike."""
    return [
        str(RECIPE),
        f"--output_dir={folder}",
        f"--max_steps={steps}",
        f"--warmup_steps={steps // 5}",
        f"--model={json.dumps({'model_type': 'gpt2', **SIZES[size]})}",
        "--eval_strategy=no",
        "--use_cpu",
        *args.recipe_options,
    ]


def measure(way: str, size: str, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Speed of one run from a fresh model, in tokens per second."""
    with quiet() as scratch:
        trainer = WAYS[way](recipe_argv(size, steps, args, scratch / "run"))
        watch = Stopwatch(args.skip)
        trainer.add_callback(watch)
        gc.collect()  # The last run's model is not cleared away in this one's time.
        begin = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - begin
    tokens = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    tokens *= trainer.model.config.n_positions
    return {
        "size": size,
        "way": way,
        "parameters": trainer.model.num_parameters(),
        "steps": steps,
        "tokens per step": tokens,
        "step seconds": watch.seconds / watch.steps,
        "step CPU seconds": watch.cpu_seconds / watch.steps,
        "tokens/s": watch.steps * tokens / watch.seconds,
        "tokens/s, all steps": steps * tokens / whole,
        "data wait": watch.waited / watch.seconds,
    }


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way in every round; before it a short run of each for its memory, which pays for what is loaded late."""
    made = []
    progress = tqdm(total=len(args.sizes) * len(args.ways) * (args.rounds + 1))
    for size in args.sizes:
        peaks = {}
        for way in args.ways:
            gc.collect()  # what the last way leaves would count as given back by this one
            peaks[way] = reporting.peak_bytes(functools.partial(measure, way, size, args.skip + 1, args))
            progress.update()
        for number, way in reporting.turns(args.ways, args.rounds):
            row = measure(way, size, args.steps or STEPS[size], args)
            made.append({"round": number, **row, "peak bytes": peaks[way]})
            progress.update()
    progress.close()
    return made


def table(made: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """A line per size and way: medians over the rounds; ratios are of runs of the same round."""
    lines = []
    for size, way in itertools.product(args.sizes, args.ways):
        chosen = [row for row in made if row["size"] == size]
        median = {key: statistics.median(row[key] for row in chosen if row["way"] == way) for key in MEDIANS}
        speed, whole, cpu = (
            ratios(chosen, way, args.beside, what) for what in ("tokens/s", "tokens/s, all steps", "step CPU seconds")
        )
        lines.append(
            {
                "GPT-2": f"{median['parameters'] / 1e6:.2f}M",
                "way": way,
                "steps": f"{median['steps']:g}",
                "step, ms": f"{1000 * median['step seconds']:.1f}",
                "tokens/s": f"{median['tokens/s']:,.0f}",
                f"of {args.beside}'s": f"{statistics.median(speed):.3f}",
                "lowest to highest": f"{min(speed):.3f} to {max(speed):.3f}",
                "tokens/s, all steps": f"{median['tokens/s, all steps']:,.0f}",
                f"of {args.beside}'s, all steps": f"{statistics.median(whole):.3f}",
                f"CPU time of {args.beside}'s": f"{statistics.median(cpu):.3f}",
                "data wait": f"{median['data wait']:.2%}",
                "most": f"{max(row['data wait'] for row in chosen if row['way'] == way):.2%}",
                "peak memory, GB": f"{median['peak bytes'] / 1e9:.2f}",
            }
        )
    return evidence.table(lines)


def explanation(made: list[dict[str, Any]], args: argparse.Namespace, commit: str) -> str:
    """How the table was made, and how to read it."""
    return f"""\
{made[0]["tokens per step"]:,} tokens per step of `recipes/tiny/shakespeare.txt`, from a fresh model; \
{args.rounds} rounds, each a run of each way, one after another. Medians over the rounds.

* Ways: `recipe` is `recipes/tiny/gpt.yaml` through `recipes/pretrain.py`, with the search for η_c and a log \
line every 5 steps, but no evaluation; `streaming` is the same with `streaming: true`, reading and tokenizing while \
it trains, {WINDOW} batches at a time; `critical` and `preconditioned` measure that sharpness every 10 and every 100 \
steps; `compiled` has `torch_compile: true`, and compiles in steps that are left out; `chunked` has \
`loss_chunks: {CHUNKS}`; `run_clm` is the logic of \
transformers' `run_clm.py` without code of ours: the \
same blocks, tokenized and grouped with `map`, a Trainer with `default_data_collator` and fused AdamW, and its \
default of a log line every 500 steps.
* Tokens/s leaves out the first {args.skip} steps, and with them the search. All steps: the whole of \
`Trainer.train()`, with the search and, of ours, the model card at its end. What is done before it \
(`map`, whose result is kept in a cache) is in neither.
* Of {args.beside}'s: the ratio to the run of the same round, median, lowest and highest. CPU time is that of all \
threads, in the steps that count; other processes of a machine disturb it less.
* Data wait: the part of the time from the end of a step to the beginning of the next, log lines included; most is \
that of the slowest round.
* Peak memory: the most that the tensors of a short run take, its model's among them.

{conditions(["torch", "transformers", "datasets"], commit)} `{args.command}`
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = reporting.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["recipe", "streaming", "run_clm"])
    parser.add_argument("--beside", choices=WAYS, default="run_clm", help="the way whose speed is 1")
    parser.add_argument("--steps", type=int, help=f"of a run; {STEPS} if not given")
    parser.add_argument("--skip", type=int, default=10, help="steps at the start of a run that are left out")
    parser.add_argument("recipe_options", nargs="*", help="options for the recipe in all ways, behind --")
    args = parsed(parser, argv, "bench_throughput.py")
    fewest = args.steps or min(STEPS[size] for size in args.sizes)
    if args.beside not in args.ways:
        parser.error(f"--ways must have --beside={args.beside}, got {' '.join(args.ways)}")
    if not 0 < args.skip < fewest:
        parser.error(f"--skip must be positive and less than steps={fewest}, got {args.skip}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    commit = current_commit()
    with torch_threads(args.threads):
        made = rows(args)
        text = f"{table(made, args)}\n\n{explanation(made, args, commit)}"
    write(args.out, "bench_throughput", made, text)


if __name__ == "__main__":
    main()
