"""The model card: what was trained, how, and what warmup did in it.

A run leaves `warmup.json`. Where the Trainer makes a card (`create_model_card`, `push_to_hub`, with peft also
`save_model`), or there is one, it has `warmup.png` and a part of `README.md` between two marks. Whatever else a card
says is its author's, or the Trainer's draft, of which three things are set right: the optimizer (it names that of
`--optim`, whatever runs) and its learning rate, what it is fine-tuned from, and the empty headings. The evaluation
goes into the metadata.
"""

import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump
from transformers import Trainer

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.plots import run_figure
from hf_warmup.trainer.report import Report, group_values, has_trained, warmup_report
from hf_warmup.trainer.sections import sections, task_of
from hf_warmup.trainer.words import target_words

logger = logging.getLogger(__name__)

_BEGIN, _END = "<!-- hf-warmup begins -->", "<!-- hf-warmup ends -->"
_MARK = re.compile(rf"^(?:{_BEGIN}|{_END})(?=[ \t\r]*$)", re.MULTILINE)
# Which every card of the Trainer says until its author has worked on it.
_DRAFT = "This model card has been generated automatically"
_HELD_OUT = "held out"  # the split that tells our results in the metadata from others


class RunCard:
    """What a run leaves in its output folder: `warmup.json`; with a card, a part of that and its plot.

    The run is worth more than its card: what cannot be read or written is a warning, and stays as it is. Only the
    first process writes, and the others do not wait for it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.written = False
        self._said_no_plot = False
        self._dataset: str | Sequence[str] | None = None

    @property
    def _folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir))

    def write(self, report: Report | None = None, *, new: bool = False) -> Path | None:
        """Write what the run leaves, once there was training; gives the file worth reading, None if one failed."""
        # `new` is a card that was made just now, in which nobody has written.
        if not (self.trainer.is_world_process_zero() and has_trained(self.trainer)):
            return None
        failed: dict[str, str] = {}
        card = (self._folder / "README.md").exists()

        def tried(name: str, make: Callable[[], bytes]) -> None:
            path = self._folder / name
            try:
                if path.exists() and not path.is_file():
                    raise OSError(f"{name} is not a file")
                _put(path, make())
            except Exception as error:
                failed[name] = _reason(error)

        try:
            made = report or warmup_report(self.trainer)
        except Exception as error:
            failed["warmup.json, warmup.png and README.md"] = _reason(error)
        else:
            tried("warmup.json", lambda: self._json(made))
            if card:
                tried("warmup.png", self._plot)
                tried("README.md", lambda: self._card(made, new, failed))
        if "warmup.png" in failed and find_spec("matplotlib") is None:  # left out, which is no failure
            reason = failed.pop("warmup.png")
            if not self._said_no_plot:
                logger.warning(f"the card in {self._folder} is without a plot ({reason})")
            self._said_no_plot = True
        self.written = not failed
        if failed:
            self._warn(failed)
            return None
        return self._folder / ("README.md" if card else "warmup.json")

    def create(self, create_model_card: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the Trainer's `create_model_card`, which our part follows."""
        # The Trainer's words for it, and trl's.
        self._dataset = kwargs.get("dataset") or kwargs.get("dataset_name") or self._dataset
        made = create_model_card(*args, **kwargs)
        self.write(new=True)
        return made

    def save(self, save_model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the Trainer's `save_model`: that of sentence-transformers makes a card, as do models of peft."""
        before = self._read()
        saved = save_model(*args, **kwargs)
        if self.written and (after := self._read()) != before:
            # peft's goes on from the card that is there.
            self.write(new=_BEGIN.encode() not in after)
        return saved

    def _read(self) -> bytes:
        try:
            return (self._folder / "README.md").read_bytes()
        except OSError:
            return b""

    def _json(self, report: Report) -> bytes:
        # With the history, which is nowhere else where nothing was saved.
        history = [
            {k: v for k, v in entry.items() if not (isinstance(v, float) and not math.isfinite(v))}
            for entry in self.trainer.state.log_history
        ]
        content = asdict(report) | {"log_history": history}
        return f"{json.dumps(content, indent=2, allow_nan=False, default=str)}\n".encode()

    def _plot(self) -> bytes:
        figure = run_figure(self.trainer.state.log_history, self._folder.name)
        figure.savefig(file := io.BytesIO(), dpi=120, format="png")
        return file.getvalue()

    def _card(self, report: Report, new: bool, failed: dict[str, str]) -> bytes:
        """The card with our part; into `failed` goes what else of it cannot be."""
        trainer, path = self.trainer, self._folder / "README.md"
        text = path.read_bytes().decode("utf-8-sig")
        opening, block, closing, body = _split(text)
        data = _mapping(block)
        names = _listed(self._dataset) or _listed(data.get("datasets"))
        before, _, after = _cut(body, neutral=new)
        before = _corrected(before, trainer, report)
        described = _described(data, trainer, report, names, _DRAFT in body, failed)
        line = "\r\n" if "\r\n" in text else "\n"
        if described != data:
            block = _rewritten(block, described, line, failed)
        head = f"{opening or f'---{line}'}{block}{closing or f'{line}---{line}'}" if block else ""
        parts = "\n\n".join(sections(trainer, report, names, plotted="warmup.png" not in failed))
        part = f"{_BEGIN}\n{parts}\n{_END}".replace("\n", line)
        return f"{head}{before}{part}{after}".encode()

    def _warn(self, failed: Mapping[str, str]) -> None:
        what = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        logger.warning(
            f"hf-warmup could not write what the run leaves in {self._folder} ({what}). The run is not touched by it, "
            "and what was there stays. trainer.create_model_card() writes it, and a new card"
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}, {' '.join(str(error).split())[:200]}"


def _put(path: Path, content: bytes) -> None:
    """Write a file beside its place first: a disk that is full, or a process that ends, leaves what was there."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(content)
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _split(text: str) -> tuple[str, str, str, str]:
    """The metadata between the lines that open and close them, and the rest."""
    found = REGEX_YAML_BLOCK.search(text)
    return (found[1], found[2], found[3], text[found.end() :]) if found else ("", "", "", text)


def _mapping(block: str) -> dict[str, Any]:
    data = yaml.safe_load(block)
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"its metadata must be a mapping, got {type(data).__name__}")
    return data or {}


def _cut(body: str, *, neutral: bool = False) -> tuple[str, str, str]:
    """What is before our part, the part, and what is behind it, where it belongs if it is not there yet."""
    # In a draft that has just been made (`neutral`) marks that are not in order mean nothing.
    marks = list(_MARK.finditer(body))
    if [mark[0] for mark in marks] == [_BEGIN, _END]:
        return body[: marks[0].start()], body[marks[0].end() : marks[1].start()], body[marks[1].end() :]
    if marks and not neutral:
        raise ValueError(f"{_BEGIN} and {_END} must be there once each and in order, or not at all")
    line = "\r\n" if "\r\n" in body else "\n"
    return f"{_MARK.sub('', body).rstrip()}{line}{line}", "", line


def _listed(names: Any) -> list[str]:
    names = [names] if isinstance(names, str) else names
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def _described(
    data: dict[str, Any],
    trainer: Trainer,
    report: Report,
    datasets: list[str],
    draft: bool,
    failed: dict[str, str],
) -> dict[str, Any]:
    """The metadata with task and evaluation; an author's results of other evaluations stay."""
    task, new = task_of(trainer), dict(data)
    tags = [data["tags"]] if isinstance(data.get("tags"), str) else data.get("tags") or []
    if isinstance(tags, list) and "hf-warmup" not in tags:
        new["tags"] = [*tags, "hf-warmup"]
    if task is not None and not data.get("pipeline_tag"):
        new["pipeline_tag"] = task
    if task is None:
        return new
    index = data.get("model-index")
    try:
        name, others = model_index_to_eval_results(index) if index else (Path(str(trainer.args.output_dir)).name, [])
        others = [result for result in others if not draft and result.dataset_split != _HELD_OUT]
        if results := others + _results(task, report, datasets):
            new["model-index"] = eval_results_to_model_index(_one_line(name), results)
        else:
            new.pop("model-index", None)
    except Exception as error:
        failed["the evaluation in the metadata of README.md"] = f"its model-index is malformed, {_reason(error)}"
    return new


def _one_line(name: Any) -> str:
    return " ".join(str(name).split())


def _results(task: str, report: Report, datasets: list[str]) -> list[EvalResult]:
    """The evaluation as the hub's metadata have it."""
    name = _one_line(", ".join(datasets)) or "the run's own data"
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^A-Za-z0-9._/-]+", "-", name),
            dataset_name=name,
            dataset_split=_HELD_OUT,
            metric_type=_one_line(metric),
            metric_name=_one_line(metric).replace("_", " "),
            metric_value=value,
        )
        for metric, value in report.evaluation.items()
    ]


def _rewritten(block: str, new: dict[str, Any], line: str, failed: dict[str, str]) -> str:
    """The metadata anew, as the hub's library writes them; as they were if that would lose comments."""
    if _has_comments(block):
        failed["the metadata of README.md"] = "there are comments in it, which would be lost"
        return block
    return yaml_dump(new, sort_keys=False, line_break=line).strip()


def _has_comments(block: str) -> bool:
    ends = 0
    for token in yaml.scan(block, Loader=yaml.SafeLoader):  # of which comments are none
        if "#" in block[ends : token.start_mark.index]:
            return True
        ends = token.end_mark.index
    return False


def _corrected(text: str, trainer: Trainer, report: Report) -> str:
    """A draft of the Trainer, with what is wrong in it set right; other cards stay as they are."""
    if _DRAFT not in text:
        return text
    text = text.replace("is a fine-tuned version of [](https://huggingface.co/) on", "was trained from scratch on")
    # It forgets a model that comes from a folder.
    start = str(getattr(getattr(trainer.model, "config", None), "_name_or_path", "") or "")
    if start and Path(start).is_dir():
        name = _one_line(Path(start).name).replace("`", "'")
        text = text.replace("was trained from scratch on", f"is a fine-tuned version of `{name}` on", 1)
    text = re.sub(r"^## [^\n]+\n\nMore information needed\n\n?", "", text, flags=re.MULTILINE)
    # It takes the last evaluation, also where the best model was loaded.
    achieved = "".join(f"- {_one_line(k).capitalize()}: {v:.4f}\n" for k, v in report.evaluation.items())
    results = r"^(It achieves the following results on the evaluation set:\n)(?:- [^\n]*\n)+"
    text = re.sub(results, lambda found: found[1] + achieved if achieved else "", text, flags=re.MULTILINE)
    for name, value in _hyperparameters(trainer, report).items():
        text = re.sub(rf"^- {name}: .*$", f"- {name}: {value}".replace("\\", r"\\"), text, flags=re.MULTILINE)
    return text


def _hyperparameters(trainer: Trainer, report: Report) -> dict[str, str]:
    """What the Trainer takes from its arguments, as it is in the optimizer and the batches that were used."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    options = {name: group_values(optimizer, name) for name in ("betas", "eps", "momentum", "weight_decay")}
    if isinstance(optimizer, GIAdamW):
        options["v0"] = [optimizer.v0]
    # Groups may differ; a value for each of many says nothing.
    words = ", ".join(f"{name}={_either(values)}" for name, values in options.items() if 0 < len(values) < 5)
    # With auto_lr that of the optimizer was no bound.
    rates = [target_words(report)] if report.auto_lr else group_values(optimizer, "initial_lr")
    batch, total = trainer.state.train_batch_size, trainer.get_total_train_batch_size(trainer.args)
    return {
        "optimizer": f"{type(optimizer).__name__}{' with ' * bool(words)}{words}",
        **({"learning_rate": _either(rates)} if 0 < len(rates) < 5 else {}),
        **({"train_batch_size": str(batch)} if batch else {}),
        "total_train_batch_size": str(total),
    }


def _either(values: Sequence[Any]) -> str:
    return " and ".join(map(str, values))
