"""Linear warmup from η_init: the paper's equation, and where it starts."""

import json
import math

import numpy as np
import pytest

from hf_warmup import LinearWarmup

N, T_WRM, TARGET = 100, 20, 0.5


class Step:
    """A step whose loss is `start` before it and again at `critical`; asked for that, it is not asked again."""

    def __init__(self, critical, start=2.0):
        self.critical, self.start, self.asked = critical, start, []

    def loss(self, lr=0.0):
        self.asked += [lr] if lr > 0 else []
        return self.start + lr * (lr - self.critical)


class Unasked:
    def loss(self, lr=0.0):
        raise AssertionError("a loss was asked for")


def made(init_lr="auto"):
    return LinearWarmup(N, TARGET, T_WRM, init_lr=init_lr)


def run(rule, step=None):
    """All learning rates of warmup."""
    lrs = []
    while rule.ended_by is None:
        lrs.append(rule(step if rule.will_probe else Unasked()))
    return lrs


@pytest.mark.parametrize("warmup_steps", [1, 7, 20, 100])
@pytest.mark.parametrize("fraction", [1e-6, 0.03, 0.1, 0.25, 0.999, 1.0])
def test_the_learning_rates_are_those_of_the_papers_equation(fraction, warmup_steps):
    rule = LinearWarmup(N, TARGET, warmup_steps, init_lr=fraction * TARGET)
    lrs = run(rule)
    expected = [min(TARGET, fraction * TARGET + TARGET * t / warmup_steps) for t in range(len(lrs))]
    assert lrs == pytest.approx(expected, rel=1e-12)
    # It ends with the first step at the target, which is reached T_wrm η_init / η_trgt steps before that from 0.
    reach = warmup_steps * (1 - fraction)
    assert rule.num_steps == len(lrs) == math.ceil(reach) + 1
    assert rule.overrun == pytest.approx(len(lrs) - 1 - reach, abs=1e-12)
    assert (rule.lr, rule.ended_by) == (TARGET, "learning_rate")
    assert rule(Unasked()) == rule(Unasked()) == TARGET
    assert rule.num_steps == len(lrs)


@pytest.mark.parametrize(
    ("critical", "auto", "catapult"),
    [
        (0.02, 0.02, 0.02),
        (0.049, 0.049, 0.049),
        (0.2, 0.05, 0.2),
        (0.7, 0.05, 0.5),  # above the target
    ],
)
def test_auto_starts_at_the_critical_learning_rate_but_at_most_at_a_tenth_of_the_target(critical, auto, catapult):
    for init_lr, expected in (("auto", auto), ("catapult", catapult)):
        rule = made(init_lr)
        lrs = run(rule, Step(critical))
        assert lrs[0] == rule.init_lr == pytest.approx(expected, rel=1 / 16)
        assert (lrs[0] == 0.05) == (expected == 0.05)
        assert lrs == run(made(lrs[0]))


def test_the_losses_of_the_first_step_are_asked_for_and_no_others():
    rule, step = made(), Step(0.2)
    assert rule.will_probe
    rule(step)
    assert not rule.will_probe
    assert step.asked == [lr for lr, _ in rule.found.evals if lr > 0]
    assert rule.found.num_evals == len(step.asked)  # the loss before the step is known
    run(rule)
    with pytest.raises(ValueError, match="step must be given with init_lr=auto, got None"):
        made()()


def test_a_number_asks_nothing_of_the_step():
    rule = made(0.1)
    assert not rule.will_probe
    assert rule() == rule.init_lr == 0.1
    assert rule.found is None
    assert rule() == rule.lr == 0.125


def test_steps_saved_counts_two_forward_passes_as_a_step():
    rule = made(0.1)
    assert rule.steps_saved() == 0.0
    rule()
    assert rule.steps_saved() == pytest.approx(T_WRM * 0.1 / TARGET, rel=1e-12)
    for init_lr, critical in (("auto", 0.02), ("auto", 0.2), ("catapult", 0.2), ("catapult", 7.0)):
        rule = made(init_lr)
        first = rule(Step(critical))
        assert rule.steps_saved() == pytest.approx(T_WRM * first / TARGET - rule.found.num_evals / 2, rel=1e-12)
    assert rule.steps_saved() == T_WRM - 1 / 2


@pytest.mark.parametrize(
    ("init_lr", "critical", "status", "capped"),
    [("auto", 0.02, "found", False), ("auto", 0.2, "found", True), ("catapult", 0.2, "found", False)]
    + [("auto", 7.0, "above_target", True), ("catapult", 7.0, "above_target", False)],
)
def test_the_first_step_says_what_the_search_found(init_lr, critical, status, capped):
    rule = made(init_lr)
    rule(Step(critical))
    news = json.loads(json.dumps(rule.news, allow_nan=False))
    found = {"critical_lr": rule.found.value} if status == "found" else {}
    assert news == {
        "warmup_steps": T_WRM,
        "steps_saved": rule.steps_saved(),
        "forward_passes": rule.found.num_evals,
        "status": status,
        "capped": capped,
        "evals": [[lr, loss] for lr, loss in rule.found.evals],
        **found,
    }
    rule(Unasked())
    assert rule.news == {}
    rule = made(0.1)
    rule()
    assert rule.news == {"warmup_steps": T_WRM, "steps_saved": rule.steps_saved()}


def test_where_every_learning_rate_raises_the_loss_it_warns_and_starts_below_all_that_did(caplog):
    rule = made()
    least = rule(Step(-1.0))
    (line,) = caplog.messages
    assert line.startswith("no learning rate from ")
    assert f"({rule.found.status}): warmup starts at {least:.3g}, " in line
    assert rule.found.value == 0
    assert rule.news["status"] == "not_descent"
    assert "critical_lr" not in rule.news
    risen = [lr for lr, loss in rule.found.evals if loss > rule.found.start + rule.found.noise]
    assert 0 < least <= min(TARGET / T_WRM, min(risen) / 2)
    assert rule(Unasked()) == pytest.approx(least + TARGET / T_WRM)


def test_it_starts_at_what_is_known_to_be_safe_where_the_loss_is_not_finite_beyond():
    class Cliff:
        def loss(self, lr=0.0):
            return 2 - lr if lr < 0.01 else math.inf

    rule = made()
    assert rule(Cliff()) == pytest.approx(0.01, rel=1 / 8)
    assert None in [loss for _, loss in rule.news["evals"]]
    json.dumps(rule.news, allow_nan=False)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_first_loss_that_is_not_finite_is_refused(loss):
    with pytest.raises(RuntimeError, match="the training loss of step 1 is .* before any update"):
        made()(Step(0.2, start=loss))


@pytest.mark.parametrize("init_lr", ["auto", "catapult", 0.1])
@pytest.mark.parametrize("at", [0, 1, 7, "end"])
def test_a_rule_that_is_loaded_goes_on_to_the_digit(at, init_lr):
    rule, other = made(init_lr), made(init_lr)
    lrs = run(made(init_lr), Step(0.2))
    for _ in range(len(lrs) if at == "end" else at):
        rule(Step(0.2) if rule.will_probe else None)
    state = json.loads(json.dumps(rule.state_dict()))
    other.load_state_dict(state)
    assert other.state_dict() == rule.state_dict() == state
    assert run(other, Step(0.2)) == ([] if at == "end" else lrs[at:])
    assert other.lr == TARGET


def test_numbers_of_numpy_are_pythons_own_in_the_state():
    rule = LinearWarmup(np.int64(N), np.float64(TARGET), np.int32(T_WRM), init_lr=np.float64(0.1))
    rule()
    plain = made(0.1)
    plain()
    assert json.loads(json.dumps(rule.state_dict())) == plain.state_dict()


OTHERS = [
    (LinearWarmup(N + 1, TARGET, T_WRM), "num_training_steps must be 100"),
    (LinearWarmup(N, 0.6, T_WRM), "learning_rate must be 0.5"),
    (LinearWarmup(N, TARGET, T_WRM + 1), "warmup_steps must be 20"),
    (LinearWarmup(N, TARGET, T_WRM, init_lr="catapult"), "init_lr must be auto"),
    (LinearWarmup(N, TARGET, T_WRM, init_lr=0.05), "init_lr must be auto"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_other_options_than_those_of_the_checkpoint_are_refused_by_name(other, message):
    rule, before = made(), other.state_dict()
    rule(Step(0.2))
    with pytest.raises(ValueError, match=f"^{message} as in the checkpoint, got "):
        other.load_state_dict(rule.state_dict())
    assert other.state_dict() == before


def test_once_warmup_has_ended_other_options_do_not_matter():
    rule, other = made(), LinearWarmup(N, 0.6, T_WRM + 1, init_lr=0.1)
    run(rule, Step(0.2))
    other.load_state_dict(rule.state_dict())
    assert other(Unasked()) == TARGET


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_training_steps", 0),
        ("learning_rate", -1.0),
        ("warmup_steps", 1.5),
        ("num_steps", -1),
        ("lr", math.nan),
        ("lr", -1.0),
        ("init_lr", None),
        ("init_lr", 0.0),
        ("init_lr", math.inf),
        ("ended_by", "magic"),
    ],
)
def test_a_state_that_no_run_leaves_is_refused_by_name(name, value):
    rule, other = made(), made()
    rule(Step(0.2))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        other.load_state_dict(rule.state_dict() | {name: value})
    assert other.state_dict() == made().state_dict()
    with pytest.raises(ValueError, match="^init_lr must be None before the first step, got 0.1"):
        other.load_state_dict(made().state_dict() | {"init_lr": 0.1})
    with pytest.raises(ValueError, match="the state must be of a LinearWarmup"):
        other.load_state_dict({"lr": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 0}, "warmup_steps must be between 1 and 100 steps, got 0"),
        ({"warmup_steps": 101}, "warmup_steps must be between 1 and 100 steps, got 101"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"init_lr": 0.6}, "init_lr must be at most the optimizer's learning rate, 0.5, got 0.6"),
        ({"init_lr": 0.0}, "init_lr must be positive and finite, got 0.0"),
        ({"init_lr": "zero"}, "init_lr must be a number, got 'zero'"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    given = {"num_training_steps": N, "learning_rate": TARGET, "warmup_steps": T_WRM, **options}
    with pytest.raises(ValueError, match=message):
        LinearWarmup(**given)
