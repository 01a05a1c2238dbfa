"""Plots of runs, and several runs side by side."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback

from hf_warmup.trainer import WarmupCallback, WarmupTrainingArguments, compare_runs
from hf_warmup.trainer.plots import run_figure, runs_figure

from tiny import DEVICE, GUIDED, OPTIONS, Rates


def train(trainer, **kwargs):
    """The learning rates of warmup by their steps, as they were made, the peak where it ended; and the history."""
    WarmupCallback.attach(trainer)
    trainer.add_callback(rates := Rates())
    trainer.train(**kwargs)
    history, begin = trainer.state.log_history, trainer.state.global_step - len(rates.seen)
    ends = {e["step"]: e["warmup/peak_lr"] for e in history if "warmup/peak_lr" in e}
    last = min(ends, default=trainer.state.global_step)
    made = {step: pytest.approx(lr) for step, lr in enumerate(rates.seen, begin) if step < last}
    return made | ends, history


def points(line):
    return list(zip(*line.get_data(), strict=True))


def drawn(figure):
    """The learning rates that are drawn, and the marks by what the legend calls them."""
    (axes,) = [axes for axes in figure.axes if axes.get_ylabel() == "learning rate"]
    curve, *marks = axes.lines
    return points(curve), {mark.get_label(): points(mark) for mark in marks}


def test_the_plot_has_every_learning_rate_of_warmup_however_seldom_is_logged(make_trainer):
    rates, history = train(make_trainer(**GUIDED, logging_steps=1000))
    curve, marks = drawn(run_figure(history))
    assert curve == list(rates.items())
    assert marks["start (η_init)"] == curve[:1]
    assert marks["end of warmup"] == curve[-1:]
    ((valley, lr),) = marks["valley"]
    assert 0 < valley <= max(rates)
    assert lr == rates[valley - 1]  # it goes no further in that step


def test_behind_warmup_the_plot_has_the_learning_rates_as_they_were_logged(make_trainer):
    rates, history = train(make_trainer(logging_steps=2))
    curve, marks = drawn(run_figure(history))
    assert marks["end of warmup"] == [(6, 3e-3)]
    logged = {e["step"]: e["learning_rate"] for e in history if "learning_rate" in e}
    assert curve == [*rates.items(), (8, logged[8]), (10, logged[10]), (12, logged[12])]


def test_the_critical_learning_rate_is_a_line_or_a_dot_for_each_search(make_trainer):
    _, history = train(make_trainer(learning_rate=1e3, optim="sgd", init_lr="catapult"))
    (critical,) = [e["warmup/critical_lr"] for e in history if "warmup/critical_lr" in e]
    _, marks = drawn(run_figure(history))
    assert {lr for _, lr in marks["critical learning rate (η_c) of step 1"]} == {critical}

    _, history = train(make_trainer(**{**GUIDED, "warmup": "persistent", "ramp_steps": None}))
    searched = [(e["step"], e["warmup/critical_lr"]) for e in history if "warmup/critical_lr" in e]
    assert len(searched) > 1
    assert drawn(run_figure(history))[1]["critical learning rate (η_c)"] == searched


def test_a_run_that_was_resumed_in_its_warmup_is_drawn_whole(make_trainer, tmp_path):
    train(make_trainer(save_strategy="steps", save_steps=4))
    rates, history = train(make_trainer(), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    curve, marks = drawn(run_figure(history))
    logged = {e["step"]: e["learning_rate"] for e in history if "learning_rate" in e}
    assert min(rates) == 4
    assert curve == [(step, rates.get(step, logged[step])) for step in range(1, 13)]
    assert marks["start (η_init)"] == [(0, pytest.approx(3e-4))]


def test_a_run_that_stops_in_its_warmup_is_drawn_as_far_as_it_came(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = make_trainer(logging_steps=1000)
    trainer.add_callback(Stop())
    rates, history = train(trainer)
    curve, marks = drawn(run_figure(history))
    assert curve == list(rates.items())
    assert set(marks) == {"start (η_init)"}


def test_a_long_warmup_is_drawn_from_start_to_end_of_some_hundred_points(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device=DEVICE))

        def forward(self, x):
            return {"loss": ((self.weight - x) ** 2).sum()}

    options = {**OPTIONS, "logging_strategy": "no", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    args = WarmupTrainingArguments(
        tmp_path, max_steps=900, warmup_steps=900, learning_rate=0.1, init_lr="1e-5", **options
    )
    rates, history = train(Trainer(Plain(), args, train_dataset=[{"x": torch.zeros(1)}] * 8))
    curve, _ = drawn(run_figure(history))
    assert 100 < len(curve) <= 400
    assert (curve[0][0], curve[-1][0]) == (0, pytest.approx(899, abs=4))
    assert curve == [(step, rates[step]) for step, _ in curve]


def test_a_history_without_our_warmup_is_drawn_without_marks():
    curve, marks = drawn(run_figure([{"step": 1, "learning_rate": 0.1, "loss": 2.0}], title="a $b"))
    assert (curve, marks) == ([(1, 0.1)], {})
    figure = run_figure([])
    assert not any(axes.lines for axes in figure.axes)


def rising(peak, losses=(4.0, 3.0)):
    history = [{"step": i + 1, "loss": loss, "learning_rate": peak * (i + 1) / 2} for i, loss in enumerate(losses)]
    return [*history, {"step": 2, "eval_loss": 3.5}]


def test_runs_are_told_apart_by_dashes_too_and_named_above():
    figure = runs_figure({name: rising(0.1) for name in "abcd"})
    upper, lower = figure.axes
    assert len({line.get_linestyle() for line in upper.lines}) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("abcd")
    for name, line in zip("abcd", upper.lines, strict=True):
        both = [other for other in lower.lines if other.get_color() == line.get_color()]
        assert [other.get_linestyle() for other in both] == [line.get_linestyle()] * 2, name


@pytest.mark.parametrize(
    ("peaks", "losses", "scales"),
    [
        ([0.1, 0.9], (4.0, 3.0), ("linear", "linear")),
        ([0.1, 1.1], (4.0, 3.0), ("log", "linear")),
        ([0.1, 0.0], (4.0, 3.0), ("linear", "linear")),  # no logarithm
        ([0.1, 0.2], (4.0, 500.0), ("linear", "log")),
        ([0.1, 0.2], (4.0, math.nan), ("linear", "linear")),
    ],
)
def test_learning_rates_ten_times_apart_and_a_loss_that_diverged_are_on_a_log_scale(peaks, losses, scales):
    upper, lower = runs_figure({str(peak): rising(peak, losses) for peak in peaks}).axes
    assert (upper.get_yscale(), lower.get_yscale()) == scales


def cells_of(compared):
    """The rows of the table by their runs, each by its columns."""
    lines = compared.table.splitlines()
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    assert header == [
        *("run", "optimizer", "β2", "batch", "seed", "warmup", "learning_rate", "highest"),
        *("warmup steps", "steps", "final loss"),
    ]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture
def runs(make_trainer, tmp_path):
    """A run of a plain Trainer, and two of ours; and their final losses."""
    losses = {}
    every = {"eval_strategy": "steps", "eval_steps": 6, "seed": 3}
    for name, options in {
        "plain": {},
        "linear": {"gi_adam": True, "adam_beta2": 0.8},
        "guided": {**GUIDED, "auto_lr": True},
    }.items():
        trainer = make_trainer(output_dir=str(tmp_path / name), **options, **every)
        if name != "plain":
            WarmupCallback.attach(trainer)
        trainer.train()
        if name == "plain":
            trainer.save_state()
        losses[name] = f"{[e['eval_loss'] for e in trainer.state.log_history if 'eval_loss' in e][-1]:.4f}"
    return losses


def test_runs_of_ours_and_of_a_plain_trainer_are_compared(runs, tmp_path):
    assert {path.name for path in (tmp_path / "linear").iterdir()} == {"warmup.json"}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"trainer_state.json"}
    compared = compare_runs([tmp_path / name for name in runs])
    shown = cells_of(compared)
    assert {name: row["final loss"] for name, row in shown.items()} == runs
    assert shown["plain"] == {
        **dict.fromkeys(("optimizer", "β2", "batch", "seed", "learning_rate", "warmup steps"), ""),
        **{"warmup": "the Trainer's own", "highest": "0.003", "steps": "12", "final loss": runs["plain"]},
    }
    assert shown["linear"] == {
        **{"optimizer": "GIAdamW", "β2": "0.8", "batch": "8", "seed": "3", "warmup": "linear"},
        **{"learning_rate": "0.003", "highest": "0.003", "warmup steps": "6", "steps": "12"},
        "final loss": runs["linear"],
    }
    report = json.loads((tmp_path / "guided" / "warmup.json").read_text())
    assert shown["guided"]["learning_rate"] == "found by the run (auto_lr)"
    assert shown["guided"]["highest"] == f"{report['peak_lr']:.3g}"
    assert shown["guided"]["warmup steps"] == str(report["warmup_steps_taken"])
    assert [line.get_label() for line in compared.figure.axes[0].lines] == list(runs)
    assert str(compared) == compared.table


def test_a_comparison_is_saved_with_its_plot(runs, tmp_path):
    compared = compare_runs([tmp_path / name for name in runs])
    compared.save(tmp_path / "new" / "report")
    assert compared.table in (tmp_path / "new" / "report" / "comparison.md").read_text()
    with Image.open(tmp_path / "new" / "report" / "comparison.png") as plot:
        assert plot.size == (840, 720)


def test_a_history_is_the_newest_that_there_is(runs, tmp_path):
    folder = tmp_path / "linear"
    state = {"log_history": [{"step": 1, "learning_rate": 7.0}], "global_step": 9}
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "trainer_state.json").write_text(json.dumps(state))
    assert max(line.get_ydata().max() for line in compare_runs([folder]).figure.axes[0].lines) < 1
    shutil.copy(folder / "checkpoint-9" / "trainer_state.json", folder)
    assert compare_runs([folder]).figure.axes[0].lines[0].get_ydata().max() == 7.0
    # A run that was cut off has its checkpoints alone.
    (tmp_path / "cut").mkdir()
    shutil.move(folder / "checkpoint-9", tmp_path / "cut" / "checkpoint-9")
    state["log_history"][0]["learning_rate"], state["global_step"] = 8.0, 10
    (tmp_path / "cut" / "checkpoint-best").mkdir()  # as a user has named it
    (tmp_path / "cut" / "checkpoint-best" / "trainer_state.json").write_text(json.dumps(state))
    assert cells_of(compare_runs([tmp_path / "cut"]))["cut"]["highest"] == "8"


def test_a_report_of_another_version_is_read(runs, tmp_path):
    path = tmp_path / "linear" / "warmup.json"
    table = compare_runs([path.parent]).table
    report = json.loads(path.read_text())
    newer = {"auto_lr", "smallest_target_lr", "bearable", "max_steps"}  # than the first version
    path.write_text(json.dumps({k: v for k, v in report.items() if k not in newer} | {"initial_eval_loss": 1.0}))
    assert compare_runs([path.parent]).table == table


def test_runs_are_named_by_what_tells_their_folders_apart(tmp_path):
    folders = [tmp_path / first / "run" for first in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    assert list(cells_of(compare_runs(folders))) == ["a/run", "b/run"]
    assert list(cells_of(compare_runs(folders[:1]))) == ["run"]


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dirs must be folders of runs, got .*nothing: it has no log history"):
        compare_runs([tmp_path / "nothing"])
    (tmp_path / "warmup.json").write_text("{}")  # as before it had the history
    with pytest.raises(ValueError, match="it has no log history, in warmup.json, trainer_state.json or a checkpoint"):
        compare_runs([tmp_path])
    with pytest.raises(ValueError, match="dirs must name at least one run's folder"):
        compare_runs([])
    with pytest.raises(ValueError, match="dirs must be a list of folders, got 'runs/a'"):
        compare_runs("runs/a")
    (tmp_path / "warmup.json").write_text('{"log_hist')
    with pytest.raises(ValueError, match="got .*warmup.json, which cannot be read"):
        compare_runs([tmp_path])
