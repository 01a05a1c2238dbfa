"""Several runs side by side: what warmup did in each, and where it led."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from hf_warmup.trainer.plots import runs_figure
from hf_warmup.trainer.report import critical_words, number, peak_words, target_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADERS = (
    "run",
    "optimizer",
    "warmup",
    "η_init",
    "η_c",
    "η_trgt",
    "highest",
    "warmup steps",
    "steps saved",
    "forward passes",
    "train steps",
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
    """What warmup did in several runs, as a table and a plot.

    Args:
        dirs: Output folders, with the `warmup.json` that every run leaves and the `trainer_state.json` of
            `trainer.save_state()`, or of the newest checkpoint where that was not called.

    Returns:
        Table and figure. Runs are named by their folders, as far as these differ.

    Raises:
        ValueError: If there is no folder, or one has not both files.
    """
    folders = [Path(folder) for folder in dirs]
    if not folders:
        raise ValueError("dirs must name at least one run's folder, got none")
    reports = [json.loads(_find(folder, "warmup.json").read_text(encoding="utf-8")) for folder in folders]
    states = [json.loads(_find(folder, "trainer_state.json").read_text(encoding="utf-8")) for folder in folders]
    names = _names(folders)
    rows = [(name, *_row(report)) for name, report in zip(names, reports, strict=True)]
    table = tabulate(rows, headers=_HEADERS, tablefmt="github", disable_numparse=True)
    histories = {name: state["log_history"] for name, state in zip(names, states, strict=True)}
    return Comparison(table, runs_figure(histories))


def _find(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    # Checkpoints have the state of their step.
    older = sorted(folder.glob(f"checkpoint-*/{name}"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not older:
        raise ValueError(f"dirs must be folders of runs with hf-warmup, got {folder}: it has no {name}")
    return older[-1]


def _names(folders: list[Path]) -> list[str]:
    paths = [folder.resolve().parts for folder in folders]
    length = next(n for n in range(1, max(map(len, paths)) + 1) if n == max(map(len, paths)) or _distinct(paths, n))
    return ["/".join(path[-length:]) for path in paths]


def _distinct(paths: list[tuple[str, ...]], length: int) -> bool:
    return len({path[-length:] for path in paths}) == len(paths)


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    tells = report["critical_lr"] is not None or report["search_status"] is not None
    loss, saved, taken = report["final_eval_loss"], report["steps_saved"], report["warmup_steps_taken"]
    return (
        report["optimizer"],
        report["warmup"],
        number(report["init_lr"]),
        critical_words(report).split(":")[0] if tells else "",
        target_words(report),
        peak_words(report).split(" (")[0],
        "not finished" if taken is None else str(taken),
        "" if saved is None else f"{saved:.1f}",
        str(report["forward_passes"]),
        str(report["train_steps"]),
        "" if loss is None else f"{loss:.4f}",
    )
