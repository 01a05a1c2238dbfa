import io
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_warmup.warmup.schedule import ExponentialSchedule, SteeredSchedule, WarmupSchedule, checkpoint_of, steps_saved

N, T_WRM, TARGET = 100, 20, 0.5
# Every LambdaLR that transformers makes, with its extra arguments.
SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-3},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.01},
    "warmup_stable_decay": {"num_decay_steps": 30},
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def schedule(name, target=TARGET, warmup_steps=T_WRM, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], target)
    kwargs = {**SCHEDULES[name], **options}
    return optimizer, get_scheduler(name, optimizer, warmup_steps, N, scheduler_specific_kwargs=kwargs)


def user_schedule(factor):
    return LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], TARGET), factor)


def run(optimizer, scheduler, num_steps=N):
    lrs = []
    for _ in range(num_steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [lrs[-1]]
        optimizer.step()
        scheduler.step()
    assert len(lrs) == num_steps
    return lrs


@every_schedule
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.03])
def test_warmup_follows_the_equation_and_the_decay_is_stretched(name, fraction):
    _, plain = schedule(name)
    factor = plain.lr_lambdas[0]
    optimizer, scheduler = schedule(name)
    warmup = WarmupSchedule(scheduler, T_WRM, N)
    assert warmup.init_fraction is None
    warmup.start(fraction)
    lrs = run(optimizer, scheduler)

    reach = T_WRM * (1 - fraction)
    assert lrs[0] == pytest.approx(fraction * TARGET, rel=1e-12)
    for t, lr in enumerate(lrs):
        ramp = fraction * TARGET + TARGET * t / T_WRM
        stretched = factor(T_WRM + (t - reach) * (N - T_WRM) / (N - reach))
        assert lr == pytest.approx(ramp if ramp < TARGET else TARGET * stretched, rel=1e-12, abs=1e-15)
    # The last step of the decay is where it was.
    assert scheduler.get_last_lr()[0] == pytest.approx(TARGET * factor(N), rel=1e-6, abs=1e-9)


@every_schedule
def test_until_the_start_nothing_changes(name):
    plain = run(*schedule(name))
    optimizer, scheduler = schedule(name)
    WarmupSchedule(scheduler, T_WRM, N)
    assert run(optimizer, scheduler) == plain


@every_schedule
@pytest.mark.parametrize("stop", [1, 10, 40], ids=["first", "in warmup", "in decay"])
def test_a_resumed_run_has_the_learning_rates_of_an_unbroken_one(name, stop):
    optimizer, scheduler = schedule(name)
    WarmupSchedule(scheduler, T_WRM, N).start(0.1)
    unbroken = run(optimizer, scheduler)

    optimizer, scheduler = schedule(name)
    WarmupSchedule(scheduler, T_WRM, N).start(0.1)
    before = run(optimizer, scheduler, stop)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    optimizer, scheduler = schedule(name)
    warmup = WarmupSchedule(scheduler, T_WRM, N)
    for target, state in zip((optimizer, scheduler), saved, strict=True):
        target.load_state_dict(state)
    assert warmup.init_fraction == 0.1
    assert before + run(optimizer, scheduler, N - stop) == unbroken


def test_a_late_start_begins_where_it_stands():
    # Overflows under a GradScaler: the search waits for a finite gradient.
    optimizer, scheduler = schedule("linear")
    warmup = WarmupSchedule(scheduler, T_WRM, N)
    run(optimizer, scheduler, 3)
    warmup.start(0.1)
    lrs = run(optimizer, scheduler, N - 3)
    assert lrs[:5] == pytest.approx([TARGET * (0.1 + t / T_WRM) for t in range(5)])
    assert max(lrs) == pytest.approx(TARGET, rel=0.01)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


def test_an_init_lr_at_or_above_the_target_means_no_warmup():
    for fraction in (1.0, 7.0):
        optimizer, scheduler = schedule("linear")
        WarmupSchedule(scheduler, T_WRM, N).start(fraction)
        assert run(optimizer, scheduler) == pytest.approx([TARGET * (1 - t / N) for t in range(N)])


def test_groups_keep_their_own_targets():
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": torch.tensor(0.02)}], foreach=False
    )
    tensor = optimizer.param_groups[1]["lr"]
    scheduler = get_scheduler("cosine", optimizer, T_WRM, N)
    WarmupSchedule(scheduler, T_WRM, N).start(0.1)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.05, 0.002])
    assert optimizer.param_groups[1]["lr"] is tensor


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear"])
def test_warmup_of_the_whole_run_is_allowed(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], TARGET)
    scheduler = get_scheduler(name, optimizer, N, N)
    WarmupSchedule(scheduler, N, N).start(0.1)
    lrs = run(optimizer, scheduler)
    assert lrs[50] == pytest.approx(TARGET * 0.6)
    assert lrs[95] == TARGET


def test_wrapping_again_does_not_nest():
    _, scheduler = schedule("cosine")
    WarmupSchedule(scheduler, T_WRM, N).start(0.5)
    warmup = WarmupSchedule(scheduler, T_WRM, N)
    assert warmup.init_fraction is None
    assert scheduler.lr_lambdas[0](T_WRM // 2) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_react_to_the_loss_are_refused(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], TARGET)
    scheduler = get_scheduler(name, optimizer)
    with pytest.raises(ValueError, match="needs a schedule that is a factor per step"):
        WarmupSchedule(scheduler, T_WRM, N)


def test_a_schedule_that_peaks_elsewhere_is_refused():
    _, scheduler = schedule("linear")
    with pytest.raises(ValueError, match="got 0.8.* at warmup_steps=30"):
        WarmupSchedule(scheduler, T_WRM + 10, N)
    for steps in (0, N + 1):
        with pytest.raises(ValueError, match=f"warmup_steps must be between 1 and 100 steps, got {steps}"):
            WarmupSchedule(scheduler, steps, N)


@pytest.mark.parametrize("make", [ExponentialSchedule, SteeredSchedule])
def test_a_factor_that_cannot_be_stretched_is_refused(make):
    own_warmup = user_schedule(lambda step: min(1, step / 6) * (1 - step / N))
    with pytest.raises(ValueError, match="must not rise, .* got 0 at step 0 and 0.9"):
        make(own_warmup, N)
    table = [1.0] * (N + 1)
    with pytest.raises(ValueError, match="must accept a fractional step, .* got TypeError at step 0.5"):
        make(user_schedule(lambda step: table[step]), N)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
@every_schedule
def test_a_short_schedule_of_transformers_is_stretched(name, num_steps):
    made = torch.optim.SGD([torch.zeros(1, requires_grad=True)], TARGET)
    options = {**SCHEDULES[name], **({"num_decay_steps": 1} if name == "warmup_stable_decay" else {})}
    SteeredSchedule(get_scheduler(name, made, 0, num_steps, scheduler_specific_kwargs=options), num_steps)


def test_a_linear_warmup_of_whole_steps_only_is_refused():
    table = [min(1.0, step / T_WRM) for step in range(N + 1)]
    with pytest.raises(ValueError, match="must accept a fractional step"):
        WarmupSchedule(user_schedule(lambda step: table[step]), T_WRM, N)


def test_a_schedule_knows_the_warmup_of_its_checkpoint():
    before, plain, after = (user_schedule(lambda step: 1.0) for _ in range(3))
    SteeredSchedule(before, N, "guided").steer(0.1, {})
    assert [checkpoint_of(s) for s in (before, plain, object())] == ["guided", None, None]
    ExponentialSchedule(after, N)
    assert checkpoint_of(after) == "exponential"
    after.load_state_dict(before.state_dict())
    assert checkpoint_of(after) == "guided"


@pytest.mark.parametrize("fraction", [0.0, -1.0, math.nan, math.inf])
def test_bad_fraction_is_named(fraction):
    _, scheduler = schedule("linear")
    with pytest.raises(ValueError, match="init_fraction must be positive and finite, got"):
        WarmupSchedule(scheduler, T_WRM, N).start(fraction)


def test_steps_saved_counts_two_forward_passes_as_a_step():
    assert steps_saved(0.05, 0.5, 200, 10) == pytest.approx(200 * 0.1 - 5)
    assert steps_saved(0.05, 0.5, 20, 10) == pytest.approx(2 - 5)
    assert steps_saved(7.0, 0.5, 200) == 200


@every_schedule
def test_an_exponential_ramp_is_followed_by_the_whole_decay(name):
    optimizer, scheduler = schedule(name, warmup_steps=0)
    factor = scheduler.lr_lambdas[0]
    ramp = ExponentialSchedule(scheduler, N)
    assert not ramp.started
    ramp.start(0.01, 1.25)
    reach = math.log(100) / math.log(1.25)
    for t, lr in enumerate(run(optimizer, scheduler)):
        stretched = factor((t - reach) * N / (N - reach)) if t >= reach else None
        assert lr == pytest.approx(TARGET * (0.01 * 1.25**t if t < reach else stretched), rel=1e-12, abs=1e-15)


def steered(t, warmup):
    """A controller that goes up to half of the target and hands over at step 10."""
    if t <= 10:
        warmup.steer(0.05 * t, {"t": t, "seen": [1.0, 2.0]}, ramp_end=10 if t == 10 else None)


@every_schedule
@pytest.mark.parametrize("stop", [0, 4, 10, 11, 60])
def test_a_steered_schedule_hands_over_and_resumes_exactly(name, stop):
    def run_from(first, last, warmup, optimizer):
        lrs = []
        for t in range(first, last):
            steered(t, warmup)
            lrs.append(optimizer.param_groups[0]["lr"])
            assert warmup.scheduler.get_last_lr() == [lrs[-1]]
            optimizer.step()
            warmup.scheduler.step()
        return lrs

    optimizer, scheduler = schedule(name, warmup_steps=0)
    factor, warmup = scheduler.lr_lambdas[0], SteeredSchedule(scheduler, N)
    assert warmup.controller == {}
    assert warmup.decay(30.5) == factor(30.5)
    lrs = run_from(0, stop, warmup, optimizer)
    file = io.BytesIO()
    torch.save([scheduler.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer, scheduler = schedule(name, warmup_steps=0)
    warmup = SteeredSchedule(scheduler, N)
    scheduler.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert warmup.started == (stop > 0)
    assert warmup.handed_over == (stop > 10)
    if 0 < stop <= 10:
        assert warmup.controller == {"t": stop - 1, "seen": [1.0, 2.0]}
    lrs += run_from(stop, N, warmup, optimizer)
    expected = [0.05 * t if t < 10 else 0.5 * factor((t - 10) * N / (N - 10)) for t in range(N)]
    assert lrs == pytest.approx([TARGET * f for f in expected], abs=1e-15)


def test_bad_steering_is_named():
    _, scheduler = schedule("linear", warmup_steps=0)
    with pytest.raises(ValueError, match="fraction must be at least 0 and finite, got nan"):
        SteeredSchedule(scheduler, N).steer(math.nan, {})
    with pytest.raises(ValueError, match="growth must be above 1 and finite, got 1.0"):
        ExponentialSchedule(scheduler, N).start(0.1, 1.0)
