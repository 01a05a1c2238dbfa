"""The sections of a model card: what warmup did, how to use the model, how it was made, what it does not say."""

import shlex
import sys
from collections.abc import Iterator
from typing import Any

import transformers
import yaml
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import PreTrainedTokenizerBase, Trainer

import __main__
from hf_warmup.trainer.markdown import fence, plain, table
from hf_warmup.trainer.report import (
    critical_words,
    init_words,
    mode_words,
    number,
    optimizer_words,
    passes_words,
    peak_words,
    sharpness_words,
    target_words,
    verdict,
)
from hf_warmup.trainer.secrets import hide_secrets

# By the ends of the names of model classes.
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "text2text-generation",
}
_SNIPPETS = {
    "text-generation": 'print(model("Once upon a time", max_new_tokens=20)[0]["generated_text"])',
    "fill-mask": 'print(model(f"The {model.tokenizer.mask_token} is here.")[0]["sequence"])',
    "text-classification": 'print(model("What a day."))',
    "token-classification": 'print(model("What a day in Paris."))',
}
_CITATION = """```bibtex
@inproceedings{kalra2024warmup,
  title = {Why Warmup the Learning Rate? Underlying Mechanisms and Improvements},
  author = {Kalra, Dayal Singh and Barkeshli, Maissam},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2406.09405}
}
```"""


def sections(trainer: Trainer, report: dict[str, Any], datasets: list[str], *, plotted: bool = True) -> Iterator[str]:
    """All sections of the card.

    Args:
        trainer: A trainer that has trained.
        report: From `warmup_report`.
        datasets: The names of its data.
        plotted: Whether there is a plot.

    Yields:
        Markdown of one section each.
    """
    if (usage := _usage(trainer)) is not None:
        yield f"## How to use\n\n{fence(usage, 'python')}"
    yield warmup_section(report, plotted=plotted)
    yield f"## This run\n\n{table(('What', 'This run'), _run_rows(trainer, report, datasets))}"
    if (again := _again(trainer)) is not None:
        yield f"## The same run again\n\n{again}"
    yield f"## Limits\n\n{_limits(report)}"
    yield f"## Citation\n\n{_CITATION}"
    if HF_HUB_OFFLINE:
        yield (
            "*Written offline (`HF_HUB_OFFLINE=1`): neither checked against the hub nor sent to it. In this folder, "
            f"this sends it:*\n\n{fence('hf upload NAME .', 'bash')}"
        )


def warmup_section(report: dict[str, Any], *, plotted: bool = True) -> str:
    """The model card's section on warmup.

    Args:
        report: From `warmup_report`.
        plotted: Whether there is a plot.

    Returns:
        Markdown, with the plot as `warmup.png`.
    """
    rows = [("Optimizer", plain(optimizer_words(report))), ("Warmup", mode_words(report))]
    if report["warmup"] == "persistent" or (
        report["warmup"] != "guided" and report["asked_init_lr"] in ("auto", "catapult")
    ):
        rows.append(("Critical learning rate η_c", critical_words(report)))
    if report["init_lr"] is not None:
        rows.append(("Initial learning rate η_init", f"{number(report['init_lr'])} ({init_words(report)})"))
    rows.append(("Target learning rate η_trgt", target_words(report)))
    steps = "not finished" if report["warmup_steps_taken"] is None else str(report["warmup_steps_taken"])
    taken = ("Warmup steps taken", steps)
    passes = passes_words(report)
    if report["warmup"] == "linear":
        if report["warmup_steps"]:
            rows += [("Warmup steps asked for (T_wrm)", str(report["warmup_steps"])), taken]
        if report["asked_init_lr"] != "none":
            saved = f"{report['steps_saved']:.1f}" + f", net of {passes}" * bool(report["forward_passes"])
            rows.append(("Steps saved (T_save)", saved))
    else:
        rows += [("Learning rate at its end, before decay", peak_words(report)), taken]
        if report["warmup"] == "persistent":
            rows.append(("Cost of the search", passes))
    if report["final_eval_loss"] is not None:
        rows.append(("Final validation loss", f"{report['final_eval_loss']:.4f}"))
    parts = ["## Learning-rate warmup", table(("What", "This run"), rows), verdict(report)]
    if report["sharpness"] is not None:
        parts.append(sharpness_words(report["sharpness"]))
    if report["search_evals"]:
        tried = [
            (f"{lr:.3g}" if lr else "0 (before it)", "not finite" if loss is None else f"{loss:.4f}")
            for lr, loss in sorted(report["search_evals"], key=lambda tried: tried[0])
        ]
        header = ("Learning rate of the first step", "Loss of its batch after it")
        parts += ["The search for η_c:", table(header, tried)]
    if plotted:
        shown = "Learning rate above, training and validation loss below, against the optimizer step"
        if report["sharpness"] is not None:
            known = report["sharpness"]["highest_stability_ratio"] is not None
            sharpness = "the sharpness" + " and the threshold of stability" * known
            shown = shown.replace(", against", f", then {sharpness}, against")
        if sum(lr > 0 for lr, _ in report["search_evals"] or ()) > 1:
            shown += "; at the bottom the loss after the first step against its learning rate"
        parts.append(f"![{shown}](warmup.png)")
    parts += [
        "Measured and written by hf-warmup, after Kalra and Barkeshli, *Why Warmup the Learning Rate?* (NeurIPS 2024, "
        "[arXiv:2406.09405](https://arxiv.org/abs/2406.09405)).",
    ]
    return "\n\n".join(part for part in parts if part)


def task_of(trainer: Trainer) -> str | None:
    """The hub's name of what the model does.

    Args:
        trainer: Holds the model.

    Returns:
        None for a class whose name does not say it.
    """
    name = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _run_rows(trainer: Trainer, report: dict[str, Any], datasets: list[str]) -> list[tuple[str, str]]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained, whole = report["trained_parameters"], report["parameters"]
    size = f"{whole:,} parameters" + f", of which {trained:,} were trained" * (trained != whole)
    steps = f"{report['train_steps']:,} of {report['sequences_per_step']:,} sequences"
    if report["model_step"] not in (None, report["train_steps"]):
        steps += f"; the model is that of step {report['model_step']:,}, the best"
    rows = [("Model", f"{plain(type(model).__name__)}, {size}")]
    rows += [("Data", ", ".join(map(plain, datasets)) or "not named")]
    rows += [("Steps", steps)]
    if report["tokens"]:
        rows.append(("Tokens", f"{report['tokens']:,}, {report['tokens'] / whole:.3g} per parameter"))
    rows += [(f"Evaluation: {plain(name)}", f"{value:.4f}") for name, value in report["evaluation"].items()]
    rows += [("Seed", str(report["seed"])), ("Processes", str(report["processes"]))]
    return rows + [(name, number) for name, number in report["versions"].items()]


def _usage(trainer: Trainer) -> str | None:
    """Lines that load the saved model and use it; None for a model that transformers cannot load."""
    # Without a name on the hub it is the folder that the card lies in; its path is of this machine alone.
    where = trainer.hub_model_id or "."
    model, task = trainer.accelerator.unwrap_model(trainer.model), task_of(trainer)
    cls = type(model).__name__
    tuned = hasattr(model, "peft_config")
    if task in _SNIPPETS and isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        first = "from transformers import pipeline\n\n"
        return f'{first}model = pipeline("{task}", model={where!r})\n{_SNIPPETS[task]}'
    if tuned or not hasattr(transformers, cls):
        return None
    return f"from transformers import {cls}\n\nmodel = {cls}.from_pretrained({where!r})"


def _again(trainer: Trainer) -> str | None:
    """The command and accelerate's configuration; None where no file was run, as in a notebook."""
    if not hasattr(__main__, "__file__"):
        return None
    state = trainer.accelerator.state
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": state.distributed_type.value,
        "mixed_precision": str(state.mixed_precision),
        "num_processes": state.num_processes,
        "use_cpu": state.device.type == "cpu",
    }
    if trainer.is_fsdp_enabled:
        config["fsdp_config"] = {"fsdp_version": state.fsdp_plugin.fsdp_version}
    if trainer.is_deepspeed_enabled:
        config["deepspeed_config"] = {"zero_stage": state.deepspeed_plugin.zero_stage}
    command = shlex.join(["accelerate", "launch", "--config_file", "accelerate.yaml", *hide_secrets(sys.argv)])
    text = yaml.safe_dump(config, sort_keys=False).rstrip()
    return f"{fence(command, 'bash')}\n\nwith `accelerate.yaml`:\n\n{fence(text, 'yaml')}"


def _limits(report: dict[str, Any]) -> str:
    limits = ["One run with one seed: nothing here says how much another seed would differ."]
    if report["warmup"] != "linear" or report["search_status"] is not None:
        limits.append(
            "What warmup measured belongs to this model, this batch size and these data. It does not carry over to "
            "others, nor from one optimizer to another."
        )
    if report["evaluation_step"] is None:
        limits.append("The model was not evaluated.")
    elif not report["evaluation"]:
        limits.append("No metric of the evaluation was finite.")
    else:
        limits.append("The evaluation is of held-out data of the run's own; nothing else was evaluated.")
        if report["evaluation_step"] != report["model_step"]:
            limits.append(f"It is of step {report['evaluation_step']:,}, the model of step {report['model_step']:,}.")
    return "\n".join(f"* {limit}" for limit in limits)
