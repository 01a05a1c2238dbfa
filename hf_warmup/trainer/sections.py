"""The sections of a model card: what warmup did, how to use the model, how it was made, what it does not say."""

import re
import shlex
import sys
from collections.abc import Iterator

import transformers
import yaml
from huggingface_hub.constants import HF_HUB_OFFLINE
from tabulate import tabulate
from transformers import PreTrainedTokenizerBase, Trainer

import __main__
from hf_warmup.trainer.report import Report
from hf_warmup.trainer.secrets import hide_secrets
from hf_warmup.trainer.words import (
    critical_words,
    init_words,
    mode_words,
    number,
    optimizer_words,
    passes_words,
    peak_words,
    sharpness_words,
    taken_words,
    target_words,
    verdict,
)

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


def sections(trainer: Trainer, report: Report, datasets: list[str], *, plotted: bool) -> Iterator[str]:
    """All sections of the card, in Markdown; with a plot, if there is one."""
    if (usage := _usage(trainer)) is not None:
        yield f"## How to use\n\n{_fence(usage, 'python')}"
    yield _warmup(report, plotted)
    yield f"## This run\n\n{_table(('What', 'This run'), _run_rows(trainer, report, datasets))}"
    if (again := _again(trainer)) is not None:
        yield f"## The same run again\n\n{again}"
    yield f"## Limits\n\n{_limits(report)}"
    yield f"## Citation\n\n{_CITATION}"
    if HF_HUB_OFFLINE:
        yield (
            "*Written offline (`HF_HUB_OFFLINE=1`): neither checked against the hub nor sent to it. In this folder, "
            f"this sends it:*\n\n{_fence('hf upload NAME .', 'bash')}"
        )


def _warmup(report: Report, plotted: bool) -> str:
    passes, measured = passes_words(report), report.sharpness
    rows = [("Optimizer", _plain(optimizer_words(report))), ("Warmup", mode_words(report))]
    if report.warmup == "persistent" or (report.warmup == "linear" and report.asked_init_lr in ("auto", "catapult")):
        rows.append(("Critical learning rate η_c", critical_words(report)))
    if report.init_lr is not None:
        rows.append(("Initial learning rate η_init", f"{number(report.init_lr)} ({init_words(report)})"))
    rows.append(("Target learning rate η_trgt", target_words(report)))
    taken = ("Warmup steps taken", taken_words(report))
    if report.warmup == "linear":
        if report.warmup_steps:
            rows += [("Warmup steps asked for (T_wrm)", str(report.warmup_steps)), taken]
        if report.asked_init_lr != "none":
            saved = f"{report.steps_saved:.1f}" + f", net of {passes}" * bool(report.forward_passes)
            rows.append(("Steps saved (T_save)", saved))
    else:
        rows += [("Learning rate at its end, before decay", peak_words(report)), taken]
        if report.warmup == "persistent":
            rows.append(("Cost of the search", passes))
    if report.final_eval_loss is not None:
        rows.append(("Final validation loss", f"{report.final_eval_loss:.4f}"))
    parts = ["## Learning-rate warmup", _table(("What", "This run"), rows), verdict(report)]
    if measured is not None:
        parts.append(sharpness_words(measured))
    tried = sorted(report.search_evals or (), key=lambda tried: tried[0])
    if tried:
        losses = [
            (f"{lr:.3g}" if lr else "0 (before it)", "not finite" if loss is None else f"{loss:.4f}")
            for lr, loss in tried
        ]
        header = ("Learning rate of the first step", "Loss of its batch after it")
        parts += ["The search for η_c:", _table(header, losses)]
    if plotted:
        shown = "Learning rate above, training and validation loss below"
        if measured is not None:
            threshold = " and the threshold of stability" * (measured.highest_stability_ratio is not None)
            shown += f", then the sharpness{threshold}"
        shown += ", against the optimizer step"
        if sum(lr > 0 for lr, _ in tried) > 1:
            shown += "; at the bottom the loss after the first step against its learning rate"
        parts.append(f"![{shown}](warmup.png)")
    parts.append(
        "Measured and written by hf-warmup, after Kalra and Barkeshli, *Why Warmup the Learning Rate?* (NeurIPS 2024, "
        "[arXiv:2406.09405](https://arxiv.org/abs/2406.09405))."
    )
    return "\n\n".join(part for part in parts if part)


def task_of(trainer: Trainer) -> str | None:
    """The hub's name of what the model does; None for a class whose name does not say it."""
    name = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _run_rows(trainer: Trainer, report: Report, datasets: list[str]) -> list[tuple[str, str]]:
    model = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    trained, whole = report.trained_parameters, report.parameters
    size = f"{whole:,} parameters" + f", of which {trained:,} were trained" * (trained != whole)
    steps = f"{report.train_steps:,} of {report.sequences_per_step:,} sequences"
    if report.model_step not in (None, report.train_steps):
        steps += f"; the model is that of step {report.model_step:,}, the best"
    rows = [("Model", f"{_plain(model)}, {size}"), ("Data", ", ".join(map(_plain, datasets)) or "not named")]
    rows.append(("Steps", steps))
    if report.tokens:
        rows.append(("Tokens", f"{report.tokens:,}, {report.tokens / whole:.3g} per parameter"))
    rows += [(f"Evaluation: {_plain(name)}", f"{value:.4f}") for name, value in report.evaluation.items()]
    return [*rows, ("Seed", str(report.seed)), ("Processes", str(report.processes)), *report.versions.items()]


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
    return f"{_fence(command, 'bash')}\n\nwith `accelerate.yaml`:\n\n{_fence(text, 'yaml')}"


def _limits(report: Report) -> str:
    limits = ["One run with one seed: nothing here says how much another seed would differ."]
    if report.warmup != "linear" or report.search_status is not None:
        limits.append(
            "What warmup measured belongs to this model, this batch size and these data. It does not carry over to "
            "others, nor from one optimizer to another."
        )
    if report.evaluation_step is None:
        limits.append("The model was not evaluated.")
    elif not report.evaluation:
        limits.append("No metric of the evaluation was finite.")
    else:
        limits.append("The evaluation is of held-out data of the run's own; nothing else was evaluated.")
        if report.evaluation_step != report.model_step:
            limits.append(f"It is of step {report.evaluation_step:,}, the model of step {report.model_step:,}.")
    return "\n".join(f"* {limit}" for limit in limits)


def _plain(name: str) -> str:
    """A name in one line without meaning to Markdown, but for `|`, which `_table` escapes in every cell."""
    name = re.sub(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(name.split()))
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _fence(text: str, language: str) -> str:
    """A block of code that may hold fences, and the marks of our part of a card."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{ticks}{language}\n{text.replace('<!-- hf-warmup', '<! -- hf-warmup')}\n{ticks}"


def _table(headers: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
