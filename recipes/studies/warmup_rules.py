"""Every rule for the learning rate that the warmup study compares, for `warmup_cases.train`.

All decay by a cosine to a tenth, from the end of warmup to the end of the run; where a warmup has no end (those
that only β2 decides), from step 0.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from hf_warmup import has_momentum, momentum_slope
from hf_warmup.guided import GuidedWarmup, PersistentCatapult

from warmup_cases import LossAt, Rule, Setting


def cosine(step: float, steps: float) -> float:
    """From 1 to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def linear(setting: Setting, optimizer: str, target: float, fraction: float = 0.0) -> Rule:
    """Linear warmup over a fraction of the steps; 0 is none. (Its first step is not wasted at 0.)"""
    warmup = round(fraction * setting.steps)

    def rule(step: int, loss_at: LossAt) -> float:
        return target * ((step + 1) / warmup if step < warmup else cosine(step - warmup, setting.steps - warmup))

    return rule


def ramp(setting: Setting, optimizer: str, target: float, growth: float = 1.05, init: float = 1e-4) -> Rule:
    """The exponential ramp alone."""
    reach = math.log(target / init) / math.log(growth)

    def rule(step: int, loss_at: LossAt) -> float:
        return init * growth**step if step < reach else target * cosine(step - reach, setting.steps - reach)

    return rule


def factor(f: Callable[[float, int], float]) -> Callable[..., Rule]:
    """A warmup that only β2 and the step decide."""

    def make(setting: Setting, optimizer: str, target: float) -> Rule:
        return lambda step, loss_at: target * cosine(step, setting.steps) * f(setting.beta2, step + 1)

    return make


class Guided:
    """Ours.

    Args:
        setting: What is trained.
        optimizer: Its name.
        target: η_trgt.
        turn: Whether it looks for the turn of the momentum.
        **options: Of `GuidedWarmup`.
    """

    def __init__(self, setting: Setting, optimizer: str, target: float, turn: bool = True, **options: Any) -> None:
        self.guide = GuidedWarmup(target, setting.steps, lambda step: cosine(step, setting.steps), **options)
        self.beta2 = setting.beta2 if optimizer == "GIAdamW" else 0.0
        self.turn, self.slope_at = turn, None

    def begin(self, optimizer: Any, model: Any, loss_fn: Any) -> None:
        """Remember whose momentum it is."""
        if self.turn and has_momentum(optimizer):
            self.slope_at = functools.partial(momentum_slope, optimizer)

    def __call__(self, step: int, loss_at: LossAt) -> float:
        """η of the step."""
        return self.guide.step(loss_at, self.own_warmup(step), self.slope_at)

    def own_warmup(self, step: int) -> Callable[[float], float]:
        """GI-Adam's factor of a step and of those after it; 1 of another optimizer."""
        return lambda ahead: math.sqrt(1 - self.beta2 ** (step + 1 + ahead))


def persistent(setting: Setting, optimizer: str, target: float, delta: float = 0.01) -> Rule:
    """Algorithm 3 of the paper."""
    catapult = PersistentCatapult(target, setting.steps, lambda step: cosine(step, setting.steps), delta=delta)
    return lambda step, loss_at: catapult.step(loss_at)


RULES: dict[str, Callable[..., Rule]] = {
    "linear": linear,
    "ramp": ramp,
    "guided": Guided,
    "persistent": persistent,
    "sqrt(1-b2^t)": factor(lambda beta2, t: math.sqrt(1 - beta2**t)),
    "untuned linear": factor(lambda beta2, t: min(1.0, t * (1 - beta2) / 2)),
    "untuned exponential": factor(lambda beta2, t: 1 - math.exp(-(1 - beta2) * t)),
}
