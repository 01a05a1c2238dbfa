"""What cannot work is refused in a line that names it, before any trial; what can becomes Python's own."""

import copy
import json
import math
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
    ("ramp_steps", np.float64(0.5), 0.5),
    ("ramp_steps", np.float16(0.5), 0.5),
    ("ramp_steps", np.float32(0.5), 0.5),
    ("ramp_steps", Fraction(1, 2), 0.5),
    ("ramp_steps", Decimal("1.5"), 1.5),
    ("ramp_steps", torch.tensor(0.5), 0.5),
    ("ramp_steps", 1, 1.0),
    ("ramp_steps", np.int64(3), 3.0),
    ("ramp_steps", torch.tensor(3), 3.0),
    ("ramp_steps", None, None),
    ("gi_adam", np.bool_(True), True),
    ("warmup_card", torch.tensor(False), False),
    ("init_lr", np.float32(0.5), 0.5),
    ("init_lr", torch.tensor(0.5), 0.5),
    ("init_lr", Decimal("0.5"), 0.5),
    ("init_lr", "0.5", "0.5"),
    ("init_lr", np.str_("catapult"), "catapult"),
    ("warmup", Word.GUIDED, "guided"),
]


@pytest.mark.parametrize(("name", "given", "expected"), TAKEN, ids=str)
def test_numbers_and_words_of_other_libraries_become_pythons(name, given, expected):
    taken = getattr(WarmupArguments(**{name: given}), name)
    assert taken == expected
    assert type(taken) is type(expected)


BOOLEANS = ["gi_adam", "auto_lr", "warmup_card"]
WORDS = ["warmup", "init_lr"]
ARRAYS = [np.array([0.5, 0.5]), np.array(0.5), torch.ones(2), [0.5], {}, b"0.5", object()]
BAD = {
    "ramp_steps": [True, "0.5", 10**400, 10**5000, math.nan, math.inf, -1.0, 0, 1j, *ARRAYS],
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


@pytest.mark.parametrize("mode", [{"init_lr": "catapult"}, {"init_lr": "1e-4"}, {"warmup": "none"}], ids=str)
@pytest.mark.parametrize("learning_rate", [math.inf, math.nan, -1.0])
def test_a_learning_rate_that_is_none_is_refused_whatever_the_warmup(make_trainer, mode, learning_rate):
    with pytest.raises(ValueError, match=r"^learning_rate must be positive and finite, got "):
        WarmupCallback.attach(make_trainer(learning_rate=learning_rate, **mode))


SWEPT = [
    {"init_lr": torch.tensor(1e-4)},
    {"learning_rate": np.float64(3e-3)},
    {"warmup": "guided", "warmup_steps": 0, "learning_rate": np.float32(0.5), "auto_lr": np.bool_(True), "vocab": 5},
    {"warmup": "guided", "warmup_steps": 0, "ramp_steps": np.float64(3)},
]


@pytest.mark.parametrize("options", SWEPT, ids=str)
def test_a_run_with_numbers_of_a_sweep_can_be_saved_and_resumed(make_trainer, tmp_path, options):
    options = {**options, "save_strategy": "steps", "save_steps": 4}
    whole = train(make_trainer(**options))
    resumed = train(make_trainer(**options), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert learning_rates(resumed) == learning_rates(whole)
    assert json.loads((tmp_path / "run" / "warmup.json").read_text())


LINEAR, GUIDED = {"warmup_steps": 6}, {"warmup_steps": 0, "warmup": "guided"}
PERSISTENT = {"warmup_steps": 0, "warmup": "persistent"}
BROKEN = [
    (LINEAR, "first_step", [10**9, -1, 0.5, None]),
    (LINEAR, "fraction", [math.nan, -1.0, math.inf, "x"]),
    (LINEAR, "init_lr", [math.nan, -1.0, 0.0, math.inf, "x", None]),
    (LINEAR, "warmup_steps", [0, 1.5]),
    (GUIDED, "fraction", [math.nan, -1.0, math.inf]),
    (GUIDED, "ramp_end", [10**9, -5, "x"]),
    (GUIDED, "rule", [{}, [], {"lr": 1.0}]),
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
            holder = factor if name in factor else factor["rule"]
            assert name in holder
            holder[name] = value
        torch.save(broken, path)
        trainer = make_trainer(**options)
        named = "with num_training_steps" if name == "rule" and isinstance(value, dict) else f"{name} must be "
        told = rf"^scheduler\.pt of the checkpoint holds .*{named}.*earlier checkpoint, or with the version of .*$"
        with pytest.raises(ValueError, match=told):
            train(trainer, resume_from_checkpoint=str(path.parent))
        assert trainer.state.global_step == 4


RISING = {**GUIDED, "learning_rate": 10.0, "vocab": 5}  # not at its bound within three steps
AUTO = {**RISING, "auto_lr": True}
CHANGED = [
    (LINEAR, {"init_lr": "1e-5"}, "init_lr must be auto as in the checkpoint, got 1e-05"),
    ({**LINEAR, "init_lr": "1e-5"}, {"init_lr": "catapult"}, "init_lr must be 1e-05 as in the .*, got catapult"),
    (LINEAR, {"warmup_steps": 8}, "warmup_steps must be 6 as in the checkpoint, got 8"),
    (LINEAR, {"max_steps": 20}, "num_training_steps must be 12 as in the checkpoint, got 20"),
    (RISING, {"auto_lr": True}, "auto_lr must be False as in the checkpoint, got True"),
    (AUTO, {"auto_lr": False}, "auto_lr must be True as in the checkpoint, got False"),
    (RISING, {"ramp_steps": 5}, r"ramp_steps must be 4\.0 as in the checkpoint, got 5\.0"),
    (RISING, {"max_steps": 20}, "num_training_steps must be 12 as in the checkpoint, got 20"),
    ({**PERSISTENT, "learning_rate": 10.0}, {"init_lr": "1e-5"}, "init_lr must be 0.0001 as in the .*, got 1e-05"),
    ({**PERSISTENT, "learning_rate": 10.0}, {"max_steps": 20}, "num_training_steps must be 12 as in the .*, got 20"),
]


@pytest.mark.parametrize(("mode", "change", "message"), CHANGED, ids=str)
def test_another_option_on_resume_is_refused_by_name_while_warmup_goes_on_and_not_afterwards(
    make_trainer, tmp_path, mode, change, message
):
    options = {**mode, "save_strategy": "steps", "save_steps": 3}
    whole = train(make_trainer(**options))
    trainer = make_trainer(**options | change)
    with pytest.raises(ValueError, match=message):
        train(trainer, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert trainer.state.global_step == 3
    resumed = train(make_trainer(**options | change), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    steps = change.get("max_steps", 12)
    assert resumed.state.global_step == steps
    if steps == 12:
        assert learning_rates(resumed) == pytest.approx(learning_rates(whole), rel=1e-12)


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


def test_a_schedule_with_a_warmup_of_its_own_is_started_or_kept_as_it_is(make_trainer):
    started = train(own_schedule(make_trainer, warmup_steps=6))
    assert learning_rates(started)[0] == pytest.approx(3e-4)
    kept = train(own_schedule(make_trainer, warmup_steps=0, warmup="none"))
    assert learning_rates(kept)[:3] == pytest.approx([0, 5e-4, 1e-3])
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


KNOW = r"WarmupCallback must know its trainer: .*WarmupCallback\.attach\(trainer\).*callbacks=\[WarmupCallback\]"


def test_a_callback_that_does_not_know_its_trainer_is_refused_in_words(make_trainer):
    with pytest.raises(ValueError, match=KNOW):
        make_trainer(trainer_kwargs={"callbacks": [WarmupCallback]})
    trainer = make_trainer()
    with pytest.raises(ValueError, match=KNOW):
        trainer.add_callback(WarmupCallback)
    with pytest.raises(ValueError, match=KNOW):
        trainer.add_callback(WarmupCallback())
    assert learning_rates(train(trainer))[0] == pytest.approx(3e-4)  # nothing of it is left


@pytest.mark.parametrize("mode", [LINEAR, GUIDED, {"warmup": "none"}], ids=str)
def test_a_trainer_that_has_trained_is_refused(make_trainer, mode):
    trainer = make_trainer(args_cls=TrainingArguments)
    trainer.train()
    trainer.args.warmup_steps = mode.get("warmup_steps", 0)
    with pytest.raises(ValueError, match=r"attach the warmup before train\(\): this trainer has trained"):
        WarmupCallback.attach(trainer, warmup=mode.get("warmup", "linear"))


CONTRADICTIONS = [
    (
        {"auto_lr": True},
        6,
        "auto_lr must be off with warmup_steps=6, got True: only guided warmup finds a learning rate, and it has "
        "warmup_steps=0",
    ),
    ({"ramp_steps": 9}, 6, "ramp_steps must be left out with warmup_steps=6, got 9.0"),
    ({"init_lr": "1e-4"}, 0, "init_lr must be left out with warmup_steps=0, got '1e-4': .* set warmup_steps"),
    ({"init_lr": "catapult"}, 0, "init_lr must be left out with warmup_steps=0, got 'catapult'"),
    ({"warmup": "linear"}, 0, "warmup_steps must be positive with warmup=linear, got 0: set it, or warmup=guided"),
    ({"warmup": "guided"}, 6, "warmup_steps must be 0 with warmup=guided, got 6"),
    ({"warmup": "persistent"}, 0.5, "warmup_steps must be 0 with warmup=persistent, got 0.5"),
]


@pytest.mark.parametrize(("options", "warmup_steps", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("changed_later", [False, True], ids=["at attach", "changed behind attach"])
def test_options_that_contradict_each_other_are_refused_before_the_first_step(
    make_trainer, options, warmup_steps, message, changed_later
):
    """A hyperparameter search changes the arguments behind `attach`."""
    trainer = make_trainer(args_cls=TrainingArguments, warmup_steps=warmup_steps)
    if not changed_later:
        with pytest.raises(ValueError, match=message):
            WarmupCallback.attach(trainer, **options)
        return
    trainer.args.warmup_steps = 0 if warmup_steps else 6
    WarmupCallback.attach(trainer, **options)
    trainer.args.warmup_steps = warmup_steps
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


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
    assert "set warmup=none" in line
