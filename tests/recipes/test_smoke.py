"""Every recipe runs: three steps of its real command, with a small model on a local text in place of the hub's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pretrain

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml"))


def name(path):
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    text = tmp_path / "text.jsonl"
    plays = (ROOT / "recipes" / "tiny" / "shakespeare.txt").read_text()[:300_000].split("\n\n")
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in plays))

    def make(path, folder):
        options = ["--smoke", "--max_steps", "3", "--output_dir", str(folder), "--use_cpu", "--disable_tqdm", "true"]
        options += [
            "--eval_steps",
            "3",
            "--held_out",
            "100",
            "--report_to",
            "none",
            "--bf16",
            "false",
            "--dataloader_num_workers",
            "1",
        ]
        recipe = yaml.safe_load(path.read_text())
        if "warmup" not in recipe:
            options += ["--warmup_steps", "2"]
        if "dataset" in recipe:
            options += ["--dataset", "", "--text", str(text), "--tokenizer", "", "--vocab_size", "400"]
        return [str(path), *options]

    return make


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_runs_on_one_process(path, command, tmp_path, capsys):
    assert pretrain.run(command(path, tmp_path / "run")) == 0
    assert "validation loss before / after" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.slow
def test_every_recipe_runs_on_two_processes(command, tmp_path):
    commands = [json.dumps(command(path, tmp_path / name(path).replace("/", "-"))) for path in RECIPES]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = str(Path(__file__).with_name("smoke.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "recipes")}
    done = subprocess.run([*launcher, script, *commands], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for path in RECIPES:
        state = json.loads((tmp_path / name(path).replace("/", "-") / "trainer_state.json").read_text())
        assert state["global_step"] == 3
    assert done.stdout.count("processes                            │ 2 ") == len(RECIPES)
