"""What cannot work is refused in a line that names it, before any trial; what can becomes Python's own."""

import copy
import json
import math
import re
from decimal import Decimal
from enum import Enum
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import (
    Adafactor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.optimization import AdafactorSchedule

from hf_warmup.trainer import WarmupArguments, WarmupCallback

from tiny import make_model, start_of


def learning_rates(trainer):
    return [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]


def train(trainer, arguments=None, **kwargs):
    WarmupCallback.attach(trainer, arguments)
    set_seed(1)
    trainer.train(**kwargs)
    return trainer


class Word(str, Enum):
    GUIDED = "guided"


TAKEN = [
    ("max_init_fraction", np.float64(0.5), 0.5),
    ("max_init_fraction", np.float16(0.5), 0.5),
    ("catapult_delta", np.float32(0.5), 0.5),
    ("catapult_delta", Fraction(1, 2), 0.5),
    ("warmup_growth", Decimal("1.5"), 1.5),
    ("critical_lr_rtol", torch.tensor(0.5), 0.5),
    ("catapult_delta", 1, 1.0),
    ("sharpness_every", np.int64(3), 3),
    ("search_batches", torch.tensor(3), 3),
    ("gi_adam", np.bool_(True), True),
    ("search_copy_on_cpu", torch.tensor(True), True),
    ("init_lr", np.float32(0.5), 0.5),
    ("init_lr", torch.tensor(0.5), 0.5),
    ("init_lr", Decimal("0.5"), 0.5),
    ("init_lr", "0.5", "0.5"),
    ("init_lr", np.str_("zero"), "zero"),
    ("warmup", Word.GUIDED, "guided"),
]


@pytest.mark.parametrize(("name", "given", "expected"), TAKEN, ids=str)
def test_numbers_and_words_of_other_libraries_become_pythons(name, given, expected):
    taken = getattr(WarmupArguments(**{name: given}), name)
    assert taken == expected
    assert type(taken) is type(expected)


FLOATS = ["warmup_growth", "max_init_fraction", "catapult_delta", "critical_lr_rtol"]
INTS = ["search_batches", "sharpness_every"]
BOOLEANS = ["gi_adam", "auto_lr", "search_copy_on_cpu"]
WORDS = ["warmup", "critical_lr_method", "sharpness_kind", "init_lr"]
ARRAYS = [np.array([0.5, 0.5]), np.array(0.5), torch.ones(2), [0.5], {}, b"0.5", object()]
BAD = {
    **{name: [True, "0.5", 10**400, 10**5000, math.nan, math.inf, -1.0, 1j, *ARRAYS] for name in FLOATS},
    **{name: [True, "3", 1.5, 10**400, -(10**400), -1, math.nan, None, *ARRAYS] for name in INTS},
    **{name: ["no", "", "False", 0, 1, None, *ARRAYS] for name in BOOLEANS},
    **{name: [True, None, "", "nope", *ARRAYS] for name in WORDS},
}
BAD["init_lr"] += ["1_0", "٣", "inf", "nan", "0", "-1", 0.0, 10**400, Decimal("sNaN"), math.nan, 1j]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_value_of_an_option_is_refused_in_one_line(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name} must be .*got .") as error:
            WarmupArguments(**{name: value})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 220


@pytest.mark.parametrize("init_lr", ["catapult", "zero", "1e-4"])
@pytest.mark.parametrize("learning_rate", [math.inf, math.nan, -1.0])
def test_a_learning_rate_that_is_none_is_refused_whatever_it_starts_with(make_trainer, init_lr, learning_rate):
    with pytest.raises(ValueError, match=r"^learning_rate must be positive and finite, got "):
        WarmupCallback.attach(make_trainer(learning_rate=learning_rate, init_lr=init_lr))


SWEPT = [
    {"max_init_fraction": np.float64(0.1)},
    {"init_lr": torch.tensor(1e-4)},
    {"learning_rate": np.float64(3e-3)},
    {"warmup": "guided", "warmup_steps": 0, "learning_rate": np.float32(0.5), "auto_lr": np.bool_(True), "vocab": 5},
    {"warmup": "exponential", "warmup_steps": 0, "warmup_growth": np.float64(1.5)},
]


@pytest.mark.parametrize("options", SWEPT, ids=str)
def test_a_run_with_numbers_of_a_sweep_can_be_saved_and_resumed(make_trainer, tmp_path, options):
    options = {**options, "save_strategy": "steps", "save_steps": 4}
    whole = train(make_trainer(**options))
    resumed = train(make_trainer(**options), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert learning_rates(resumed) == learning_rates(whole)
    assert json.loads((tmp_path / "run" / "warmup.json").read_text())


LINEAR, GUIDED = {"warmup_steps": 6}, {"warmup_steps": 0, "warmup": "guided"}
EXPONENTIAL, PERSISTENT = {"warmup_steps": 0, "warmup": "exponential"}, {"warmup_steps": 0, "warmup": "persistent"}
BROKEN = [
    (LINEAR, "init_fraction", [math.nan, -1.0, 0.0, math.inf, 7.0, "x"]),
    (LINEAR, "first_step", [10**9, -1, 0.5, None]),
    (EXPONENTIAL, "growth", [math.nan, 1.0, -2.0, math.inf]),
    (GUIDED, "fraction", [math.nan, -1.0, math.inf]),
    (GUIDED, "ramp_end", [10**9, -5, 1.5]),
    (GUIDED, "controller", [{}, [], {"lr": 1.0}]),
    (GUIDED, "lr", [math.nan, -1.0, math.inf, None]),
    (GUIDED, "num_steps", [-1, 1.5, math.nan]),
    (GUIDED, "slopes", [["x"], 3.0, [1.0] * 100]),
    (GUIDED, "ended_by", ["turn", 3]),
    (PERSISTENT, "loss", [math.nan, None]),
    (PERSISTENT, "num_searches", [-1]),
]


@pytest.mark.parametrize(("mode", "name", "values"), BROKEN, ids=lambda x: x if isinstance(x, str) else "")
def test_numbers_of_a_checkpoint_that_no_run_left_are_refused(make_trainer, tmp_path, mode, name, values):
    options = {**mode, "save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    train(make_trainer(**options))
    path = tmp_path / "run" / "checkpoint-4" / "scheduler.pt"
    saved = torch.load(path)
    for value in values:
        broken = copy.deepcopy(saved)
        factors = [f for f in broken["lr_lambdas"] if f]
        for factor in factors:
            holder = factor if name in factor else factor["controller"]
            assert name in holder
            holder[name] = value
        torch.save(broken, path)
        trainer = make_trainer(**options)
        named = "with num_training_steps" if name == "controller" and isinstance(value, dict) else f"{name} must be "
        with pytest.raises(
            ValueError, match=rf"^scheduler\.pt of the checkpoint holds .*{named}.*earlier checkpoint$"
        ):
            train(trainer, resume_from_checkpoint=str(path.parent))
        assert trainer.state.global_step == 4


CHANGED = [
    (
        LINEAR,
        {"init_lr": "1e-5"},
        "init_lr was catapult in the checkpoint, and is 1e-05 now: warmup has started",
        True,
    ),
    (LINEAR, {"max_init_fraction": 0.5}, "max_init_fraction was 0.1 .* is 0.5 now: warmup has started", True),
    (EXPONENTIAL, {"warmup_growth": 2.0}, "warmup_growth was 1.05 .* is 2.0 now: warmup has started", True),
    (PERSISTENT, {"catapult_delta": 0.5}, "catapult_delta was 0.1 .* is 0.5 now: the run goes on", None),
]


@pytest.mark.parametrize(("mode", "change", "message", "same"), CHANGED, ids=str)
def test_an_option_that_is_another_on_resume_is_said(make_trainer, tmp_path, caplog, mode, change, message, same):
    options = {**mode, "save_strategy": "steps", "save_steps": 4}
    whole = train(make_trainer(**options))
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    train(make_trainer(**options), resume_from_checkpoint=checkpoint)
    assert "in the checkpoint, and is" not in caplog.text
    changed = train(make_trainer(**options | change), resume_from_checkpoint=checkpoint)
    (said,) = [r.getMessage() for r in caplog.records if "in the checkpoint, and is" in r.getMessage()]
    assert re.search(message, said)
    if same is not None:
        assert (learning_rates(changed) == learning_rates(whole)) == same


class LBFGS(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.LBFGS(self.model.parameters())
        return self.optimizer


def adafactor(**options):
    def make(make_trainer, **run):
        model = make_model()
        optimizer = Adafactor(model.parameters(), **options)
        schedule = AdafactorSchedule(optimizer) if options["relative_step"] else None
        return make_trainer(model=model, trainer_kwargs={"optimizers": (optimizer, schedule)}, **run)

    return make


MEANINGLESS = [
    (lambda make, **run: make(LBFGS, **run), "must make its step without a closure, got LBFGS"),
    (adafactor(relative_step=True, warmup_init=True, lr=None), "relative_step must be False in Adafactor, got True"),
    (adafactor(relative_step=False, lr=None), "lr must be a number in Adafactor, got None"),
]


@pytest.mark.parametrize(("make", "message"), MEANINGLESS, ids=["closure", "relative step", "no rate"])
@pytest.mark.parametrize("mode", [LINEAR, GUIDED, {"warmup_steps": 6, "init_lr": "1e-4"}], ids=str)
def test_an_optimizer_that_no_schedule_reaches_is_refused(make_trainer, make, message, mode):
    trainer = make(make_trainer, **mode)
    with pytest.raises(ValueError, match=message):
        train(trainer)
    assert trainer.state.global_step == 0


def test_an_optimizer_without_a_learning_rate_to_reach_is_refused(make_trainer):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = make_trainer(model=model, trainer_kwargs={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="the optimizer's learning rate must be positive and finite, got 0"):
        train(trainer)


def own_schedule(make_trainer, **run):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 6, 12)
    return make_trainer(model=model, trainer_kwargs={"optimizers": (optimizer, schedule)}, **run)


def test_a_schedule_with_a_warmup_of_its_own_is_started_or_kept_as_it_is(make_trainer, caplog):
    started = train(own_schedule(make_trainer, warmup_steps=6))
    assert learning_rates(started)[0] == pytest.approx(3e-4)
    kept = train(own_schedule(make_trainer, warmup_steps=0))
    assert learning_rates(kept)[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert "schedule is kept as it is, with the warmup that it has: for init_lr=catapult" in caplog.text
    with pytest.raises(ValueError, match="warmup_steps has to be the length of its warmup"):
        train(own_schedule(make_trainer, warmup_steps=4))
    with pytest.raises(ValueError, match="needs one without a warmup of its own"):
        train(own_schedule(make_trainer, **GUIDED))


def test_a_create_scheduler_that_returns_nothing_warms_up(make_trainer):
    class Cosine(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 6, num_training_steps)

    trainer = train(make_trainer(Cosine))
    assert learning_rates(trainer)[0] == start_of(trainer)["warmup/init_lr"] == pytest.approx(3e-4)


@pytest.mark.parametrize("mode", [LINEAR, GUIDED, {"warmup_steps": 6, "gi_adam": True}], ids=str)
def test_a_deep_copy_of_a_trainer_warms_up_and_leaves_the_other_alone(make_trainer, mode):
    plain = train(make_trainer(**mode))
    trainer = make_trainer(**mode)
    WarmupCallback.attach(trainer)
    for one in (copy.deepcopy(trainer), trainer):
        set_seed(1)
        one.train()
        assert learning_rates(one) == learning_rates(plain)
        assert all(map(torch.equal, one.model.parameters(), plain.model.parameters()))


def test_a_shallow_copy_of_a_trainer_is_refused(make_trainer):
    trainer = make_trainer(args_cls=TrainingArguments)
    WarmupCallback.attach(trainer)
    with pytest.raises(ValueError, match="got a copy, .*deepcopy"):
        copy.copy(trainer).train()


def said(caplog, words):
    return [record.message for record in caplog.records if words in record.message]


def test_gradients_that_are_all_zero_are_said_once(make_trainer, caplog):
    class Flat(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 0.0

    train(make_trainer(Flat, warmup="guided", warmup_steps=0))
    (line,) = said(caplog, "all zero")
    assert line.startswith("the gradients of step 1 are all zero: no learning rate can be tried there")


def test_gradients_that_become_nan_under_guided_warmup_are_said_once(make_trainer, caplog):
    class Breaks(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * (float("nan") if self.state.global_step > 2 else 1.0)

    train(make_trainer(Breaks, warmup="guided", warmup_steps=0, learning_rate=1.0, vocab=5))
    (line,) = said(caplog, "not finite")
    assert line.startswith("the gradients of step 4 are not finite: no learning rate can be tried there")


def test_a_callback_that_sets_the_learning_rate_during_the_ramp_is_told_once(make_trainer, caplog):
    class Own(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-5

    trainer = make_trainer(warmup="guided", warmup_steps=0)
    trainer.add_callback(Own())
    train(trainer)
    (line,) = said(caplog, "something else")
    assert "has set the learning rate of step 1 to 1e-05" in line
    assert "set init_lr=zero" in line
