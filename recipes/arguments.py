"""A recipe: one YAML file, of which any option can be changed on the command line."""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import AutoConfig, HfArgumentParser, PretrainedConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_warmup.trainer import WarmupTrainingArguments


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
    shuffle_blocks: int = field(default=4096, metadata={"help": "Blocks of a stream that are shuffled together."})
    tokenizer: str = field(
        default="", metadata={"help": "A tokenizer of the hub or a folder; one is trained on the text if empty."}
    )
    init_from: str = field(
        default="",
        metadata={"help": "Folder of a model to go on from, with its weights and its tokenizer, in place of `model`."},
    )
    model: str = field(
        default="",
        metadata={
            "help": "Configuration as a mapping (JSON on the command line): model_type, and what differs from its "
            "defaults. The vocabulary size and the context are filled in."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of the tokenizer that is trained on the text."})
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
    smoke: bool = field(
        default=False,
        metadata={
            "help": "Shrink the model, the batch and what is shuffled, and nothing else, to see that a recipe runs."
        },
    )
    plan: int = field(
        default=0,
        metadata={"help": "Print what the run would be on that many processes (tokens, memory, search), and end."},
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
        for name, objective in (("document_mask", "clm"), ("sample_prompt", "clm"), ("whole_word_mask", "mlm")):
            if getattr(self, name) and self.objective != objective:
                raise ValueError(f"{name} is for objective={objective}, got {self.objective}")
        for name, least in (("vocab_size", 300), ("context", 8), ("held_out", 1), ("shuffle_blocks", 1)):
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
    if recipe.smoke:
        options |= {known.attribute_map.get(name, name): size for name, size in _SMOKE.items() if hasattr(known, name)}
    positions = {"max_position_embeddings": recipe.context}
    return AutoConfig.for_model(model_type, **{"vocab_size": vocab_size, **positions, **special_ids, **options})


# A model that takes no time: by the names that the configurations of transformers have for these.
_SMOKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Parser(HfArgumentParser):
    """A parser whose errors are ValueErrors of a line."""

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: some hundred lines.
        raise ValueError(message)


def parse(argv: list[str]) -> tuple[WarmupTrainingArguments, RecipeArguments]:
    """Read `RECIPE.yaml [--option value ...]`.

    Raises:
        ValueError: In one line, with the option and its value.
    """
    parser = Parser(
        [WarmupTrainingArguments, RecipeArguments],
        usage="pretrain.py RECIPE.yaml [--option value ...]",
        allow_abbrev=False,
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    path = Path(argv[0])
    if not path.is_file():
        raise ValueError(f"the recipe must be a YAML file that exists, got {path}")
    # As if typed before the rest: argparse checks what is typed, but not the defaults it is given.
    arguments = _as_typed(_read(path)) + argv[1:]
    training, recipe = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if recipe.streaming and training.max_steps <= 0:
        raise ValueError(
            f"max_steps must be positive with streaming=true, got {training.max_steps}: a stream has no end"
        )
    available = get_available_reporting_integrations()
    for name in training.report_to:
        if name in INTEGRATION_TO_CALLBACK and name not in available:
            raise ValueError(
                f"report_to must be of what is installed, got {name}: pip install it, or pass --report_to none"
            )
    if recipe.smoke:
        training.per_device_train_batch_size = training.per_device_eval_batch_size = 2
        training.gradient_accumulation_steps = min(2, training.gradient_accumulation_steps)
        recipe.shuffle_blocks = min(64, recipe.shuffle_blocks)  # read before the first step
    return training, recipe


def _as_typed(options: dict[str, Any]) -> list[str]:
    typed = []
    for name, value in options.items():
        if isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        elif value is not None:
            typed.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return typed


def _read(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must be a mapping of options, got {type(options).__name__}")
    annotations = {
        name: hint
        for cls in (WarmupTrainingArguments, RecipeArguments)
        for name, hint in typing.get_type_hints(cls).items()
        if name in {f.name for f in dataclasses.fields(cls)}
    }
    for name, value in options.items():
        if name not in annotations:
            near = difflib.get_close_matches(str(name), annotations, 1)
            raise ValueError(f"unknown option {name}: {value} in {path}" + (f"; did you mean {near[0]}?" * len(near)))
        _check_type(name, value, annotations[name])
    if "text" in options:
        files = [options["text"]] if isinstance(options["text"], str) else options["text"]
        options["text"] = [str(path.parent / file) for file in files]
    return options


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse text where a number belongs: YAML 1.1 reads 6e-4 as text, and only 6.0e-4 as a number."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    accepted = set(typing.get_args(hint)) if union else {hint}
    if accepted & {int, float} and str not in accepted and (isinstance(value, str | list | dict) or value is True):
        raise ValueError(f"{name} must be a number, got {value!r}; YAML needs the dot: 6.0e-4, not 6e-4")
    if bool in accepted and str not in accepted and not isinstance(value, bool | None):
        raise ValueError(f"{name} must be true or false, got {value!r}")
