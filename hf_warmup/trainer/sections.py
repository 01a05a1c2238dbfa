"""The sections of a model card: what warmup did, of what run it was, what that does not say."""

import re
from collections.abc import Iterator

from tabulate import tabulate
from transformers import Trainer

from hf_warmup.trainer.report import Report
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
    yield _warmup(report, plotted)
    yield f"## This run\n\n{_table(('What', 'This run'), _run_rows(trainer, report, datasets))}"
    yield f"## Limits\n\n{_limits(report)}"
    yield f"## Citation\n\n{_CITATION}"


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


def _table(headers: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
