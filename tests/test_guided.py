import itertools
import json
import math

import pytest

from hf_warmup.guided import GuidedWarmup, PersistentCatapult, ramp_rate

RATE = 0.01


def fixed_critical_lr(critical_lr, start=2.0, curvature=1.0):
    """A loss that falls up to `critical_lr` and rises beyond it, on every batch."""
    return lambda lr: start + curvature * lr * (lr - critical_lr)


def lrs(guide, losses, num_steps, **options):
    return [guide.step(losses(t), **options) for t in range(num_steps)]


def test_the_distance_to_a_critical_lr_that_stands_still_decays_exponentially():
    # ln(c / η_t) = ln(c / η_0) e^(-ρ t), to the staircase's factor of 1.5 around c.
    guide = GuidedWarmup(1.0, 1000, rate=RATE)
    made = lrs(guide, lambda t: fixed_critical_lr(0.5), 200)
    assert made[0] == pytest.approx(0.5e-3, rel=1.0)  # the search for c is to a factor of 2
    for t in (50, 100, 199):
        expected = math.log(0.5 / made[0]) * (1 - RATE) ** t
        assert math.log(0.5 / made[t]) == pytest.approx(expected, abs=math.log(1.5) * (1 - (1 - RATE) ** t) + 0.1)


def test_a_ramp_takes_160_steps_or_nine_times_the_root_of_the_runs():
    assert [2 / ramp_rate(n) for n in (1, 150, 300)] == pytest.approx([160] * 3)
    assert [2 / ramp_rate(n) for n in (2500, 10_000, 1_000_000)] == pytest.approx([450, 900, 9000])
    for n in (300, 10_000):
        by_default, given = (GuidedWarmup(1.0, n, **options) for options in ({}, {"rate": ramp_rate(n)}))
        assert lrs(by_default, lambda t: fixed_critical_lr(0.5), 100) == lrs(
            given, lambda t: fixed_critical_lr(0.5), 100
        )


def test_the_rise_and_the_decay_written_out():
    decay = lambda x: 1 - x / 400  # noqa: E731
    guide = GuidedWarmup(0.02, 400, decay, rate=0.05, init_lr=1e-3, every=1000)
    made = lrs(guide, lambda t: fixed_critical_lr(0.5), 400)
    expected = [1e-3]
    while expected[-1] < 0.02:
        expected.append(min(0.02, expected[-1] * (guide.critical_lr / expected[-1]) ** 0.05))
    end = len(expected) - 1
    assert guide.ramp_end == end
    assert 5 < end < 100
    expected += [0.02 * (1 - (t - end) / (400 - end)) for t in range(end + 1, 400)]
    assert made == pytest.approx(expected, rel=1e-12)


def test_the_ramp_rests_where_the_critical_lr_is_below_it():
    guide = GuidedWarmup(1.0, 1000, rate=0.3, every=5)
    made = lrs(guide, lambda t: fixed_critical_lr(0.5 if t < 10 else 1e-9), 15)
    assert guide.critical_lr < made[-1]
    assert all(later >= earlier for earlier, later in zip(made, made[1:], strict=False))
    guide.critical_lr = made[-1] / 10
    assert guide.step(fixed_critical_lr(1e-9)) in (made[-1], guide.peak)


def test_the_target_is_reached_and_never_passed():
    guide = GuidedWarmup(1e-2, 1000, rate=RATE)
    made = lrs(guide, lambda t: fixed_critical_lr(0.5), 300)
    assert all(later >= earlier for earlier, later in zip(made, made[1:], strict=False))
    assert max(made) == made[-1] == 1e-2
    assert guide.ramp_end is not None


@pytest.mark.parametrize("make", [GuidedWarmup, PersistentCatapult])
def test_a_ramp_that_does_not_end_gives_way_to_the_decay_at_half_of_the_run(make):
    guide = make(100.0, 60, lambda x: 1 - x / 60)
    made = lrs(guide, lambda t: fixed_critical_lr(1e-3, start=2.0 + t, curvature=1e3), 60)
    assert guide.ramp_end == 29
    assert made[29] == max(made) > 0
    assert made[30:] == pytest.approx([guide.level * (60 - t) / 31 for t in range(30, 60)])


@pytest.mark.parametrize("guess", [1e-9, 1e-4, 1.0, 1e5])
def test_a_target_that_is_a_guess_is_where_the_first_search_begins_and_nothing_else(guess):
    asked = []

    def losses(t):
        def loss_at(lr):
            if t == 0 and lr > 0:
                asked.append(lr)
            return fixed_critical_lr(0.3 if t > 60 else 3.0)(lr)

        return loss_at

    def made(target, **options):
        guide = GuidedWarmup(target, 400, lambda step: 1 - step / 400, rate=RATE, init_lr=3e-3, **options)
        rates = [guide.step(losses(t), slope_at=lambda lr, t=t: 1.0 if t < 40 else -1.0) for t in range(400)]
        return guide, rates

    guide, rates = made(guess, ceiling=False)
    assert asked[0] == min(guess, 1.0)
    _, free = made(1e4)
    # But for a factor of 2 in the first η_c, which the staircase makes up for.
    assert guide.peak == pytest.approx(guide.level)
    assert guide.level < 1e4
    assert max(rates) == pytest.approx(max(free), rel=0.5)
    assert guide.ramp_end is not None


def test_a_guess_that_is_too_low_is_passed_and_a_ceiling_is_not():
    for ceiling in (True, False):
        guide = GuidedWarmup(1e-2, 2000, rate=RATE, ceiling=ceiling)
        made = [
            guide.step(
                fixed_critical_lr(3.0), slope_at=lambda lr, t=t: 1.0 if t < 60 else -1.0, loss_of_step=lambda: 1.0
            )
            for t in range(2000)
        ]
        assert max(made) == (1e-2 if ceiling else pytest.approx(guide.beyond * guide.turn_lr))


def test_a_loss_that_never_rises_is_no_reason_to_overflow_behind_a_guess():
    guide = GuidedWarmup(1e-3, 400, rate=0.5, every=1, ceiling=False)
    made = [guide.step(lambda lr: -lr, slope_at=lambda lr: 1.0) for _ in range(400)]
    assert max(made) <= 1e6


def test_a_guess_far_beyond_what_a_model_computes_is_not_taken_for_one_that_it_bears():
    # Overflowing logits are all the same, which is no worse than a model that has learned nothing.
    guide = GuidedWarmup(1e4, 400, ceiling=False)
    guide.step(lambda lr: 1.9 if lr > 100 else fixed_critical_lr(0.3)(lr))
    assert guide.critical_lr == pytest.approx(0.3, rel=1.0)


def test_a_first_learning_rate_above_the_critical_one_is_refused_where_nothing_else_bounds_it():
    GuidedWarmup(1e-4, 400, init_lr=0.2, ceiling=False).step(fixed_critical_lr(0.5))
    with pytest.raises(ValueError, match="init_lr must be at most η_c of the first step, .* got 10"):
        GuidedWarmup(1e-4, 400, init_lr=10.0, ceiling=False).step(fixed_critical_lr(0.5))


def test_a_state_with_a_ceiling_is_not_for_a_guess():
    made = GuidedWarmup(1.0, 400)
    made.step(fixed_critical_lr(0.5))
    state = made.state_dict()
    with pytest.raises(ValueError, match="ceiling must be True as in the state, got False"):
        GuidedWarmup(1.0, 400, ceiling=False).load_state_dict(state)
    del state["ceiling"]  # as it was before there was a choice
    again = GuidedWarmup(1.0, 400)
    again.load_state_dict(state)
    assert again.state_dict() == made.state_dict()


def test_a_guess_needs_a_momentum():
    guide = GuidedWarmup(1.0, 400, ceiling=False)
    guide.step(fixed_critical_lr(0.5))
    with pytest.raises(ValueError, match="ceiling must be True for an optimizer without momentum, got False"):
        guide.step(fixed_critical_lr(0.5))


@pytest.mark.parametrize("target", [1.0, 100.0])
def test_the_peak_is_the_smallest_critical_lr_met_however_high_the_target(target):
    # η_c falls to 0.01 by step 60 and rises again.
    critical = lambda t: 0.01 * math.exp(5 * abs(1 - t / 60))  # noqa: E731
    guide = GuidedWarmup(target, 1000, rate=0.02)
    made = lrs(guide, lambda t: fixed_critical_lr(critical(t)), 300)
    assert made[-1] == guide.level == pytest.approx(guide.peak)
    assert 0.01 / 1.5 <= guide.peak <= 0.01 * 1.5**4  # a staircase's mean over 20 steps
    half = GuidedWarmup(target, 1000, rate=0.02, kappa=0.5, until="end")
    whole = GuidedWarmup(target, 1000, rate=0.02, until="end")
    for either in (half, whole):
        lrs(either, lambda t: fixed_critical_lr(critical(t)), 300)
    assert half.peak == pytest.approx(whole.peak / 2)


def test_the_staircase_finds_where_half_of_the_batches_rise():
    # Batches whose η_c scatters by 3 either way.
    scatter = [3.0, 1 / 3, 1.5, 1 / 1.5, 2.0, 0.5, 1.0]
    guide = GuidedWarmup(1e3, 1000, every=1, until="end")
    seen = []
    for t in range(95):
        guide.step(fixed_critical_lr(0.2 * scatter[t * 3 % 7]))
        seen.append(math.log(guide.critical_lr))
    assert math.exp(sum(seen[30:]) / len(seen[30:])) == pytest.approx(0.2, rel=0.3)


def turning(turn_lr):
    """A momentum that goes downhill up to a learning rate of the training, and uphill above it."""
    return lambda guide: lambda lr: 1.0 if math.isnan(guide.level) or guide.level <= turn_lr else -1.0


@pytest.mark.parametrize(("rate", "beyond"), [(RATE, 2.8125), (RATE / 2, 5.625), (0.0125, 2.25), (0.02, 2.25)])
@pytest.mark.parametrize("target", [1.0, 100.0])
def test_from_where_the_momentum_turns_the_ramp_goes_on_to_a_multiple_of_it_that_grows_with_its_length(
    target, rate, beyond
):
    guide = GuidedWarmup(target, 2000, rate=rate)
    made = []
    for t in range(900):
        # A loss that goes on falling: there is nothing to wait for.
        made.append(guide.step(fixed_critical_lr(5.0, start=10 - 0.01 * t), 1.0, turning(0.02)(guide)))
    # It is seen when three of the last six slopes have turned: in the third step that begins above it.
    turned = made.index(guide.turn_lr)
    assert made[turned - 3] <= 0.02 < made[turned - 2]
    assert guide.beyond == pytest.approx(beyond)
    assert max(made) == guide.peak == pytest.approx(beyond * guide.turn_lr)
    # On the longest ramp it takes so long to see that the loss falls.
    assert guide.waited == (0 if rate > RATE / 2 else pytest.approx((turned + 1) / 2, abs=2))
    rising = math.log(beyond) / math.log(2.25) / rate
    assert guide.ramp_end - turned - guide.waited == pytest.approx(rising, abs=2.01)
    rises = [math.log(b / a) for a, b in zip(made, made[1:], strict=False)]
    assert rises[turned - 2] > rate * math.log(5 / 0.02 / 1.5)  # c is a stair below 5 at times
    first = turned + guide.waited
    assert rises[first : guide.ramp_end - 1] == pytest.approx([rate * math.log(2.25)] * (guide.ramp_end - 1 - first))


def plateau(t):
    """From 5 to 3 in 50 steps, with a scatter; from step 600 on down again."""
    return 5 - 0.04 * min(t, 50) - 0.001 * max(0, t - 600) + 0.05 * (-1) ** t


def waiting(num_steps, loss, target=100.0, **options):
    """A run whose momentum turns at step 52; its learning rates."""
    guide, made = GuidedWarmup(target, 4000, **options), []
    for t in range(num_steps):
        slope = 1.0 if t < 50 else -1.0
        made.append(guide.step(fixed_critical_lr(5.0, start=loss(t)), 1.0, lambda lr, slope=slope: slope))
    return guide, made


def test_a_long_ramp_waits_at_the_turn_until_the_loss_falls_again():
    guide, made = waiting(1900, plateau)
    hold = guide.turn_lr
    assert guide.turn_step == 52
    assert not guide.waits
    waits = [t for t, lr in enumerate(made) if lr == hold]
    assert waits[0] == guide.turn_step - 1  # whose learning rate it is
    # The means written out: of the steps 53 to 78, and with s^7.
    assert guide.turn_loss == pytest.approx(sum(map(plateau, range(53, 79))) / 26)
    least = guide.turn_loss - 0.1 * (plateau(0) - guide.turn_loss)

    def recent(t):
        return sum(s**7 * plateau(s) for s in range(53, t + 1)) / sum(s**7 for s in range(53, t + 1))

    # The mean in closed form, to some steps; it falls by .001 a step.
    assert recent(waits[-1] - 4) > least > recent(waits[-1] + 6)
    assert waits == list(range(waits[0], waits[-1] + 1))
    assert guide.waited == pytest.approx(len(waits), abs=1)
    assert made[waits[-1] + 1] == pytest.approx(hold * 2.25**guide.rate)
    assert max(made) == pytest.approx(guide.beyond * guide.turn_lr)


@pytest.mark.parametrize(("length", "hold"), [(160, None), (200, 1.8), (300, 1.2), (400, 1.0)])
def test_the_shorter_a_ramp_the_nearer_to_its_peak_it_waits(length, hold):
    guide, made = waiting(1900, lambda t: plateau(min(t, 600)), rate=2 / length)
    assert guide.hold == pytest.approx(hold or 2.25)
    assert guide.still_waits == (hold is not None)
    assert made[-1] == guide.wait_lr == pytest.approx((hold or 2.25) * guide.turn_lr)
    # It comes there by its own pace.
    rising = math.log(guide.hold) / math.log(2.25) * length / 2
    assert made.index(made[-1]) - 52 == pytest.approx(rising, abs=1.01)


def test_a_loss_that_never_falls_again_is_waited_for_until_half_of_the_run():
    guide, made = waiting(4000, lambda t: plateau(min(t, 600)))
    assert guide.waits
    assert guide.ramp_end == 1999
    assert made[2000:] == [max(made)] * 2000 == [guide.turn_lr] * 2000
    assert guide.waited == pytest.approx(made[:2000].count(max(made)), abs=1)
    assert not guide.needs_loss


def test_a_short_ramp_and_a_low_target_wait_for_nothing():
    guide, made = waiting(4000, lambda t: plateau(min(t, 600)), rate=2 / 160)
    assert (guide.waited, guide.ramp_end - 52) == (0, pytest.approx(80, abs=1.01))
    assert max(made) == guide.beyond * guide.turn_lr == 2.25 * guide.turn_lr
    low = 0.9 * waiting(80, plateau)[0].turn_lr
    guide, made = waiting(4000, lambda t: plateau(min(t, 600)), target=low)
    assert guide.waited == 0
    assert guide.ramp_end < guide.num_training_steps / 2
    assert not guide.needs_loss
    assert made[-1] == max(made) == low


def test_the_steps_own_loss_is_asked_for_from_the_turn_to_the_end_of_the_wait():
    guide, asked, needed = GuidedWarmup(100.0, 4000), [], []
    for t in range(1500):
        if guide.needs_loss:
            needed.append(t)
        # What is tried is of a part of the batch, whose loss may be anything.
        losses = fixed_critical_lr(5.0, start=9.0 - t)
        slope = 1.0 if t < 50 else -1.0
        guide.step(losses, 1.0, lambda lr, slope=slope: slope, lambda t=t: asked.append(t) or plateau(t))
    assert asked == needed == [0, *range(53, needed[-1] + 1)]
    assert 600 < needed[-1] < 1000
    assert guide.first_loss == plateau(0)


def test_a_ramp_that_ends_below_where_it_would_wait_has_nothing_to_wait_for():
    # η_c falls to a third of where the momentum turned, and ends the ramp.
    guide = GuidedWarmup(100.0, 4000)
    for t in range(2000):
        critical = 5.0 if t < 60 or not guide.turn_lr > 0 else guide.turn_lr / 3
        guide.step(fixed_critical_lr(critical, plateau(min(t, 600))), 1.0, lambda lr, t=t: 1.0 if t < 50 else -1.0)
    assert guide.ramp_end < 1000
    assert guide.level == guide.peak < 2.25 * guide.turn_lr
    assert (guide.waits, guide.still_waits, guide.needs_loss) == (True, False, False)


def test_a_turn_that_is_too_late_to_judge_the_loss_is_not_waited_at():
    guide = GuidedWarmup(100.0, 1000, rate=0.001)
    for t in range(600):
        slope = 1.0 if t < 420 else -1.0
        guide.step(fixed_critical_lr(5.0, 20 - 0.02 * t), 1.0, lambda lr, slope=slope: slope)
    assert guide.turn_step == 422
    assert (guide.waited, guide.still_waits) == (0, False)
    assert guide.level > 1.05 * guide.turn_lr
    assert guide.ramp_end == 499


@pytest.mark.parametrize("momentum", [True, False])
def test_a_ramp_of_twice_the_length_may_go_to_twice_the_smallest_mean_if_there_is_a_momentum(momentum):
    # c is 0.02 and three stairs above it; its mean of six is the same at all times but at the start.
    guide, means, seen = GuidedWarmup(100.0, 4000, rate=2 / 320, kappa=0.5, init_lr=1e-6), [], []
    while guide.num_steps < 900:
        if guide.needs_trial and guide.num_steps > 0:
            seen.append(guide.critical_lr)
            means += [math.exp(sum(map(math.log, seen[-6:])) / 6)] if len(seen) >= 6 else []
        guide.step(fixed_critical_lr(0.02), 1.0, (lambda lr: 1.0) if momentum else None)
    assert guide.stretch == 2.0
    assert guide.peak == pytest.approx((1.0 if momentum else 0.5) * min(means))


def test_behind_a_long_ramp_the_peak_is_held_to_the_trials_made_there():
    def critical(t):
        return 5.0 if t < 1700 else 3.0 if t < 2000 else 50.0 if t < 3000 else 1.0

    def run(guide, steps):
        return [guide.step(fixed_critical_lr(critical(t)), 1.0, lambda lr: 1.0) for t in steps]

    options = {"rate": 2 / 640, "until": "end", "every": 1, "init_lr": 0.05}
    guide = GuidedWarmup(100.0, 4000, **options)
    made = run(guide, range(2010))
    resumed = GuidedWarmup(100.0, 4000, **options)
    resumed.load_state_dict(json.loads(json.dumps(guide.state_dict())))
    assert run(resumed, range(2010, 3990)) == (rest := run(guide, range(2010, 3990)))
    made += rest
    assert guide.ramp_end == 1999
    # The last trials of the ramp are below it: they let it go to 4 times their mean, and are forgotten.
    assert made[1999] == max(made) > 4.5
    assert made[2000:3000] == [made[1999]] * 1000
    assert made[-1] == guide.peak == pytest.approx(1.0, rel=0.5)


def test_a_late_turn_is_judged_by_the_losses_of_one_over_rho_steps():
    guide = GuidedWarmup(100.0, 1200, init_lr=1e-7)
    for t in range(620):
        loss = 5 - 0.004 * min(t, 420) - 0.02 * max(0, t - 420)  # never a plateau
        guide.step(fixed_critical_lr(5.0, loss), 1.0, lambda lr, t=t: 1.0 if t < 410 else -1.0)
    assert guide.turn_step == 412
    assert not guide.waits
    # It has risen to where it waits for a part of them; half of the turn's step are 206.
    rising = math.log(guide.hold) / math.log(2.25) / guide.rate
    assert guide.waited == pytest.approx(1 / guide.rate - rising, abs=2)


def test_three_losses_that_are_low_by_chance_do_not_end_the_wait_behind_an_early_turn():
    guide = GuidedWarmup(100.0, 4000, init_lr=0.05)
    for t in range(500):
        scatter = 0.6 if t % 6 < 3 else -0.6
        guide.step(fixed_critical_lr(5.0, 5 - 2 * (t > 3) + scatter), 1.0, lambda lr: -1.0)
    assert guide.turn_step == 6
    assert guide.still_waits


def test_an_optimizer_with_a_warmup_of_its_own_waits_at_what_it_then_bears():
    guide, made = GuidedWarmup(100.0, 4000), []
    for t in range(1500):
        own = math.sqrt(1 - 0.999 ** (t + 1))
        slope = 1.0 if t < 50 else -1.0
        losses = fixed_critical_lr(5.0 / own, plateau(min(t, 600)))
        made.append(own * guide.step(losses, own, lambda lr, slope=slope: slope))
    assert all(b >= 0.999 * a for a, b in zip(made, made[1:], strict=False))
    assert made[-1] == pytest.approx(guide.turn_lr)
    assert guide.still_waits


def test_a_loss_that_is_not_finite_is_no_part_of_what_is_waited_for():
    guide, _ = waiting(1900, lambda t: math.nan if t in (53, 300) else plateau(t))
    assert math.isfinite(guide.recent_loss)
    assert not guide.waits


def test_a_ramp_near_the_critical_lr_is_no_faster_behind_the_turn():
    guide = GuidedWarmup(100.0, 2000, rate=RATE, init_lr=0.3)
    made = [guide.step(fixed_critical_lr(0.5), 1.0, lambda lr: -1.0) for _ in range(40)]
    assert guide.turn_lr == made[5]  # with the sixth slope
    for t in range(8, 39):
        assert 0 <= math.log(made[t] / made[t - 1]) <= RATE * math.log(1.5 * 0.5 / made[t - 1]) + 1e-9


def test_a_momentum_that_turns_at_times_has_not_turned():
    guide, count = GuidedWarmup(1.0, 2000, rate=RATE), itertools.count()
    for _ in range(400):
        guide.step(fixed_critical_lr(0.5), 1.0, lambda lr: -1.0 if next(count) % 3 == 0 else 1.0)
    assert math.isnan(guide.turn_lr)
    assert math.isnan(guide.state_dict()["turn_lr"])


def test_where_an_own_warmup_hides_a_part_of_the_learning_rate_the_turn_counts_the_rest():
    guide = GuidedWarmup(100.0, 2000, rate=RATE)
    for _ in range(300):
        guide.step(fixed_critical_lr(5.0), 0.5, turning(0.02)(guide))
    assert 0.01 < guide.turn_lr < 0.01 * (5 / 0.02) ** (3 * RATE)
    assert guide.peak == guide.beyond * guide.turn_lr


def test_slopes_are_asked_for_in_every_step_until_the_turn_and_along_what_is_tried():
    guide, asked, needed, tried = GuidedWarmup(100.0, 2000, until="end"), [], [], []

    def loss_at(lr):
        tried.append((guide.num_steps, lr))
        return fixed_critical_lr(5.0)(lr)

    def slope_at(lr):
        asked.append((guide.num_steps, lr))
        return 1.0 if guide.num_steps < 50 else -1.0

    for step in range(150):
        if guide.needs_slope:
            needed.append(step)
        guide.step(loss_at, 1.0, slope_at)
    assert [step for step, _ in asked] == needed == list(range(1, 53))  # step 52 is the third that has turned
    trials = [(step, lr) for step, lr in tried if lr > 0 and 0 < step <= 52]
    assert [at for at in asked if at[0] % 5 == 0] == trials
    assert guide.num_trials == len([lr for _, lr in tried if lr > 0])


def test_a_trial_costs_one_forward_pass_and_they_become_rarer():
    calls = []

    def counted(t):
        loss_at = fixed_critical_lr(0.5)
        return lambda lr: calls.append((t, lr)) or loss_at(lr)

    guide = GuidedWarmup(100.0, 10_000, until="end")
    lrs(guide, counted, 10_000)
    tried = [(t, lr) for t, lr in calls if lr > 0]
    assert len(tried) == guide.num_trials
    at = sorted({t for t, _ in tried})
    assert at[:21] == list(range(0, 105, 5))
    assert all(b - a == max(5, 5 * a // 100) for a, b in zip(at[1:], at[2:], strict=False))
    assert len(tried) / 3 < 0.01 * 10_000  # three forward passes are a training step: below 1% of it
    # Of 300 steps half may be a ramp, which is all that is tried unless it goes on to the end.
    assert sum(t < 150 for t, _ in tried) / 3 < 0.08 * 300
    assert sum(5 <= t < 150 for t, _ in tried) <= 0.2 * 150


def test_after_the_target_nothing_is_tried_unless_asked_to_the_end():
    for until, asks in (("target", False), ("end", True)):
        guide = GuidedWarmup(1e-3, 1000, until=until)
        lrs(guide, lambda t: fixed_critical_lr(0.5), 120)
        assert guide.ramp_end is not None
        assert guide.handed_over != asks
        trials = guide.num_trials
        lrs(guide, lambda t: fixed_critical_lr(1e-4), 400)
        assert (guide.num_trials > trials) == asks
        assert (guide.level < 1e-3) == asks  # to the end the peak may be lowered


def test_the_decay_multiplies_the_peak_and_does_not_lower_it():
    # η_c follows the learning rate down, as it does in training: at 3 η it is never in the way.
    guide = GuidedWarmup(1e-2, 600, lambda x: max(0.1, 1 - x / 500), until="end")
    made = []
    for t in range(600):
        made.append(guide.step(fixed_critical_lr(3 * made[-1] if t > 200 else 0.5)))
    assert guide.level == 1e-2
    assert made[-1] == pytest.approx(1e-3)


def test_a_decay_to_zero_ends_without_an_error():
    guide = GuidedWarmup(1e-2, 100, lambda x: 1 - x / 100, rate=0.2, until="end", every=1)
    made = lrs(guide, lambda t: fixed_critical_lr(0.5), 101)
    assert made[100] == pytest.approx(0.0, abs=1e-15)


def test_an_optimizer_with_a_warmup_of_its_own_is_held_to_what_it_bears_without_it():
    # GI-Adam at step t bears 1 / w_t times what AdamW does.
    plain, gi = GuidedWarmup(10.0, 1000), GuidedWarmup(10.0, 1000)
    for t in range(200):
        own = math.sqrt(1 - 0.999 ** (t + 1))
        a = plain.step(fixed_critical_lr(0.05))
        b = gi.step(fixed_critical_lr(0.05 / own), own_warmup=own)
        assert b == pytest.approx(a, rel=1.0)
    assert gi.critical_lr == pytest.approx(plain.critical_lr, rel=0.6)


def own_warmup(t, beta2=0.999):
    """GI-Adam's factor of step t and of those after it."""
    return lambda ahead: math.sqrt(1 - beta2 ** (t + 1 + ahead))


@pytest.mark.parametrize("decay", [lambda x: 1.0, lambda x: 1 - x / 300], ids=["constant", "linear"])
def test_an_own_warmup_is_counted_as_far_as_the_run_sees_of_it(decay):
    # √(1-β2^t) is .5 at step 300: nothing is made with a factor of 1.
    guide, made = GuidedWarmup(100.0, 300, decay), []
    for t in range(300):
        slope = 1.0 if t < 60 else -1.0
        losses = fixed_critical_lr(50.0 / own_warmup(t)(0))
        made.append(guide.step(losses, own_warmup(t), lambda lr, slope=slope: slope))

    def largest(end):
        return max(own_warmup(s)(0) * decay((s - end) * 300 / (300 - end)) for s in range(end, 300))

    turn, end = guide.turn_step, guide.ramp_end
    borne = [lr * own_warmup(t)(0) for t, lr in enumerate(made)]
    assert guide.turn_lr == pytest.approx(borne[turn] / largest(turn), rel=0.02)
    assert guide.level == guide.peak == 2.25 * guide.turn_lr
    assert max(borne[end:]) == pytest.approx(2.25 * guide.turn_lr * largest(end), rel=0.02)


def test_a_wait_that_half_of_the_run_ended_leaves_the_level_alone():
    guide, levels = GuidedWarmup(100.0, 2000, until="end"), []
    for t in range(1400):
        slope = 1.0 if t < 50 else -1.0
        w = own_warmup(t) if guide.needs_slope or guide.needs_loss or guide.needs_trial else 1.0  # as the Trainer asks
        losses = fixed_critical_lr(50.0 / own_warmup(t)(0), plateau(min(t, 600)))
        guide.step(losses, w, lambda lr, slope=slope: slope)
        levels.append(guide.level)
    assert guide.still_waits
    assert guide.ramp_end == 999
    assert set(levels[999:]) == {levels[999]}


def test_an_own_warmup_that_is_short_beside_the_run_counts_in_full():
    ahead, alone = (GuidedWarmup(100.0, 100_000) for _ in range(2))
    for t in range(100):
        w, slope = own_warmup(t), 1.0 if t < 60 else -1.0
        losses = fixed_critical_lr(50.0 / w(0))
        ahead.step(losses, w, lambda lr, slope=slope: slope)
        alone.step(losses, w(0), lambda lr, slope=slope: slope)
    assert ahead.turn_lr == pytest.approx(alone.turn_lr, rel=0.01)


def test_a_loss_that_is_not_finite_has_risen():
    guide = GuidedWarmup(1.0, 1000, every=1)
    guide.step(fixed_critical_lr(0.5))
    before = guide.critical_lr
    guide.step(lambda lr: 2.0 if lr == 0 else math.nan)
    assert guide.critical_lr == pytest.approx(before / 1.5)
    guide.step(lambda lr: math.nan)
    assert guide.critical_lr == pytest.approx(before / 1.5**2)


def test_a_first_loss_that_is_not_finite_is_an_error():
    for guide in (GuidedWarmup(1.0, 9), PersistentCatapult(1.0, 9)):
        with pytest.raises(RuntimeError, match="training loss of step 1 is nan before any update"):
            guide.step(lambda lr: math.nan)


@pytest.mark.parametrize("make", [GuidedWarmup, PersistentCatapult])
@pytest.mark.parametrize("curve", [lambda lr: 1.0 + lr, lambda lr: 1.0 + (lr > 0)], ids=["uphill", "another loss"])
def test_nothing_is_trained_on_a_first_search_that_found_nothing(make, curve):
    guide = make(1.0, 200)
    with pytest.raises(
        RuntimeError, match=r"no learning rate from .* keeps the loss of the first step .*set warmup=lin"
    ):
        guide.step(curve)


@pytest.mark.parametrize("curve", [lambda lr: 1.0, lambda lr: 1.0 - lr], ids=["flat", "down"])
def test_a_first_batch_without_a_critical_lr_still_gives_a_learning_rate(curve):
    guide = GuidedWarmup(1.0, 200)
    made = lrs(guide, lambda t: curve, 50)
    assert all(0 < lr <= 1.0 for lr in made)


@pytest.mark.parametrize("falls", [0.0, 0.003])
@pytest.mark.parametrize("turn", [30, 200])
@pytest.mark.parametrize("stop", [1, 37, 42, 77, 118])
@pytest.mark.parametrize(
    "make",
    [
        lambda: GuidedWarmup(0.02, 120, lambda x: 1 - x / 240, until="end"),
        lambda: GuidedWarmup(1.0, 120, lambda x: 1 - x / 240),
        lambda: GuidedWarmup(1.0, 400, lambda x: 1 - x / 800, init_lr=0.005, rate=0.012),
        lambda: PersistentCatapult(1.0, 120),
    ],
)
def test_a_saved_state_goes_on_exactly(make, stop, turn, falls):
    def step(guide, t):
        critical = 0.05 + 0.3 * math.exp(-t / 20) + 1e-4 * (t % 3)
        losses = fixed_critical_lr(critical, start=9 - 0.1 * min(t, turn) - falls * t)
        return guide.step(losses, 1.0, lambda lr: 1.0 if t < turn else -1.0)

    whole = make()
    num_steps = whole.num_training_steps
    expected = [step(whole, t) for t in range(num_steps)]
    first = make()
    made = [step(first, t) for t in range(stop)]
    again = make()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    made += [step(again, t) for t in range(stop, num_steps)]
    assert made == expected
    assert str(again.state_dict()) == str(whole.state_dict())  # a NaN is not equal to itself


def test_a_state_of_another_class_is_refused():
    with pytest.raises(ValueError, match="the state must be of a GuidedWarmup"):
        GuidedWarmup(1.0, 9).load_state_dict(PersistentCatapult(1.0, 9).state_dict())


def test_persistent_catapult_goes_from_search_to_search_when_the_loss_is_below_where_it_was():
    # Algorithm 3 by hand: at θ* with L = 2, η_c = 0.1; the loss rises for two steps; below 2 it searches again.
    guide = PersistentCatapult(1.0, 1000, init_lr=1e-3, delta=1e-3)
    script = [(2.0, 0.1), (2.5, 9.0), (2.2, 9.0), (1.9, 0.4), (1.95, 9.0), (1.8, 2.0), (1.7, 9.0)]
    made = [guide.step(fixed_critical_lr(critical, start)) for start, critical in script]
    assert made[:3] == pytest.approx([0.1] * 3, rel=0.15)
    assert made[0] >= 0.1  # the upper end of the bracket: it induces a catapult
    assert made[3:5] == pytest.approx([0.4] * 2, rel=0.15)
    assert made[5:] == [1.0, 1.0]
    assert guide.num_searches == 3
    assert guide.ramp_end == 5
    assert not guide.needs_trial
    trials = guide.num_trials
    guide.step(fixed_critical_lr(0.01, 0.1))
    assert guide.num_trials == trials


BAD = [
    (lambda: GuidedWarmup(0.0, 9), "target_lr must be positive and finite, got 0.0"),
    (lambda: GuidedWarmup(1.0, 0), "num_training_steps must be at least 1, got 0"),
    (lambda: GuidedWarmup(1.0, 9, rate=1.5), "rate must be positive and at most 1 and finite, got 1.5"),
    (lambda: GuidedWarmup(1.0, 9, kappa=-1.0), "kappa must be positive and finite, got -1.0"),
    (lambda: GuidedWarmup(1.0, 9, init_lr=math.nan), "init_lr must be positive and finite, got nan"),
    (lambda: GuidedWarmup(1.0, 9, every=0), "every must be at least 1, got 0"),
    (lambda: GuidedWarmup(1.0, 9, until="noon"), "until must be .* got 'noon'"),
    (lambda: PersistentCatapult(1.0, 9, delta=0.0), "delta must be positive and finite, got 0.0"),
    (lambda: PersistentCatapult(1.0, 9, init_lr=-1.0), "init_lr must be positive and finite, got -1.0"),
    (lambda: GuidedWarmup(1.0, 9).step(lambda lr: 1.0, own_warmup=0.0), "own_warmup must be above 0 .* got 0.0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
