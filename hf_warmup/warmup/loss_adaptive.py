"""Loss-adaptive warmup: the learning rate is a function of the loss, and rises as the loss falls.

Let D = L - L* be how far the loss is above the least that it can be. Where the curvature is at most
K0 + K1 D + K2 D², and the optimizer's step has a norm of its own (Muon, Lion; nearly so Adam), the step that the
theory allows is [1]

    η(D) = D / (K0 + K1 D + K2 D²),

which has its maximum at D_p = √(K0 / K2): while the loss falls to that, η rises, and behind it η falls. Nobody knows
the K's of a network, but three conditions fix them without a solver. Warmup begins at η(D_0) = η_p / a, with D_0 of
the first step, and its peak is η(D_p) = η_p, where η' = 0. With 1/η = K0/D + K1 + K2 D

    η' = 0           K0 = K2 D_p²
    η(D_p) = η_p     K1 = 1/η_p - 2 K2 D_p,    so    1/η = 1/η_p + K2 (D - D_p)² / D
    η(D_0) = η_p/a   K2 = (a - 1) D_0 / (η_p (D_0 - D_p)²)

    η(D) = η_p / (1 + (a - 1) q(D) / q(D_0)),    q(D) = (D - D_p)² / D.

The rule takes L* = 0, below which a cross-entropy does not go; `fraction` says where the peak is, at
D_p = (1 - fraction) D_0, and a is 10. Three things are not the paper's. D is of a running mean of the losses, as a
batch's own would make η jump; it is some 9 steps late. η never falls: where the loss rises again, η stays where it
is. And behind the peak, which ends warmup, the user's decay takes over. In a bound of the curvature no K is
negative; here K1 is, unless 2 (a - 1) D_p D_0 <= (D_0 - D_p)², so of the theory only the shape is left.

[1] Riabinin, Veprikov, Bolatov, Takáč and Beznosikov, "Where Does Warm-Up Come From? Adaptive Scheduling for
    Norm-Constrained Optimizers", arXiv:2602.05813.
"""

import math
from typing import Any

from hf_warmup.numeric import not_negative, number, positive
from hf_warmup.warmup.rule import Rule, Step


class LossAdaptiveWarmup(Rule):
    """Warmup that is as long as the loss takes to fall by a fraction.

    For training from scratch with a known learning rate, where nobody knows over how many steps to warm up. It costs
    nothing. In fine-tuning, where the loss hardly falls, it would go on until half of the run, far below its peak.

    Example:
        >>> rule = LossAdaptiveWarmup(1000, learning_rate=0.1, fraction=0.5)
        >>> class At:
        ...     def __init__(self, loss): self.loss = lambda lr=0.0: loss
        >>> [round(rule(At(loss)), 4) for loss in (8.0, 8.0, 4.0, 4.0, 0.0)], rule.ended_by
        ([0.01, 0.01, 0.0115, 0.0133, 0.0186], None)

    Args:
        num_training_steps: N, all steps of the run.
        learning_rate: η_p, that of the peak.
        fraction: Of the first step's loss, by which the loss has fallen when η is at its peak; between 0 and 1. A
            language model of bytes has lost a third of its first loss, ln V, once it knows how frequent each is.

    Attributes:
        first_loss: D_0, the loss of the first step; NaN before.
        mean_loss: D, the running mean; NaN before the first step.
        news: Empty.
        will_probe: False: it asks for no loss at a learning rate.

    Raises:
        ValueError: If an argument is out of range.
    """

    START = 10  # a: warmup begins at the peak over this
    WEIGHT = 0.1  # of a step's loss in the running mean

    kind, ends, will_probe = "loss adaptive", ("peak", "half of the run"), False
    options = ("num_training_steps", "learning_rate", "fraction")
    saved = (*options, "num_steps", "lr", "first_loss", "mean_loss", "ended_by")

    def __init__(self, num_training_steps: int, learning_rate: float, *, fraction: float = 0.4) -> None:
        super().__init__(num_training_steps)
        self.learning_rate = positive("learning_rate", learning_rate)
        self.fraction = _between_0_and_1("fraction", fraction)
        self.lr = self.learning_rate / self.START
        self.first_loss = self.mean_loss = math.nan

    def _decide(self, step: Step) -> None:
        loss = step.loss()
        if self.num_steps == 0:
            if not 0 < loss < math.inf:
                raise RuntimeError(f"the loss of the first step must be positive and finite, got {loss:g}")
            self.first_loss = self.mean_loss = loss
        elif math.isfinite(loss):
            self.mean_loss += self.WEIGHT * (loss - self.mean_loss)
        if self.mean_loss <= (1 - self.fraction) * self.first_loss:
            self.lr, self.ended_by = self.learning_rate, "peak"
            return
        self.lr = max(self.lr, self._at(self.mean_loss))
        if self.num_steps + 1 >= self.num_training_steps / 2:
            self.ended_by = "half of the run"

    def _at(self, loss: float) -> float:
        """η(D), before the peak."""
        peak = (1 - self.fraction) * self.first_loss
        q, q_first = ((at - peak) ** 2 / at for at in (loss, self.first_loss))
        return self.learning_rate / (1 + (self.START - 1) * q / q_first)

    @classmethod
    def _check_values(cls, state: dict[str, Any]) -> None:
        positive("learning_rate", state["learning_rate"])
        _between_0_and_1("fraction", state["fraction"])
        not_negative("lr", state["lr"])
        if state["num_steps"] > 0:
            positive("first_loss", state["first_loss"])
            if not math.isfinite(number("mean_loss", state["mean_loss"])):
                raise ValueError(f"mean_loss must be finite, got {state['mean_loss']}")


def _between_0_and_1(name: str, value: Any) -> float:
    if not 0 < (given := number(name, value)) < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {given}")
    return given
