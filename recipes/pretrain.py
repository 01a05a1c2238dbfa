"""Pretrain a language model from scratch.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py recipes/tiny/gpt.yaml

Any option of the recipe can be changed behind it: `--learning_rate 1e-3 --init_lr zero`. Leaves the model,
its tokenizer, a model card with a plot, and `warmup.json` in the output folder. `--plan 64` only says what the
run would be on 64 processes.
"""

import logging
import shutil
import sys
from pathlib import Path

from tabulate import tabulate
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_warmup.trainer import WarmupCallback, WarmupTrainingArguments, warmup_report
from hf_warmup.trainer.model_card import peak_words

from arguments import RecipeArguments, make_config, parse
from data import load_text, load_tokenizer, make_collator, mask_once, pack, unigram_entropy
from metrics import LanguageModelMetrics
from plan import plan


class Progress(ProgressCallback):
    """The Trainer's progress bar, with the latest numbers on it instead of lines above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {k: logs[k] for k in ("loss", "eval_loss", "learning_rate") if k in logs}
            self.training_bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()})


def prepare_output(args: WarmupTrainingArguments, recipe: RecipeArguments) -> str | None:
    """Refuse to mix two runs in one folder; find the checkpoint to resume from."""
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume:
        checkpoint = (
            get_last_checkpoint(folder) if resume in ("latest", "true", "True") and folder.is_dir() else resume
        )
        if checkpoint is None or not Path(checkpoint).is_dir():
            raise ValueError(
                f"resume_from_checkpoint must be `latest` or a checkpoint folder, got {resume}: none there"
            )
        return checkpoint
    if folder.is_dir() and any(folder.iterdir()):
        is_run = (folder / "warmup.json").exists() or get_last_checkpoint(folder) is not None
        if not (recipe.overwrite and is_run):
            way = "pass --resume_from_checkpoint latest or --overwrite" if is_run else "it holds no earlier run"
            raise ValueError(f"output_dir must be empty, got {folder}: {way}, or choose another")
    return None


def make_model(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = make_config(
        recipe,
        len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if recipe.objective == "mlm":
        return AutoModelForMaskedLM.from_config(config)
    model = AutoModelForCausalLM.from_config(config)
    if model.loss_type is None:
        # GPT-2's class name is in no list of transformers' losses: the Trainer would count one token too many.
        model.loss_type = "ForCausalLM"
    return model


def make_trainer(args: WarmupTrainingArguments, recipe: RecipeArguments) -> tuple[Trainer, float]:
    """The trainer, with warmup attached, and the unigram entropy of its held-out text."""
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the text"):
        train_lines, held_out_lines = load_text(recipe)
        tokenizer = load_tokenizer(recipe, train_lines)
        train, held_out = (pack(recipe, lines, tokenizer) for lines in (train_lines, held_out_lines))
    collator = make_collator(recipe, tokenizer)
    entropy = unigram_entropy(held_out, tokenizer)
    metrics = LanguageModelMetrics(shift=recipe.objective == "clm")
    trainer = Trainer(
        make_model(recipe, tokenizer),
        args,
        train_dataset=train,
        eval_dataset=mask_once(held_out, collator),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.reduce,
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress)
    WarmupCallback.attach(trainer)
    return trainer, entropy


def warmup_rows(report: dict) -> list[tuple[str, str]]:
    """What warmup took, asked for in steps or left to find its own end."""
    if report["warmup"] == "linear":
        return [
            ("warmup steps taken / asked for", f"{report['warmup_steps_taken']} / {report['warmup_steps']}"),
            ("steps saved (net of the search)", f"{report['steps_saved']:.1f}"),
        ]
    return [
        ("warmup", report["warmup"]),
        ("highest learning rate", peak_words(report)),
        ("warmup steps taken", str(report["warmup_steps_taken"])),
        ("forward passes for the search", str(report["forward_passes"])),
    ]


def summary(trainer: Trainer, entropy: float) -> str:
    """One table of what happened."""
    report = warmup_report(trainer)
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    before, after = evaluations[0], evaluations[-1]
    critical = "not searched for" if report["critical_lr"] is None else f"{report['critical_lr']:.3g}"
    if report["search_status"] == "above_target":
        critical = f"above {critical}"
    rows = [
        ("critical learning rate η_c", critical),
        ("initial learning rate η_init", f"{report['init_lr']:.3g}" + " (capped)" * report["capped"]),
        ("target learning rate η_trgt", f"{report['target_lr']:.3g}"),
        *warmup_rows(report),
        ("validation loss before / after", f"{before['eval_loss']:.3f} / {after['eval_loss']:.3f}"),
        ("perplexity before / after", f"{before['eval_perplexity']:.1f} / {after['eval_perplexity']:.1f}"),
        ("token accuracy before / after", f"{before['eval_accuracy']:.3f} / {after['eval_accuracy']:.3f}"),
        ("unigram entropy of the held-out text", f"{entropy:.3f}"),
        ("optimizer", report["optimizer"]),
        ("parameters", f"{trainer.model.num_parameters():,}"),
        ("processes", str(trainer.args.world_size)),
        ("output folder", trainer.args.output_dir),
    ]
    return tabulate(rows, tablefmt="rounded_outline", disable_numparse=True)


def run(argv: list[str]) -> None:
    args, recipe = parse(argv)
    if recipe.plan:
        print(plan(args, recipe))
        return
    # The evaluation before the first step is half of the summary.
    args.eval_on_start = not args.resume_from_checkpoint
    checkpoint = prepare_output(args, recipe)
    trainer, entropy = make_trainer(args, recipe)
    if recipe.overwrite and checkpoint is None and trainer.is_world_process_zero():
        shutil.rmtree(args.output_dir, ignore_errors=True)  # not before everything else has been checked
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(
        model_name=Path(args.output_dir).name,
        tags=["hf-warmup"],
        dataset=[Path(file).name for file in recipe.text],
        tasks="text-generation" if recipe.objective == "clm" else "fill-mask",
    )
    if trainer.is_world_process_zero():
        print(summary(trainer, entropy))
    # Together, and without a process group: threads that are left alone may abort the exit.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def main() -> None:
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        run(sys.argv[1:])
    except ValueError as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
