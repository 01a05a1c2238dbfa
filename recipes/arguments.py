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

from hf_warmup.trainer import WarmupTrainingArguments


@dataclass
class RecipeArguments:
    """What to train on what; everything about how is a TrainingArguments or a warmup option."""

    objective: Literal["clm", "mlm"] = field(
        default="clm", metadata={"help": "Causal (`clm`, as GPT) or masked (`mlm`, as BERT) language modelling."}
    )
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Plain text files in UTF-8; in a YAML, relative to its folder."},
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
    mlm_probability: float = field(default=0.15, metadata={"help": "Fraction of the tokens masked by `mlm`."})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Delete the earlier run in output_dir first; anything but a run is left alone, with an error."
        },
    )

    plan: int = field(
        default=0,
        metadata={"help": "Print what the run would be on that many processes (tokens, memory, search), and end."},
    )

    def __post_init__(self) -> None:
        if self.plan < 0:
            raise ValueError(f"plan must be at least 0 processes, got {self.plan}")
        if not self.text:
            raise ValueError("text must name at least one file, got none")
        for path in self.text:
            if not Path(path).is_file():
                raise ValueError(f"text must be a file that exists, got {path}")
        for name, least in (("vocab_size", 300), ("context", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, got {self.mlm_probability}")
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
    return AutoConfig.for_model(
        model_type, vocab_size=vocab_size, max_position_embeddings=recipe.context, **special_ids, **options
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first: some hundred lines.
        raise ValueError(message)


def parse(argv: list[str]) -> tuple[WarmupTrainingArguments, RecipeArguments]:
    """Read `RECIPE.yaml [--option value ...]`.

    Raises:
        ValueError: In one line, with the option and its value.
    """
    parser = _Parser(
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
