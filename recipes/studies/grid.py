"""Runs a study: a YAML grid of trainings, in parallel, each of them once.

    setting: {width: 48}                       # fields of warmup_cases.Setting; what stands here is of all runs
    seeds: [0, 1, 2]
    runs:                                      # blocks; all combinations of the lists in each are runs
      - optimizer: [AdamW, RAdam]
        setting: {beta2: [0.95, 0.999]}
        rule: linear                           # a name in RULES, and its options
        options: {fraction: [0.0, 0.1]}        # a list of mappings: first those of the one, then of the next
        target: [1.0e-3, 2.0e-3]               # η_trgt

A finished run is a line of `results/<study>.csv`. It has a key (setting, optimizer, rule, options, η_trgt, seed); a
run whose key is there is never made again: a study that is killed goes on where it was. A line is written at once
and in whole, by one process that has locked the file; one that a killed process left unfinished is cut off. Guided
warmup with a bound that it does not reach without one is the same training, and gets its line.

`--shard i/n` makes every n-th run, from the i-th, into a file of its own; all files of a study are read together. In
a Slurm array from 1 to n that is `--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT`. Tables are made from the
files alone.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

import reporting
import warmup_rules
from peer_optimizers import missing
from warmup_cases import Rule, Setting, make_stream, num_weights, train, unigram_entropy
from warmup_starts import From, constant, times_own_warmup

GRIDS = Path(__file__).parent / "grids"
SMOKE = Path(__file__).parents[2] / "runs" / "studies-smoke"
RULES: dict[str, Callable[..., Rule]] = {
    **warmup_rules.RULES,
    "from": From,
    "linear x sqrt(1-b2^t)": times_own_warmup,
    "constant": constant,
}
KEYS = ("setting", "optimizer", "rule", "options", "target", "seed")
LOSSES = ("loss", "first", "entropy", "peak")
# What a rule has measured; empty where it does not apply.
FOUND = ("init", "critical_lr", "sharpness", "passes", "hvps", "saved", "steps")
NUMBERS = (*LOSSES, "probes", *FOUND, "seconds")
COLUMNS = (*KEYS, *NUMBERS, "conditions")
REFUSED = ("nothing bounds", "does not fall along the first step")  # of guided warmup, where it is not for
BLOCK = {"optimizer", "rule", "target", "seeds"}
SMALL = {"width": 16, "depth": 1, "context": 16, "batch": 4, "steps": 10}  # with --smoke

Row = dict[str, Any]
Line = dict[str, str]
Report = Callable[[list[Row]], str]
Plot = Callable[[list[Row]], Figure]
Task = TypeVar("Task", bound=Any)
Made = TypeVar("Made")


class Job(NamedTuple):
    """A run."""

    setting: Setting
    optimizer: str
    rule: str
    options: dict[str, Any]
    target: float
    seed: int

    def key(self) -> tuple[str, ...]:
        """What tells it from the others in a CSV."""
        different = {k: v for k, v in asdict(self.setting).items() if v != getattr(Setting(self.setting.name), k)}
        numbers = (f"{self.target:.6g}", str(self.seed))
        return (json.dumps(different), self.optimizer, self.rule, json.dumps(self.options), *numbers)

    def lacks(self) -> str:
        """What is not here that it needs; empty if nothing."""
        if self.setting.device == "cuda" and not torch.cuda.is_available():
            return "a GPU"
        package = missing(self.optimizer)
        return package and f"pip install '{package}'"


@dataclass(frozen=True)
class Study:
    """A name and its runs, in the order in which they are made."""

    name: str
    jobs: list[Job]


def combinations(choices: dict[str, Any] | list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the lists among the values; of several mappings one after the other."""
    for mapping in choices if isinstance(choices, list) else [choices]:
        lists = [value if isinstance(value, list) else [value] for value in mapping.values()]
        for chosen in itertools.product(*lists):
            yield dict(zip(mapping, chosen, strict=True))


def load(name: str, smoke: bool = False) -> Study:
    """Read a grid; for `smoke` the first and the last target of each block, one seed and small sizes."""
    path = GRIDS / f"{name}.yml"
    grid = yaml.safe_load(path.read_text())
    blocks = grid.pop("runs")
    shared = {"setting": {}, "options": {}} | grid
    for block in blocks:
        given = shared | block
        if unknown := given.keys() - BLOCK - {"setting", "options"}:
            raise ValueError(f"{path.name} has unknown keys: {', '.join(sorted(unknown))}")
        if lacking := BLOCK - given.keys():
            raise ValueError(f"a block of {path.name} lacks {', '.join(sorted(lacking))}: {block}")
    jobs: dict[tuple[str, ...], Job] = {}
    # A seed of everything before the next: what a killed study has made is a whole picture.
    for seed in dict.fromkeys(seed for block in blocks for seed in (shared | block)["seeds"]):
        for block in blocks:
            if seed in (shared | block)["seeds"][: 1 if smoke else None]:
                for job in _jobs(path.stem, shared, block, seed, smoke):
                    jobs.setdefault(job.key(), job)
    return Study(path.stem, list(jobs.values()))


def _jobs(name: str, shared: dict[str, Any], block: dict[str, Any], seed: int, smoke: bool) -> Iterator[Job]:
    given = shared | block
    targets = given["target"][:: max(1, len(given["target"]) - 1)] if smoke else given["target"]
    settings = itertools.product(combinations(shared["setting"]), combinations(block.get("setting", {})))
    names = combinations({"optimizer": given["optimizer"], "rule": given["rule"]})
    for which, (ours, own) in itertools.product(names, settings):
        if which["rule"] not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {which['rule']}")
        setting = Setting(name, **ours | own | (SMALL if smoke else {}))
        for options, target in itertools.product(combinations(given["options"]), targets):
            yield Job(setting, which["optimizer"], which["rule"], options, float(target), seed)


def run(job: Job, conditions: str = "") -> Line:
    """Make a run; its line of the CSV."""
    torch.set_num_threads(1)
    start, entropy = time.perf_counter(), unigram_entropy(job.setting)
    rule = RULES[job.rule](job.setting, job.optimizer, job.target, **job.options)
    try:
        made = train(job.setting, job.optimizer, rule, job.seed)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in REFUSED):
            raise
        made = {"loss": entropy, "first": entropy, "peak": 0.0, "probes": 0}  # it counts as one that learned nothing
    if math.isnan(made["loss"]):
        made["loss"] = math.inf
    made |= {"entropy": entropy, "seconds": time.perf_counter() - start}
    line = dict.fromkeys(COLUMNS, "") | dict(zip(KEYS, job.key(), strict=True))
    return line | {k: f"{v:.6g}" for k, v in made.items()} | {"conditions": conditions}


def files(folder: Path, name: str) -> list[Path]:
    """The files of a study: one, and those of its shards."""
    return [path for path in (folder / f"{name}.csv", *sorted(folder.glob(f"{name}-*of*.csv"))) if path.exists()]


def lines(folder: Path, name: str, keys: tuple[str, ...] = KEYS) -> dict[tuple[str, ...], Line]:
    """What is in them, by its key; of a run that two shards made (they are asked not to), the first."""
    made: dict[tuple[str, ...], Line] = {}
    for path in files(folder, name):
        whole, _, _ = path.read_text().rpartition("\n")  # another process may be in the midst of a line
        for line in csv.DictReader(io.StringIO(whole)):
            made.setdefault(tuple(line[key] for key in keys), line)
    return made


def rows(folder: Path, name: str) -> list[Row]:
    """The finished runs: every field of the setting, every option and every number by its name."""
    made = []
    for key, line in lines(folder, name).items():
        numbers = {k: float(line[k]) if line[k] else None for k in (*NUMBERS, "target")}
        setting = asdict(Setting(name, **json.loads(line["setting"])))
        made.append(line | numbers | setting | json.loads(line["options"]) | {"seed": int(line["seed"]), "keys": key})
    return made


def weights_of(row: Row) -> int:
    """The number of weights of its model."""
    return num_weights(Setting("", **json.loads(row["setting"])))


@contextlib.contextmanager
def appending(path: Path, columns: tuple[str, ...] = COLUMNS) -> Iterator[Callable[..., None]]:
    """Add lines to a CSV that no other process adds to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing {path}; give each a --shard of its own") from None

        def write(*lines: Line) -> None:
            text = io.StringIO()
            csv.DictWriter(text, columns, lineterminator="\n").writerows(lines)
            file.write(text.getvalue().encode())
            file.flush()

        file.seek(0)
        before = file.read()
        file.truncate(before.rfind(b"\n") + 1)
        if b"\n" not in before:
            write({column: column for column in columns})
        elif before.splitlines()[0].decode().split(",") != list(columns):
            raise RuntimeError(f"{path} has other columns than this version of the study: move it away")
        yield write


def shard_of(text: str) -> tuple[int, int]:
    """i and n of `--shard i/n`."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--shard must be i/n with i from 1 to n, got {text}")
    return int(index), int(count)


def finish(study: Study, folder: Path, processes: int, shard: tuple[int, int] = (1, 1)) -> None:
    """Make the runs of a shard that are missing, with a progress bar that says the time left."""
    index, count = shard
    name = study.name if count == 1 else f"{study.name}-{index}of{count}"
    with appending(folder / f"{name}.csv") as write:
        done = lines(folder, study.name)
        mine = study.jobs[index - 1 :: count]
        todo = [job for job in mine if job.key() not in done]
        for lacking in dict.fromkeys((job.optimizer, job.lacks()) for job in todo if job.lacks()):
            print(f"{study.name}: skips {lacking[0]}, which needs: {lacking[1]}")
        todo = [job for job in todo if not job.lacks()]
        for setting in {job.setting for job in todo if job.setting.text == "packages"}:
            make_stream(setting)
        make = partial(run, conditions=conditions())
        with tqdm(desc=name, total=len(mine), initial=len(mine) - len(todo), unit="run", smoothing=0.05) as bar:
            for bounded in (False, True):  # the others first, which tell what a bound changes
                part = [job for job in todo if is_bounded(job) == bounded]
                known = [twin(job, done) for job in part]
                asked = [job for job, line in zip(part, known, strict=True) if line is None]
                for line in itertools.chain(filter(None, known), results(make, asked, processes)):
                    write(line)
                    bar.update()
                    done[tuple(line[key] for key in KEYS)] = line


def is_bounded(job: Job) -> bool:
    """Whether it is guided warmup to a learning rate."""
    return job.rule == "guided" and "auto_lr" not in job.options


def twin(job: Job, done: dict[tuple[str, ...], Line]) -> Line | None:
    """The same training, if `auto_lr` did not go as far as the learning rate that bounds this one."""
    line = done.get(job._replace(options={"auto_lr": True} | job.options, target=1.0).key())
    if line is None or not is_bounded(job) or not 0 < float(line["peak"]) < job.target:
        return None
    return line | dict(zip(KEYS, job.key(), strict=True)) | {"seconds": "0"}


def results(make: Callable[[Task], Made], todo: list[Task], processes: int) -> Iterator[Made]:
    """What each of the tasks gives, as it comes."""
    if processes == 1 or len(todo) < 2:
        yield from map(make, todo)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(make, task) for task in todo]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def conditions() -> str:
    """What the runs that begin now are made with."""
    with reporting.torch_threads(1):  # as each run has
        return reporting.conditions(["torch", "transformers"], reporting.current_commit())


def append(name: str, columns: tuple[str, ...], tasks: Iterable[Task], make: Callable, processes: int) -> None:
    """Make the tasks, named tuples of its first columns, that a CSV lacks; its last column are the `conditions`."""
    todo, how = lacking(name, tasks), {"conditions": conditions()}
    with appending(reporting.RESULTS / f"{name}.csv", (*columns, *how)) as write:
        for line in tqdm(results(make, todo, processes), name, len(todo), unit="run"):
            write(line | how)


def lacking(name: str, tasks: Iterable[Task]) -> list[Task]:
    """Those that no line of it is of."""
    of = {task: tuple(f"{v:g}" if isinstance(v, float) else str(v) for v in task) for task in tasks}
    done = lines(reporting.RESULTS, name, next(iter(of))._fields)
    return [task for task, key in of.items() if key not in done]


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
    return f"{len(made)} runs, {hours:.2f} hours of one thread; seeds {seeds}; {made_with(made)}."


def made_with(made: Iterable[Row | Line]) -> str:
    """Versions, hardware, commits and days of the runs."""
    commits: dict[str, set[str]] = {}
    for row in made:
        where, _, commit = row["conditions"].rstrip(".").partition("; commit ")
        commits.setdefault(where, set()).update([commit] if commit else [])
    return " and ".join(
        f"{where}; commit {', '.join(sorted(of))}" if of else where for where, of in sorted(commits.items())
    )


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


def small_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of a study, also of one without a grid."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    made.add_argument("--processes", type=int, default=cores, help="at once; by default as many as there are cores")
    made.add_argument("--table", action="store_true", help="make no runs: the table and the plot from the CSVs")
    return made


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of a study with a grid."""
    made = small_parser(doc)
    made.add_argument("--shard", default="1/1", help="i/n: every n-th run from the i-th, and no table")
    made.add_argument("--smoke", action="store_true", help="two small runs of everything, to runs/studies-smoke")
    made.add_argument("--plan", action="store_true", help="make nothing: say how many runs are missing")
    return made


def parse_parts(doc: str | None, parts: Iterable[str]) -> argparse.Namespace:
    """The command line of a study of several grids: `parts` are those that are named, or all."""
    options, known = parser(doc), list(parts)
    options.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(known)}; all if none is named")
    args = options.parse_args()
    if unknown := {*args.parts} - {*known}:
        options.error(f"a part must be one of {', '.join(known)}, got {', '.join(unknown)}")
    args.parts = args.parts or known
    return args


def execute(studies: Iterable[Study], args: argparse.Namespace) -> Path | None:
    """Make what the options ask for; the folder of the results, or None if no table is wanted."""
    folder = SMOKE if args.smoke else reporting.RESULTS
    index, count = shard_of(args.shard)
    for study in studies:
        if args.plan:
            print(plan(study, folder))
        elif not args.table:
            finish(study, folder, args.processes, (index, count))
    if count > 1:
        print(f"shard {index} of {count} is finished; when all are: the same command with --table")
    return None if args.plan or count > 1 else folder


def command(name: str, report: Report, plot: Plot, doc: str | None) -> None:
    """The command line of a study of one grid."""
    args = parser(doc).parse_args()
    study = load(name, args.smoke)
    if folder := execute([study], args):
        save(folder, name, page(study, folder, report), plot(complete(study, folder)))


def save(folder: Path, name: str, text: str, figure: Figure | None = None) -> None:
    """The table and the plot of a study."""
    (folder / f"{name}.md").write_text(text)
    if figure is not None:
        figure.savefig(folder / f"{name}.png", dpi=120)
    print(folder / f"{name}.md")


def plan(study: Study, folder: Path) -> str:
    """How many runs there are, and how long those that are missing take, as far as finished ones can tell."""
    finished = lines(folder, study.name)
    seconds = [float(line["seconds"]) for line in finished.values() if line["seconds"]]
    todo = [job for job in study.jobs if job.key() not in finished]
    text = f"{study.name}: {len(study.jobs)} runs, {len(todo)} missing"
    return text + (f", about {len(todo) * sum(seconds) / len(seconds) / 60:.0f} min" if seconds else "")
