"""A recipe as a person launches it: --smoke and --plan anywhere, options that are meant, a log in a file."""

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import torch

import arguments
import finetuning
import pretrain
from finetune_classification import ClassificationConfig
from running import RunFolder

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TINY, GPT2, BERT = (
    str(ROOT / "recipes" / name) for name in ("tiny/gpt.yaml", "gpt2_124m/guided.yaml", "bert_base/zero.yaml")
)
TEXT = (ROOT / "recipes" / "tiny" / "shakespeare.txt").read_text()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder that recipes run in."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tmp_path):
    """Six small steps, without a word on the device or on bars."""
    (tmp_path / "part.txt").write_text(TEXT[:60_000])
    options = ["--text", "part.txt", "--output_dir", "run", "--vocab_size", "300", "--context", "32"]
    options += ["--model.n_embd", "32", "--model.n_layer", "1", "--model.n_head", "2"]
    return [TINY, *options, "--max_steps", "6", "--warmup_steps", "3", "--eval_strategy", "no"]


@pytest.mark.parametrize(
    ("recipe", "hubs"),
    [(GPT2, ("HuggingFaceFW/fineweb-edu", "gpt2")), (BERT, ("wikimedia/wikipedia", "google-bert/bert-base-uncased"))],
    ids=["gpt2", "bert"],
)
def test_a_recipe_of_the_hub_runs_with_smoke_alone_and_says_what_it_replaced(recipe, hubs, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [])
    folders = []
    for _ in range(2):  # the second takes the place of the first
        assert pretrain.run([recipe, "--smoke"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("smoke: ")]
        assert f"shakespeare.txt in place of {hubs[0]}, a tokenizer trained on the text in place of {hubs[1]}" in line
        assert "no tensorboard, which is not installed, 3 steps" in line
        folders.append(line.rpartition(" ")[2])
    assert folders[0] == folders[1]
    assert re.fullmatch(r"runs/[\w-]+-smoke", folders[0])
    assert json.loads((Path(folders[0]) / "trainer_state.json").read_text())["global_step"] == 3


def test_smoke_is_small_and_what_is_typed_counts_more():
    args, recipe = arguments.parse([GPT2, "--smoke"])
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, recipe.shuffle_blocks) == (2, 2, 64)
    assert args.dataloader_num_workers == 0
    if not torch.accelerator.is_available():
        assert args.use_cpu
        assert not args.bf16
    typed = ["--max_steps", "7", "--per_device_train_batch_size", "5", "--output_dir", "mine"]
    args, recipe = arguments.parse([GPT2, "--smoke", *typed])
    assert (args.max_steps, args.per_device_train_batch_size, args.output_dir) == (7, 5, "mine")
    assert not recipe.overwrite


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--plan", "8"], []),  # what the recipe is for
        (["--plan", "9"], ["text again"]),
        (["--plan", "16"], ["text again", "lower gradient_accumulation_steps"]),
        (["--plan", "16", "--gradient_accumulation_steps", "2"], []),
        (["--plan", "16", "--dataset_config", "sample-100BT"], ["lower gradient_accumulation_steps"]),
        (["--plan", "16", "--auto_lr"], ["text again"]),
        (["--plan", "16", "--dataset", "my/own"], ["lower gradient_accumulation_steps"]),
    ],
    ids=lambda value: "_".join(value).replace("--", "") or "none",
)
def test_a_plan_warns_of_text_that_is_met_again_and_of_a_batch_that_has_outgrown_its_rate(options, warned, capsys):
    assert pretrain.run([GPT2, *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == len(warned)
    assert all(words in line for words, line in zip(warned, lines, strict=True))


def test_a_plan_needs_neither_gpu_nor_reporter_and_says_operations_and_days(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [])
    pretrain.run([GPT2, "--plan", "8"])
    printed = capsys.readouterr().out
    rows = {k.strip(): v.strip() for k, v in re.findall(r"│([^│]*)│([^│]*)│\n", printed)}
    parameters, tokens = 124_475_904, 8 * 16 * 4 * 1024 * 19073
    operations = tokens * (6 * parameters + 12 * 12 * 768 * 1024)  # attention: layers, width, context
    assert rows["operations in all"].startswith(f"{operations:.3g}, ")
    days = [operations / (0.4 * peak * 8) / 86400 for peak in (312e12, 989e12)]
    assert rows["days at 40% of the peak"] == f"{days[0]:.2g} on 8 A100, {days[1]:.2g} on 8 H100"
    # In bf16, as the recipe is for GPUs: two bytes a weight and four of its shard in single precision.
    assert re.search(rf"weights +│ [\d.]+ GiB │ {(2 + 4 / 8) * parameters / 2**30:.2f} GiB ", printed)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_the_batch_that_a_learning_rate_was_chosen_for_is_that_of_the_recipe(path):
    _, recipe = arguments.parse([str(path), "--use_cpu"])
    assert f"= {recipe.lr_chosen_for:,} tokens per step" in path.read_text()


TYPED = [
    (["--learning_rte", "1e-3"], "unknown option --learning_rte 1e-3; did you mean learning_rate?"),
    (["--learning-rte=1e-3"], "unknown option --learning-rte=1e-3; did you mean learning_rate?"),
    (["--zzzz", "a", "b", "--seed", "1"], "unknown option --zzzz a b"),
    (["--warmup_growth", "2"], "warmup_growth is no option any more: use warmup=guided"),
    (["--max_init_fraction=1"], "max_init_fraction is no option any more: use init_lr=catapult in place of 1.0"),
]
NESTED = [
    (["--model.n_layr", "2"], "model has an option that gpt2 does not know, got n_layr: 2"),
    (["--model.n_layer", "--seed", "1"], "model.n_layer must have a value, got none"),
    (["--model", "gpt2", "--model.n_layer=2"], "model must be a mapping for n_layer to be in it, got 'gpt2'"),
]


@pytest.mark.parametrize(("options", "message"), [*TYPED, *NESTED])
def test_an_option_that_is_none_is_named_with_the_one_that_is_meant(options, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        pretrain.run([TINY, *options, "--plan", "1"])


@pytest.mark.parametrize(("options", "message"), TYPED)
def test_so_it_is_in_the_fine_tuning_scripts(options, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        finetuning.parse(["--model", "m", "--files", "f.csv", *options], ClassificationConfig)


def test_an_option_of_the_model_changes_one_key_of_it():
    options = ["--model.n_layer", "2", "--model.attn_pdrop=0.5", "--model.activation_function", "relu"]
    _, recipe = arguments.parse([TINY, *options])
    before = {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4}
    assert json.loads(recipe.model) == before | {"n_layer": 2, "attn_pdrop": 0.5, "activation_function": "relu"}


def test_help_is_in_groups_with_warmup_before_the_trainers(capsys):
    for parse in (arguments.parse, lambda argv: finetuning.parse(argv, ClassificationConfig)):
        with pytest.raises(SystemExit):
            parse(["--help"])
        title, groups = "", {}
        for line in capsys.readouterr().out.splitlines():
            title = line[:-1] if re.fullmatch(r"\w+:", line) else title
            groups.setdefault(title, []).extend(re.findall(r"^  (?:-h, )?--(\w+)", line))
        assert list(groups)[1:] == ["options", "run", "data", "model", "warmup", "Trainer"]
        assert {"warmup", "auto_lr", "warmup_steps"} < set(groups["warmup"])
        for option, owner in {"output_dir": "run", "dataset": "data", "model": "model", "seed": "Trainer"}.items():
            assert option in groups[owner]


def test_a_log_in_a_file_has_lines_and_the_same_command_says_that_it_has_finished(command, capsys):
    # Warnings are errors here, and the device is whatever there is.
    assert pretrain.run([*command, "--logging_steps", "3", "--peak_tflops", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "it/s" not in err
    numbers = r"loss [\d.]+, grad_norm [\d.]+, learning_rate [\de.-]+, [\d,]+ tokens/s, data wait [\d.]+%, MFU [\d.]+%"
    assert len(re.findall(rf"^[36]/6 steps: {numbers}$", out, re.MULTILINE)) == 2
    weights = Path("run/model.safetensors").stat().st_mtime_ns
    assert pretrain.run([*command, "--logging_steps", "3", "--peak_tflops", "0.5"]) == 0
    assert capsys.readouterr().out == "finished: 6 of 6 steps, output in run; --overwrite trains anew\n"
    with pytest.raises(ValueError, match=r"other options, logging_steps \(was 3, now 5\), .*--overwrite"):
        pretrain.run(command)
    assert Path("run/model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("now", "recipe", "named"),
    [
        (["a.yaml", "--seed", "2"], ["--max_steps=9"], "seed (was 1, now 2): "),
        (["a.yaml"], ["--max_steps=9"], "seed (was 1, now not set): "),
        (["a.yaml", "--seed", "1"], ["--max_steps=8"], "max_steps (was 9, now 8): "),  # the file was edited
        (["b.yaml", "--seed=1", "--bf16"], ["--max_steps=9"], "recipe (was a.yaml, now b.yaml), bf16 (was not set, "),
        (["a.yaml", "--seed=1", "--text", *"a" * 50], ["--max_steps=9"], "options, text: "),  # too long to be shown
        (["a.yaml", "--seed=1", "--overwrite", "--output-dir", "x"], ["--max_steps=9"], None),
        (["a.yaml", "--seed", "3", "--max_steps=9", "--seed", "1"], [], None),
    ],
)
def test_another_command_for_the_folder_of_a_run_is_told_what_differs(now, recipe, named, tmp_path):
    RunFolder(tmp_path, ["a.yaml", "--seed", "1"], ["--max_steps=9"]).begin()
    folder = RunFolder(tmp_path, now, recipe)
    if named is None:
        assert folder.checkpoint(None, overwrite=False) is None
        return
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        folder.checkpoint(None, overwrite=False)
    assert "--overwrite" in str(error.value)


@pytest.mark.parametrize(("nodes", "accumulated"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_the_slurm_script_starts_every_machine_with_the_batch_of_the_recipe(nodes, accumulated, tmp_path):
    (script,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "recipes/README.md").read_text(), re.DOTALL
    )
    stubs = {
        "scontrol": "seq -f node%g $SLURM_NNODES",
        "srun": 'for SLURM_NODEID in $(seq 0 $((SLURM_NNODES - 1))); do export SLURM_NODEID; "$@"; done',
        "accelerate": 'echo "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_NNODES": str(nodes)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == nodes
    for rank, line in enumerate(lines):
        assert (
            f"--num_machines {nodes} --num_processes {8 * nodes} --machine_rank {rank} --main_process_ip node1 "
            in line
        )
        assert line.endswith(f"recipes/gpt2_124m/guided.yaml --gradient_accumulation_steps {accumulated}")
