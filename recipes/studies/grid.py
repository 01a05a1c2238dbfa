"""Runs a study: a YAML grid of trainings, in parallel, each of them once.

    runs:                                      # blocks; all combinations of the lists in each are runs
      - optimizer: [AdamW, RAdam]
        setting: {beta2: [0.95, 0.999]}        # fields of warmup_cases.Setting; a list is an axis
        rule: linear                           # a name in RULES, and its options
        options: {fraction: [0.0, 0.1]}
        target: [1.0e-3, 2.0e-3]               # η_trgt
    setting: {width: 48}                       # of all blocks
    seeds: [0, 1, 2]
    smoke: {steps: 8}                          # fields of Setting under --smoke

A finished run is a line of `results/<study>.csv`. It has a key (setting, optimizer, rule, options, η_trgt, seed); a
run whose key is there is never made again: a study that is killed goes on where it was. A line is written at once
and in whole, by one process that has locked the file; one that a killed process left unfinished is cut off.

`--shard i/n` makes every n-th run, from the i-th, into a file of its own; all files of a study are read together.
Under `accelerate launch` or in a Slurm array the shard is that of the process or the task. Tables are made from the
files alone, and of the seeds that are complete.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import itertools
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

import reporting
import warmup_rules
from peer_optimizers import missing
from warmup_cases import Rule, Setting, train, unigram_entropy
from warmup_starts import From, constant, times_own_warmup
from warmup_study import KEYS, Job

GRIDS = Path(__file__).parent / "grids"
SMOKE = Path(__file__).parents[2] / "runs" / "studies-smoke"
RULES: dict[str, Callable[..., Rule]] = {
    **warmup_rules.RULES,
    "from": From,
    "linear x sqrt(1-b2^t)": times_own_warmup,
    "constant": constant,
}
LOSSES = ("loss", "first", "entropy", "peak")
# What a rule has measured; empty where it does not apply.
FOUND = ("init", "critical_lr", "sharpness", "passes", "hvps", "saved", "steps")
COLUMNS = (*KEYS, *LOSSES, "probes", *FOUND, "seconds", "conditions")

Row = dict[str, Any]
Report = Callable[[list[Row]], str]
Plot = Callable[[list[Row]], Figure]


@dataclass(frozen=True)
class Study:
    """A name and its runs, in the order in which they are made."""

    name: str
    jobs: list[Job]


def axes(choices: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the lists among the values."""
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    for chosen in itertools.product(*lists):
        yield dict(zip(choices, chosen, strict=True))


def load(name: str, smoke: bool = False) -> Study:
    """Read a grid; for `smoke` the first and the last target of each block, one seed and small sizes."""
    path = GRIDS / f"{name}.yml"
    grid = yaml.safe_load(path.read_text())
    if unknown := grid.keys() - {"runs", "setting", "seeds", "smoke"}:
        raise ValueError(f"{path.name} has unknown keys: {', '.join(sorted(unknown))}")
    jobs: dict[tuple[str, ...], Job] = {}
    # A seed of everything before the next: what a killed study has made is a whole picture.
    for seed in grid["seeds"][: 1 if smoke else None]:
        for block in grid["runs"]:
            for job in _block(block, grid, path, seed, smoke):
                jobs.setdefault(job.key(), job)
    return Study(path.stem, list(jobs.values()))


def _block(block: dict[str, Any], grid: dict[str, Any], path: Path, seed: int, smoke: bool) -> Iterator[Job]:
    if block.keys() - {"options", "setting"} != {"optimizer", "rule", "target"}:
        raise ValueError(f"a block of {path.name} must have optimizer, rule, target, got {', '.join(block)}")
    setting = grid.get("setting", {}) | block.get("setting", {}) | (grid["smoke"] if smoke else {})
    targets = block["target"]
    for names in axes({"optimizer": block["optimizer"], "rule": block["rule"]}):
        if names["rule"] not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {names['rule']}")
        for fields, options in itertools.product(axes(setting), axes(block.get("options", {}))):
            for target in dict.fromkeys((targets[0], targets[-1]) if smoke else targets):
                made = Setting(path.stem, **fields)
                yield Job(made, names["optimizer"], names["rule"], options, float(target), seed)


def run(job: Job, conditions: str = "") -> dict[str, str]:
    """Make a run; its line of the CSV."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    rule = RULES[job.rule](job.setting, job.optimizer, job.target, **job.options)
    made = train(job.setting, job.optimizer, rule, job.seed)
    if math.isnan(made["loss"]):
        made["loss"] = math.inf
    made |= {"entropy": unigram_entropy(job.setting), "seconds": time.perf_counter() - start}
    line = dict.fromkeys(COLUMNS, "") | dict(zip(KEYS, job.key(), strict=True))
    return line | {k: f"{v:.6g}" for k, v in made.items()} | {"conditions": conditions}


def files(folder: Path, name: str) -> list[Path]:
    """The files of a study: one, and those of its shards."""
    return [path for path in (folder / f"{name}.csv", *sorted(folder.glob(f"{name}-*of*.csv"))) if path.exists()]


def lines(folder: Path, name: str) -> list[dict[str, str]]:
    """What is in them; of a run that two shards made (they are asked not to), the first."""
    made: dict[tuple[str, ...], dict[str, str]] = {}
    for path in files(folder, name):
        whole, _, _ = path.read_text().rpartition("\n")  # another process may be in the midst of a line
        for line in csv.DictReader(io.StringIO(whole)):
            made.setdefault(tuple(line[key] for key in KEYS), line)
    return list(made.values())


def rows(folder: Path, name: str) -> list[Row]:
    """The finished runs: every field of the setting, every option and every number by its name."""
    made = []
    for line in lines(folder, name):
        numbers = {k: float(line[k]) if line[k] else None for k in (*LOSSES, "probes", *FOUND, "seconds", "target")}
        keys = tuple(line[key] for key in KEYS)
        setting = asdict(Setting(name, **json.loads(line["setting"])))
        made.append(line | setting | json.loads(line["options"]) | numbers | {"seed": int(line["seed"]), "keys": keys})
    return made


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[dict[str, str]], None]]:
    """Add lines to a CSV that no other process adds to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing {path}; give each a --shard of its own") from None

        def write(line: dict[str, str], header: bool = False) -> None:
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader() if header else writer.writerow(line)
            file.write(text.getvalue().encode())
            file.flush()

        file.seek(0)
        before = file.read()
        file.truncate(before.rfind(b"\n") + 1)
        if b"\n" not in before:
            write({}, header=True)
        elif before.split(b"\n")[0].decode().split(",") != list(COLUMNS):
            raise RuntimeError(f"{path} has other columns than this version of the study: move it away")
        yield write


def shard_of(text: str | None, environ: dict[str, str]) -> tuple[int, int]:
    """i and n of `--shard i/n`, of a process of `accelerate launch`, or of a task of a Slurm array."""
    if text is not None:
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
            raise ValueError(f"--shard must be i/n with i from 1 to n, got {text}")
        return int(index), int(count)
    if int(environ.get("WORLD_SIZE", 1)) > 1:
        return int(environ["RANK"]) + 1, int(environ["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_COUNT" in environ:
        first = int(environ["SLURM_ARRAY_TASK_MIN"])
        return int(environ["SLURM_ARRAY_TASK_ID"]) - first + 1, int(environ["SLURM_ARRAY_TASK_COUNT"])
    return 1, 1


def finish(study: Study, folder: Path, processes: int, shard: tuple[int, int] = (1, 1)) -> None:
    """Make the runs of a shard that are missing, with a progress bar that says the time left."""
    index, count = shard
    name = study.name if count == 1 else f"{study.name}-{index}of{count}"
    with appending(folder / f"{name}.csv") as write:
        done = {tuple(line[key] for key in KEYS) for line in lines(folder, study.name)}
        mine = study.jobs[index - 1 :: count]
        lacking = Counter({job.optimizer: missing(job.optimizer) for job in mine if missing(job.optimizer)})
        for optimizer, package in lacking.items():
            print(f"{study.name}: skips {optimizer}, which needs: pip install '{package}'")
        mine = [job for job in mine if job.optimizer not in lacking]
        todo = [job for job in mine if job.key() not in done]
        with reporting.torch_threads(1):  # as each run has
            conditions = reporting.conditions(["torch", "transformers"], reporting.current_commit())
        with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=name, unit="run", smoothing=0.05) as bar:
            for line in _results(partial(run, conditions=conditions), todo, processes):
                write(line)
                bar.update()


def _results(make: Callable[[Job], dict[str, str]], todo: list[Job], processes: int) -> Iterator[dict[str, str]]:
    if processes == 1 or len(todo) < 2:
        yield from map(make, todo)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(make, job) for job in todo]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def provenance(made: list[Row]) -> str:
    """The seeds of the runs and what they were made with, in a line."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in made})))
    hours = sum(row["seconds"] for row in made) / 3600
    made_with = " and ".join(sorted({row["conditions"].rstrip(".") for row in made}))
    return f"{len(made)} runs, {hours:.2f} hours of one thread; seeds {seeds}; {made_with}."


def complete(study: Study, folder: Path) -> list[Row]:
    """The finished runs of the grid, of the seeds that lack none; an optimizer or rule without any is left out."""
    made = {row["keys"]: row for row in rows(folder, study.name)}
    known = {(row["optimizer"], row["rule"]) for row in made.values()}
    jobs = [job for job in study.jobs if (job.optimizer, job.rule) in known]
    lacking = {job.seed for job in jobs if job.key() not in made}
    return [made[job.key()] for job in jobs if job.seed not in lacking]


def page(study: Study, folder: Path, report: Report) -> str:
    """The table of a study, from its CSVs alone."""
    made = complete(study, folder)
    if not made:
        raise RuntimeError(f"no seed of {study.name} is complete: run python recipes/studies/{study.name}.py")
    return f"{report(made)}\n\n{provenance(made)} `python recipes/studies/{study.name}.py`\n"


def command(name: str, report: Report, plot: Plot, doc: str) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="at once; by default as many as there are cores")
    parser.add_argument("--shard", help="i/n: every n-th run from the i-th, and no table")
    parser.add_argument("--smoke", action="store_true", help="two small runs of everything, to runs/studies-smoke")
    parser.add_argument("--table", action="store_true", help="make no runs: the table and the plot from the CSVs")
    parser.add_argument("--plan", action="store_true", help="make nothing: say how many runs are missing")
    args = parser.parse_args()
    study, folder = load(name, args.smoke), SMOKE if args.smoke else reporting.RESULTS
    shard = shard_of(args.shard, dict(os.environ))
    if args.plan:
        print(plan(study, folder))
        return
    if not args.table:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        finish(study, folder, args.processes or max(1, (os.cpu_count() or 1) // local), shard)
    if shard[1] == 1:
        (folder / f"{name}.md").write_text(page(study, folder, report))
        plot(complete(study, folder)).savefig(folder / f"{name}.png", dpi=120)
        print(f"{folder / name}.md")
    else:
        print(f"shard {shard[0]} of {shard[1]} is finished; when all are: python recipes/studies/{name}.py --table")


def plan(study: Study, folder: Path) -> str:
    """How many runs there are, and how long those that are missing take, as far as finished ones can tell."""
    finished = {tuple(line[key] for key in KEYS): float(line["seconds"]) for line in lines(folder, study.name)}
    todo = [job for job in study.jobs if job.key() not in finished]
    text = f"{study.name}: {len(study.jobs)} runs, {len(todo)} missing"
    return text + (f", about {len(todo) * sum(finished.values()) / len(finished) / 60:.0f} min" if finished else "")
