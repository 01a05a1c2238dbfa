"""Fine-tune a causal language model on text, prompts and completions, or chats: trl's SFTTrainer, LoRA, and warmup.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/finetune_sft.py \\
        --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --output_dir runs/sft \\
        --learning_rate 2e-4 --max_steps 1000

Every option of trl's SFTConfig is one of this script, as are the warmup's. Rows have a column `text` (or what
dataset_text_field says), `prompt` and `completion`, or `messages`. Leaves the adapter (with --lora_r 0 the model),
the tokenizer, a model card with a plot, and `warmup.json` in the output folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_warmup.trainer import WarmupArguments, WarmupCallback

from finetuning import FinetuneArguments, from_pretrained, load_data, lora_config, parse, train
from running import main
from texts import why_no_text


@dataclass
class SFTWarmupConfig(WarmupArguments, SFTConfig):
    """SFTConfig and WarmupArguments in one."""


def check_columns(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Refuse rows that SFTTrainer would fail on in the middle of them."""
    columns, text = set(rows.column_names), args.dataset_text_field
    if not (text in columns or {"prompt", "completion"} <= columns or "messages" in columns):
        raise ValueError(
            f"dataset_text_field must be a column, where the rows have no prompt and completion and no messages, got "
            f"{text}: they have {', '.join(rows.column_names)}"
        )
    chat = "messages" in columns or "prompt" in columns and not isinstance(rows[0]["prompt"], str)
    if chat and args.chat_template_path is None and tokenizer.chat_template is None:
        raise ValueError("chat_template_path must be given for chats and a tokenizer without a template, got none")


def complaint(row: Mapping[str, Any], text: str) -> str | None:
    """What a row holds in place of a text, of a prompt and a completion, or of messages; None if it has them."""
    if "prompt" in row and "completion" in row:
        kinds = {type(row["prompt"]), type(row["completion"])}
        if kinds != {str} and kinds != {list}:
            return "no prompt and completion, both text or both messages"
        return _no_messages(row["prompt"] + row["completion"]) if kinds == {list} else None
    if "messages" in row:
        return _no_messages(row["messages"])
    return f"in {text} {why}" if text in row and (why := why_no_text(row[text])) is not None else None


def _no_messages(value: Any) -> str | None:
    messages = value if isinstance(value, list) else []
    good = messages and all(isinstance(message, dict) and message.get("role") for message in messages)
    return None if good else "no list of messages, each with a role"


def make_trainer(args: SFTWarmupConfig, what: FinetuneArguments) -> SFTTrainer:
    """The trainer, with warmup attached."""
    with args.main_process_first(desc="preparing the data"):
        rows, held_out = load_data(what, args.seed, lambda row: complaint(row, args.dataset_text_field))
    tokenizer = from_pretrained(AutoTokenizer, what.model)
    check_columns(rows, tokenizer, args)
    options, args.model_init_kwargs = args.model_init_kwargs or {}, None  # SFTTrainer is given the model itself
    model = from_pretrained(AutoModelForCausalLM, what.model, **{"dtype": what.dtype, **options})
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(what, model, "CAUSAL_LM"),
    )
    WarmupCallback.attach(trainer)
    return trainer


def run(argv: Sequence[str]) -> int:
    """Train as told; 0, or 128 and the number of the signal that stopped it."""
    args, what = parse(argv, SFTWarmupConfig)
    return train(argv, args, what, lambda: make_trainer(args, what))


if __name__ == "__main__":
    main(run)
