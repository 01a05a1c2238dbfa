"""The commands of the READMEs: each is understood, and those that need no hub and no second machine run."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import BertConfig

import arguments
import finetuning
from finetune_classification import ClassificationConfig
from finetune_sft import SFTWarmupConfig

ROOT = Path(__file__).parents[2]
BLOCKS = [
    block
    for readme in (ROOT / "README.md", ROOT / "recipes" / "README.md")
    for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SCRIPTS = [line for line in LINES if re.search(r"recipes/\w+\.py", line)]
LOCAL = [line for line in SCRIPTS if "recipes/tiny/" in line and "srun" not in line]
LONG = ("bert", "deepspeed")


def words(line):
    inner = re.search(r"bash -c '(.*)'", line)
    return shlex.split(re.sub(r"\$\w+", "1", inner[1]) if inner else line, comments=True)


def split(line):
    """What launches, the script, and the script's own arguments."""
    command = words(line)
    at = next(i for i, word in enumerate(command) if re.fullmatch(r"recipes/\w+\.py", word))
    return command[:at], command[at], command[at + 1 :]


def test_the_readmes_have_commands():
    assert len(SCRIPTS) >= 9
    assert len(LOCAL) == 4


# trl's own name for checkpointing is deprecated in transformers 5.24.
@pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("line", SCRIPTS)
def test_a_command_names_files_that_are_there_and_options_that_are_known(line, tmp_path, monkeypatch):
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    # What a reader has: files of their own, and the model of an earlier command.
    for name in re.findall(r"\S+\.parquet", line):
        Path(name).touch()
    if "--init_from" in line:
        BertConfig().save_pretrained("runs/bert-base-zero")
    launcher, script, argv = split(line)
    assert Path(script).is_file()
    if "--config_file" in launcher:
        load_config_from_file(launcher[launcher.index("--config_file") + 1])
    if argv == ["--help"]:
        with pytest.raises(SystemExit):
            arguments.parse(argv)
    elif script == "recipes/pretrain.py":
        arguments.parse([*argv, "--use_cpu", "--bf16", "false"])
    else:
        config = SFTWarmupConfig if "sft" in script else ClassificationConfig
        finetuning.parse([*argv, "--use_cpu", "--bf16", "false"], config)


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.long] * any(word in line for word in LONG)) for line in LOCAL]
)
def test_a_command_that_needs_no_hub_runs(line, tmp_path):
    if "deepspeed" in line and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `make deepspeed` installs it")
    launcher, script, argv = split(line)
    assert launcher[:2] == ["accelerate", "launch"]
    if "deepspeed" not in line and "--num_processes" in launcher:
        launcher += ["--main_process_port", "0"]  # others may be running
    text = tmp_path / "short.txt"
    text.write_text((ROOT / "recipes" / "tiny" / "shakespeare.txt").read_text()[:100_000])
    short = ["--smoke", "--max_steps", "3", "--warmup_steps", "2", "--eval_steps", "3", "--text", str(text)]
    short += ["--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher[2:], script, *argv, *short],
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "validation loss before / after" in done.stdout
    num = launcher[launcher.index("--num_processes") + 1] if "--num_processes" in launcher else "1"
    assert re.search(rf"│ processes +│ {num} ", done.stdout)


def test_runs_are_compared_as_the_readme_says(tmp_path, monkeypatch):
    (line,) = [line for line in LINES if "compare_runs" in line]
    assert compile(words(line)[2], "README", "exec")
    with pytest.raises(ValueError, match="dirs must be folders of runs"):
        exec(words(line)[2], {})
