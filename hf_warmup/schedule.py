"""Warmup from η_init: the learning rate at step t, then whatever decay the user chose.

Warmup from an initial learning rate η_init to the target η_trgt has the slope of warmup from 0 [1]:

    η_t = min(η_trgt, η_init + η_trgt t / T_wrm),    t = 0, 1, ...

so it reaches η_trgt after T_reach = T_wrm (1 - η_init / η_trgt) steps, T_wrm η_init / η_trgt before warmup
from 0 does. A search for η_init costs forward passes, of which [1] counts two as one step:

    T_save = T_wrm η_init / η_trgt - T_fp / 2.

A slope of (η_trgt - η_init) / T_wrm would save nothing.

`WarmupSchedule` does this to a schedule that exists: a `LambdaLR` whose factor f(t) rises from t = 0 to
f(T_wrm) = 1 and then decays until step N. The first T_reach steps follow the equation above, and the decay,
which had N - T_wrm steps, is stretched over the N - T_reach that are left:

    f(T_wrm + (t - T_reach) (N - T_wrm) / (N - T_reach)),    t >= T_reach,

so that training still ends at step N with the learning rate it would have had. The first step trains at
η_init, where most schedules waste it at 0.

Two more do without T_wrm. `ExponentialSchedule` is a ramp of a fixed growth per step r, η_t = η_init r^t, which
reaches η_trgt after T_reach = ln(η_trgt / η_init) / ln r steps, and then decays in the same way: f, made without
warmup, is stretched over the steps that are left. `SteeredSchedule` takes the learning rate of every step from
outside (a rule of `hf_warmup.warmup`).

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405, "η_init from the loss catapult".
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hf_warmup.numeric import number, positive, shown, whole


def decay_step(step: float, ramp_end: int, num_training_steps: int) -> float:
    """Where a decay made for all N steps stands if it began at t_r: (t - t_r) N / (N - t_r)."""
    return (step - ramp_end) * num_training_steps / max(1, num_training_steps - ramp_end)


_LOOKS = 20  # steps along a run where a factor is asked for, to see whether it rises


def steps_saved(init_lr: float, target_lr: float, warmup_steps: int, forward_passes: int = 0) -> float:
    """T_save = T_wrm η_init / η_trgt - T_fp / 2, negative where the search cost more than it saved.

    Args:
        init_lr: η_init.
        target_lr: η_trgt.
        warmup_steps: T_wrm, optimizer steps that warmup from 0 takes.
        forward_passes: T_fp, forward passes over one step's batch that were spent to find η_init.

    Returns:
        Optimizer steps.

    Raises:
        ValueError: If a number is none, or `target_lr` is not positive and finite.
    """
    part = number("init_lr", init_lr) / positive("target_lr", target_lr)
    return number("warmup_steps", warmup_steps) * min(1.0, part) - number("forward_passes", forward_passes) / 2


def checkpoint_of(scheduler: Any) -> str | None:
    """The warmup that a schedule has, or that the checkpoint had which was loaded into it.

    Args:
        scheduler: Of any kind.

    Returns:
        `linear`, `exponential` or the name of a controller; None if it has, and had, none of this module's.
    """
    # A factor that is no function is loaded by updating its __dict__, whatever wrote that.
    kinds = (getattr(factor, "__dict__", {}).get("warmup_kind") for factor in getattr(scheduler, "lr_lambdas", ()))
    return next((kind for kind in kinds if kind is not None), None)


def unchanged(scheduler: Any) -> Any:
    """Undo in a schedule what an earlier run may have left in its factors.

    Args:
        scheduler: Of any kind. The factor of a `LambdaLR` may be a function that lives as long as the process does.

    Returns:
        The same object.
    """
    if isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = [f.inner if isinstance(f, _Factor) else f for f in scheduler.lr_lambdas]
        for factor in scheduler.lr_lambdas:
            getattr(factor, "__dict__", {}).pop("warmup_kind", None)
    return scheduler


def warms_up(scheduler: Any, num_training_steps: int) -> bool:
    """Whether a schedule has a warmup of its own.

    Args:
        scheduler: Of any kind; of one that is no `LambdaLR` nothing is known.
        num_training_steps: N.

    Returns:
        Whether a factor rises.
    """
    factors = scheduler.lr_lambdas if isinstance(scheduler, LambdaLR) else []
    return any(_rise(factor, num_training_steps) is not None for factor in factors)


def _rise(factor: Callable[[Any], float], num_training_steps: int) -> int | None:
    """A step at which the factor is larger than at the first one; None if it never is."""
    highest = max(((num_training_steps - 1) * k // _LOOKS for k in range(_LOOKS + 1)), key=factor)
    # Not 1: cosine_warmup_with_min_lr is at its peak before its first step.
    return highest if factor(0) < 0.9 * factor(highest) else None


def _check_fraction(factor: Callable[[Any], float], step: float) -> None:
    try:
        factor(step)
    except (TypeError, LookupError) as error:
        raise ValueError(
            "the schedule's factor must accept a fractional step, as its decay is stretched, got "
            f"{type(error).__name__} at step {step}: {error}"
        ) from error


class _Changed:
    """An existing `LambdaLR`, changed in place by factors that wrap its own; it stays the user's object.

    What the factors know is part of the schedule's `state_dict`, so a run that resumes goes on exactly.
    """

    _factor: type["_Factor"]
    _factors: list[Any]

    def __init__(self, scheduler: LRScheduler, num_training_steps: int, *args: Any) -> None:
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"warmup needs a schedule that is a factor per step (LambdaLR), got {type(scheduler).__name__}: "
                "one that reacts to the loss, or has a state of its own, has no factor to warm up"
            )
        self.scheduler = unchanged(scheduler)
        self.num_training_steps = num_training_steps = whole("num_training_steps", num_training_steps, 1)
        self._check(scheduler.lr_lambdas)
        self._factors = [self._factor(f, num_training_steps, *args) for f in scheduler.lr_lambdas]
        scheduler.lr_lambdas = list(self._factors)

    def _check(self, factors: list[Callable[[Any], float]]) -> None:
        """Refuse factors that are no decay: they are stretched, behind a warmup of ours."""
        for factor in factors:
            _check_fraction(factor, 0.5)
            highest = _rise(factor, self.num_training_steps)
            if highest is not None:
                raise ValueError(
                    f"the schedule's factor must not rise, as this warmup needs one without a warmup of its own, got "
                    f"{factor(0):.4g} at step 0 and {factor(highest):.4g} at {highest}"
                )

    @property
    def started(self) -> bool:
        """Whether warmup has started, in this run or in the one that it resumes."""
        return self._factors[0].started

    @property
    def made_with(self) -> dict[str, Any]:
        """The options of the warmup, as plain values; those of the checkpoint once one is loaded."""
        return self._factors[0].made_with

    @made_with.setter
    def made_with(self, options: dict[str, Any]) -> None:
        for factor in self._factors:
            factor.made_with = options

    def check_state(self) -> None:
        """Refuse numbers of a checkpoint that no run has left.

        Raises:
            ValueError: With the number's name.
        """
        now = whole("last_epoch", self.scheduler.last_epoch, 0)
        for base in self.scheduler.base_lrs:
            if not 0 <= number("base_lrs", base) < math.inf:
                raise ValueError(f"base_lrs must be at least 0 and finite, got {base}")
        for factor in self._factors:
            factor.check_state(now)

    def skip(self, num_steps: int) -> None:
        """Go on after that many steps, which were made with another schedule: warmup has the rest of the run.

        Args:
            num_steps: From the start of the run. Before `start`, or the first `steer`.

        Raises:
            ValueError: If they are not between 0 and `num_training_steps`.
        """
        if whole("num_steps", num_steps, 0) > self.num_training_steps:
            raise ValueError(f"num_steps must be at most {self.num_training_steps}, got {num_steps}")
        self.scheduler.last_epoch = num_steps
        for factor in self._factors:
            factor.first_step = num_steps
        self._apply()

    def _apply(self) -> None:
        """Give the step that comes next the learning rate that the factors have now."""
        now = self.scheduler.last_epoch
        lrs = [float(base) * f(now) for f, base in zip(self._factors, self.scheduler.base_lrs, strict=True)]
        for group, lr in zip(self.scheduler.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.scheduler._last_lr = list(lrs)


class _Factor:
    """f, changed.

    `LambdaLR.state_dict` saves the `__dict__` of its factors, and only plain numbers and words (and containers of
    them) may be in there if the checkpoint is to load: the wrapped function, and what a new run is told again, live
    in slots.
    """

    __slots__ = ("__dict__", "inner", "num_training_steps")

    def __init__(self, inner: Callable[[Any], float], num_training_steps: int, kind: str) -> None:
        self.inner = inner
        self.num_training_steps = num_training_steps
        self.warmup_kind = kind
        self.first_step = 0  # of warmup: the steps before it were made with another schedule, or waited for a gradient
        self.made_with: dict[str, Any] = {}

    def __call__(self, step: int) -> float:
        return self.inner(step)

    def check_state(self, now: int) -> None:
        """Refuse numbers that no run has left at that step."""
        if whole("first_step", self.first_step, 0) > now:
            raise ValueError(f"first_step must be at most last_epoch={now}, got {self.first_step}")

    @property
    def started(self) -> bool:
        return False


class _Ramp(_Factor):
    """A ramp from η_init that is known later, and f in the steps that are left."""

    __slots__ = ()

    def __init__(self, inner: Callable[[Any], float], num_training_steps: int, kind: str) -> None:
        super().__init__(inner, num_training_steps, kind)
        self.init_fraction: float | None = None

    @property
    def started(self) -> bool:
        return self.init_fraction is not None

    def check_state(self, now: int) -> None:
        super().check_state(now)
        if self.init_fraction is not None and not 0 < number("init_fraction", self.init_fraction) <= 1:
            raise ValueError(f"init_fraction must be above 0 and at most 1, got {self.init_fraction}")

    def _stretched(self, t: int, reach: float, warmup_steps: int = 0) -> float:
        """The factor f at step `t` of a ramp that took `reach` of them where f has `warmup_steps`."""
        decay_steps = self.num_training_steps - warmup_steps
        if decay_steps == 0:
            return 1.0
        left = self.num_training_steps - self.first_step - reach
        return self.inner(warmup_steps + (t - reach) * (decay_steps / left if left > 0 else 1.0))


class _RampSchedule(_Changed):
    """A schedule whose factors are ramps."""

    @property
    def init_fraction(self) -> float | None:
        """η_init / η_trgt; None before `start`."""
        return self._factors[0].init_fraction

    def _start(self, init_fraction: float) -> None:
        init_fraction = positive("init_fraction", init_fraction)
        for factor in self._factors:
            factor.init_fraction = min(1.0, init_fraction)
            factor.first_step = self.scheduler.last_epoch
        self._apply()


class _Linear(_Ramp):
    __slots__ = ("warmup_steps",)

    def __init__(self, inner: Callable[[Any], float], num_training_steps: int, warmup_steps: int) -> None:
        super().__init__(inner, num_training_steps, "linear")
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        if self.init_fraction is None:
            return self.inner(step)
        t = step - self.first_step
        factor = self.init_fraction + t / self.warmup_steps
        return (
            factor
            if factor < 1
            else self._stretched(t, self.warmup_steps * (1 - self.init_fraction), self.warmup_steps)
        )


class WarmupSchedule(_RampSchedule):
    """Makes an existing `LambdaLR` warm up from an η_init that is known later, or from a checkpoint.

    The schedule is changed in place and stays the user's object. Until `start` it gives the learning rates
    it gave before. η_init is part of the schedule's `state_dict`, so a run that resumes goes on exactly.

    Args:
        scheduler: The schedule; every factor must reach 1 when warmup ends and accept a fractional step.
        warmup_steps: T_wrm, in optimizer steps. At least 1.
        num_training_steps: N, the step at which the decay ends.

    Raises:
        ValueError: If `scheduler` is no `LambdaLR`, if a factor is not 1 when warmup ends or takes whole steps only,
            or if `warmup_steps` is not between 1 and `num_training_steps`.
    """

    _factor = _Linear

    def __init__(self, scheduler: LRScheduler, warmup_steps: int, num_training_steps: int) -> None:
        if not 1 <= whole("warmup_steps", warmup_steps) <= whole("num_training_steps", num_training_steps, 1):
            raise ValueError(f"warmup_steps must be between 1 and {num_training_steps} steps, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        super().__init__(scheduler, num_training_steps, warmup_steps)

    def _check(self, factors: list[Callable[[Any], float]]) -> None:
        for factor in factors if self.warmup_steps < self.num_training_steps else ():
            # cosine_warmup_with_min_lr is at its peak one step earlier.
            peak = max(factor(self.warmup_steps - 1), factor(self.warmup_steps))
            if not math.isclose(peak, 1.0, rel_tol=1e-6):
                raise ValueError(
                    f"the schedule's factor must be 1 when warmup ends, got {peak} at warmup_steps={self.warmup_steps}"
                    ": a schedule of your own is kept as it is, so warmup_steps has to be the length of its warmup"
                )
            _check_fraction(factor, self.warmup_steps + 0.5)

    def start(self, init_fraction: float) -> None:
        """Start warmup with the step that comes next, at η_init = `init_fraction` η_trgt.

        Args:
            init_fraction: η_init / η_trgt. At 1 or above there is no warmup.

        Raises:
            ValueError: If `init_fraction` is not positive and finite.
        """
        self._start(init_fraction)


class _Exponential(_Ramp):
    def __init__(self, inner: Callable[[Any], float], num_training_steps: int) -> None:
        super().__init__(inner, num_training_steps, "exponential")
        self.growth = 1.0

    def check_state(self, now: int) -> None:
        super().check_state(now)
        if self.init_fraction is not None and not 1 < number("growth", self.growth) < math.inf:
            raise ValueError(f"growth must be above 1 and finite, got {self.growth}")

    def __call__(self, step: int) -> float:
        if self.init_fraction is None:
            return self.inner(step)
        t, reach = step - self.first_step, -math.log(self.init_fraction) / math.log(self.growth)
        return self.init_fraction * self.growth**t if t < reach else self._stretched(t, reach)


class ExponentialSchedule(_RampSchedule):
    """Makes an existing `LambdaLR` without warmup rise by a fixed growth per step from an η_init known later.

    Args:
        scheduler: The schedule, made with 0 warmup steps; every factor must accept a fractional step.
        num_training_steps: N, the step at which the decay ends.

    Raises:
        ValueError: If `scheduler` is no `LambdaLR`, or a factor rises or takes whole steps only.
    """

    _factor = _Exponential

    def __init__(self, scheduler: LRScheduler, num_training_steps: int) -> None:
        super().__init__(scheduler, num_training_steps)

    def start(self, init_fraction: float, growth: float) -> None:
        """Start the ramp with the step that comes next, at η_init = `init_fraction` η_trgt.

        Args:
            init_fraction: η_init / η_trgt.
            growth: r, above 1.

        Raises:
            ValueError: If `init_fraction` is not positive and finite, or `growth` not above 1 and finite.
        """
        growth = number("growth", growth)
        if not 1 < growth < math.inf:
            raise ValueError(f"growth must be above 1 and finite, got {growth}")
        for factor in self._factors:
            factor.growth = growth
        self._start(init_fraction)


class _Steered(_Factor):
    __slots__ = ()

    def __init__(self, inner: Callable[[Any], float], num_training_steps: int, kind: str) -> None:
        super().__init__(inner, num_training_steps, kind)
        self.fraction: float | None = None
        self.ramp_end: int | None = None
        self.controller: dict[str, Any] = {}

    @property
    def started(self) -> bool:
        return self.fraction is not None

    def check_state(self, now: int) -> None:
        super().check_state(now)
        if self.fraction is not None and not 0 <= number("fraction", self.fraction) < math.inf:
            raise ValueError(f"fraction must be at least 0 and finite, got {self.fraction}")
        if self.ramp_end is not None and whole("ramp_end", self.ramp_end, self.first_step) > now:
            raise ValueError(f"ramp_end must be at most last_epoch={now}, got {self.ramp_end}")
        if not isinstance(self.controller, dict):
            raise ValueError(f"controller must be a dict, got {shown(self.controller)}")

    def __call__(self, step: int) -> float:
        if self.fraction is None:
            return self.inner(step)
        if self.ramp_end is None:
            return self.fraction
        return self.fraction * self.inner(decay_step(step, self.ramp_end, self.num_training_steps))


class SteeredSchedule(_Changed):
    """Gives every step of an existing `LambdaLR` without warmup the learning rate that a controller says.

    Args:
        scheduler: The schedule, made with 0 warmup steps; its factor f must accept a fractional step.
        num_training_steps: N, the step at which the decay ends.
        kind: The controller's name, kept in checkpoints: `checkpoint_of`.

    Raises:
        ValueError: If `scheduler` is no `LambdaLR`, or a factor rises or takes whole steps only.
    """

    _factor = _Steered
    _factors: list[_Steered]

    def __init__(self, scheduler: LRScheduler, num_training_steps: int, kind: str = "steered") -> None:
        super().__init__(scheduler, num_training_steps, kind)

    @property
    def num_steps(self) -> int:
        """Steps that are left to warmup and decay: N, less those that were skipped."""
        return self.num_training_steps - self._factors[0].first_step

    def decay(self, step: float) -> float:
        """The factor f that the schedule has by itself, made for the steps that are left.

        Args:
            step: Between 0 and `num_steps`, possibly fractional.

        Returns:
            f, that of the first parameter group.
        """
        left = self.num_steps
        return float(self._factors[0].inner(step * (self.num_training_steps / left) if left > 0 else step))

    @property
    def controller(self) -> dict[str, Any]:
        """The state of the controller that was last given; empty at the start of a run."""
        return self._factors[0].controller

    @property
    def handed_over(self) -> bool:
        """Whether the schedule has taken over."""
        return self._factors[0].ramp_end is not None

    def steer(self, fraction: float, controller: dict[str, Any], *, ramp_end: int | None = None) -> None:
        """Give the step that comes next `fraction` η_trgt, and those after it, until steered again.

        Args:
            fraction: Of every group's own target.
            controller: The controller's state, of plain numbers, to be kept in checkpoints.
            ramp_end: t_r: hand over to the schedule, whose decay f((t - t_r) N / (N - t_r)) from that step on then
                multiplies `fraction`.

        Raises:
            ValueError: If `fraction` is negative or not finite.
        """
        if not 0 <= number("fraction", fraction) < math.inf:
            raise ValueError(f"fraction must be at least 0 and finite, got {fraction}")
        for factor in self._factors:
            factor.fraction, factor.ramp_end, factor.controller = fraction, ramp_end, controller
        self._apply()
