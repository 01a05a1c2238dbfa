"""Fine-tune a pretrained model to tell texts apart: the plain Trainer, LoRA or all weights, and warmup.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/finetune_classification.py \\
        --model FacebookAI/roberta-base --dataset fancyzhx/ag_news --eval_split test --lora_r 0 \\
        --output_dir runs/classification --learning_rate 2e-5 --num_train_epochs 1

Every option of TrainingArguments is one of this script, as are the warmup's. Rows have a column with the text and
one with the label, a word or a whole number. Leaves LoRA's adapter (with --lora_r 0 the model), the tokenizer, a
model card with a plot, and `warmup.json` in the output folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_warmup.trainer import WarmupCallback, WarmupTrainingArguments

from finetuning import FinetuneArguments, from_pretrained, load_data, lora_config, parse, train
from metrics import TokenAccuracy
from running import main
from texts import why_no_text


@dataclass
class ClassificationConfig(WarmupTrainingArguments):
    """WarmupTrainingArguments, and where the texts and their labels are."""

    text_column: str = field(default="text", metadata={"help": "The column with the texts."})
    label_column: str = field(
        default="label", metadata={"help": "The column with the labels, words or whole numbers."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens that longer texts are cut to."})

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        super().__post_init__()


def words_of(rows: Dataset, args: ClassificationConfig) -> list[str]:
    """The label of each row, as a word."""
    for option, kinds in (("text_column", ("string",)), ("label_column", ("string", "int64", "bool"))):
        name = getattr(args, option)
        if name not in rows.column_names:
            raise ValueError(f"{option} must be one of {', '.join(rows.column_names)}, got {name}")
        if rows.features[name].dtype.removeprefix("large_") not in kinds:
            raise ValueError(f"{option} must hold {' or '.join(kinds)}, got {name}, which does not")
    kind, labels = rows.features[args.label_column], rows[args.label_column]
    return kind.int2str(list(labels)) if isinstance(kind, ClassLabel) else [str(label) for label in labels]


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, numbers: dict[str, int], args: ClassificationConfig
) -> Dataset:
    """The rows as tokens, and their labels as numbers."""
    words = words_of(rows, args)
    if unknown := set(words) - numbers.keys():
        raise ValueError(f"label_column must hold labels that are trained on, got {min(unknown)} to evaluate on")
    tokens = rows.map(
        lambda batch: tokenizer(batch[args.text_column], truncation=True, max_length=args.max_length),
        batched=True,
        remove_columns=rows.column_names,
        desc="Tokenizing",
    )
    return tokens.add_column("labels", [numbers[word] for word in words])


def complaint(row: Mapping[str, Any], args: ClassificationConfig) -> str | None:
    """What a row holds in place of a text or a label; None if it has both, or lacks the column."""
    text, label = row.get(args.text_column, "none"), row.get(args.label_column, 0)
    if (why := why_no_text(text)) is not None:
        return f"in {args.text_column} {why}"
    if not isinstance(label, str | int | float):
        return f"in {args.label_column} {'null' if label is None else f'no label but {type(label).__name__}'}"
    return None


def make_trainer(args: ClassificationConfig, what: FinetuneArguments) -> Trainer:
    """The trainer, with warmup attached."""
    set_seed(args.seed)
    tokenizer = from_pretrained(AutoTokenizer, what.model)
    with args.main_process_first(desc="preparing the data"):
        rows, held_out = load_data(what, args.seed, lambda row: complaint(row, args))
        words = sorted(set(words_of(rows, args)))
        if len(words) < 2:
            raise ValueError(f"label_column must hold at least two labels, got {words[0]} in all rows")
        numbers = {word: number for number, word in enumerate(words)}
        rows = encode(rows, tokenizer, numbers, args)
        held_out = None if held_out is None else encode(held_out, tokenizer, numbers, args)
    model = from_pretrained(
        AutoModelForSequenceClassification,
        what.model,
        dtype=what.dtype,
        num_labels=len(words),
        id2label=dict(enumerate(words)),
        label2id=numbers,
        ignore_mismatched_sizes=True,  # a head for other labels gives way to a new one
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    if (lora := lora_config(what, model, "SEQ_CLS")) is not None:
        model = get_peft_model(model, lora)
    accuracy = TokenAccuracy(keep_in_memory=True)

    def likeliest(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return accuracy.compute(predictions=prediction.predictions, references=prediction.label_ids)

    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=likeliest,
    )
    WarmupCallback.attach(trainer)
    return trainer


def run(argv: Sequence[str]) -> int:
    """Train as told; 0, or 128 and the number of the signal that stopped it."""
    args, what = parse(argv, ClassificationConfig)
    return train(argv, args, what, lambda: make_trainer(args, what))


if __name__ == "__main__":
    main(run)
