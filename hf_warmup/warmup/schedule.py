"""A rule for warmup, then whatever decay the user chose, over the steps that are left.

`WarmupSchedule` changes a schedule that exists: a `LambdaLR` whose factor f(t) has its peak, 1, at W (0 without a
warmup of its own) and then decays until step N. While warmup goes on, every parameter group has the learning rate
that the rule decides, times its own share of the largest. Once the rule has ended, at step e (which may lie between
two), the decay, which had N - W steps, is stretched over the N - e that are left:

    η_t = η_e f(W + (t - e) (N - W) / (N - e)),    t >= e,

so that training ends at step N with the learning rate it would have had.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hf_warmup.numeric import not_negative, number, shown, whole
from hf_warmup.warmup.rule import Step, Warmup

_LOOKS = 20  # steps along a run where a factor is asked for, to see whether it rises


def checkpoint_of(scheduler: Any) -> str | None:
    """The kind of rule of the warmup that a schedule has, or had in the checkpoint that was loaded; else None."""
    # A factor that is no function is loaded by updating its __dict__, whatever wrote that.
    kinds = (getattr(factor, "__dict__", {}).get("warmup_kind") for factor in getattr(scheduler, "lr_lambdas", ()))
    return next((kind for kind in kinds if kind is not None), None)


def unchanged(scheduler: Any) -> Any:
    """The same schedule, without what an earlier run may have left in its factors."""
    if isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = [f.inner if isinstance(f, _Factor) else f for f in scheduler.lr_lambdas]
        for factor in scheduler.lr_lambdas:
            getattr(factor, "__dict__", {}).pop("warmup_kind", None)
    return scheduler


class WarmupSchedule:
    """Gives an existing `LambdaLR` a warmup by a rule; its decay has the steps that are left.

    The schedule is changed in place and stays the user's object. Until the first `warm_up` it gives the learning
    rates it gave before. The rule's state is part of the schedule's `state_dict`, so a run that resumes goes on
    exactly.

    Example:
        >>> import torch
        >>> from hf_warmup import LinearWarmup
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
        >>> schedule = WarmupSchedule(scheduler, num_training_steps=100)
        >>> rule = LinearWarmup(100, learning_rate=0.1, warmup_steps=10, init_lr=0.01)
        >>> schedule.warm_up(rule)  # in every step, before the optimizer's
        0.01

    Args:
        scheduler: The schedule; every factor must accept a fractional step, and must not rise behind `warmup_steps`.
        num_training_steps: N, the step at which the decay ends.
        warmup_steps: W, where the factors have their peak: the length of the schedule's own warmup, which the rule's
            takes the place of.
        kind: That of the rule, by which a checkpoint of another is told.

    Raises:
        ValueError: If `scheduler` is no `LambdaLR`, if a factor rises, is not 1 at W or takes whole steps only, or
            if W is not between 0 and N.
    """

    def __init__(
        self, scheduler: LRScheduler, num_training_steps: int, warmup_steps: int = 0, *, kind: str | None = None
    ) -> None:
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"warmup needs a schedule that is a factor per step (LambdaLR), got {type(scheduler).__name__}: "
                "one that reacts to the loss, or has a state of its own, has no factor to warm up"
            )
        self.num_training_steps = whole("num_training_steps", num_training_steps, 1)
        self.warmup_steps = whole("warmup_steps", warmup_steps)
        if not 0 <= self.warmup_steps <= self.num_training_steps:
            raise ValueError(f"warmup_steps must be between 0 and {num_training_steps} steps, got {warmup_steps}")
        self.scheduler = unchanged(scheduler)
        for factor in scheduler.lr_lambdas if self.warmup_steps < self.num_training_steps else ():
            self._check(factor)
        self._factors = [_Factor(f, self.num_training_steps, self.warmup_steps, kind) for f in scheduler.lr_lambdas]
        scheduler.lr_lambdas = list(self._factors)
        self._known: dict[str, Any] = self.state

    def _check(self, factor: Callable[[Any], float]) -> None:
        """Refuse a factor that takes whole steps only, or has its peak elsewhere."""
        steps, warmup_steps = self.num_training_steps, self.warmup_steps
        try:
            factor(warmup_steps + 0.5)
        except (TypeError, LookupError) as error:
            raise ValueError(
                "the schedule's factor must accept a fractional step, as its decay is stretched, got "
                f"{type(error).__name__} at step {warmup_steps + 0.5}: {error}"
            ) from error
        if warmup_steps == 0:
            highest = max(((steps - 1) * k // _LOOKS for k in range(_LOOKS + 1)), key=factor)
            # Not 1: cosine_warmup_with_min_lr is at its peak before its first step.
            if factor(0) < 0.9 * factor(highest):
                raise ValueError(
                    f"the schedule's factor must not rise, as this warmup needs one without a warmup of its own, "
                    f"got {factor(0):.4g} at step 0 and {factor(highest):.4g} at {highest}: set warmup_steps to "
                    "the length of its warmup, or warmup=none to keep it as it is"
                )
            return
        # cosine_warmup_with_min_lr is at its peak one step earlier.
        peak = max(factor(warmup_steps - 1), factor(warmup_steps))
        if not math.isclose(peak, 1.0, rel_tol=1e-6):
            raise ValueError(
                f"the schedule's factor must be 1 when warmup ends, got {peak} at warmup_steps={warmup_steps}: a "
                "schedule of your own is kept as it is, so warmup_steps has to be the length of its warmup"
            )

    @property
    def target(self) -> float:
        """The largest learning rate of the parameter groups, which a rule's is set beside."""
        return max(float(base) for base in self.scheduler.base_lrs)

    @property
    def started(self) -> bool:
        """Whether warmup has started, in this run or in the one that it resumes."""
        return self._factors[0].fraction is not None

    @property
    def ended(self) -> bool:
        """Whether the decay has taken over."""
        return self._factors[0].ramp_end is not None

    @property
    def num_steps(self) -> int:
        """Steps that are left to warmup and decay: N, less those that were skipped."""
        return self.num_training_steps - self._factors[0].first_step

    @property
    def state(self) -> dict[str, Any]:
        """The rule's state, of this run or of the checkpoint; empty before the first step."""
        return self._factors[0].rule

    def warm_up(self, rule: Warmup, step: Step | None = None) -> float | None:
        """Have the rule decide the learning rate of the step that is about to be made, once the gradients are there.

        Args:
            rule: The same in every step; a checkpoint that was loaded must be of it.
            step: What the rule may ask; not needed by one that asks nothing.

        Returns:
            The learning rate that the rule decided, which is its last where the decay began before this step; None
            once warmup has ended, or if the optimizer left out the step that was decided last.
        """
        if self.ended:
            return None
        if self.started and self.state is not self._known:  # a checkpoint was loaded
            rule.load_state_dict(self.state)
            self._known = self.state
        now = self.scheduler.last_epoch
        if now == self._factors[0].decided:
            return None
        # A rule that asks nothing may be given no step, which the protocol does not say of all.
        lr = not_negative("the learning rate of the rule", rule(step))  # type: ignore[arg-type]
        self._known = rule.state_dict()
        for factor in self._factors:
            if factor.fraction is None:
                factor.first_step = now
            factor.fraction, factor.rule, factor.decided = lr / self.target, self._known, now
            factor.ramp_end = None if rule.ended_by is None else now - rule.overrun
        self._apply()
        return lr

    def check_state(self) -> None:
        """Refuse numbers of a checkpoint that no run has left, by name."""
        now = whole("last_epoch", self.scheduler.last_epoch, 0)
        for base in self.scheduler.base_lrs:
            not_negative("base_lrs", base)
        for factor in self._factors:
            factor.check_state(now)

    def skip(self, num_steps: int) -> None:
        """Before the first `warm_up`: go on after so many steps of another schedule; warmup has the rest."""
        if whole("num_steps", num_steps, 0) > self.num_training_steps:
            raise ValueError(f"num_steps must be at most {self.num_training_steps}, got {num_steps}")
        self.scheduler.last_epoch = num_steps
        for factor in self._factors:
            factor.first_step = num_steps
        self._apply()

    @property
    def began(self) -> int | None:
        """The step at which training with this warmup began; None before `begin`, or of a checkpoint without it."""
        return self._factors[0].began

    def begin(self) -> None:
        """Note, for the checkpoints, that training begins with this warmup, which may wait for a gradient."""
        for factor in self._factors:
            factor.began = self.scheduler.last_epoch

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

    __slots__ = ("__dict__", "inner", "num_training_steps", "warmup_steps")

    def __init__(
        self, inner: Callable[[Any], float], num_training_steps: int, warmup_steps: int, kind: str | None
    ) -> None:
        self.inner = inner
        self.num_training_steps = num_training_steps
        self.warmup_steps = warmup_steps
        self.warmup_kind = kind
        self.first_step = 0  # of warmup: those before it were made with another schedule, or waited for a gradient
        self.decided = -1  # the last step that was decided, which the optimizer may leave out
        self.fraction: float | None = None
        self.ramp_end: float | None = None
        self.rule: dict[str, Any] = {}
        self.began: int | None = None

    def __call__(self, step: int) -> float:
        if self.fraction is None:
            return self.inner(step)
        if self.ramp_end is None:
            return self.fraction
        decay, left = self.num_training_steps - self.warmup_steps, self.num_training_steps - self.ramp_end
        if decay == 0:
            return self.fraction
        stretched = (step - self.ramp_end) * (decay / left if left > 0 else 1.0)
        # Rounding would ask for a step behind N, of which a factor of the user's may know nothing.
        return self.fraction * self.inner(self.warmup_steps + min(stretched, decay))

    def check_state(self, now: int) -> None:
        for name, least in {"first_step": 0, "decided": -1, "began": 0}.items():
            value = getattr(self, name)
            if not (name == "began" and value is None) and whole(name, value, least) > now:
                raise ValueError(f"{name} must be at most last_epoch={now}, got {value}")
        if self.fraction is not None:
            not_negative("fraction", self.fraction)
        if self.ramp_end is not None and not self.first_step <= number("ramp_end", self.ramp_end) <= now:
            raise ValueError(f"ramp_end must be from {self.first_step} to last_epoch={now}, got {self.ramp_end}")
        if not isinstance(self.rule, dict):
            raise ValueError(f"rule must be a dict, got {shown(self.rule)}")
