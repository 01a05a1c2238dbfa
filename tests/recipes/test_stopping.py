"""Runs that are told to stop, or killed, and the same command again."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("hashed.py"))
STEPS = 14


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a small streaming run in another process; returns the process."""
    folder = tmp_path_factory.mktemp("start")
    parts = (ROOT / "recipes" / "tiny" / "shakespeare.txt").read_text()[:200_000].split("\n\n")
    text = folder / "plays.jsonl"
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "recipes"),
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }

    def start(folder, *options, processes=1, recipe="llama_tiny.yaml"):
        launcher = (
            [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        )
        command = [sys.executable, *launcher, SCRIPT, f"{folder}.hashes", str(ROOT / "recipes" / recipe), "--smoke"]
        command += ["--output_dir", str(folder), "--text", str(text), "--use_cpu", "--disable_tqdm", "true"]
        command += ["--max_steps", str(STEPS), "--logging_steps", "1", "--eval_strategy", "no", "--context", "32"]
        command += [
            "--held_out",
            "20",
            "--shuffle_blocks",
            "7",
            "--sample_prompt",
            "",
            "--gradient_accumulation_steps",
        ]
        command += ["2", "--save_strategy", "steps", "--save_steps", "3", *options]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return start


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The folder of a run with as many workers that nobody has stopped; each is made once."""

    @functools.cache
    def unbroken(workers):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        finish(start(folder, "--dataloader_num_workers", str(workers)))
        return folder

    return unbroken


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out


def wait_for_step(process, folder, step):
    path, deadline = Path(f"{folder}.hashes"), time.monotonic() + 600
    while not (path.exists() and any(line.split()[1] == str(step) for line in path.read_text().splitlines())):
        assert time.monotonic() < deadline, "the run does not come to that step"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def batches(folder):
    """What each process saw in each step: its micro-batches, and all that it saw if the step was made twice."""
    seen = {}
    for line in Path(f"{folder}.hashes").read_text().splitlines():
        process, step, digest = line.split()
        seen.setdefault((process, int(step)), []).append(digest)
    return {key: (digests[-2:], set(digests)) for key, digests in seen.items()}


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return {e["step"]: (e["loss"], e["learning_rate"]) for e in state["log_history"] if "loss" in e}


def assert_same_run(unbroken, broken):
    assert batches(unbroken) == batches(broken)
    assert losses(unbroken) == losses(broken)
    assert sorted(losses(broken)) == list(range(1, STEPS + 1))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_streaming_run_killed_at_any_step_sees_the_same_batches_and_losses(workers, start, unbroken, tmp_path):
    options, broken = ["--dataloader_num_workers", str(workers)], tmp_path / "broken"
    step = random.Random(workers).randrange(1, STEPS - 1)
    process = start(broken, *options)
    wait_for_step(process, broken, step)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # As a kill in the middle of saving leaves it: it is passed over.
    (broken / f"checkpoint-{STEPS}").mkdir()
    (broken / f"checkpoint-{STEPS}" / "model.safetensors").write_bytes(b"half")
    finish(start(broken, *options))
    assert_same_run(unbroken(workers), broken)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(number, start, unbroken, tmp_path):
    options, broken = ["--save_steps", "100"], tmp_path / "broken"
    process = start(broken, *options)
    wait_for_step(process, broken, 4)
    process.send_signal(number)
    out = finish(process, 128 + number)
    (step,) = re.findall(rf"stopped by {number.name} after step (\d+); the same command goes on from there", out)
    assert (broken / f"checkpoint-{step}").is_dir()
    assert not (broken / "model.safetensors").exists()
    finish(start(broken, *options))
    assert_same_run(unbroken(0), broken)


@pytest.mark.long
def test_a_signal_stops_all_processes_in_the_same_step(start, tmp_path):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    finish(start(unbroken, processes=2))
    process = start(broken, processes=2)
    wait_for_step(process, broken, 4)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert json.loads((broken / "run.json").read_text())["ended"] is False
    finish(start(broken, processes=2))
    assert_same_run(unbroken, broken)
