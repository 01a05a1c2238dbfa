"""A rule's learning rates in a schedule of transformers or of one's own, and the decay behind them."""

import io
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_warmup import GuidedWarmup, LinearWarmup, PersistentCatapult, WarmupSchedule
from hf_warmup.warmup import LossAdaptiveWarmup
from hf_warmup.warmup.schedule import checkpoint_of

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


class Step:
    """Step t of a training whose loss falls, and whose critical learning rate rises, from step to step."""

    def __init__(self, t):
        self.t = t

    def loss(self, lr=0.0):
        return 6 - 0.01 * self.t + 0.4 * lr * (lr - 0.04 * (self.t + 1))

    def slope(self):
        return 0.2

    momentum_slope = slope


# Each with the warmup_steps of the schedule that it takes the place of.
RULES = {
    "linear": (lambda: LinearWarmup(N, TARGET, T_WRM, init_lr=0.05), T_WRM),
    "linear, searched": (lambda: LinearWarmup(N, TARGET, T_WRM, init_lr="catapult"), T_WRM),
    "guided": (lambda: GuidedWarmup(N, TARGET), 0),
    "loss adaptive": (lambda: LossAdaptiveWarmup(N, TARGET, fraction=0.02), 0),
    "persistent": (lambda: PersistentCatapult(N, TARGET, init_lr=1e-3), 0),
}
every_rule = pytest.mark.parametrize(("make", "warmup_steps"), RULES.values(), ids=RULES)


def sgd(target=TARGET):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], target)


def schedule(name, warmup_steps=T_WRM):
    return get_scheduler(name, sgd(), warmup_steps, N, scheduler_specific_kwargs=SCHEDULES[name])


def user_schedule(factor):
    return LambdaLR(sgd(), factor)


def linear(init_lr=0.05, num_training_steps=N, warmup_steps=T_WRM):
    return LinearWarmup(num_training_steps, TARGET, warmup_steps, init_lr=init_lr)


def run(scheduler, decide=lambda t: None, first=0, last=N):
    """The learning rates of those steps."""
    lrs = []
    for t in range(first, last):
        decide(t)
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [lrs[-1]]
        scheduler.optimizer.step()
        scheduler.step()
    return lrs


def run_warmup(warmup, rule, first=0, last=N):
    return run(warmup.scheduler, lambda t: warmup.warm_up(rule, Step(t)), first, last)


def resume(warmup, saved):
    """`warmup`, from a checkpoint of the other."""
    from_, to = ((made.scheduler, made.scheduler.optimizer) for made in (saved, warmup))
    file = io.BytesIO()
    torch.save([made.state_dict() for made in from_], file)
    file.seek(0)
    for made, state in zip(to, torch.load(file, weights_only=True), strict=True):
        made.load_state_dict(state)
    warmup.check_state()
    return warmup


@every_schedule
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.03])
def test_linear_warmup_follows_the_equation_and_the_decay_is_stretched(name, fraction):
    factor = schedule(name).lr_lambdas[0]
    warmup = WarmupSchedule(schedule(name), N, T_WRM)
    lrs = run_warmup(warmup, linear(fraction * TARGET))

    reach = T_WRM * (1 - fraction)
    assert lrs[0] == pytest.approx(fraction * TARGET, rel=1e-12)
    for t, lr in enumerate(lrs):
        ramp = fraction * TARGET + TARGET * t / T_WRM
        stretched = factor(T_WRM + (t - reach) * (N - T_WRM) / (N - reach))
        assert lr == pytest.approx(ramp if ramp < TARGET else TARGET * stretched, rel=1e-12, abs=1e-15)
    # The last step of the decay is where it was.
    assert warmup.scheduler.get_last_lr()[0] == pytest.approx(TARGET * factor(N), rel=1e-6, abs=1e-9)


@every_schedule
@pytest.mark.parametrize("learning_rate", [TARGET, 2 * TARGET], ids=["of the schedule", "found by the run"])
def test_a_rule_that_ends_at_a_step_is_followed_by_the_whole_decay_of_its_last_learning_rate(name, learning_rate):
    scheduler, rule = schedule(name, warmup_steps=0), GuidedWarmup(N, learning_rate)
    factor = scheduler.lr_lambdas[0]
    lrs = run_warmup(WarmupSchedule(scheduler, N), rule)
    alone, end = GuidedWarmup(N, learning_rate), rule.num_steps - 1
    assert 5 < end < N / 2
    for t, lr in enumerate(lrs):
        stretched = learning_rate * factor((t - end) * N / (N - end)) if t >= end else None
        assert lr == pytest.approx(alone(Step(t)) if t < end else stretched, rel=1e-12, abs=1e-15)
    assert scheduler.get_last_lr()[0] == pytest.approx(learning_rate * factor(N), rel=1e-6, abs=1e-9)


@every_schedule
@pytest.mark.parametrize("warmup_steps", [0, T_WRM])
def test_until_the_first_decision_nothing_changes(name, warmup_steps):
    plain, scheduler = run(schedule(name, warmup_steps)), schedule(name, warmup_steps)
    warmup = WarmupSchedule(scheduler, N, warmup_steps)
    assert (warmup.started, warmup.ended, warmup.state) == (False, False, {})
    assert run(scheduler) == plain


@every_schedule
@every_rule
@pytest.mark.parametrize("stop", [0, 1, 3, "end", "end + 1", 60])
def test_a_resumed_run_has_the_learning_rates_of_an_unbroken_one(name, make, warmup_steps, stop):
    def made():
        return WarmupSchedule(schedule(name, warmup_steps), N, warmup_steps), make()

    warmup, rule = made()
    unbroken, end = run_warmup(warmup, rule), rule.num_steps
    assert 3 < end < N / 2
    stop = {"end": end - 1, "end + 1": end}.get(stop, stop)

    stopped, rule = made()
    before = run_warmup(stopped, rule, last=stop)
    warmup, rule = made()
    resume(warmup, stopped)
    assert (warmup.started, warmup.ended, warmup.state) == (stop > 0, stop >= end, stopped.state)
    assert before + run_warmup(warmup, rule, first=stop) == unbroken
    assert rule.num_steps == (end if stop < end else 0)


def test_a_late_start_begins_where_it_stands():
    # Overflows under a GradScaler: the search waits for a finite gradient.
    warmup, rule = WarmupSchedule(schedule("linear"), N, T_WRM), linear()
    run(warmup.scheduler, last=3)
    lrs = run_warmup(warmup, rule, first=3)
    assert lrs[:5] == pytest.approx([TARGET * (0.1 + t / T_WRM) for t in range(5)])
    assert max(lrs) == pytest.approx(TARGET, rel=0.01)
    assert warmup.scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)
    assert warmup.num_steps == N - 3


@every_rule
def test_a_skipped_optimizer_step_makes_no_second_decision(make, warmup_steps):
    # Under a GradScaler that finds an overflow neither the optimizer nor the schedule steps.
    def made():
        return WarmupSchedule(schedule("linear", warmup_steps), N, warmup_steps)

    def decide(t):
        warmup.warm_up(rule, Step(t))
        made, held = rule.num_steps, warmup.scheduler.get_last_lr()
        assert warmup.warm_up(rule, Step(t + 50)) is None
        assert (rule.num_steps, warmup.scheduler.get_last_lr()) == (made, held)

    lrs, warmup, rule = run_warmup(made(), make()), made(), make()
    assert run(warmup.scheduler, decide, last=3) == lrs[:3]
    decide(3)
    warmup, rule = resume(made(), warmup), make()  # nor does it behind a checkpoint
    assert run(warmup.scheduler, decide, first=3) == lrs[3:]


def test_an_init_lr_at_the_target_means_no_warmup():
    lrs = run_warmup(WarmupSchedule(schedule("linear"), N, T_WRM), linear(TARGET))
    assert lrs == pytest.approx([TARGET * (1 - t / N) for t in range(N)])


def test_groups_keep_their_own_targets():
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": torch.tensor(0.02)}], foreach=False
    )
    tensor = optimizer.param_groups[1]["lr"]
    warmup = WarmupSchedule(get_scheduler("cosine", optimizer, T_WRM, N), N, T_WRM)
    assert warmup.target == 0.5
    assert warmup.warm_up(linear()) == 0.05
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.05, 0.002])
    assert optimizer.param_groups[1]["lr"] is tensor


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear"])
def test_warmup_of_the_whole_run_is_allowed(name):
    scheduler = get_scheduler(name, sgd(), N, N)
    lrs = run_warmup(WarmupSchedule(scheduler, N, N), linear(warmup_steps=N))
    assert lrs[50] == pytest.approx(TARGET * 0.6)
    assert lrs[95] == TARGET


def test_wrapping_again_does_not_nest():
    scheduler = schedule("cosine")
    WarmupSchedule(scheduler, N, T_WRM).warm_up(linear(0.25))
    warmup = WarmupSchedule(scheduler, N, T_WRM)
    assert not warmup.started
    assert scheduler.lr_lambdas[0](T_WRM // 2) == pytest.approx(0.5)


def test_steps_that_were_made_with_another_schedule_are_left_out():
    warmup = WarmupSchedule(schedule("linear", warmup_steps=0), N)
    warmup.skip(40)
    assert warmup.num_steps == 60
    assert warmup.scheduler.get_last_lr() == pytest.approx([0.6 * TARGET])
    rule = GuidedWarmup(warmup.num_steps, TARGET)
    lrs, end = run_warmup(warmup, rule, first=40), rule.num_steps - 1
    # The decay, made for all steps, has those that are left.
    assert lrs[end:] == pytest.approx([TARGET * (1 - t / (60 - end)) for t in range(60 - end)], rel=1e-9)
    with pytest.raises(ValueError, match="num_steps must be at most 100, got 101"):
        warmup.skip(101)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_react_to_the_loss_are_refused(name):
    with pytest.raises(ValueError, match="needs a schedule that is a factor per step"):
        WarmupSchedule(get_scheduler(name, sgd()), N, T_WRM)


def test_a_schedule_that_peaks_elsewhere_is_refused():
    with pytest.raises(ValueError, match="got 0.8.* at warmup_steps=30"):
        WarmupSchedule(schedule("linear"), N, T_WRM + 10)
    for steps in (-1, N + 1):
        with pytest.raises(ValueError, match=f"warmup_steps must be between 0 and 100 steps, got {steps}"):
            WarmupSchedule(schedule("linear"), N, steps)


TABLE = [min(1.0, step / T_WRM) for step in range(N + 1)]


@pytest.mark.parametrize(
    ("factor", "warmup_steps", "message"),
    [
        (lambda step: min(1, step / 6) * (1 - step / N), 0, "must not rise, .* got 0 at step 0 and 0.9"),
        (lambda step: [1.0][step * 0], 0, "must accept a fractional step, .* got TypeError at step 0.5"),
        (lambda step: TABLE[step], T_WRM, "must accept a fractional step, .* got TypeError at step 20.5"),
        (lambda step: {0: 1.0}[step], 0, "must accept a fractional step, .* got KeyError at step 0.5"),
    ],
)
def test_a_factor_that_cannot_be_stretched_is_refused(factor, warmup_steps, message):
    with pytest.raises(ValueError, match=message):
        WarmupSchedule(user_schedule(factor), N, warmup_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
@every_schedule
def test_a_short_schedule_of_transformers_is_stretched(name, num_steps):
    options = {**SCHEDULES[name], **({"num_decay_steps": 1} if name == "warmup_stable_decay" else {})}
    WarmupSchedule(get_scheduler(name, sgd(), 0, num_steps, scheduler_specific_kwargs=options), num_steps)


def test_a_schedule_knows_the_warmup_of_its_checkpoint():
    before, plain, after = (user_schedule(lambda step: 1.0) for _ in range(3))
    WarmupSchedule(before, N, kind="guided").warm_up(GuidedWarmup(N, TARGET), Step(0))
    assert [checkpoint_of(s) for s in (before, plain, object())] == ["guided", None, None]
    warmup = WarmupSchedule(after, N, kind="persistent")
    assert checkpoint_of(after) == "persistent"
    after.load_state_dict(before.state_dict())
    assert checkpoint_of(after) == "guided"
    with pytest.raises(ValueError, match="the state must be of a PersistentCatapult"):
        warmup.warm_up(PersistentCatapult(N, TARGET), Step(1))


def test_a_rule_with_other_options_than_those_of_the_checkpoint_is_refused_by_name():
    before, after = (WarmupSchedule(schedule("linear"), N, T_WRM) for _ in range(2))
    run_warmup(before, linear(0.05), last=1)
    resume(after, before)
    with pytest.raises(ValueError, match="^init_lr must be 0.05 as in the checkpoint, got 0.1"):
        after.warm_up(linear(0.1))
    assert after.warm_up(linear(0.05)) == pytest.approx(0.075)


class Wrong:
    """A rule that has no number to give."""

    kind, ended_by, overrun = "wrong", None, 0.0

    def __init__(self, lr):
        self.lr = lr

    def __call__(self, step):
        return self.lr

    def state_dict(self):
        return {}


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf, None, "x"])
def test_a_rule_that_has_no_number_to_give_is_refused_and_changes_nothing(lr):
    warmup = WarmupSchedule(schedule("linear"), N, T_WRM)
    with pytest.raises(ValueError, match=f"the learning rate of the rule must be .*, got '?{lr}"):
        warmup.warm_up(Wrong(lr))
    assert not warmup.started
    assert run_warmup(warmup, linear())[0] == 0.05


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last_epoch", -1),
        ("base_lrs", [math.nan]),
        ("first_step", 5),
        ("decided", 5),
        ("fraction", -0.5),
        ("ramp_end", 7),
        ("ramp_end", math.nan),
        ("rule", [1.0]),
    ],
)
def test_numbers_of_a_checkpoint_that_no_run_has_left_are_refused_by_name(name, value):
    before, after = (WarmupSchedule(schedule("linear"), N, T_WRM) for _ in range(2))
    run_warmup(before, linear(), last=4)
    state = before.scheduler.state_dict()
    (state if name in state else state["lr_lambdas"][0])[name] = value
    after.scheduler.load_state_dict(state)
    with pytest.raises(ValueError, match=f"{name} must be"):
        after.check_state()


@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_no_factor_is_asked_for_a_step_behind_the_last(warmup_steps):
    asked = []

    def factor(step):
        asked.append(step)
        return 1.0 if step <= warmup_steps else math.sqrt((num_steps - step) / (num_steps - warmup_steps))

    for num_steps in range(20, 120, 7):
        for end in range(1, num_steps):
            optimizer = sgd()
            scheduler = LambdaLR(optimizer, factor)
            schedule = WarmupSchedule(scheduler, num_steps, warmup_steps)
            if warmup_steps:
                rule = LinearWarmup(num_steps, TARGET, warmup_steps, init_lr=TARGET * (1 - end / num_steps))
            else:
                rule = GuidedWarmup(num_steps, TARGET * end / num_steps, ramp_steps=3 * end)
            for t in range(num_steps):
                schedule.warm_up(rule, Step(t))
                optimizer.step(), scheduler.step()
            assert schedule.ended
            assert scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-6)
            assert max(asked) <= num_steps
            asked.clear()
