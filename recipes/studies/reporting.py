"""What the benchmarks have in common: quiet runs, memory as the allocator records it, and their results as files."""

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
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

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


def allocations(profiled: profile) -> list[tuple[int, int]]:
    """When torch's CPU allocator gave out how many bytes, or, negative, took them back; in this order."""
    events = profiled.profiler.kineto_results.events()
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")


def device_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark that runs on a CPU or a GPU."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, script: str) -> argparse.Namespace:
    """The options, and the whole command line as `command`.

    Raises:
        ValueError: In one line, if there is no GPU.
    """
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
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
