"""Critical learning rate: how far one update can go before the loss rises.

Let L(η) be the loss of one fixed batch at θ - η u, with θ the parameters and u the update an optimizer
is about to make. The critical learning rate is

    η_c = inf { η > 0 : L(η) > L(0) }.

Below η_c a step does not raise the loss. A little above it the loss rises, then falls as the iterate is
thrown to a flatter region (a catapult). Warmup that starts at η_c skips the steps that a start from 0
spends below it [1]. Only forward passes are needed. On a quadratic loss with gradient g and Hessian H
the answer is known, and the tests check it: η_c = 2 gᵀu / uᵀHu, so 2/λ when u = g and H = λ I.

Two searches of [1] are here, as `method="paper"`:

    EXP_SEARCH(η_0):  double η from η_0 while the loss does not rise, up to η_trgt;
    BIN_SEARCH(δ):    halve the bracket until the loss at its upper end is below (1 + δ) L(0).

Where the printed algorithms say nothing, or would go wrong:

* a loss that is not finite counts as risen (a comparison with NaN is false, so the printed loops would
  return the η that produced it);
* an equal loss has not risen: rounding makes many on the way up from a small η_0;
* doubling stops at η_trgt itself instead of the first η beyond it;
* if the loss rises at η_0 already, η is halved until it does not, where the paper takes η_0 itself;
* every way to have no answer has a status of its own.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405, Algorithms 1 and 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["found", "above_target", "never_rises", "not_descent", "nonfinite", "budget_spent"]

# Relative to L(0): 16 units in the last place of a loss in single precision, which rounding alone can give.
_ROUNDING = 16 * 2.0**-23


@dataclass(frozen=True)
class CriticalLR:
    """What a search for η_c found.

    Attributes:
        value: The search's answer, in the units of the optimizer's `lr`; by `status`:
            `found`: η_c, the bracket's upper end (the paper's choice), or its lower end when the loss at the
            upper end is beyond (1 + δ) L(0), as at a cliff where it is not finite;
            `above_target`: η_trgt, where the loss has not risen;
            `never_rises`: infinity, with no target to stop at no η up to `lower` raised the loss;
            `not_descent`: 0, the loss rises however small η is;
            `nonfinite`: NaN, L(0) itself is not finite;
            `budget_spent`: `lower`, as nothing larger is known to be safe.
        lower: Largest η tried below `upper` that did not raise the loss.
        upper: Smallest η tried that raised the loss; infinity if none did.
        evals: Every (η, loss) tried, in order, the one at 0 included.
        status: How the search ended.
    """

    value: float
    lower: float
    upper: float
    evals: tuple[tuple[float, float], ...]
    status: Status

    @property
    def num_evals(self) -> int:
        """Loss evaluations (forward passes) spent, the one at 0 included."""
        return len(self.evals)


def find_critical_lr(
    loss_at: Callable[[float], float],
    *,
    guess: float | None = None,
    target: float | None = None,
    slope: float | None = None,
    method: Literal["paper"] = "paper",
    rtol: float = 1 / 16,
    delta: float = 0.1,
    max_evals: int = 40,
) -> CriticalLR:
    """Bracket the critical learning rate of `loss_at`.

    The bracket is true: L(lower) <= L(0) < L(upper). It holds the first crossing if the loss crosses once,
    as on a quadratic, and the first crossing that the evaluations can know of otherwise.

    Args:
        loss_at: The loss after a step of the given learning rate; `loss_at(0.0)` is L(0). Must be
            deterministic: the same batch, the same dropout masks.
        guess: η_0, the first learning rate tried; sets the cost, not the answer. 1e-4 or `target`, whichever
            is smaller, if None.
        target: η_trgt; the search ends there if the loss has not risen. No limit if None.
        slope: -dL/dη at 0, gᵀu, if known: the search ends at once as `not_descent` unless it is positive.
        method: `"paper"`.
        rtol: Relative precision wanted. δ decides when the paper's search ends; where the loss at the upper
            end is beyond (1 + δ) L(0) even in a bracket of relative width rtol², there is a cliff, and the
            search ends there.
        delta: δ, how far above L(0), relative to it, the loss at the upper end may be.
        max_evals: Most evaluations to spend.

    Returns:
        Bracket, estimate and status, after about |log2(η_c / guess)| + 2 evaluations and those BIN_SEARCH
        needs, 0 to 10.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(guess=guess, target=target, rtol=rtol, delta=delta)
    if method != "paper":
        raise ValueError(f'method must be "paper", got {method!r}')
    if max_evals < 2:
        raise ValueError(f"max_evals must be at least 2, got {max_evals}")
    search = _Search(loss_at, max_evals)
    if not math.isfinite(search.start):
        return search.result("nonfinite", math.nan)
    if slope is not None and not slope > 0:
        return search.result("not_descent", 0.0)
    eta = min(1e-4 if guess is None else guess, math.inf if target is None else target)
    return search.bracket(eta, target) or search.bisect(delta, rtol)


class _Search:
    """The evaluations so far and the bracket they give."""

    def __init__(self, loss_at: Callable[[float], float], max_evals: int) -> None:
        self.loss_at = loss_at
        self.max_evals = max_evals
        self.evals: list[tuple[float, float]] = []
        self.lower, self.upper = 0.0, math.inf
        self.loss_upper = math.inf
        self.start = self.loss(0.0)

    def loss(self, eta: float) -> float:
        loss = float(self.loss_at(eta))
        self.evals.append((eta, loss))
        return loss if math.isfinite(loss) or eta == 0 else math.inf

    def rises(self, eta: float) -> bool:
        """Try `eta` and narrow the bracket."""
        loss = self.loss(eta)
        if loss > self.start:
            self.upper, self.loss_upper = eta, loss
            return True
        self.lower = eta
        return False

    @property
    def spent(self) -> bool:
        return len(self.evals) >= self.max_evals

    def result(self, status: Status, value: float) -> CriticalLR:
        return CriticalLR(value, self.lower, self.upper, tuple(self.evals), status)

    def bracket(self, eta: float, target: float | None) -> CriticalLR | None:
        """EXP_SEARCH, upwards or downwards from `eta`; None when there is a bracket."""
        if self.rises(eta):
            while self.lower == 0:
                if self.spent:
                    return self.result("budget_spent", 0.0)
                # Uphill the rise halves with η. Just above η_c it is small too, but large at twice that η.
                noise = _ROUNDING * abs(self.start)
                was_small = self.loss_upper - self.start <= 4 * noise
                if self.rises(self.upper / 2) and was_small and self.loss_upper - self.start <= noise:
                    return self.result("not_descent", 0.0)
            return None
        while self.upper == math.inf:
            if target is not None and self.lower >= target:
                return self.result("above_target", target)
            eta = 2 * self.lower if target is None else min(2 * self.lower, target)
            if self.spent and target is not None:
                return self.result("budget_spent", self.lower)
            if self.spent or eta == math.inf:
                return self.result("never_rises", math.inf)
            self.rises(eta)
        return None

    def bisect(self, delta: float, rtol: float) -> CriticalLR:
        """BIN_SEARCH: halve the bracket until the loss at its upper end is low enough."""
        highest = self.start + delta * abs(self.start)
        while self.loss_upper > highest:
            middle = (self.lower + self.upper) / 2
            if self.upper <= (1 + rtol**2) * self.lower or not self.lower < middle < self.upper:
                return self.result("found", self.lower)
            if self.spent:
                return self.result("budget_spent", self.lower)
            self.rises(middle)
        return self.result("found", self.upper)


def _check(**positive: float | None) -> None:
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
