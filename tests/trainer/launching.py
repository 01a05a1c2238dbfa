"""Launches processes.py on one machine and reads what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import free_ports

SCRIPT = Path(__file__).parent / "processes.py"
LINEAR = {"max_steps": 20, "warmup_steps": 8, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 4}
# Few tokens: there is a first descent, and a valley at its end.
GUIDED = {
    **{"max_steps": 40, "warmup": "guided", "auto_lr": True, "warmup_steps": 0, "gi_adam": False, "tokens": 5},
    **{"save_strategy": "steps", "save_steps": 12, "ramp_steps": 8.8},
}


def launch(folder, num_processes, *runs, fails=False, forks=False, **environment):
    """Every run in turn on that many processes, or in forks of them; the global batch is 16 sequences."""
    folder.mkdir(exist_ok=True)
    if forks:
        runs = [{**run, "port": port} for run, port in zip(runs, free_ports(len(runs)), strict=True)]
    size = {"per_device_train_batch_size": 16 // num_processes, "gradient_accumulation_steps": 1}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--standalone"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), json.dumps([{**size, **run} for run in runs])],
        capture_output=True,
        text=True,
        timeout=600 + 20 * len(runs) * forks,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done


class Seen:
    """What one run left: by process its log, and the tensors put together from all of them."""

    def __init__(self, folder, name):
        self.processes = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]
        self.history = self.processes[0].get("history")
        if (folder / f"{name}.pt").exists():
            self.tensors = torch.load(folder / f"{name}.pt")

    def numbers(self, key):
        return [entry[key] for entry in self.history if key in entry]

    @property
    def weights(self):
        return self.tensors["weights"]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_rule(seen, reference):
    """What guided warmup has come to, on every process."""
    alone = reference.processes[0]["rule"]
    assert alone["valley_lr"] is not None
    assert alone["decoder"] is True
    for process in seen.processes:
        assert process["rule"]["decoder"] is True
        for name in ("valley_step", "valley_lr", "path", "mean_slope", "slopes"):
            assert process["rule"][name] == pytest.approx(alone[name], rel=1e-2, abs=1e-2), name


def assert_same_run(seen, reference):
    """Learning rates and η_c to 1e-3, losses to 1e-4: what sums in another order may change."""
    assert seen.numbers("warmup/status") == reference.numbers("warmup/status")
    for key, rel in [("warmup/critical_lr", 1e-3), ("learning_rate", 1e-3), ("loss", 1e-4)]:
        found, expected = seen.numbers(key), reference.numbers(key)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert abs(one / other - 1) < rel if other else one == 0, key


def assert_v0_is_squared_gradient(seen, reference):
    """(1-β2) g_1² + β2 g_1² = g_1², the gradient being that of one process."""
    squares = reference.tensors["squares"]
    assert seen.tensors["second_moments"].keys() == squares.keys()
    for name, v in seen.tensors["second_moments"].items():
        assert (v - squares[name]).abs().max() < 1e-5 * squares[name].max(), name


def assert_one_copy(memory):
    """What the search holds beside the forward pass is a copy of the shard, which is half of 4,229,376 weights."""
    assert memory["shard"] == 4 * 4_229_376 // 2
    assert memory["shard"] < memory["own"] < 1.1 * memory["shard"]
    assert memory["left"] == 0
