"""Several runs side by side: what warmup did in each, and where it led."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from hf_warmup.trainer.plots import History, runs_figure
from hf_warmup.trainer.report import Report
from hf_warmup.trainer.words import mode_words, number, peak_words, taken_words, target_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADERS = (
    "run",
    "optimizer",
    "β2",
    "batch",
    "seed",
    "warmup",
    "learning_rate",
    "highest",
    "warmup steps",
    "steps",
    "final loss",
)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        table: In Markdown, a row per run.
        figure: Learning rate above, losses below, against the optimizer step.
    """

    table: str
    figure: "Figure"

    def __str__(self) -> str:
        return self.table

    def save(self, folder: Path | str) -> None:
        """Write `comparison.md` and, beside it, `comparison.png`.

        Args:
            folder: Made if it is not there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(folder / "comparison.png", dpi=120)
        alt = "Learning rate above, training and validation loss below, against the optimizer step, of each run"
        text = f"{self.table}\n\n![{alt}](comparison.png)\n"
        (folder / "comparison.md").write_text(text, encoding="utf-8")


def compare_runs(dirs: Sequence[Path | str]) -> Comparison:
    """What warmup did in several runs, as a table and a plot; runs of a plain Trainer too.

    Example:
        compare_runs(["runs/plain", "runs/guided"]).save("runs/compared")

    Args:
        dirs: Output folders, each with the `warmup.json` that every run of ours leaves, or with the
            `trainer_state.json` of `trainer.save_state()` or of a checkpoint.

    Returns:
        Table and figure. Runs are named by their folders, as far as these differ. What a plain run does not say of
        itself stays empty.

    Raises:
        ValueError: If there is no folder, or one has neither file, or one that cannot be read.
    """
    if isinstance(dirs, str | Path):
        raise ValueError(f"dirs must be a list of folders, got {dirs!r}")
    folders = [Path(folder) for folder in dirs]
    if not folders:
        raise ValueError("dirs must name at least one run's folder, got none")
    names, runs = _names(folders), [_read(folder) for folder in folders]
    rows = [(name, *_row(report, history)) for name, (report, history) in zip(names, runs, strict=True)]
    table = tabulate(rows, headers=_HEADERS, tablefmt="github", disable_numparse=True)
    return Comparison(table, runs_figure({name: history for name, (_, history) in zip(names, runs, strict=True)}))


def _read(folder: Path) -> tuple[Report | None, History]:
    """A run's report, if it is one of ours, and its log history."""
    report, ours = None, _json(folder / "warmup.json")
    if ours is not None:
        known = {field.name for field in fields(Report)}  # another version may have others
        report = Report(**{name: value for name, value in ours.items() if name in known})
    # The newest of what there is: `save_state`, the report, the last checkpoint.
    for state in (_json(folder / "trainer_state.json"), ours):
        if state is not None and "log_history" in state:
            return report, state["log_history"]
    older: list[Any] = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):  # of a run that was killed while it saved
            older.append(_json(path))
    if not older:
        raise ValueError(
            f"dirs must be folders of runs, got {folder}: it has no log history, in warmup.json, trainer_state.json "
            "or a checkpoint"
        )
    return report, max(older, key=lambda state: state["global_step"])["log_history"]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"dirs must be folders of whole runs, got {path}, which cannot be read: {error}") from error


def _names(folders: list[Path]) -> list[str]:
    paths = [folder.resolve().parts for folder in folders]
    longest = max(map(len, paths))
    # As few of their last parts as tell all of them apart.
    length = next((n for n in range(1, longest) if len({path[-n:] for path in paths}) == len(paths)), longest)
    return ["/".join(path[-length:]) for path in paths]


def _row(report: Report | None, history: History) -> tuple[str, ...]:
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    if report is None:
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        known = (number(max(rates)) if rates else "", "", str(max((e["step"] for e in history), default="")))
        return ("", "", "", "", "the Trainer's own", "", *known, f"{losses[-1]:.4f}" if losses else "")
    return (
        report.optimizer,
        f"{report.betas[1]:g}" if report.betas else "",
        str(report.sequences_per_step),
        str(report.seed),
        mode_words(report).split(":")[0],
        target_words(report),
        peak_words(report).split(" (")[0],
        taken_words(report),
        str(report.train_steps),
        "" if report.final_eval_loss is None else f"{report.final_eval_loss:.4f}",
    )
