"""What a run would be, on any number of processes, without running it: `--plan 64`."""

import functools

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_warmup.trainer import WarmupTrainingArguments
from hf_warmup.warmup import GuidedWarmup

from arguments import RecipeArguments, make_config, one_line
from running import PEAK_TFLOPS, flops_per_token

SINGLE, HALF = 4, 2  # bytes of a number
ADAM_STATES = 2  # numbers that Adam keeps per parameter
SEARCH_PASSES = 8  # forward passes of a search, at most on most networks
SEARCH_COPIES = 1.1  # most that a search holds, in copies of the parameters
REACHED = 0.4  # part of a GPU's peak that a run reaches
GROWN = 2  # times as large a batch is another one
# About how many tokens a data set and its configuration have: FineWeb-Edu's by its card, in tokens of GPT-2; of
# Wikipedia its words, of which each is a token at least.
DATASET_TOKENS = {
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): 10e9,
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): 100e9,
    ("HuggingFaceFW/fineweb-edu", "sample-350BT"): 350e9,
    ("wikimedia/wikipedia", "20231101.en"): 3.3e9,
}


def search_cost(args: WarmupTrainingArguments) -> str:
    """Forward passes of the search, and what part of the run they are."""
    steps = args.max_steps

    def share(passes: float) -> str:
        # A training step is about three forward passes: its own and a backward pass of two.
        return f" ({passes / 3 / steps:.2%} of the run)" if steps > 0 else ""

    kind = args.kind(args.warmup_steps)
    if kind == "guided":
        return "no forward pass; an optimizer step more in each step to the valley"
    if kind == "persistent":
        return "about 8 forward passes a search; how many searches depends on the run"
    if kind == "none" or args.fixed_init_lr is not None:
        return "none"
    return f"1 to {SEARCH_PASSES} forward passes{share(SEARCH_PASSES)}"


def warmup_words(args: WarmupTrainingArguments, decoder: bool, optimizer: str, num_weights: int) -> str:
    kind = args.kind(args.warmup_steps)
    if kind == "guided":
        steps = args.ramp_steps
        if steps is None and args.max_steps > 0:
            steps = GuidedWarmup.usual_ramp_steps(
                args.max_steps, decoder=decoder, optimizer=optimizer, num_weights=num_weights
            )
        about = "some steps" if steps is None else f"about {steps:.0f} steps"
        return f"guided: {about} to the valley, and at most half of the run"
    if kind == "persistent":
        return "persistent: as long as it takes"
    steps = args.get_warmup_steps(args.max_steps) if args.max_steps > 0 else args.warmup_steps
    return f"linear over {steps} steps" if steps else "none"


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def memory_per_process(parameters: int, processes: int, low: int, search: bool) -> list[list[str]]:
    """Rows: weights, gradients, optimizer, search and all of them; columns: the ways to spread a model.

    Args:
        parameters: Of the model.
        processes: What shards are divided by.
        low: Bytes of a number in the precision that DeepSpeed's model computes with. DDP and FSDP2 keep single
            precision and cast on the fly.
        search: Whether learning rates are tried: a copy of what a process holds in single precision.
    """
    whole, part = parameters, parameters / processes
    ways = {
        "DDP": (SINGLE * whole, SINGLE * whole, whole),
        "ZeRO-2": (low * whole + SINGLE * part, low * part, part),
        "ZeRO-3": ((low + SINGLE) * part, low * part, part),
        "FSDP2": (SINGLE * part, SINGLE * part, part),
    }
    columns = []
    for weights, gradients, held in ways.values():
        needs = [weights, gradients, ADAM_STATES * SINGLE * held, SEARCH_COPIES * SINGLE * held * search]
        columns.append([*needs, sum(needs)])
    names = ("weights", "gradients", "optimizer", "search, while it runs", "in all")
    rows = [[name, *map(gibibytes, row)] for name, *row in zip(names, *columns, strict=True)]
    return [["memory per process", *ways], *rows]


def days(operations: float, processes: int) -> str:
    """How long so many operations take on GPUs, one a process."""
    needs = {kind: operations / (REACHED * PEAK_TFLOPS[kind] * 1e12 * processes) / 86400 for kind in ("A100", "H100")}
    return ", ".join(f"{time:.2g} on {processes} {kind}" for kind, time in needs.items())


def warnings(args: WarmupTrainingArguments, recipe: RecipeArguments, tokens: int) -> list[str]:
    """What is wrong with so many tokens per step, each a line."""
    lines, in_all = [], tokens * max(args.max_steps, 0)
    known = DATASET_TOKENS.get((recipe.dataset, recipe.dataset_config))
    if known is not None and in_all > known:
        lines.append(
            f"warning: {recipe.dataset} {recipe.dataset_config} has about {known / 1e9:g}B tokens, and the run takes "
            f"{in_all / known:.3g} times as many: it meets the same text again"
        )
    chosen = recipe.lr_chosen_for
    if chosen and not args.auto_lr and tokens >= GROWN * chosen:
        lines.append(
            f"warning: the recipe's learning_rate was chosen for {chosen:,} tokens per step, and {tokens:,} are "
            f"{tokens / chosen:.3g} times as many: lower gradient_accumulation_steps or per_device_train_batch_size, "
            "or choose it anew"
        )
    return lines


def plan(args: WarmupTrainingArguments, recipe: RecipeArguments) -> str:
    """Two tables, and what is wrong with them; nothing is trained, tokenized or written."""
    cls = AutoModelForMaskedLM if recipe.objective == "mlm" else AutoModelForCausalLM
    config = make_config(recipe, recipe.vocab_size)
    with torch.device("meta"), one_line("model must be a configuration that a model can be made of", recipe.model):
        model = cls.from_config(config)
    parameters = model.num_parameters()
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * recipe.plan
    steps = f"{args.max_steps:,}" if args.max_steps > 0 else f"those of {args.num_train_epochs:g} epochs"
    tokens = sequences * recipe.context
    operations = tokens * args.max_steps * flops_per_token(model, recipe.context)
    rows = [
        ("processes", f"{recipe.plan}"),
        ("parameters", f"{parameters:,}"),
        ("sequences per step", f"{sequences:,}"),
        ("tokens per step", f"{tokens:,}"),
        ("steps", steps),
        ("tokens in all", f"{tokens * args.max_steps:,}" if args.max_steps > 0 else "by the text"),
        *(
            [
                ("operations in all", f"{operations:.3g}, 6 for a parameter and a token, and attention's"),
                (f"days at {REACHED:.0%} of the peak", days(operations, recipe.plan)),
            ]
            if args.max_steps > 0
            else []
        ),
        ("warmup", warmup_words(args, recipe.objective == "clm", recipe.optim_factory, parameters)),
        ("search", search_cost(args)),
    ]
    kind = args.kind(args.warmup_steps)
    searches = kind == "persistent" or (kind == "linear" and args.fixed_init_lr is None)
    low = HALF if args.bf16 or args.fp16 else SINGLE
    memory = memory_per_process(parameters, recipe.plan, low, searches)
    notes = ["Activations come on top, and the layer that is gathered where weights are sharded."]
    table = functools.partial(tabulate, tablefmt="rounded_outline", disable_numparse=True)
    notes += warnings(args, recipe, tokens)
    return "\n".join([table(rows), table(memory, headers="firstrow"), *notes])
