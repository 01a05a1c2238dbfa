"""What a run says on the console, what goes to the trackers, and what is a warning."""

import logging
import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from hf_warmup.trainer import WarmupCallback, warmup_report

from tiny import GUIDED, make_model, start_of


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def train(trainer, **kwargs):
    WarmupCallback.attach(trainer)
    trainer.train(**kwargs)
    return trainer


def blocks(capsys):
    """The blocks on the console: the first line, and the rows by their word."""
    found = re.findall(r"^hf-warmup: (.*)\n((?:  .*\n)*)", capsys.readouterr().out, re.MULTILINE)
    return [(title, dict(re.findall(r"^  (.+?)  +(.+)$", rows, re.MULTILINE))) for title, rows in found]


def test_linear_warmup_says_where_it_starts_and_what_it_cost(make_trainer, capsys):
    trainer = train(make_trainer())
    (title, will), (after, did) = blocks(capsys)
    assert (title, after) == ("linear warmup", "what linear warmup did")
    assert will == {
        "optimizer": "AdamW, as it is",
        "from": "the critical learning rate of the first step, at most 0.0003",
        "to": "0.003, over 6 steps",
        "then": "linear, in the steps left",
    }
    assert did == {
        "optimizer": "AdamW",
        "critical lr": "above 0.003: the loss does not rise up to learning_rate",
        "started at": "0.0003",
        "warmup ended": "after 6 of 12 steps, at 0.003 (learning_rate)",
        "cost": "1 forward pass",
        "next time": "the same, or without warmup_steps, where the run finds how long warmup takes",
        "written to": f"{trainer.args.output_dir}/warmup.json",
    }


def test_a_critical_learning_rate_and_a_start_by_hand_are_told_apart(make_trainer, capsys):
    trainer = train(make_trainer(learning_rate=1e3, optim="sgd", init_lr="catapult"))
    start = start_of(trainer)
    (_, will), (_, did) = blocks(capsys)
    assert (will["optimizer"], will["from"]) == ("SGD, as it is", "the critical learning rate of the first step")
    assert did["critical lr"] == did["started at"] == f"{start['warmup/critical_lr']:.3g}"
    assert did["cost"] == f"{start['warmup/forward_passes']:.0f} forward passes"

    train(make_trainer(init_lr="1e-5"))
    (_, will), (_, did) = blocks(capsys)
    assert (will["from"], did["started at"], did["cost"]) == ("1e-05", "1e-05", "no forward passes")
    assert did["next time"] == "the same"
    assert "critical lr" not in did


class MadeByASubclass(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: min(1.0, t / 6))
        return self.lr_scheduler


@pytest.mark.parametrize("cls", [Trainer, MadeByASubclass])
def test_a_schedule_of_the_users_own_is_not_called_lr_scheduler_type(make_trainer, capsys, cls):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 6))
    given = {"trainer_kwargs": {"optimizers": (optimizer, schedule)}} if cls is Trainer else {}
    trainer = make_trainer(cls, model=model, lr_scheduler_type="cosine", **given)
    train(trainer)
    trainer.train()
    for title, said in blocks(capsys):
        assert title.startswith("what") or said["then"] == "your own schedule, in the steps left"


def test_a_schedule_of_the_trainers_is_named_in_every_run(make_trainer, capsys):
    trainer = train(make_trainer(lr_scheduler_type="cosine"))
    trainer.train()
    assert [said["then"] for _, said in blocks(capsys) if "then" in said] == ["cosine, in the steps left"] * 2


def test_guided_warmup_says_its_bound_where_it_ended_and_why(make_trainer, capsys):
    report = warmup_report(train(make_trainer(**GUIDED)))
    (title, will), (after, did) = blocks(capsys)
    assert (title, after) == ("guided warmup", "what guided warmup did")
    assert will["to"] == "10 (learning_rate) or less"
    # ramp_steps, and half of them.
    assert will["steps"] == "about 9 until the first descent of the loss is over, at most 20 of 40"
    valley, peak = report.valley_lr, report.peak_lr
    assert did["valley"] == f"at {valley:.3g}, where the first descent was over"
    why = f"told by the first descent, which was over at {valley:.3g}"
    assert did["warmup ended"] == f"after {report.warmup_steps_taken} of 40 steps, at {peak:.3g} ({why})"
    assert did["cost"].startswith("no forward passes; one more optimizer step, on copies, in each step")
    assert did["next time"] == f"the same: a learning_rate above {peak:.2g} changes nothing"
    assert report.bearable is None


def test_auto_lr_says_that_nothing_bounds_it_and_which_learning_rate_it_found(make_trainer, capsys):
    report = warmup_report(train(make_trainer(**GUIDED, auto_lr=True)))
    (_, will), (_, did) = blocks(capsys)
    assert will["to"] == "whatever the run finds: auto_lr"
    assert did["next time"] == f"the same; or learning_rate={report.peak_lr:.2g}, which is what this run found"


@pytest.mark.parametrize("learning_rate", [3e-3, 1e-3])
def test_a_learning_rate_less_than_a_third_of_what_training_bears_is_said_to_be_one(
    make_trainer, capsys, learning_rate
):
    trainer = train(make_trainer(**{**GUIDED, "learning_rate": learning_rate}))
    (expected,) = [e["warmup/expected_peak_lr"] for e in trainer.state.log_history if "warmup/expected_peak_lr" in e]
    report = warmup_report(trainer)
    assert report.ended_by == "learning_rate"
    assert report.bearable == pytest.approx(expected / learning_rate)
    assert (report.bearable >= 3) == (learning_rate == 1e-3)
    _, (_, did) = blocks(capsys)
    assert did["warmup ended"].endswith(f"of 40 steps, at {learning_rate:.3g} (learning_rate)")
    more = f"from scratch a learning_rate up to {report.bearable:.2g} times as large, or auto_lr; to fine-tune, "
    assert did["next time"] == more * (report.bearable >= 3) + "the same"


def test_guided_warmup_that_comes_to_half_of_the_run_asks_for_more_steps(make_trainer, capsys):
    report = warmup_report(train(make_trainer(**{**GUIDED, "max_steps": 12}, auto_lr=True)))
    _, (_, did) = blocks(capsys)
    assert report.ended_by == "half of the run"
    assert did["warmup ended"] == f"after 6 of 12 steps, at {report.peak_lr:.3g} (at half of the run)"
    assert did["next time"] == "more steps: half of the run was not enough for its warmup"


def test_persistent_warmup_says_what_its_searches_cost(make_trainer, capsys):
    trainer = train(make_trainer(warmup="persistent", warmup_steps=0, max_steps=20))
    (title, will), (after, did) = blocks(capsys)
    assert (title, after) == ("persistent warmup", "what persistent warmup did")
    assert will["to"] == "0.003, from one critical learning rate to the next"
    assert did["cost"] == f"{warmup_report(trainer).forward_passes:.0f} forward passes"


def test_gi_adam_is_named_with_its_built_in_warmup(make_trainer, capsys):
    train(make_trainer(gi_adam=True, adam_beta2=0.8))
    (_, will), (_, did) = blocks(capsys)
    assert will["optimizer"] == "GIAdamW, in AdamW's place (gi_adam)"
    # √(1 - .8^8) = .912, √(1 - .8^7) = .889.
    assert did["optimizer"] == (
        "GIAdamW, v_0 = g_0²: a built-in warmup to 0.9 of the step length over 8 steps at β2 = 0.8"
    )


def test_a_resumed_run_says_so_while_its_warmup_goes_on(make_trainer, tmp_path, capsys):
    train(make_trainer(save_strategy="steps", save_steps=4))
    capsys.readouterr()
    train(make_trainer(), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    (_, will), (_, did) = blocks(capsys)
    assert will["resumed"] == "after 4 steps of warmup, and goes on exactly"
    assert did["warmup ended"] == "after 6 of 12 steps, at 0.003 (learning_rate)"
    train(make_trainer(), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    ((title, did),) = blocks(capsys)
    assert title == "what linear warmup did"
    assert did["started at"] == "0.0003"


@pytest.mark.parametrize("options", [{}, GUIDED])
def test_a_run_that_stops_in_its_warmup_says_so(make_trainer, capsys, options):
    trainer = make_trainer(**options)
    trainer.add_callback(Stop(3))
    train(trainer)
    _, (_, did) = blocks(capsys)
    assert did["warmup ended"] == f"not before the run, which stopped after 3 of {trainer.args.max_steps} steps"
    assert did["next time"] == "the same, to its end"


def test_what_is_written_nowhere_is_not_said_to_be(make_trainer, capsys):
    train(make_trainer(warmup_card=False))
    _, (_, did) = blocks(capsys)
    assert "written to" not in did


@pytest.mark.parametrize("options", [{"warmup": "none"}, {"log_level": "error"}])
def test_a_run_without_our_warmup_or_that_logs_errors_only_is_silent(make_trainer, capsys, options):
    train(make_trainer(**options))
    assert not blocks(capsys)


def test_only_the_first_process_speaks(make_trainer, capsys):
    class Second(Trainer):
        def is_world_process_zero(self):
            return False

    train(make_trainer(Second))
    assert not blocks(capsys)


class Tracker(TrainerCallback):
    """As the callbacks of TensorBoard and W&B."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.update(logs)


@pytest.mark.parametrize("disable_tqdm", [True, False])  # PrinterCallback and ProgressCallback
@pytest.mark.parametrize(("options", "found"), [({}, "steps_saved"), (GUIDED, "valley_lr")])
def test_measurements_go_to_trackers_and_not_to_the_console(make_trainer, capsys, disable_tqdm, options, found):
    trainer = make_trainer(disable_tqdm=disable_tqdm, **options)
    trainer.add_callback(tracker := Tracker())
    before = list(trainer.callback_handler.callbacks)
    train(trainer)
    history = {k: v for e in trainer.state.log_history for k, v in e.items()}
    for name in ("warmup/init_lr", "warmup/target_lr", "warmup/peak_lr", f"warmup/{found}"):
        assert tracker.seen[name] == history[name]
    assert all(isinstance(value, int | float) for name, value in tracker.seen.items())
    console = capsys.readouterr()
    assert "learning_rate" in console.out
    assert "warmup/" not in console.out + console.err
    assert [one for one in trainer.callback_handler.callbacks if one in before] == before


class LogsAll(TrainerCallback):
    """Asks for a line of every step, before it is made."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        control.should_log = True


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["linear", "guided"])
def test_measurements_take_no_line_of_the_trainers_own(make_trainer, options):
    trainer = make_trainer(**options | {"logging_steps": 1000})
    trainer.add_callback(LogsAll())
    train(trainer)
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == list(range(1, trainer.state.max_steps + 1))


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("hf_warmup") and r.levelno == logging.WARNING]


def test_gi_adam_whose_built_in_warmup_is_longer_than_the_run_is_a_warning_with_advice(make_trainer, caplog):
    # √(1 - .999^1660) = .9001; 60 steps are a quarter.
    train(make_trainer(gi_adam=True, max_steps=60))
    (warning,) = warnings_of(caplog)
    mean = sum(math.sqrt(1 - 0.999**t) for t in range(1, 61)) / 60
    assert "built-in warmup takes 1660 steps at adam_beta2=0.999, and the run has 60" in warning
    assert f"its steps are {mean:.2g} of AdamW's on the mean" in warning
    caplog.clear()
    advised = float(re.search(r"Set adam_beta2 to (\S+) or less", warning)[1])
    train(make_trainer(gi_adam=True, max_steps=60, adam_beta2=advised))
    assert not warnings_of(caplog)


def test_of_a_run_of_a_few_steps_no_beta2_is_advised(make_trainer, caplog):
    train(make_trainer(gi_adam=True))
    assert warnings_of(caplog) == [
        "GI-Adam's built-in warmup takes 1660 steps at adam_beta2=0.999, and the run has 12"
    ]


def from_scratch(tmp_path):
    return make_model()


def from_a_folder(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "base")


def with_an_adapter(tmp_path):
    return get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


# transformers 5.24 renamed what peft 0.21 calls.
@pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "named"), [(from_scratch, None), (from_a_folder, "base"), (with_an_adapter, "PEFT")])
def test_auto_lr_on_a_model_that_has_been_trained_is_a_warning(make_trainer, tmp_path, caplog, make, named):
    WarmupCallback.attach(make_trainer(model=make(tmp_path), **GUIDED, auto_lr=True))
    found = [text for text in warnings_of(caplog) if "auto_lr is for training from scratch" in text]
    assert len(found) == (named is not None)
    assert all(f"{named}: the learning rate that it finds may undo" in text for text in found)
    caplog.clear()
    WarmupCallback.attach(make_trainer(model=make(tmp_path), **GUIDED))
    assert not warnings_of(caplog)
