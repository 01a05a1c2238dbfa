"""What a run leaves in its folder, deletes there and finds there; and what it sends to the hub."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import pretrain
from running import RunFolder, carry_out, main

ROOT = Path(__file__).parents[2]
MODEL = '{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def command(tmp_path):
    """Makes the command of six small steps."""
    text = tmp_path / "part.txt"
    text.write_text((ROOT / "recipes" / "tiny" / "shakespeare.txt").read_text()[:60_000])

    def command(folder, *options):
        fixed = ["--text", str(text), "--output_dir", str(folder), "--model", MODEL, "--vocab_size", "300"]
        fixed += ["--context", "32", "--max_steps", "6", "--warmup_steps", "3", "--eval_strategy", "no", "--use_cpu"]
        return [str(ROOT / "recipes" / "tiny" / "gpt.yaml"), *fixed, "--disable_tqdm", "true", *options]

    return command


def report_of(folder):
    report = json.loads((folder / "warmup.json").read_text())
    del report["log_history"]  # with how long it all took
    return report


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def as_if_killed_before_the_end(folder):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "ended": False}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--max_steps", "-1", "--num_train_epochs", "0.05", "--warmup_steps", "2"],
        ["--streaming", "--held_out", "20", "--shuffle_blocks", "8"],
    ],
    ids=["steps", "epochs", "stream"],
)
def test_a_run_killed_behind_its_last_checkpoint_ends_with_the_same_weights(how, command, tmp_path):
    folder = tmp_path / "run"
    # Its last learning rate is not 0: a step too many would show.
    schedule = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-3}']
    options = [*schedule, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", *how]
    assert pretrain.run(command(folder, *options)) == 0
    weights, state = load_file(folder / "model.safetensors"), json.loads((folder / "trainer_state.json").read_text())
    report = report_of(folder)
    for _ in range(2):
        as_if_killed_before_the_end(folder)
        assert pretrain.run(command(folder, *options)) == 0
    again = json.loads((folder / "trainer_state.json").read_text())
    assert again["global_step"] == state["global_step"]
    assert again["max_steps"] == state["max_steps"]
    after = load_file(folder / "model.safetensors")
    assert all(weights[name].equal(after[name]) for name in weights)
    assert report_of(folder) == report
    assert json.loads((folder / "run.json").read_text())["ended"] is True


def test_overwrite_deletes_a_run_and_nothing_else(command, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "stream").mkdir(parents=True)
    for name in ("stream/worker-0.jsonl", "model.safetensors", "notes.txt"):
        (elsewhere / name).write_text("mine")
    saving = ["--save_strategy", "steps", "--save_steps", "3"]
    pretrain.run(command(folder, *saving))
    mine = ["thesis.tex", "runs/other/model.safetensors", "checkpoint-best/model.safetensors", "stream/notes.txt"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("mine")
    (folder / "stream" / "worker-7.jsonl").write_text("an earlier run's")
    (folder / "checkpoint-77").symlink_to(elsewhere)
    (folder / "merges.txt").symlink_to(elsewhere / "notes.txt")
    pretrain.run(command(folder, "--save_strategy", "no", "--overwrite"))
    left = tree(folder)
    assert set(mine) <= left
    assert not {name for name in left if name.startswith(("checkpoint-3", "checkpoint-6", "checkpoint-77"))}
    assert "stream/worker-7.jsonl" not in left
    assert {(elsewhere / name).read_text() for name in tree(elsewhere)} == {"mine"}
    assert len(tree(elsewhere)) == 3


def test_what_a_run_writes_is_what_overwrite_deletes(command, tmp_path):
    folder = tmp_path / "run"
    options = ["--save_strategy", "steps", "--save_steps", "3", "--report_to", "tensorboard"]
    pretrain.run(command(folder, *options, "--streaming", "--held_out", "20", "--shuffle_blocks", "8"))
    assert {"model.safetensors", "tokenizer.json", "stream/worker-0.jsonl"} <= tree(folder)
    RunFolder(folder, []).clear()
    assert tree(folder) == {"run.json", "README.md"}  # which may be an author's


def test_overwrite_through_a_link_leaves_no_checkpoint_of_the_earlier_run(command, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    pretrain.run(command(tmp_path / "link", "--save_strategy", "steps", "--save_steps", "3"))
    assert (tmp_path / "real" / "checkpoint-3").is_dir()
    pretrain.run(command(tmp_path / "link", "--save_strategy", "no", "--overwrite"))
    assert not list((tmp_path / "real").glob("checkpoint-*"))
    assert (tmp_path / "real" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "content", ["", '{"command": [', "[]", "null", '{"ended": true}', '{"command": 3, "ended": 1}']
)
def test_a_broken_note_of_the_run_is_named(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"output_dir must hold a run.json that can be read, got .*run.json") as error:
        RunFolder(tmp_path, []).checkpoint(None, overwrite=False)
    assert "\n" not in str(error.value)
    assert RunFolder(tmp_path, []).checkpoint(None, overwrite=True) is None


def test_the_note_of_a_run_is_whole_or_the_earlier_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, ["a.yaml"])
    folder.begin()
    before = (tmp_path / "run.json").read_text()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.end()
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize("below", ["", "/below"])
def test_an_output_folder_that_cannot_be_is_named_before_all_else(below, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="output_dir must be a folder that can be written into, got .*file") as error:
        pretrain.run(command(f"{tmp_path}/file{below}"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="output_dir must be a folder .*: File name too long"):
        pretrain.run(command(tmp_path / ("a" * 300)))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    args = SimpleNamespace(
        output_dir=str(tmp_path / "run"), resume_from_checkpoint=None, hub_token=None, disable_tqdm=True
    )
    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as end:
        main(lambda argv: carry_out(argv, args, overwrite=False, make_trainer=full, finish=print))
    assert end.value.code.startswith(f"error: output_dir must have room for the run, got {tmp_path / 'run'}: ")
    assert "No space left on device" in end.value.code


def test_a_prompt_longer_than_the_context_is_cut_from_the_left(command, tmp_path, capsys):
    prompt = "To be, or not to be: that is the question. " * 20 + "The end of Romeo"
    pretrain.run(command(tmp_path / "run", "--sample_prompt", prompt, "--max_steps", "3"))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(printed) == 2
    assert all("end of Romeo" in line for line in printed)


class Hub:
    """Takes what is sent to the hub: a copy of the folder, without what the hub is told to ignore."""

    def __init__(self, folder):
        self.folder, self.uploads = folder, 0

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path, ignore_patterns=(), **kwargs):
        self.uploads += 1
        ignored = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, self.folder / str(self.uploads), ignore=ignored)
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_what_is_pushed_to_the_hub_last_is_what_is_left_here(command, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    options = ["--hub_model_id", "me/model", "--push_to_hub", "--save_strategy", "steps", "--save_steps", "3"]
    pretrain.run(command(tmp_path / "run", *options))
    assert hub.uploads >= 2
    for name in ("README.md", "warmup.json", "trainer_state.json", "model.safetensors"):
        assert (hub.folder / str(hub.uploads) / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert "on the part.txt dataset" in (hub.folder / str(hub.uploads) / "README.md").read_text()


def test_a_token_that_a_run_would_keep_is_refused(command, tmp_path):
    with pytest.raises(ValueError, match="hub_token must be left out, .*: set HF_TOKEN") as error:
        pretrain.run(command(tmp_path / "run", "--hub_token", "of-mine"))
    assert "of-mine" not in str(error.value)
    assert not (tmp_path / "run").exists()
