"""Algorithm 3 of the paper, by hand."""

import json
import math

import pytest

from hf_warmup import PersistentCatapult


class Step:
    """A step whose loss is `start` before it and again at `critical`."""

    def __init__(self, start, critical):
        self.start, self.critical = start, critical

    def loss(self, lr=0.0):
        return self.start + lr * (lr - self.critical)


SCRIPT = [(2.0, 0.1), (2.5, 9.0), (2.2, 9.0), (1.9, 0.4), (1.95, 9.0), (1.8, 2.0), (1.7, 9.0)]


def test_it_goes_from_search_to_search_when_the_loss_is_below_where_it_was():
    # At θ* with L = 2, η_c = 0.1; the loss rises for two steps; below 2 it searches again.
    rule = PersistentCatapult(1000, 1.0, init_lr=1e-3, delta=1e-3)
    assert rule.asks == ("loss",)
    made = [rule(Step(*script)) for script in SCRIPT]
    assert made[:3] == pytest.approx([0.1] * 3, rel=0.15)
    assert made[0] >= 0.1  # the upper end of the bracket: it induces a catapult
    assert made[3:5] == pytest.approx([0.4] * 2, rel=0.15)
    assert made[5:] == [1.0, 1.0]
    assert rule.num_searches == 3
    assert rule.ended_by == "learning_rate"
    assert not rule.will_probe
    assert rule.asks == ()


def test_it_gives_way_to_the_decay_at_half_of_the_run():
    rule = PersistentCatapult(8, 1.0, init_lr=1e-3)
    made = [rule(Step(2.0, 0.1)) for _ in range(6)]
    assert rule.ended_by == "half of the run"
    assert rule.num_steps == 4
    assert made == made[:1] * 6


def test_a_search_is_news_with_all_the_forward_passes_so_far():
    rule = PersistentCatapult(1000, 1.0, init_lr=1e-3)
    for script, searches in zip(SCRIPT[:4], (True, False, False, True), strict=True):
        before = rule.num_trials
        rule(Step(*script))
        found = {"critical_lr": rule.critical_lr, "forward_passes": rule.num_trials}
        assert rule.news == (found if searches else {})
        assert (rule.num_trials > before) == searches


@pytest.mark.parametrize("at", range(6))
def test_a_rule_that_is_loaded_goes_on_to_the_digit(at):
    rule, other = (PersistentCatapult(1000, 1.0, init_lr=1e-3, delta=1e-3) for _ in range(2))
    for script in SCRIPT[:at]:
        rule(Step(*script))
    state = rule.state_dict()
    other.load_state_dict(json.loads(json.dumps(state)))
    assert [rule(Step(*script)) for script in SCRIPT[at:]] == [other(Step(*script)) for script in SCRIPT[at:]]


def test_a_loss_that_rises_at_every_rate_is_refused():
    with pytest.raises(RuntimeError, match="no learning rate from .* keeps the loss of the first step from rising"):
        PersistentCatapult(10, 1.0)(Step(1.0, -1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": 1.0, "delta": 0.0}, "delta must be positive and finite, got 0.0"),
        ({"learning_rate": 1.0, "init_lr": -1.0}, "init_lr must be positive and finite, got -1.0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        PersistentCatapult(9, **options)


@pytest.mark.parametrize(
    ("name", "other"),
    [("num_training_steps", 900), ("learning_rate", 2.0), ("init_lr", 1e-3), ("delta", 0.2)],
)
def test_other_options_than_those_of_the_checkpoint_are_refused_by_name(name, other):
    options = {"num_training_steps": 1000, "learning_rate": 1.0, "init_lr": 1e-4, "delta": 0.1}
    rule, changed = PersistentCatapult(**options), PersistentCatapult(**options | {name: other})
    rule(Step(2.0, 0.1))
    before = changed.state_dict()
    with pytest.raises(ValueError, match=f"^{name} must be {options[name]} as in the checkpoint, got {other}"):
        changed.load_state_dict(rule.state_dict())
    assert changed.state_dict() == before
    for script in SCRIPT:
        rule(Step(*script))
    changed.load_state_dict(rule.state_dict())  # warmup has ended
    assert changed.lr == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", -1), ("lr", math.nan), ("num_trials", 1.5), ("critical_lr", -1.0), ("ended_by", "magic")],
)
def test_a_state_that_no_run_leaves_is_refused_by_name(name, value):
    rule = PersistentCatapult(1000, 1.0)
    rule(Step(2.0, 0.1))
    with pytest.raises(ValueError, match=name):
        PersistentCatapult(1000, 1.0).load_state_dict(rule.state_dict() | {name: value})
    with pytest.raises(ValueError, match="the state must be of a PersistentCatapult"):
        rule.load_state_dict({})
