"""Every recipe runs: three steps of its real command, with a small model on a local text in place of the hub's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forking import free_ports

import pretrain

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TEXT = ROOT / "recipes" / "tiny" / "shakespeare.txt"


def name(path):
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


def command(path, folder):
    """The recipe's command, with what a test needs behind it."""
    options = [
        "--smoke",
        "--max_steps",
        "3",
        "--output_dir",
        str(folder / "run"),
        "--use_cpu",
        "--disable_tqdm",
        "true",
    ]
    options += ["--eval_steps", "3", "--held_out", "100"]
    options += ["--dataloader_num_workers", "1"]
    recipe = yaml.safe_load(path.read_text())
    if "warmup_steps" in recipe:
        options += ["--warmup_steps", "2"]
    if path.stem == "one_gpu":  # as on a GPU with less memory
        options += ["--loss_chunks", "4"]
    if "text" in recipe:
        short = folder / "short.txt"
        short.write_text(TEXT.read_text()[:100_000])
        options += ["--text", str(short)]
    if "dataset" in recipe:
        plays = folder / "plays.jsonl"
        parts = TEXT.read_text()[:300_000].split("\n\n")
        plays.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
        options += ["--dataset", "", "--text", str(plays), "--tokenizer", "", "--vocab_size", "400"]
    return [str(path), *options]


def check(folder, printed):
    assert "validation loss before / after" in printed
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_runs_on_one_process(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert pretrain.run(command(path, tmp_path)) == 0
    check(tmp_path, capsys.readouterr().out)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder for each recipe, in which two processes have run it; and the status that they all ended with."""
    folders = {path: tmp_path_factory.mktemp("two") for path in RECIPES}
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/ddp.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "tests/recipes/forked.py"]
    told = [
        {"argv": command(path, folder), "folder": str(folder), "port": port}
        for (path, folder), port in zip(folders.items(), free_ports(len(folders)), strict=True)
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/recipes{os.pathsep}{ROOT}/tests/trainer"}
    done = subprocess.run(
        [sys.executable, *launch, json.dumps(told)],
        cwd=ROOT,
        env=environment,
        timeout=900,
        check=False,  # the tests say which failed
    )
    return folders, done.returncode


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_runs_on_two_processes(path, two):
    folders, status = two
    printed = (folders[path] / "printed.0").read_text()
    check(folders[path], printed)
    assert "processes                            │ 2 " in printed
    assert status == 0, printed


@pytest.mark.parametrize(
    "options",
    [
        ["--activation_checkpointing"],
        ["--torch_compile", "--torch_compile_backend", "eager"],
        ["--torch_compile", "--torch_compile_backend", "eager", "--loss_chunks", "4"],
    ],
    ids=str,
)
def test_a_recipe_runs_with_what_the_trainer_offers_for_speed_and_memory(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert pretrain.run([*command(ROOT / "recipes" / "gpt2_124m" / "guided.yaml", tmp_path), *options]) == 0
    check(tmp_path, capsys.readouterr().out)
