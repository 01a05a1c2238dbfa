"""Every rule for the learning rate that the warmup study compares, for `warmup_cases.train`.

All decay by a cosine to a tenth, from the end of warmup to the end of the run; where a warmup has no end (those
that only β2 decides), from step 0.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_warmup import GuidedWarmup, PersistentCatapult, has_momentum, momentum_slope, update_slope
from hf_warmup.warmup import LossAdaptiveWarmup, Warmup

from warmup_cases import LossAt, Rule, Setting, num_weights


def cosine(step: float, steps: float) -> float:
    """From 1 to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def linear(setting: Setting, optimizer: str, target: float, fraction: float = 0.0, length: int | None = None) -> Rule:
    """Linear warmup over so many steps, or a fraction of all; 0 is none. (Its first step is not wasted at 0.)"""
    warmup = round(fraction * setting.steps) if length is None else length

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


class TrainingStep:
    """What a rule may ask of a step of `warmup_cases.train`."""

    def __init__(self, optimizer: Any, loss_at: LossAt, lr: float) -> None:
        self.optimizer, self.loss_at, self.lr = optimizer, loss_at, lr

    def loss(self, lr: float = 0.0) -> float:
        """The batch's loss after the step; at 0 before it."""
        return self.loss_at(lr)

    def slope(self) -> float:
        """gᵀu / max(1, ‖g‖) along the step."""
        return self._slope(update_slope)

    def momentum_slope(self) -> float | None:
        """The same along the momentum alone."""
        return self._slope(momentum_slope) if has_momentum(self.optimizer) else None

    def _slope(self, measure: Callable[..., float]) -> float:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
        return measure(self.optimizer, self.lr) / max(1.0, norm)


class Ruled:
    """A rule of ours, then the decay.

    Args:
        setting: What is trained.
        rule: Until it has ended.
    """

    def __init__(self, setting: Setting, rule: Warmup) -> None:
        self.steps, self.rule, self.lr, self.end = setting.steps, rule, 1e-6, 0
        self.found: dict[str, float] = {}

    def begin(self, optimizer: Any, model: Any, loss_fn: Any) -> None:
        """Remember whose steps they are."""
        self.optimizer = optimizer

    def __call__(self, step: int, loss_at: LossAt) -> float:
        """η of the step."""
        if self.rule.ended_by is not None:
            return self.lr * cosine(step - self.end, self.steps - self.end)
        self.lr, self.end = self.rule(TrainingStep(self.optimizer, loss_at, self.lr)), step
        return self.lr


def guided(
    setting: Setting,
    optimizer: str,
    target: float,
    auto_lr: bool = False,
    ramp_steps: float | None = None,
    **constants: float,
) -> Ruled:
    """Ours; with other constants than it has."""
    decoder = setting.family in ("gpt", "llama", "llama-gqa", "qwen3")  # as the Trainer has it
    kind: type[GuidedWarmup] = type("GuidedWarmup", (GuidedWarmup,), constants)
    ramp_steps = ramp_steps or kind.usual_ramp_steps(
        setting.steps, decoder=decoder, optimizer=optimizer, num_weights=num_weights(setting)
    )
    return Ruled(setting, kind(setting.steps, None if auto_lr else target, ramp_steps=ramp_steps, decoder=decoder))


def persistent(setting: Setting, optimizer: str, target: float, delta: float = 0.01) -> Rule:
    """Algorithm 3 of the paper."""
    return Ruled(setting, PersistentCatapult(setting.steps, target, delta=delta))


def loss_adaptive(setting: Setting, optimizer: str, target: float, fraction: float = 0.4) -> Rule:
    """As far as the loss has fallen."""
    return Ruled(setting, LossAdaptiveWarmup(setting.steps, target, fraction=fraction))


def formula(lr: Callable[[int, int], float]) -> Callable[..., Rule]:
    """Linear warmup over a token per parameter, at most half of the run, to a formula's learning rate.

    Args:
        lr: Of the number of parameters and that of tokens in the run.
    """

    def make(setting: Setting, optimizer: str, target: float) -> Rule:
        size = num_weights(setting)
        tokens = setting.batch * setting.context
        return linear(setting, optimizer, lr(size, tokens * setting.steps), min(0.5, size / tokens / setting.steps))

    return make


RULES: dict[str, Callable[..., Rule]] = {
    "linear": linear,
    "ramp": ramp,
    "guided": guided,
    "persistent": persistent,
    "loss adaptive": loss_adaptive,
    # After Porian et al., arXiv:2406.19146, as OLMo-core's ladder has it; Li et al., arXiv:2503.04715.
    "OLMo formula": formula(lambda size, tokens: 0.0047 * (size / 108e6) ** (-1 / 3) / 2),
    "Step Law": formula(lambda size, tokens: 1.79 * size**-0.713 * tokens**0.307),
    "sqrt(1-b2^t)": factor(lambda beta2, t: math.sqrt(1 - beta2**t)),
    "untuned linear": factor(lambda beta2, t: min(1.0, t * (1 - beta2) / 2)),
    "untuned exponential": factor(lambda beta2, t: 1 - math.exp(-(1 - beta2) * t)),
}
