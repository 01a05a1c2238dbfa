"""Pretrain a language model from scratch.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py recipes/tiny/gpt.yaml

Any option of the recipe can be changed behind it: `--learning_rate 1e-3 --warmup none`. Leaves the model,
its tokenizer, a model card with a plot, and `warmup.json` in the output folder. `--plan 64` only says what the
run would be on 64 processes, and `--smoke` makes three small steps; both anywhere, without a GPU or the hub.
"""

import json
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

from hf_warmup.trainer import (
    SharpnessCallback,
    WarmupCallback,
    WarmupTrainingArguments,
    muon_cls_and_kwargs,
    warmup_report,
)
from hf_warmup.trainer.words import critical_words, number, target_words

from arguments import RecipeArguments, make_config, one_line, parse, read_recipe
from chunked import chunk_loss
from collator import Collator, Numbered
from data import bytes_per_token, load_text, load_tokenizer, mask_once, pack, unigram_entropy
from framing import Framing
from metrics import LanguageModelMetrics
from plan import plan
from running import (
    Epochs,
    Progress,
    RecipeTrainer,
    Samples,
    carry_out,
    flops_per_token,
    leave,
    main,
    peak_flops,
    warmup_rows,
)
from stream import PackedStream


def make_model(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    cls = AutoModelForMaskedLM if recipe.objective == "mlm" else AutoModelForCausalLM
    if recipe.init_from:
        model = cls.from_pretrained(recipe.init_from)
    else:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = make_config(recipe, len(tokenizer), **special)
        with one_line("model must be a configuration that a model can be made of", recipe.model):
            model = cls.from_config(config)
    for option, value, name in (
        ("context", recipe.context, "max_position_embeddings"),
        ("tokenizer", len(tokenizer), "vocab_size"),
    ):
        if value > (most := getattr(model.config, name, value)):
            whose = "init_from's" if recipe.init_from else "the model's"
            raise ValueError(f"{option} must be at most {most}, {whose} {name}, got {value}")
    if recipe.document_mask:
        # With a cache, which models make for themselves, transformers does not look where positions begin anew.
        model.config.use_cache = False
    if recipe.objective == "clm" and model.loss_type is None:
        # GPT-2's class name is in no list of transformers' losses: the Trainer would count one token too many.
        model.loss_type = "ForCausalLM"
    return model


def make_trainer(args: WarmupTrainingArguments, recipe: RecipeArguments) -> tuple[Trainer, float]:
    """The trainer, with warmup attached, and the unigram entropy of its held-out text."""
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the text"):
        documents, held_out_documents = load_text(recipe)
        tokenizer = load_tokenizer(recipe, documents)
        framing = Framing(recipe, tokenizer)
        held_out = pack(recipe, held_out_documents, framing)
        train = None if recipe.streaming else Numbered(pack(recipe, documents, framing))
    if recipe.streaming:
        train = PackedStream(
            documents,
            framing,
            batch_size=args.per_device_train_batch_size,
            window=recipe.shuffle_blocks,
            seed=args.seed,
            places=Path(args.output_dir) / "stream",
        )
    # Blocks have columns that the collator needs and the model does not know.
    args.remove_unused_columns = False
    causal = recipe.objective == "clm"
    metrics = LanguageModelMetrics(
        shift=causal, bytes_per_token=bytes_per_token(held_out, tokenizer) if causal else None
    )
    model = make_model(recipe, tokenizer)
    trainer = RecipeTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=mask_once(held_out, recipe, tokenizer),
        data_collator=Collator(recipe, tokenizer, args.seed),
        processing_class=tokenizer,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.reduce,
        flops_per_token=flops_per_token(model, recipe.context),
        peak=peak_flops(args, recipe.peak_tflops),
        optimizer_cls_and_kwargs=muon_cls_and_kwargs(args) if recipe.optim_factory == "muon" else None,
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress)
    if isinstance(train, Numbered):
        trainer.add_callback(Epochs(train))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        if recipe.sample_prompt:
            raise ValueError(
                f"sample_prompt must be empty under FSDP and DeepSpeed, got {recipe.sample_prompt!r}: one process "
                "alone has no whole model to generate with"
            )
        if recipe.loss_chunks:
            raise ValueError(
                f"loss_chunks must be 0 under FSDP and DeepSpeed, got {recipe.loss_chunks}: the output layer's "
                "weights are not whole where the loss is made"
            )
    if recipe.loss_chunks:
        if args.n_gpu > 1:
            raise ValueError(
                f"loss_chunks must be 0 with {args.n_gpu} GPUs in one process, got {recipe.loss_chunks}: launch a "
                "process for each"
            )
        chunk_loss(trainer.model, recipe.loss_chunks)
    if recipe.sample_prompt:
        trainer.add_callback(Samples(tokenizer, recipe.sample_prompt))
    WarmupCallback.attach(trainer)
    if recipe.sharpness_every:
        # Behind it, as the first learning rate is only known by then.
        SharpnessCallback(every=recipe.sharpness_every, kind=recipe.sharpness_kind).attach(trainer)
    return trainer, unigram_entropy(held_out, tokenizer)


def summary(trainer: Trainer, entropy: float) -> str:
    """One table of what happened."""
    report = warmup_report(trainer)
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    before, after = evaluations[0], evaluations[-1]
    rows = [
        ("critical learning rate η_c", critical_words(report)),
        ("initial learning rate η_init", number(report.init_lr) + " (capped)" * report.capped),
        ("target learning rate η_trgt", target_words(report)),
        *warmup_rows(report),
        ("validation loss before / after", f"{before['eval_loss']:.3f} / {after['eval_loss']:.3f}"),
        ("perplexity before / after", f"{before['eval_perplexity']:.1f} / {after['eval_perplexity']:.1f}"),
        *(
            [
                (
                    "bits per byte before / after",
                    f"{before['eval_bits_per_byte']:.3f} / {after['eval_bits_per_byte']:.3f}",
                )
            ]
            if "eval_bits_per_byte" in after
            else []
        ),
        ("token accuracy before / after", f"{before['eval_accuracy']:.3f} / {after['eval_accuracy']:.3f}"),
        ("unigram entropy of the held-out text", f"{entropy:.3f}"),
        ("optimizer", report.optimizer),
        ("parameters", f"{trainer.model.num_parameters():,}"),
        ("processes", str(trainer.args.world_size)),
        ("output folder", trainer.args.output_dir),
    ]
    return tabulate(rows, tablefmt="rounded_outline", disable_numparse=True)


def go_on(trainer: Trainer, checkpoint: str) -> None:
    """Have a stream begin where the checkpoint's step has taken its last batch."""
    stream = trainer.train_dataset
    if not isinstance(stream, PackedStream):
        return
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    args = trainer.args
    stream.resume(state["global_step"] * args.gradient_accumulation_steps * args.world_size)
    args.ignore_data_skip = True  # the Trainer would read all that came before once more


def run(argv: list[str]) -> int:
    """Train as told; 0, or 128 and the number of the signal that stopped it."""
    args, recipe = parse(argv)
    if recipe.plan:
        print(plan(args, recipe))
        return 0
    entropy = 0.0

    def make() -> Trainer:
        nonlocal entropy
        trainer, entropy = make_trainer(args, recipe)
        return trainer

    return carry_out(
        argv,
        args,
        overwrite=recipe.overwrite,
        make_trainer=make,
        finish=lambda trainer: finish(trainer, recipe, entropy),
        go_on=go_on,
        recipe=read_recipe(argv[0]),
    )


def finish(trainer: Trainer, recipe: RecipeArguments, entropy: float) -> None:
    """Evaluate, save the model and its card, and print what happened."""
    trainer.evaluate()
    card = {
        "model_name": Path(trainer.args.output_dir).name,
        "tags": ["hf-warmup"],
        "dataset": [recipe.dataset] if recipe.dataset else [Path(file).name for file in recipe.text],
        "dataset_tags": [recipe.dataset] if recipe.dataset else None,
        "tasks": "text-generation" if recipe.objective == "clm" else "fill-mask",
    }
    leave(trainer, card)
    if trainer.is_world_process_zero():
        print(summary(trainer, entropy))


if __name__ == "__main__":
    main(run)
