import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "processes.py"


def run(folder, num_processes, options):
    folder.mkdir()
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--standalone"]
    command = [*launcher, str(SCRIPT), str(folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(num_processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 3e-3}, {"learning_rate": 1e3, "optim": "sgd", "gi_adam": False, "max_init_fraction": 1.0}],
    ids=["capped", "found"],
)
def test_two_processes_search_as_one_with_the_same_global_batch(options, tmp_path):
    (one,) = run(tmp_path / "one", 1, {**options, "per_device_train_batch_size": 8})
    two = run(tmp_path / "two", 2, {**options, "per_device_train_batch_size": 4})
    assert [ranks["world_size"] for ranks in two] == [2, 2]
    assert two[0]["history"][0] == two[1]["history"][0]
    assert two[0]["weights"] == two[1]["weights"]
    alone, together = one["history"][0], two[0]["history"][0]
    assert together["warmup/status"] == alone["warmup/status"]
    assert together["warmup/critical_lr"] == pytest.approx(alone["warmup/critical_lr"], rel=1e-3)
    # The first loss is the step's own, averaged over the processes.
    assert together["warmup/evals"][0][1] == two[0]["history"][1]["loss"]


@pytest.mark.slow
def test_two_processes_are_guided_as_one(tmp_path):
    options = {"warmup": "guided", "warmup_steps": 0, "max_steps": 12, "guide_every": 2, "guide_rate": 0.2}
    (one,) = run(tmp_path / "one", 1, {**options, "per_device_train_batch_size": 8})
    two = run(tmp_path / "two", 2, {**options, "per_device_train_batch_size": 4})
    numbers = ("warmup/critical_lr", "warmup/init_lr", "warmup/peak_lr", "warmup/forward_passes", "learning_rate")
    seen = [[{k: e[k] for k in numbers if k in e} for e in rank["history"]] for rank in (one, *two)]
    assert seen[1] == seen[2]
    assert two[0]["weights"] == two[1]["weights"]
    assert len(seen[0]) == len(seen[1])
    for alone, together in zip(seen[0], seen[1], strict=True):
        for entry in (alone, together):  # losses that round otherwise may cost the first search a pass more
            entry.pop("warmup/forward_passes", None)
        assert together == pytest.approx(alone, rel=0.01)
    assert any("warmup/peak_lr" in e for e in seen[0])
