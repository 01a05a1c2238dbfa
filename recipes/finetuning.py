"""What the fine-tuning scripts share: their options, the pretrained model, the data, and a run up to its card."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from peft import LoraConfig
from tabulate import tabulate
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_warmup.trainer import warmup_report
from hf_warmup.trainer.words import number, target_words

from arguments import Parser, as_dataclasses, one_line
from running import carry_out, leave, warmup_rows
from texts import LeftOut, json_rows

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class FinetuneArguments:
    """What to fine-tune on what; everything about how is an option of the trainer or of the warmup."""

    model: str = field(metadata={"help": "The pretrained model: a folder, or a name that the hub has."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type that its weights are loaded in; `auto` is the one of its files."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains the model's own weights instead."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA's A."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Ends of the names of the modules that LoRA changes; `all-linear`: all but the head."},
    )
    files: list[str] = field(
        default_factory=list, metadata={"help": "Files to train on, all .jsonl, .csv or .parquet, with a row each."}
    )
    dataset: str = field(default="", metadata={"help": "A data set of the hub, by name, in place of `files`."})
    dataset_config: str = field(default="", metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "The split of it that is trained on."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Files to evaluate on."})
    eval_split: str = field(default="", metadata={"help": "The split of `dataset` to evaluate on."})
    held_out: float = field(
        default=0.1,
        metadata={"help": "Fraction of the rows to evaluate on where no other are named; 0 evaluates never."},
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Delete the earlier run in output_dir first; anything but a run is left alone, with an error."
        },
    )

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.dataset):
            got = f"{', '.join(self.files)} and {self.dataset}" if self.files else "none"
            raise ValueError(f"files must name at least one file, or dataset a data set, and not both, got {got}")
        for name in ("files", "eval_files"):
            if (got := getattr(self, name)) and {Path(file).suffix for file in got} not in [{kind} for kind in _KINDS]:
                raise ValueError(f"{name} must be of one kind, .jsonl, .csv or .parquet, got {', '.join(got)}")
            for file in got:
                if not Path(file).is_file():
                    raise ValueError(f"{name} must be files that exist, got {file}")
        if self.eval_split and not self.dataset:
            raise ValueError(f"eval_split is for a dataset, got {self.eval_split}: name eval_files instead")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be at least 0 and less than 1, got {self.held_out}")
        if self.lora_r < 0:
            raise ValueError(f"lora_r must be at least 0, got {self.lora_r}")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, got {self.lora_dropout}")


def parse(argv: Sequence[str], config: type[TrainingArguments]) -> tuple[Any, FinetuneArguments]:
    """Read the options of a trainer's configuration, which mixes in WarmupArguments, and of what to train."""
    return as_dataclasses(Parser([config, FinetuneArguments]), argv)


def from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    """The model or tokenizer of that name or folder."""
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"model must be one that {cls.__name__} knows, in a folder or on the hub and in reach from here, got "
            f"{name}: {str(error).strip().splitlines()[0]}"
        ) from error


def lora_config(what: FinetuneArguments, model: PreTrainedModel, task_type: str) -> LoraConfig | None:
    """LoRA as asked for; None without it."""
    if what.lora_r == 0:
        return None
    targets: list[str] | str = what.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        names = ["." + name for name, _ in model.named_modules()]
        for target in targets:  # peft would leave out those that are not there, as long as one is
            if not any(name.endswith("." + target) for name in names):
                raise ValueError(f"lora_target_modules must be names of modules of {what.model}, got {target}")
    return LoraConfig(
        r=what.lora_r,
        lora_alpha=what.lora_alpha,
        lora_dropout=what.lora_dropout,
        target_modules=targets,
        task_type=task_type,
    )


# What a row holds in place of what is trained on; None for a good one.
Complaint = Callable[[Mapping[str, Any]], str | None]


def load_data(what: FinetuneArguments, seed: int, complaint: Complaint) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on; without those that there is a complaint about."""
    train = _load(what, "files", what.files, "dataset_split", what.dataset_split, complaint)
    if what.eval_files or what.eval_split:
        return train, _load(what, "eval_files", what.eval_files, "eval_split", what.eval_split, complaint)
    if what.held_out == 0:
        return train, None
    if len(train) < 2:
        raise ValueError(f"held_out must be 0 for a single row, got {what.held_out}")
    parts = train.train_test_split(what.held_out, seed=seed)
    return parts["train"], parts["test"]


def _load(
    what: FinetuneArguments, files_name: str, files: list[str], split_name: str, split: str, complaint: Complaint
) -> Dataset:
    option, got = (files_name, ", ".join(files)) if files else ("dataset", f"{what.dataset} with {split_name} {split}")
    left = LeftOut(got)
    if files and _KINDS[Path(files[0]).suffix] == "json":
        rows = _json_data(files, option, complaint, left)
    else:
        rows = _built_data(what, files, split, option, got)
        taken = [left.takes((why := complaint(row)) and f"row {i} holds {why}") for i, row in enumerate(rows, 1)]
        rows = rows if all(taken) else rows.select([i for i, good in enumerate(taken) if good])
    if len(rows) == 0:
        reason = f": {left.first}" if left.first else ""
        raise ValueError(f"{option} must hold at least one row to train on, got none in {got}{reason}")
    left.say()
    return rows


def _json_data(files: list[str], option: str, complaint: Complaint, left: LeftOut) -> Dataset:
    numbered = [(path, count, row) for path in files for count, row in json_rows(path, option)]
    names = list(dict.fromkeys(name for _, _, row in numbered if isinstance(row, dict) for name in row))
    rows = []
    for path, count, row in numbered:
        if isinstance(row, dict):
            row = {name: row.get(name) for name in names}
        why = complaint(row) if isinstance(row, dict) else row
        if left.takes(why and f"row {count} of {Path(path).name} holds {why}"):
            rows.append(row)
    with one_line(f"{option} must hold columns of one type each", ", ".join(files)):
        return Dataset.from_dict({name: [row[name] for row in rows] for name in names})


def _built_data(what: FinetuneArguments, files: list[str], split: str, option: str, got: str) -> Dataset:
    if files:
        options: dict[str, Any] = {"path": _KINDS[Path(files[0]).suffix], "data_files": files, "split": "train"}
    else:
        options = {"path": what.dataset, "name": what.dataset_config or None, "split": split}
    try:
        return load_dataset(**options)
    except StopIteration:  # how datasets takes an empty file
        return Dataset.from_dict({})
    except DatasetGenerationError as error:  # its own message only says that there was an error
        raise ValueError(f"{option} must hold a row a line, got {got}: {error.__cause__}") from error
    except (DatasetNotFoundError, OSError, OfflineModeIsEnabled, HTTPError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{option} must be one that can be had from here, got {got}: {reason}") from error


def train(
    argv: Sequence[str], args: TrainingArguments, what: FinetuneArguments, make_trainer: Callable[[], Trainer]
) -> int:
    """Train in output_dir, and leave the model or its adapter there, and its card.

    Begins, or goes on where the same command was stopped. 0, or 128 and the number of the signal that stopped it.
    """
    return carry_out(
        argv, args, overwrite=what.overwrite, make_trainer=make_trainer, finish=lambda trainer: finish(trainer, what)
    )


def finish(trainer: Trainer, what: FinetuneArguments) -> None:
    """Evaluate, save, and say what happened."""
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    card: dict[str, Any] = {"model_name": Path(trainer.args.output_dir).name, "tags": ["hf-warmup"]}
    data = what.dataset or ", ".join(Path(file).name for file in what.files)
    if type(trainer) is Trainer:  # trl's card has other options, and names a base model by itself
        card["dataset"] = data
    elif what.dataset:
        card["dataset_name"] = data
    leave(trainer, card)
    if trainer.is_world_process_zero():
        print(summary(trainer))


def summary(trainer: Trainer) -> str:
    """One table of what happened."""
    report = warmup_report(trainer)
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rows = [
        ("optimizer", report.optimizer),
        ("initial learning rate η_init", number(report.init_lr) + " (capped)" * report.capped),
        ("target learning rate η_trgt", target_words(report)),
        *warmup_rows(report),
        *(
            (f"{name} before / after", f"{evaluations[0][key]:.3f} / {evaluations[-1][key]:.3f}")
            for name, key in (("validation loss", "eval_loss"), ("accuracy", "eval_accuracy"))
            if evaluations and key in evaluations[0]
        ),
        ("parameters trained / in all", f"{trained:,} / {trainer.model.num_parameters():,}"),
        ("output folder", trainer.args.output_dir),
    ]
    return tabulate(rows, tablefmt="rounded_outline", disable_numparse=True)
