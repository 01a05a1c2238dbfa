"""A recipe: one YAML file, of which any option can be changed on the command line."""

import contextlib
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from accelerate.utils import DynamoBackend
from transformers import AutoConfig, HfArgumentParser, PretrainedConfig, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from hf_warmup.trainer import WarmupArguments, WarmupTrainingArguments
from hf_warmup.trainer.arguments import GONE

CHARACTERS = "characters"  # the tokenizer that is none of the hub's


@dataclass
class RecipeArguments:
    """What to train on what; everything about how is a TrainingArguments or a warmup option."""

    objective: Literal["clm", "mlm"] = field(
        default="clm", metadata={"help": "Causal (`clm`, as GPT) or masked (`mlm`, as BERT) language modelling."}
    )
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Files to train on, .txt in UTF-8, .jsonl or .parquet; in a YAML, relative to its folder."},
    )
    dataset: str = field(default="", metadata={"help": "A data set of the hub, by name, in place of `text`."})
    dataset_config: str = field(default="", metadata={"help": "Its configuration, such as sample-10BT."})
    dataset_split: str = field(default="train", metadata={"help": "The split of it that is trained on."})
    text_column: str = field(default="text", metadata={"help": "The column of .jsonl, .parquet or `dataset`."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read documents while training instead of before it. Of .txt files paragraphs are documents then. "
            "Needs max_steps; the text begins again when it ends."
        },
    )
    held_out: int = field(
        default=500, metadata={"help": "Documents at the start of a stream that are kept for evaluation."}
    )
    held_out_end: bool = field(
        default=False,
        metadata={"help": "Keep the last tenth for evaluation, in place of every tenth part; not of a stream."},
    )
    shuffle_blocks: int = field(default=4096, metadata={"help": "Blocks of a stream that are shuffled together."})
    tokenizer: str = field(
        default="",
        metadata={
            "help": "A tokenizer of the hub or a folder; one is trained on the text if empty; `characters` takes the "
            "text's characters (`clm` only)."
        },
    )
    init_from: str = field(
        default="",
        metadata={"help": "Folder of a model to go on from, with its weights and its tokenizer, in place of `model`."},
    )
    model: str = field(
        default="",
        metadata={
            "help": "Configuration as a mapping (JSON on the command line): model_type, and what differs from its "
            "defaults. The vocabulary size and the context are filled in. `--model.n_layer 2` changes one key of it."
        },
    )
    vocab_size: int = field(
        default=4096, metadata={"help": "Size of the tokenizer that is trained on the text; of `characters` the most."}
    )
    context: int = field(default=128, metadata={"help": "Tokens in a training sequence."})
    document_mask: bool = field(
        default=False,
        metadata={"help": "Let no token see another document of its block, and begin positions anew (`clm` only)."},
    )
    whole_word_mask: bool = field(
        default=False,
        metadata={"help": "Mask all tokens of a word or none (`mlm` only); masked words are all [MASK]."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Fraction of the tokens masked by `mlm`."})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Delete the earlier run in output_dir first; anything but a run is left alone, with an error."
        },
    )
    sample_prompt: str = field(
        default="", metadata={"help": "A text that the model goes on with after every evaluation (`clm` only)."}
    )
    peak_tflops: float = field(
        default=0.0,
        metadata={
            "help": "What a device does at most, in 10^12 operations per second, for the MFU; known for some GPUs."
        },
    )
    sharpness_every: int = field(
        default=0,
        metadata={"help": "Steps from one measurement of the sharpness to the next, for the log; 0 is never."},
    )
    sharpness_kind: Literal["critical", "hessian", "preconditioned"] = field(
        default="critical",
        metadata={
            "help": "Which: `critical` is 2 over the critical learning rate, by a few forward passes; `hessian` the "
            "largest eigenvalue of the Hessian; `preconditioned` the same for Adam. The last two take some tens of "
            "training steps' time, and whole weights on every process."
        },
    )
    optim_factory: Literal["none", "muon"] = field(
        default="none",
        metadata={
            "help": "`muon`: Muon for the matrices inside the model and AdamW for the rest, both at learning_rate, in "
            "the place of `optim`. Not under DeepSpeed."
        },
    )
    loss_chunks: int = field(
        default=0,
        metadata={
            "help": "Make the logits of a training batch in so many parts, each again in the backward pass, to hold "
            "one of them at a time (`clm` only); 0 holds all. Not under FSDP or DeepSpeed."
        },
    )
    smoke: bool = field(
        default=False,
        metadata={
            "help": "See that a recipe runs, without a hub, a GPU or time: a small model and batch, three steps, "
            "Shakespeare and a tokenizer of its own in place of the hub's, output in output_dir with -smoke behind "
            "it. Sizes on the command line count."
        },
    )
    plan: int = field(
        default=0,
        metadata={
            "help": "Print what the run would be on that many processes (tokens, days, memory, search), and end."
        },
    )
    lr_chosen_for: int = field(
        default=0,
        metadata={"help": "Tokens per step that learning_rate was chosen for, for a word of `plan`; 0 if unknown."},
    )

    def __post_init__(self) -> None:
        if self.plan < 0:
            raise ValueError(f"plan must be at least 0 processes, got {self.plan}")
        if bool(self.text) == bool(self.dataset):
            got = f"{', '.join(self.text)} and {self.dataset}" if self.text else "none"
            raise ValueError(f"text must name at least one file, or dataset a data set, and not both, got {got}")
        for path in self.text:
            if not Path(path).is_file():
                raise ValueError(f"text must be a file that exists, got {path}")
        for name, objective in (
            ("document_mask", "clm"),
            ("sample_prompt", "clm"),
            ("loss_chunks", "clm"),
            ("whole_word_mask", "mlm"),
        ):
            if getattr(self, name) and self.objective != objective:
                raise ValueError(f"{name} is for objective={objective}, got {self.objective}")
        if self.tokenizer == CHARACTERS and self.objective != "clm":
            raise ValueError(f"tokenizer={CHARACTERS} is for objective=clm, got {self.objective}")
        if self.tokenizer == CHARACTERS and self.init_from:
            raise ValueError(f"tokenizer={CHARACTERS} is for a model from scratch, got init_from={self.init_from}")
        if self.held_out_end and self.streaming:
            raise ValueError("held_out_end must be false with streaming=true, got true: the end is not known")
        if self.vocab_size > _MOST_WORDS:
            raise ValueError(f"vocab_size must be at most {_MOST_WORDS}, got {self.vocab_size}")
        if not 0 <= self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops must be at least 0 and finite, got {self.peak_tflops}")
        for name, least in (
            ("vocab_size", 300),
            ("context", 8),
            ("held_out", 1),
            ("shuffle_blocks", 1),
            ("sharpness_every", 0),
            ("lr_chosen_for", 0),
            ("loss_chunks", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, got {self.mlm_probability}")
        if self.init_from:
            if not (Path(self.init_from) / "config.json").is_file():
                raise ValueError(f"init_from must be the folder of a model, got {self.init_from}")
            return
        try:
            known = isinstance(json.loads(self.model)["model_type"], str)
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(f"model must be a mapping with a model_type, got {self.model!r}")


_MOST_WORDS = 10_000_000  # ten times as many as any tokenizer of the hub has; far more end the process at once


def make_config(recipe: RecipeArguments, vocab_size: int, **special_ids: int | None) -> PretrainedConfig:
    """The model's configuration; the vocabulary and the context are filled in."""
    options = json.loads(recipe.model)
    model_type = options.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(f"model must have a model_type that transformers knows, got {model_type!r}") from None
    for name, value in options.items():
        if not hasattr(known, name):
            raise ValueError(f"model has an option that {model_type} does not know, got {name}: {value}")
        size = any(name in (common, known.attribute_map.get(common)) for common in _SMOKE)
        if size and value is not None and not (isinstance(value, int) and value > 0):
            raise ValueError(f"model must have sizes that are positive whole numbers, got {name}: {value!r}")
    if recipe.smoke:
        options |= {known.attribute_map.get(name, name): size for name, size in _SMOKE.items() if hasattr(known, name)}
        options.pop("vocab_size", None)  # of the hub's tokenizer, padded
    positions = {"max_position_embeddings": recipe.context}
    with one_line("model must be a configuration that transformers takes", recipe.model):
        return AutoConfig.for_model(model_type, **{"vocab_size": vocab_size, **positions, **special_ids, **options})


@contextlib.contextmanager
def one_line(must: str, got: Any) -> Iterator[None]:
    """Makes one line of whatever a library has to say against a value."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{must}, got {got}: {reason or type(error).__name__}") from error


# A model that takes no time: by the names that the configurations of transformers have for these.
_SMOKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


# The groups of --help, in their order; of `data` is also what no other names, and the trainer's own come last.
_GROUPS = {
    "run": """output_dir overwrite resume_from_checkpoint smoke plan lr_chosen_for sample_prompt peak_tflops
        sharpness_every sharpness_kind""".split(),
    "data": ["text_column", "label_column"],
    "model": """objective model init_from dtype lora_r lora_alpha lora_dropout lora_target_modules
        loss_chunks""".split(),
    "warmup": [*(option.name for option in dataclasses.fields(WarmupArguments)), "warmup_steps"],
    "Trainer": ["optim_factory"],
}


class Parser(HfArgumentParser):
    """A parser whose errors are ValueErrors of a line, and whose help is in groups."""

    def __init__(self, types: Sequence[type], usage: str = "%(prog)s [--option value ...]") -> None:
        own = [cls for cls in types if not issubclass(cls, TrainingArguments)]
        self.titles = {option.name: "data" for cls in own for option in dataclasses.fields(cls)}
        self.titles |= {name: title for title, names in _GROUPS.items() for name in names}
        self.groups: dict[str, Any] = {}
        super().__init__(types, usage=usage, allow_abbrev=False)

    def add_argument(self, *flags: str, **options: Any) -> Any:
        if flags[0] == "-h":
            return super().add_argument(*flags, **options)
        self.groups = self.groups or {title: self.add_argument_group(title) for title in _GROUPS}
        name = options.get("dest", flags[0].lstrip("-"))
        return self.groups[self.titles.get(name, "Trainer")].add_argument(*flags, **options)

    def read(self, argv: Sequence[str]) -> Any:
        """The options by name.

        Raises:
            ValueError: In one line, with the first that there is not, and what is meant.
        """
        found, left = self.parse_known_args(list(argv))
        if left:
            more = [*left[1:], "--"]
            shown = " ".join([left[0], *more[: next(i for i, word in enumerate(more) if word.startswith("--"))]])
            name = left[0].partition("=")[0].lstrip("-").replace("-", "_")
            raise unknown(name, shown, [f.name for cls in self.dataclass_types for f in dataclasses.fields(cls)])
        return found

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: some hundred lines.
        raise ValueError(message)


def unknown(name: str, shown: str, known: Iterable[str], where: str = "") -> ValueError:
    """What to say of an option that there is not: what it has become, or which is meant."""
    if name in GONE:
        return ValueError(f"{name}{where} is no option any more: {GONE[name]}")
    near = difflib.get_close_matches(name, known, 1)
    return ValueError(f"unknown option {shown}{where}" + "".join(f"; did you mean {n}?" for n in near))


def parse(argv: list[str]) -> tuple[WarmupTrainingArguments, RecipeArguments]:
    """Read `RECIPE.yaml [--option value ...]`.

    Raises:
        ValueError: In one line, with the option and its value.
    """
    parser = Parser([WarmupTrainingArguments, RecipeArguments], usage="pretrain.py RECIPE.yaml [--option value ...]")
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    # As if typed before the rest: argparse checks what is typed, but not the defaults it is given.
    options, (typed, keys) = read_recipe(argv[0]), _keys_of_model(argv[1:])
    given = parser.read([*options, *typed])
    arguments = [*options, *(_smoke_sizes(given) if given.smoke else []), *typed]
    if keys:
        arguments.append(f"--model={_with_keys(given.model, keys)}")
    said = ["smoke: a small model"]
    if given.smoke:
        arguments += _smoke_data(given, typed, said)
    if (given.smoke or given.plan) and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "--tf32=false"]
        # A plan is for GPUs: there the type of numbers counts.
        arguments += ["--bf16=false", "--fp16=false"] if given.smoke else []
    training, recipe = as_dataclasses(parser, arguments)
    if recipe.streaming and training.max_steps <= 0:
        raise ValueError(
            f"max_steps must be positive with streaming=true, got {training.max_steps}: a stream has no end"
        )
    if recipe.loss_chunks and training.label_smoothing_factor:
        raise ValueError(
            f"loss_chunks must be 0 with label_smoothing_factor={training.label_smoothing_factor}, which needs all "
            f"logits, got {recipe.loss_chunks}"
        )
    available = get_available_reporting_integrations()
    for name in [] if recipe.plan else list(training.report_to):
        if name not in available and recipe.smoke:
            training.report_to.remove(name)
            said.append(f"no {name}, which is not installed")
        elif name not in available:
            raise ValueError(
                f"report_to must be of what is installed, got {name}: pip install it, or pass --report_to none"
            )
    if recipe.smoke and training.process_index == 0:
        print(", ".join([*said, f"{training.max_steps} steps, output in {training.output_dir}"]))
    return training, recipe


# The most of what --smoke has; more on the command line counts.
_SMOKE_SIZES = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "shuffle_blocks": 64,  # read before the first step
    "held_out": 100,
    "max_steps": 3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
}
_SHAKESPEARE = Path(__file__).with_name("tiny") / "shakespeare.txt"


def _smoke_sizes(given: Any) -> list[str]:
    sizes = {name: min(most, getattr(given, name)) for name, most in _SMOKE_SIZES.items()}
    if sizes["max_steps"] <= 0:  # epochs
        sizes["max_steps"] = _SMOKE_SIZES["max_steps"]
    # A compiler takes longer than the steps.
    return ["--torch_compile=false", *(f"--{name}={size}" for name, size in sizes.items())]


def _smoke_data(given: Any, typed: Sequence[str], said: list[str]) -> list[str]:
    """What takes the place of the hub's, and a folder that is not the recipe's; `said` is told what was replaced."""
    options = []
    if given.dataset and not Path(given.dataset).exists():
        options += ["--dataset=", "--dataset_config=", f"--text={_SHAKESPEARE}", "--text_column=text"]
        said.append(f"{_SHAKESPEARE.name} in place of {given.dataset}")
    if given.tokenizer not in ("", CHARACTERS) and not Path(given.tokenizer).exists():
        options += ["--tokenizer=", f"--vocab_size={min(512, given.vocab_size)}"]
        said.append(f"a tokenizer trained on the text in place of {given.tokenizer}")
    if not any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in typed):
        options += [f"--output_dir={given.output_dir or 'run'}-smoke", "--overwrite"]
    return options


def _keys_of_model(typed: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The options without those of single keys of the model, as `--model.n_layer 2`; and these."""
    others, keys, words = [], {}, iter(typed)
    for word in words:
        if not word.startswith("--model."):
            others.append(word)
            continue
        name, is_there, value = word.removeprefix("--model.").partition("=")
        value = value if is_there else next(words, "--")
        if value.startswith("--"):
            raise ValueError(f"model.{name} must have a value, got none")
        try:
            keys[name] = json.loads(value)
        except ValueError:
            keys[name] = value
    return others, keys


def _with_keys(model: str, keys: dict[str, Any]) -> str:
    try:
        return json.dumps({**json.loads(model), **keys})
    except (ValueError, TypeError):
        raise ValueError(f"model must be a mapping for {', '.join(keys)} to be in it, got {model!r}") from None


# From, and below; None and words are not looked at.
_RANGES = {
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "data_seed": (0, 2**32),
    "dataloader_num_workers": (0, math.inf),
    "eval_steps": (0, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "label_smoothing_factor": (0, 1),
    "logging_steps": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "save_steps": (0, math.inf),
    "seed": (0, 2**32),
    "weight_decay": (0, math.inf),
}


def as_dataclasses(parser: Parser, argv: Sequence[str]) -> tuple[Any, ...]:
    """The options as the parser's dataclasses.

    Raises:
        ValueError: In one line, with the option and its value, whatever the libraries say.
    """
    # Bars are for a terminal; in a file there is a line for each log entry.
    argv = [f"--disable_tqdm={not sys.stderr.isatty()}", *argv]
    parser.read(argv)
    try:
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:
        raise ValueError(_named(parser, argv, error)) from error
    training = parsed[0]
    if training.hub_token:
        raise ValueError("hub_token must be left out, as a run keeps its command and its options: set HF_TOKEN")
    if not training.output_dir:
        raise ValueError(f"output_dir must be the name of a folder, got {training.output_dir!r}")
    for name, (least, below) in _RANGES.items():
        value = getattr(training, name, None)
        if isinstance(value, int | float) and not least <= value < below:
            most = "" if below == math.inf else f" and less than {below}"
            raise ValueError(f"{name} must be at least {least}{most}, got {value}")
    kind, options = training.lr_scheduler_type, training.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with one_line(f"lr_scheduler_kwargs must be those of lr_scheduler_type={getattr(kind, 'value', kind)}", options):
        get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=dict(options or {}))
    if (backend := training.torch_compile_backend) is not None:
        with one_line("torch_compile_backend must be one that accelerate knows", backend):
            DynamoBackend(backend.upper())
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # torch would warn that there is nothing to pin for
    return parsed


def _named(parser: Parser, argv: list[str], error: Exception) -> str:
    """What the error says, with the option that it is about: the one without which there is no error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    known = {field.name for cls in parser.dataclass_types for field in dataclasses.fields(cls)}
    if isinstance(error, ValueError) and (reason.split()[0] in known or reason.startswith("argument -")):
        return reason
    begins = [i for i, word in enumerate(argv) if word.startswith("--")]
    given = []
    for begin, end in zip(begins, [*begins[1:], len(argv)], strict=True):
        name, _, value = argv[begin].lstrip("-").partition("=")
        given.append((name, " ".join([*filter(None, [value]), *argv[begin + 1 : end]]), argv[:begin] + argv[end:]))
    # What is asked for must be there, so that leaving it out is no cure: then the value tells.
    for name, value, others in given:
        if _is_cured(parser, others) or len(value) > 9 and value in reason:
            return reason if name in reason and value in reason else f"{name} cannot be {value}: {reason}"
    return reason


def _is_cured(parser: Parser, argv: list[str]) -> bool:
    try:
        parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception:
        return False
    return True


def _as_typed(options: dict[str, Any]) -> list[str]:
    typed = []
    for name, value in options.items():
        if isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        elif value is not None:
            typed.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return typed


def read_recipe(name: str) -> list[str]:
    """The options of a recipe as if they were typed.

    Raises:
        ValueError: In one line, if it is not there or holds something else.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"the recipe must be a YAML file that exists, got {path}")
    return _as_typed(_read(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must be a mapping of options, got {type(options).__name__}")
    known = {option.name for cls in (WarmupTrainingArguments, RecipeArguments) for option in dataclasses.fields(cls)}
    for name, value in options.items():
        if name not in known:
            raise unknown(str(name), f"{name}: {value}", known, f" in {path}")
    if options.get("text"):
        files = options["text"] if isinstance(options["text"], list) else [options["text"]]
        options["text"] = [str(path.parent / str(file)) for file in files]
    return options
