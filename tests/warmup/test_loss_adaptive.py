"""The closed form of the learning rate, its ends, and its state."""

import json
import math

import pytest

from hf_warmup.warmup import LossAdaptiveWarmup

FIRST, TARGET, FRACTION = 8.0, 0.5, 0.5
PEAK = FIRST * (1 - FRACTION)
LOSSES = [FIRST, 9.0, 6.0, 3.0, 7.5, math.nan, 2.0, math.inf, 1.0, 2.5]


class Step:
    """A step that can be asked for its own loss alone."""

    def __init__(self, loss):
        self.before = loss

    def loss(self):
        return self.before


def rule_of(num_training_steps=1000, learning_rate=TARGET, fraction=FRACTION):
    return LossAdaptiveWarmup(num_training_steps, learning_rate, fraction=fraction)


def means(losses):
    """What the rule takes the loss to be, written out."""
    mean = losses[0]
    for loss in losses:
        if math.isfinite(loss):
            mean = 0.9 * mean + 0.1 * loss
        yield mean


def papers(loss):
    """η = D / (K0 + K1 D + K2 D²) of the K's that have a tenth of the target at first and a flat top at PEAK.

    1/η is linear in the K's, and so is the condition of the top, K0 = K2 PEAK²: three equations, by elimination.
    """
    # PEAK: (PEAK + PEAK) K2 + K1 = 1/η_p, and at FIRST: (PEAK²/FIRST + FIRST) K2 + K1 = 10/η_p
    k2 = (10 / TARGET - 1 / TARGET) / (PEAK**2 / FIRST + FIRST - 2 * PEAK)
    k1 = 1 / TARGET - 2 * PEAK * k2
    return loss / (k2 * PEAK**2 + k1 * loss + k2 * loss**2)


def test_the_learning_rate_is_the_papers_function_of_the_mean_loss():
    rule, most = rule_of(), 0.0
    for loss, mean in zip(LOSSES, means(LOSSES), strict=True):
        most = max(most, papers(mean))
        assert rule(Step(loss)) == pytest.approx(most, rel=1e-10)
        assert rule.mean_loss == pytest.approx(mean, rel=1e-10)
    assert TARGET / 10 < most < TARGET  # the losses have told a part of the curve


def test_it_begins_at_a_tenth_and_has_its_flat_top_where_the_loss_has_fallen_by_the_fraction():
    assert rule_of()(Step(FIRST)) == pytest.approx(TARGET / 10, rel=1e-10)
    for near in (1e-3, 1e-4):
        rule = rule_of()
        rule(Step(FIRST))
        lr = rule(Step(10 * PEAK * (1 + near) - 9 * FIRST))  # has the mean just above the peak
        assert (TARGET - lr) / TARGET == pytest.approx(9 * near**2 * PEAK / (FIRST - PEAK) ** 2 * FIRST, rel=1e-2)


def test_it_never_falls_and_ends_at_the_target_when_the_mean_loss_is_at_the_peak():
    rule, losses = rule_of(), [FIRST, *([6.0, 5.0, 9.0] * 5), *([3.0] * 30)]
    made = [rule(Step(loss)) for loss in losses]
    assert made == sorted(made)
    end = next(i for i, mean in enumerate(means(losses)) if mean <= PEAK)
    assert made[end - 1] < made[end] == made[-1] == TARGET
    assert (rule.ended_by, rule.num_steps, rule.overrun) == ("peak", end + 1, 0)
    assert not rule.will_probe


def test_it_gives_way_to_the_decay_at_half_of_the_run():
    rule = rule_of(num_training_steps=8)
    made = [rule(Step(loss)) for loss in (8.0, 7.0, 6.0, 5.0, 1.0)]
    assert (rule.ended_by, rule.num_steps) == ("half of the run", 4)
    assert made[-1] == made[-2] < TARGET


@pytest.mark.parametrize("at", range(1 + len(LOSSES)))
def test_a_rule_that_is_loaded_goes_on_to_the_digit(at):
    rule, other = rule_of(), rule_of()
    for loss in LOSSES[:at]:
        rule(Step(loss))
    other.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    losses = LOSSES[at:] + [3.0] * 30 if at else LOSSES
    assert [rule(Step(loss)) for loss in losses] == [other(Step(loss)) for loss in losses]
    assert rule.ended_by == other.ended_by == ("peak" if at else None)


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_a_first_loss_that_nothing_can_be_a_fraction_of_is_refused(loss):
    with pytest.raises(RuntimeError, match=f"first step must be positive and finite, got {loss:g}"):
        rule_of()(Step(loss))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_training_steps": 0}, "num_training_steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"fraction": 0.0}, "fraction must be between 0 and 1, got 0.0"),
        ({"fraction": 1}, "fraction must be between 0 and 1, got 1.0"),
        ({"fraction": math.nan}, "fraction must be between 0 and 1, got nan"),
        ({"fraction": "half"}, "fraction must be a number, got 'half'"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        rule_of(**options)


@pytest.mark.parametrize(("name", "other"), [("num_training_steps", 900), ("learning_rate", 2.0), ("fraction", 0.25)])
def test_other_options_than_those_of_the_checkpoint_are_refused_by_name(name, other):
    rule = rule_of()
    rule(Step(FIRST))
    with pytest.raises(ValueError, match=f"^{name} must be .* as in the checkpoint, got {other}"):
        rule_of(**{name: other}).load_state_dict(rule.state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", -1), ("lr", math.nan), ("first_loss", 0.0), ("mean_loss", math.nan), ("ended_by", "magic")],
)
def test_a_state_that_no_run_leaves_is_refused_by_name(name, value):
    rule = rule_of()
    rule(Step(FIRST))
    with pytest.raises(ValueError, match=name):
        rule_of().load_state_dict(rule.state_dict() | {name: value})
