"""The model card: what was trained, how, and what warmup did in it.

A run leaves `warmup.json`, `warmup.png` and a part of `README.md` between two marks. Whatever else a card says is
its author's, or the Trainer's draft, of which three things are set right: the optimizer (it names that of `--optim`,
whatever runs), what it is fine-tuned from, and the empty headings. The evaluation goes into the metadata.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from hf_warmup.gi_adam import GIAdamW
from hf_warmup.probe import innermost
from hf_warmup.trainer.plots import run_figure
from hf_warmup.trainer.report import warmup_report
from hf_warmup.trainer.secrets import hide_known
from hf_warmup.trainer.sections import sections, task_of

_BEGIN, _END = "<!-- hf-warmup begins -->", "<!-- hf-warmup ends -->"
# Which every card of the Trainer says until its author has worked on it.
_DRAFT = "This model card has been generated automatically"
_HELD_OUT = "held out"  # the split that tells our results in the metadata from others


def write_card(trainer: Trainer, dataset: str | Sequence[str] | None = None) -> None:
    """Write `warmup.json`, `warmup.png` and our part of `README.md` into the output folder.

    A card that is not there is made by the Trainer first; of one that is, only our part is replaced. Only the
    first process writes.

    Args:
        trainer: A trainer that has trained.
        dataset: Names of its data, if the card's metadata do not have them.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "README.md").exists():
        if hasattr(trainer.model, "config"):
            trainer.create_model_card()  # comes back here once the card exists
            return
        # The Trainer cannot describe a plain module.
        data = ModelCardData(library_name="transformers", tags=["generated_from_trainer"])
        ModelCard(f"---\n{data}\n---\n\n# {folder.name}\n").save(folder / "README.md")
    report = warmup_report(trainer)
    (folder / "warmup.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    run_figure(trainer.state.log_history).savefig(folder / "warmup.png", dpi=120)
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    assert isinstance(card.data, ModelCardData)
    names = _listed(dataset) or _listed(card.data.datasets)
    _describe(card.data, trainer, report, names, draft=_DRAFT in card.text)
    card.text = _with_part(_corrected(card.text, trainer), hide_known("\n\n".join(sections(trainer, report, names))))
    # In a draft every name is of the run; what an author says stays.
    text = hide_known(str(card)) if _is_draft(str(card)) else str(card)
    ModelCard(text, ignore_metadata_errors=True).save(folder / "README.md")


@contextmanager
def kept_words(trainer: Trainer) -> Iterator[None]:
    """Keep a card that somebody wrote, which `create_model_card` would replace by its draft.

    Args:
        trainer: Its output folder has the card.

    Yields:
        Nothing.
    """
    path = Path(str(trainer.args.output_dir)) / "README.md"
    before = path.read_text(encoding="utf-8") if path.exists() and trainer.is_world_process_zero() else ""
    try:
        yield
    finally:
        if before and not _is_draft(before):
            path.write_text(before, encoding="utf-8")


def _is_draft(card: str) -> bool:
    tags = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("tags") or []
    return _DRAFT in card or {"generated_from_trainer", "trl"} <= set(tags)  # trl's drafts say it nowhere else


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _describe(data: ModelCardData, trainer: Trainer, report: dict[str, Any], datasets: list[str], draft: bool) -> None:
    """Put the task and the evaluation into the card's metadata; an author's results of other evaluations stay."""
    task = task_of(trainer)
    data.tags = [*(data.tags or []), *({"hf-warmup"} - set(data.tags or []))]
    data.pipeline_tag = data.pipeline_tag or task
    if not report["evaluation"] or task is None:
        return
    name = ", ".join(datasets) or "the run's own data"
    ours = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^A-Za-z0-9._/-]+", "-", name),
            dataset_name=name,
            dataset_split=_HELD_OUT,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in report["evaluation"].items()
    ]
    others = [] if draft else [result for result in data.eval_results or [] if result.dataset_split != _HELD_OUT]
    data.model_name = data.model_name or Path(str(trainer.args.output_dir)).name
    data.eval_results = others + ours


def _with_part(text: str, part: str) -> str:
    part = f"{_BEGIN}\n{part}\n{_END}"
    if _BEGIN in text and _END in text:
        return text[: text.index(_BEGIN)] + part + text[text.index(_END) + len(_END) :]
    return text.rstrip() + "\n\n" + part + "\n"


def _corrected(text: str, trainer: Trainer) -> str:
    """A draft of the Trainer, with what is wrong in it set right; other cards stay as they are."""
    if _DRAFT not in text:
        return text
    text = text.replace("is a fine-tuned version of [](https://huggingface.co/) on", "was trained from scratch on")
    # It forgets a model that comes from a folder.
    start = str(getattr(getattr(trainer.model, "config", None), "_name_or_path", "") or "")
    if start and Path(start).is_dir():
        text = text.replace("was trained from scratch on", f"is a fine-tuned version of `{Path(start).name}` on", 1)
    text = re.sub(r"^## [^\n]+\n\nMore information needed\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"^- optimizer: .*$", lambda _: f"- optimizer: {_optimizer_line(trainer)}", text, flags=re.MULTILINE)


def _optimizer_line(trainer: Trainer) -> str:
    optimizer = innermost(trainer.optimizer)
    wanted = ("betas", "eps", "momentum", "weight_decay")
    options = {name: optimizer.defaults[name] for name in wanted if name in optimizer.defaults}
    options["weight_decay"] = trainer.args.weight_decay  # the groups' own, the default is not used
    if isinstance(optimizer, GIAdamW):
        options["v0"] = optimizer.v0
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{type(optimizer).__name__} with {words}"
