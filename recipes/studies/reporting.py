"""What the benchmarks have in common: options, quiet runs in turns, memory as the allocator has it, and files."""

import argparse
import contextlib
import csv
import io
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"


@contextlib.contextmanager
def quiet() -> Iterator[Path]:
    """Keep what is printed from the progress bar, and files in a folder of our own."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        default, tempfile.tempdir = tempfile.tempdir, scratch
        try:
            yield Path(scratch)
        finally:
            tempfile.tempdir = default
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def torch_threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator had given out at once in `run`, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)


def turns(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Number of the round and name: they take turns, in every other round the other way round."""
    names = list(names)
    for number in range(rounds):
        yield from ((number, name) for name in (names if number % 2 else reversed(names)))


def ratios(made: list[dict[str, Any]], way: str, other: str, what: str) -> list[float]:
    """What a way took, over what another took in the same round."""
    of = {(row["way"], row["round"]): row[what] for row in made}
    return [value / of[other, number] for (name, number), value in sorted(of.items()) if name == way]


def parser(doc: str | None, **defaults: int) -> argparse.ArgumentParser:
    """The options of a benchmark: those that all have, and whole numbers by name."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    made.add_argument("--threads", type=int, default=2, help="of torch")
    for name, value in defaults.items():
        made.add_argument(f"--{name}", type=int, default=value)
    return made


def parsed(made: argparse.ArgumentParser, argv: list[str] | None, script: str) -> argparse.Namespace:
    """The options, and the whole command line as `command`.

    Raises:
        ValueError: In one line, if there is no GPU.
    """
    args = made.parse_args(argv)
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu where torch finds no GPU, got cuda")
    args.command = " ".join([f"python recipes/studies/{script}", *(sys.argv[1:] if argv is None else argv)])
    return args


def current_commit() -> str:
    """Of the code that was imported: to be asked at the start, as the next one may be made meanwhile."""
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def conditions(packages: list[str], commit: str, device: str = "cpu") -> str:
    """Versions, hardware, commit and day, in a line."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    num = torch.get_num_threads()
    hardware = f"{_cpu()}, {os.cpu_count()} cores, {num} torch thread{'s' * (num > 1)}"
    if device != "cpu":
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {hardware}"
    return f"{versions}; {hardware}; commit {commit}; {date.today().isoformat()}."


def write(folder: Path, name: str, rows: list[dict[str, Any]], text: str) -> None:
    """Every row as CSV, the text as Markdown and on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.md").write_text(text)
    print(text)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
