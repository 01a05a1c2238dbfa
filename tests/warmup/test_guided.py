"""Guided warmup, on worlds in which the way to the valley is known."""

import json
import math
import random
from statistics import fmean

import pytest

from hf_warmup import GuidedWarmup


class World:
    """A training in which the loss and its slope are functions of the path, the sum of the learning rates.

    Args:
        valley: The path at which the slope turns.
        slope: Of the path, before that; such that the estimate of the distance is right, if None.
        loss: Of the path.
    """

    def __init__(self, valley=0.05, slope=None, loss=lambda path: 6.0):
        self.valley, self.path, self.loss_of = valley, 0.0, loss
        self.slope_of = slope or (lambda path: 0.3 * loss(path) / (valley - path))

    def loss(self, lr=0.0):
        assert lr == 0.0, "guided warmup asks for no loss at a learning rate"
        return self.loss_of(self.path)

    def slope(self):
        return self.slope_of(self.path)

    def momentum_slope(self):
        return self.slope_of(self.path) if self.path < self.valley else -0.05 / self.valley

    def run(self, rule, most=10_000):
        lrs = []
        while rule.ended_by is None and len(lrs) < most:
            lrs.append(rule(self))
            self.path += lrs[-1]
        return lrs


class Asked(World):
    """Notes what it is asked."""

    def __getattribute__(self, name):
        if name in ("loss", "slope", "momentum_slope"):
            self.asked.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("learning_rate", [None, 1e-4])
def test_it_asks_what_it_says_before(decoder, learning_rate):
    world, rule = Asked(loss=learning_on), GuidedWarmup(400, learning_rate, decoder=decoder)
    said = []
    for _ in range(400):
        world.asked = []
        said.append(rule.asks)
        world.path += rule(world)
        assert tuple(world.asked) == said[-1]
    expected = {("loss", "slope"), ("loss", "momentum_slope"), ()}
    assert set(said) == expected | ({("loss",)} if not decoder and learning_rate is None else set())


def learning_on(path):
    """A loss that falls by a unit until the path is 0.05, and then on."""
    return 6.0 - 20 * path


def test_the_first_learning_rate_is_that_of_a_line_that_makes_the_distance_in_its_steps():
    rule = GuidedWarmup(300)
    assert rule(World(slope=lambda path: 40.0)) == pytest.approx(2 * 0.3 * 6 / 40 / 70**2, rel=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "line"),
    [(2, 1), (3, 1), (150, 50), (210, 70), (1400, 70), (1500, 75), (2400, 120), (10**5, 5000)],
)
def test_it_takes_70_steps_and_a_third_of_the_run_at_most_and_of_no_decoder_5_percent_at_least(num_steps, line):
    for decoder, steps in ((False, line), (True, min(line, 70))):
        assert GuidedWarmup.usual_ramp_steps(num_steps, decoder=decoder) == pytest.approx(steps)
        assert GuidedWarmup(num_steps, decoder=decoder).ramp_steps == pytest.approx(steps)


@pytest.mark.parametrize("name", ["Muon", "MuonAdamW", "MuonWithAuxAdam", "NorMuon"])
@pytest.mark.parametrize(
    ("num_steps", "num_weights", "line"),
    [(2, 30**4, 1), (12, 30**4, 4), (10**4, 5**4, 6), (10**4, 30**4, 24), (10**6, 16 * 10**8, 160)],
)
def test_with_muon_it_takes_fewer_and_at_least_the_slopes_that_tell_the_valley(name, num_steps, num_weights, line):
    assert GuidedWarmup.usual_ramp_steps(num_steps, optimizer=name, num_weights=num_weights) == pytest.approx(line)


@pytest.mark.parametrize("valley", [1e-4, 0.05, 30.0])
def test_where_the_estimate_is_right_the_way_is_a_straight_line_of_t_star_steps_to_the_valley(valley):
    rule = GuidedWarmup(1000)
    lrs = World(valley, loss=lambda path: 6.0).run(rule)[: rule.valley_step]
    assert rule.valley_step == pytest.approx(70, abs=6)  # six slopes tell it
    slope = 2 * valley / 70**2
    for t in range(20, 64):
        assert lrs[t] == pytest.approx(slope * t, rel=0.1)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_estimate_that_is_off_by_a_factor_changes_the_steps_to_the_valley_by_its_root(factor):
    rule = GuidedWarmup(1000)
    # The remaining distance is told too long by the factor, up to the last tenth.
    World(0.05, slope=lambda path: 0.3 * 6 / factor / max(0.05 - path, 0.005)).run(rule)
    assert rule.valley_step == pytest.approx(70 / math.sqrt(factor), rel=0.2)


@pytest.mark.parametrize(("decoder", "ramp"), [(False, 88), (True, 88), (True, 24), (True, 23)])
def test_the_learning_rates_are_those_of_the_equations_written_out(decoder, ramp):
    slopes = [60 + 30 * math.sin(t * t) - t for t in range(400)]
    losses = [6 - 0.01 * t + 0.1 * math.cos(3 * t * t) for t in range(400)]
    rule, lrs, eta, path, kept, fallen = GuidedWarmup(400, ramp_steps=ramp, decoder=decoder), [], 0.0, 0.0, [], 0.0
    valley = climb = None

    class Step:
        def loss(self):
            return losses[t]

        def slope(self):
            return 50.0

        def momentum_slope(self):
            return slopes[t]

    for t in range(200):
        if rule.ended_by is not None:
            break
        lrs.append(rule(Step()))
        if t == 0:
            eta = 2 * 0.3 * losses[0] / 50 / ramp**2
        elif valley is None:
            kept.append(slopes[t])
            fallen += eta * slopes[t]
            near = path >= 0.3 * losses[t] / fmean(kept) / 2
            turned = sum(slope <= 0 for slope in kept[-6:]) >= 3 and near
            bent = path * fmean(kept[-6:]) <= 0.4 * fallen and fallen >= 0.15 * losses[t]
            if len(kept) >= 6 and (turned or (bent and decoder and ramp >= 24)):
                valley, t_v, eta_v = path, t, eta
            else:
                mean = fmean(kept[-6:])
                line = (
                    2 * math.sqrt((path + 0.3 * losses[t] / mean) * (path + eta / 2)) / ramp if mean > 0 else math.inf
                )
                eta = max(eta, min(line, eta * (1 + 2 / t)))
        if valley is not None and climb is None:
            first, after = max(6, t_v // 2), losses[t_v : t + 1]
            if decoder:
                climb = t
            elif len(after) <= first:
                settled, recent = fmean(after), None
            else:
                seen = len(after) - first
                weight = max(1 / seen, 2 / max(first, len(after) / 4))
                recent = losses[t] if recent is None else recent + weight * (losses[t] - recent)
                if seen >= 6 and settled - recent >= 0.1 * (losses[0] - settled):
                    climb = t
        if climb is not None:
            peak = max(eta_v, (0.25 if decoder and ramp >= 24 else 0.15) * valley)
            rise = (peak - eta_v) / max(199 - climb, t_v)
            eta = min(peak, eta_v + rise * (t - climb))
        path += eta
        assert lrs[t] == pytest.approx(eta, rel=1e-12)
    assert valley is not None
    assert rule.valley_lr == eta_v
    assert rule.climb_step == climb is not None


@pytest.mark.parametrize("seed", range(5))
def test_the_learning_rate_never_falls_and_rises_no_faster_than_the_square_of_the_steps(seed):
    noise = random.Random(seed)
    rule = GuidedWarmup(400)
    lrs = World(0.05, slope=lambda path: noise.uniform(-50, 100) if path else 25.0, loss=learning_on).run(rule)
    assert all(new >= old for old, new in zip(lrs, lrs[1:], strict=False))
    way = lrs[: rule.valley_step]
    assert len(way) > 10
    assert all(way[t] <= way[t - 1] * (1 + 2 / t) * (1 + 1e-12) for t in range(1, len(way)))


def test_the_unit_of_the_learning_rate_does_not_matter():
    small, large = GuidedWarmup(1200), GuidedWarmup(1200)
    lrs = World(0.05, loss=learning_on).run(small)
    others = World(50.0, loss=lambda path: learning_on(path / 1000)).run(large)
    assert others == pytest.approx([1000 * lr for lr in lrs])
    assert small.ended_by == large.ended_by == "peak"


@pytest.mark.parametrize("scale", [1e-3, 0.5, 2.0])
def test_a_scale_of_the_loss_and_its_slope_does_not_matter(scale):
    lrs = World(0.05, loss=learning_on).run(GuidedWarmup(400))
    others = World(0.05, loss=lambda path: scale * learning_on(path)).run(GuidedWarmup(400))
    assert others == pytest.approx(lrs)


@pytest.mark.parametrize("scale", [2.5, 16, 512])
def test_nor_does_that_of_a_loss_that_begins_above_twelve_and_whose_gradients_are_clipped(scale):
    """The slope of a clipped gradient has no scale: without a unit of its own the loss would make the way longer."""

    def slope(path):
        return 0.3 * 2 * learning_on(path) / (0.05 - path)

    lrs = World(0.05, slope, lambda path: 2 * learning_on(path)).run(GuidedWarmup(400))  # begins at 12
    others = World(0.05, slope, lambda path: scale * learning_on(path)).run(GuidedWarmup(400))
    assert others == pytest.approx(lrs)


def test_the_peak_is_a_part_of_the_way_to_the_valley():
    rule = GuidedWarmup(1200)
    lrs = World(0.05, loss=learning_on).run(rule)
    assert rule.ended_by == "peak"
    assert lrs[-1] == rule.peak == pytest.approx(0.15 * 0.05, rel=0.15)  # six slopes tell it, some steps late


def test_of_a_decoder_it_is_a_larger_part_of_a_shorter_way():
    rule = GuidedWarmup(4000, ramp_steps=120, decoder=True)
    lrs = World(0.05, slope=lambda path: 100 * (1 - path / 0.05), loss=learning_on).run(rule)
    # The mean over the path s is 1 - s/2 of the first slope, so the slope is .4 of it at s = 3/4; the six slopes of
    # the mean are some steps late.
    assert 3 / 4 * 0.05 < rule.valley_path < 0.82 * 0.05
    assert lrs[-1] == rule.peak == 0.25 * rule.valley_path


def test_a_decoder_is_in_the_valley_though_no_slope_turns_but_not_of_few_steps_nor_are_others():
    kinds = {"decoder": {"decoder": True}, "other": {}, "few steps": {"decoder": True, "ramp_steps": 23}}
    ways = {name: GuidedWarmup(1200, **kind) for name, kind in kinds.items()}
    for rule in ways.values():
        World(1e9, slope=lambda path: 40.0 if path < 0.05 else 2.0, loss=learning_on).run(rule)
    assert [name for name, rule in ways.items() if rule.valley_step is not None] == ["decoder"]


def test_a_short_steep_part_at_the_beginning_does_not_end_the_way_of_a_decoder():
    rule = GuidedWarmup(1200, decoder=True)
    # As of wide models, which learn the frequencies of their tokens first: a thirtieth of the way, much steeper.
    World(1e9, slope=lambda path: 300.0 if path < 0.0017 else 40.0 if path < 0.05 else 2.0, loss=learning_on).run(rule)
    assert 0.05 < rule.valley_path < 0.06


def test_it_waits_in_the_valley_until_the_loss_falls_again_by_a_tenth_of_its_first_descent():
    rule = GuidedWarmup(2000)
    world = World(0.05)
    since = 0

    def loss(path):
        nonlocal since
        since += path >= 0.05
        return learning_on(min(path, 0.05)) - (0.2 if since > 300 else 0.05)  # the first descent is 1

    world.loss_of = loss
    lrs = world.run(rule)
    waited = lrs[rule.valley_step : rule.climb_step + 1]
    assert set(waited) == {rule.valley_lr}
    assert 290 < len(waited) < 400
    assert rule.ended_by == "peak"


def test_a_long_wait_looks_at_the_last_quarter_of_its_losses():
    rule, since = GuidedWarmup(4000), 0
    world = World(0.05)

    def loss(path):
        nonlocal since
        since += path >= 0.05
        return 6 - 20 * min(path, 0.05) - 0.3 * (since > 800)  # the first descent is 1

    world.loss_of = loss
    world.run(rule)
    # A mean over some n steps has taken a third of the fall after ln(3/2) n/2.
    assert rule.climb_step - rule.valley_step - 800 == pytest.approx(math.log(1.5) * 200 / 2, rel=0.15)


def test_a_decoder_climbs_at_once():
    rule = GuidedWarmup(4000, ramp_steps=120, decoder=True)
    lrs = World(0.05, loss=lambda path: max(5.0, learning_on(path))).run(rule)
    assert rule.climb_step == rule.valley_step
    rise = (rule.peak - rule.valley_lr) / (1999 - rule.valley_step)
    assert lrs[rule.valley_step + 10] == pytest.approx(rule.valley_lr + 10 * rise)


def test_a_loss_that_stays_in_the_valley_holds_the_learning_rate_there():
    rule = GuidedWarmup(400)
    lrs = World(0.05, loss=lambda path: max(5.0, learning_on(path))).run(rule)
    assert rule.ended_by == "half of the run"
    assert len(lrs) == 200
    assert set(lrs[rule.valley_step :]) == {rule.valley_lr}


@pytest.mark.parametrize("num_steps", [*range(1300, 1500, 2), 4000])
def test_it_climbs_in_a_straight_line_that_is_at_the_peak_at_half_of_the_run(num_steps):
    rule = GuidedWarmup(num_steps, ramp_steps=num_steps / 20)
    lrs = World(0.05, loss=learning_on).run(rule)
    assert len(lrs) == num_steps / 2
    assert lrs[-1] == rule.peak
    assert rule.ended_by == "peak"
    climb = lrs[rule.climb_step :]
    rise = (rule.peak - rule.valley_lr) / (len(climb) - 1)
    assert [b - a for a, b in zip(climb, climb[1:], strict=False)] == pytest.approx([rise] * (len(climb) - 1))


def test_a_climb_just_before_half_of_the_run_is_no_jump():
    rule = GuidedWarmup(300, ramp_steps=66)
    lrs = World(0.05, loss=learning_on).run(rule)
    rises = [b - a for a, b in zip(lrs[rule.climb_step :], lrs[rule.climb_step + 1 :], strict=False)]
    assert max(rises) == pytest.approx((rule.peak - rule.valley_lr) / rule.valley_step)
    assert rule.ended_by == "half of the run"


@pytest.mark.parametrize("bound", [1e-5, 1e-3, 3e-3])
def test_a_bound_is_reached_and_never_passed(bound):
    rule = GuidedWarmup(400, learning_rate=bound, ramp_steps=88)
    lrs = World(0.05, loss=learning_on).run(rule)
    assert rule.ended_by == "learning_rate"
    assert max(lrs) == lrs[-1] == bound
    free = World(0.05, loss=learning_on).run(GuidedWarmup(400, ramp_steps=88))
    assert lrs[:-1] == free[: len(lrs) - 1]


def test_the_valley_and_the_peak_that_a_bound_was_before_are_news():
    world, rule, news = World(0.05, loss=learning_on), GuidedWarmup(1200), {}
    while rule.ended_by is None:
        world.path += rule(world)
        news |= {rule.num_steps - 1: rule.news} if rule.news else {}
    assert news == {rule.valley_step: {"valley_lr": rule.valley_lr}}
    bounded = GuidedWarmup(1200, learning_rate=1e-4)
    World(0.05).run(bounded)
    assert bounded.news == {"expected_peak_lr": pytest.approx(0.15 * 0.05, rel=0.01)}


def test_a_bound_above_the_peak_changes_nothing():
    lrs = World(0.05, loss=learning_on).run(GuidedWarmup(400, learning_rate=0.1))
    assert lrs == World(0.05, loss=learning_on).run(GuidedWarmup(400))


@pytest.mark.parametrize("decoder", [False, True])
def test_slopes_of_both_signs_far_from_the_valley_do_not_tell_it(decoder):
    signs = iter([1, 1, 1, -0.8, -0.8, -0.8] * 1000)
    rule = GuidedWarmup(400, decoder=decoder)
    World(1e9, slope=lambda path: 40.0 * next(signs) if path else 10.0).run(rule, most=30)
    assert rule.valley_step is None


def test_a_run_too_short_for_its_line_decays_from_its_half_on():
    rule = GuidedWarmup(8)
    lrs = World(1e9, slope=lambda path: 40.0).run(rule)
    assert len(lrs) == 4
    assert rule.ended_by == "half of the run"


def test_after_its_end_it_says_its_last_learning_rate():
    rule = GuidedWarmup(400, learning_rate=1e-3)
    world = World(0.05)
    world.run(rule)
    assert rule(world) == rule(world) == 1e-3


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_a_first_loss_that_is_not_positive_is_refused(loss):
    with pytest.raises(RuntimeError, match="the loss of the first step must be positive and finite, got"):
        GuidedWarmup(100)(World(slope=lambda path: 1.0, loss=lambda path: loss))


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan])
def test_a_first_step_that_goes_uphill_is_refused(slope):
    with pytest.raises(RuntimeError, match="the loss does not fall along the first step"):
        GuidedWarmup(100)(World(slope=lambda path: slope))


def test_steps_of_which_nothing_is_known_are_not_in_the_mean_of_all_slopes():
    class Overflows(World):
        def momentum_slope(self):
            return math.inf if self.path < 1e-4 else super().momentum_slope()

    rule = GuidedWarmup(400)
    Overflows(1e9, slope=lambda path: 40.0).run(rule, most=30)
    assert rule.num_slopes < rule.num_steps - 1
    assert rule.mean_slope == pytest.approx(40.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -3.0])
def test_a_later_loss_that_says_nothing_leaves_the_learning_rate_where_it_was(value):
    rule, world = GuidedWarmup(400), World(0.05)
    world.run(rule, most=20)
    before = rule.lr
    world.loss_of, world.slope_of = lambda path: value, lambda path: 40.0
    assert rule(world) == before


def test_an_optimizer_without_momentum_is_refused():
    class Plain(World):
        def momentum_slope(self):
            return None

    with pytest.raises(ValueError, match="must have a momentum"):
        Plain().run(GuidedWarmup(100))


def test_where_nothing_bounds_it_is_an_error_and_no_number():
    def flat(path):
        return 1.0 if path == 0 else -1e-9

    with pytest.raises(RuntimeError, match="nothing bounds the learning rate: in 50 steps, up to"):
        World(1e9, slope=flat).run(GuidedWarmup(100))
    World(1e9, slope=flat).run(GuidedWarmup(12))  # too short to say so
    rule = GuidedWarmup(100, learning_rate=1.0)
    World(1e9, slope=flat).run(rule)
    assert rule.ended_by in ("learning_rate", "half of the run")


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("at", [0, 1, 5, 40, 70, 90, 150])
def test_a_rule_that_is_loaded_goes_on_to_the_digit(at, decoder):
    world, rule = World(0.05, loss=learning_on), GuidedWarmup(400, decoder=decoder)
    world.run(rule, most=at)
    twin, other = World(0.05, loss=learning_on), GuidedWarmup(400, decoder=decoder)
    twin.path = world.path
    other.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert other.state_dict() == rule.state_dict()
    assert twin.run(other) == world.run(rule)
    assert other.state_dict() == rule.state_dict()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (GuidedWarmup(400, 1e-3), "learning_rate must be None"),
        (GuidedWarmup(500), "num_training_steps must be 400"),
        (GuidedWarmup(400, ramp_steps=5), "ramp_steps must be 70.0"),
        (GuidedWarmup(400, decoder=True), "decoder must be False"),
    ],
)
def test_other_options_than_those_of_the_checkpoint_are_refused_by_name(other, message):
    rule = GuidedWarmup(400)
    World(0.05).run(rule, most=10)
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"{message} as in the checkpoint"):
        other.load_state_dict(rule.state_dict())
    assert other.state_dict() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", -1),
        ("lr", math.nan),
        ("path", -1.0),
        ("slopes", [1.0] * 7),
        ("slopes", ["x"]),
        ("slopes", 3.0),
        ("mean_slope", None),
        ("num_slopes", -1),
        ("fall", None),
        ("decoder", 1),
        ("valley_path", -1.0),
        ("valley_step", 0),
        ("valley_lr", None),
        ("ramp_steps", 0.0),
        ("learning_rate", 0.0),
        ("num_training_steps", 0),
        ("ended_by", "magic"),
    ],
)
def test_a_state_that_no_run_leaves_is_refused_by_name(name, value):
    rule = GuidedWarmup(400)
    World(0.05, loss=learning_on).run(rule, most=150)
    assert rule.valley_step is not None
    with pytest.raises(ValueError, match=name):
        GuidedWarmup(400).load_state_dict(rule.state_dict() | {name: value})
    with pytest.raises(ValueError, match="the state must be of a GuidedWarmup"):
        GuidedWarmup(400).load_state_dict({"lr": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_training_steps": 0}, "num_training_steps must be"),
        ({"num_training_steps": 1.5}, "num_training_steps must be"),
        ({"num_training_steps": 10, "learning_rate": 0.0}, "learning_rate must be"),
        ({"num_training_steps": 10, "learning_rate": math.nan}, "learning_rate must be"),
        ({"num_training_steps": 10, "ramp_steps": 0}, "ramp_steps must be"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        GuidedWarmup(**arguments)
