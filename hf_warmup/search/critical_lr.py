"""Critical learning rate: how far one update can go before the loss rises.

Let L(η) be the loss of one fixed batch at θ - η u, with θ the parameters and u the update an optimizer is about to
make. The critical learning rate is

    η_c = inf { η > 0 : L(η) > L(0) }.

Below η_c a step does not raise the loss. A little above it the loss rises, then falls as the iterate is thrown to a
flatter region (a catapult). Warmup that starts at η_c skips the steps that a start from 0 spends below it [1]. Only
forward passes are needed. On a quadratic loss with gradient g and Hessian H the answer is known, and the tests check
it: η_c = 2 gᵀu / uᵀHu, so 2/λ when u = g and H = λ I.

`method="secant"`, the default, models the curve with the points it has (`hf_warmup.search.secant`) and closes a
bracket of relative width `rtol`: from a guess that is wrong by 100 times in 6 forward passes in the median on
networks (recipes/studies/search_accuracy.py), and in 2 if all that is asked is whether the loss rises up to η_trgt.
It may step over a crossing that lies between the learning rates it tries.

`method="paper"` is the two searches of [1]:

    EXP_SEARCH(η_0):  double η from η_0 while the loss does not rise, up to η_trgt;
    BIN_SEARCH(δ):    halve the bracket until the loss at its upper end is below (1 + δ) L(0).

Where the printed algorithms say nothing, or would go wrong: a loss that is not finite counts as risen (a comparison
with NaN is false); an equal loss has not risen, as rounding makes many on the way up from a small η_0; doubling
stops at η_trgt itself; if the loss rises at η_0 already, η is halved until it does not, where the paper takes η_0
itself.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405, Algorithms 1 and 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hf_warmup.numeric import number, positive, shown, whole
from hf_warmup.search.secant import Curve

Status = Literal["found", "above_target", "never_rises", "not_descent", "nonfinite", "budget_spent"]

# Relative to L(0): 16 units in the last place of a loss in single precision, which rounding alone can give.
_ROUNDING = 16 * 2.0**-23
_NARROWEST = 1e-12  # of two learning rates that are nearer to each other ln η may be the same float


@dataclass(frozen=True)
class CriticalLR:
    """What a search for η_c found.

    Attributes:
        value: The search's answer, in the units of the optimizer's `lr`; by `status`:
            `found`: η_c. Of `secant`, the crossing of the model inside the bracket; of `paper`, the bracket's upper
                end, or its lower end where the loss at the upper one is beyond (1 + δ) L(0), as at a cliff;
            `above_target`: η_trgt, where the loss has not risen;
            `never_rises`: infinity, no η up to `lower` raised the loss and there is no target;
            `not_descent`: 0, the loss rises however small η is;
            `nonfinite`: NaN, L(0) itself is not finite;
            `budget_spent`: `lower`, as nothing larger is known to be safe.
        lower: Largest η tried below `upper` that did not raise the loss; 0 if none. (On an exact parabola, known
            from its slope and two losses, `secant` needs no trial there.)
        upper: Smallest η tried that raised the loss; infinity if none did.
        evals: Every (η, loss) known, in order, the one at 0 first.
        status: How the search ended.
        start_given: Whether L(0) was known to the caller and not evaluated.
    """

    value: float
    lower: float
    upper: float
    evals: tuple[tuple[float, float], ...]
    status: Status
    start_given: bool = False

    @property
    def start(self) -> float:
        """L(0)."""
        return self.evals[0][1]

    @property
    def noise(self) -> float:
        """A change of the loss that rounding alone can make."""
        return _ROUNDING * abs(self.start)

    @property
    def num_evals(self) -> int:
        """Loss evaluations (forward passes) spent, the one at 0 included unless L(0) was given."""
        return len(self.evals) - self.start_given

    def check_finite(self, step: int) -> None:
        """Raise a RuntimeError that names the optimizer step, from 1, if L(0) is not finite."""
        if self.status == "nonfinite":
            raise RuntimeError(
                f"the training loss of step {step} is {self.start} before any update: check the data and the "
                "model, no learning rate can help"
            )


def find_critical_lr(
    loss_at: Callable[[float], float],
    *,
    guess: float | None = None,
    target: float | None = None,
    slope: float | None = None,
    start: float | None = None,
    method: Literal["secant", "paper"] = "secant",
    rtol: float = 1 / 16,
    delta: float = 0.1,
    max_evals: int = 40,
) -> CriticalLR:
    """Bracket the critical learning rate of `loss_at`.

    The bracket is true: L(lower) <= L(0) < L(upper). It holds the first crossing if the loss crosses once, as on a
    quadratic, and the first that the evaluations can know of otherwise.

    Example:
        >>> found = find_critical_lr(lambda lr: (1 - 20 * lr) ** 2)
        >>> found.status, round(found.value, 3), found.lower < 0.1 < found.upper
        ('found', 0.1, True)

    Args:
        loss_at: The loss after a step of the given learning rate; `loss_at(0.0)` is L(0). Must be deterministic: the
            same batch, the same dropout masks.
        guess: The first learning rate tried, as the last answer. Sets the cost, not the answer. If None, `secant`
            starts at `target`, and `paper` at 1e-4 or `target`, whichever is smaller.
        target: η_trgt; the search ends there if the loss has not risen. No limit if None.
        slope: -dL/dη at 0, gᵀu, if known (`update_slope`): saves `secant` a trial; not positive, it ends either
            search at once as `not_descent`.
        start: L(0), if known: the loss that the gradient came from. Saves a forward pass: whether η_c lies above
            η_trgt then takes one.
        method: `"secant"` or `"paper"`.
        rtol: Relative width of the bracket wanted. In the paper's search δ decides when to end; where the loss at
            the upper end is beyond (1 + δ) L(0) even in a bracket of relative width rtol², there is a cliff, and it
            ends.
        delta: δ of `paper`: how far above L(0), relative to it, the loss at the upper end may be.
        max_evals: Most evaluations to spend.

    Returns:
        Bracket, estimate and status. `paper` costs about |log2(η_c / guess)| + 2 evaluations and those that
        BIN_SEARCH needs, 0 to 10.

    Raises:
        ValueError: If an argument is out of range, or `loss_at` gives no number.
    """
    guess = None if guess is None else positive("guess", guess)
    target = None if target is None else positive("target", target)
    start = None if start is None else number("start", start)
    rtol, delta, max_evals = positive("rtol", rtol), positive("delta", delta), whole("max_evals", max_evals, 2)
    if rtol < _NARROWEST:
        raise ValueError(f"rtol must be at least {_NARROWEST:g}, which the logarithm of a float can tell, got {rtol}")
    if slope is not None and math.isnan(slope := number("slope", slope)):
        raise ValueError("slope must be a number, got nan")
    if not isinstance(method, str) or method not in ("secant", "paper"):
        raise ValueError(f'method must be "secant" or "paper", got {shown(method)}')
    search = _Search(loss_at, max_evals, start)
    if not math.isfinite(search.start):
        return search.result("nonfinite", math.nan)
    if slope is not None and not slope > 0:
        return search.result("not_descent", 0.0)
    limit = math.inf if target is None else target
    if method == "secant":
        first = guess if guess is not None else 1e-4 if target is None else target
        return search.secant(min(first, limit), limit, slope, rtol)
    return search.bracket(min(1e-4 if guess is None else guess, limit), target) or search.bisect(delta, rtol)


class _Search:
    """The evaluations so far and the bracket they give."""

    def __init__(self, loss_at: Callable[[float], float], max_evals: int, start: float | None) -> None:
        self.loss_at = loss_at
        self.max_evals = max_evals
        self.evals: list[tuple[float, float]] = [] if start is None else [(0.0, start)]
        self.start_given = start is not None
        self.lower, self.upper = 0.0, math.inf
        self.loss_upper = math.inf
        self.start = self.loss(0.0) if start is None else start
        self.noise = _ROUNDING * abs(self.start)  # a change of the loss that rounding alone can make

    def loss(self, eta: float) -> float:
        loss = number("the loss of loss_at", self.loss_at(eta))
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
    def has_fallen(self) -> bool:
        """Whether a trial has lowered the loss by more than rounding can."""
        return any(math.isfinite(loss) and loss < self.start - self.noise for _, loss in self.evals)

    def falls_at(self, eta: float) -> bool:
        """Whether the loss at `eta` is lower by more than rounding can make it; tried if the budget allows."""
        return not self.spent and self.loss(eta) < self.start - self.noise

    @property
    def spent(self) -> bool:
        return len(self.evals) - self.start_given >= self.max_evals

    def result(self, status: Status, value: float) -> CriticalLR:
        return CriticalLR(value, self.lower, self.upper, tuple(self.evals), status, self.start_given)

    def secant(self, eta: float, target: float, slope: float | None, rtol: float) -> CriticalLR:
        """Close the bracket with the help of a model of the curve."""
        curve = Curve(self.start, slope, rtol)
        falls = False  # whether the loss has been seen to fall by more than rounding can explain
        while True:
            loss = self.loss(eta)
            falls = falls or self.has_fallen
            # Before it falls anywhere a rise within rounding says nothing: the way on is up.
            if rises := loss > self.start + (0 if falls else self.noise):
                self.loss_upper = loss
            curve.add(eta, loss, rises)
            self.lower, self.upper = self._tried(curve)
            if curve.lower >= math.log(target):
                return self.result("above_target", target)
            if not curve.closed and (lower := curve.parabola_lower()) is not None:
                curve.lower, self.lower, falls = lower, math.exp(lower), True
            if curve.closed:
                if falls:
                    # At a cliff the model has nothing to stand on: the last safe η.
                    value = curve.crossing() if math.isfinite(self.loss_upper) else self.lower
                    return self.result("found", min(max(value, self.lower), self.upper))
                # The first trial may have met the crossing itself: look once well below it.
                eta = math.exp(curve.lower) / 2
                falls = self.falls_at(eta)
                if not falls:
                    return self.result("not_descent", 0.0)
                curve.restart(eta, self.evals[-1][1])
            eta = curve.next()
            if eta < 1e-300:
                return self.result("not_descent", 0.0)
            if eta > 1e300 or (self.spent and self.upper == math.inf == target):
                return self.result("never_rises", math.inf)
            if self.spent:
                return self.result("budget_spent", self.lower)
            eta = min(eta, target)

    def _tried(self, curve: Curve) -> tuple[float, float]:
        """The ends of the bracket as they were tried, without what is neither a rise nor a fall."""
        safe = [eta for eta, loss in self.evals if 0 < eta and loss <= self.start and math.log(eta) <= curve.lower]
        risen = [eta for eta, _ in self.evals if 0 < eta and math.log(eta) == curve.upper]
        return max(safe, default=0.0), min(risen, default=math.inf)

    def bracket(self, eta: float, target: float | None) -> CriticalLR | None:
        """EXP_SEARCH, upwards or downwards from `eta`; None when there is a bracket."""
        if self.rises(eta):
            while self.lower == 0:
                if self.spent:
                    return self.result("budget_spent", 0.0)
                # Uphill the rise halves with η. Just above η_c it is small too, but large at twice that η.
                was_small = self.loss_upper - self.start <= 4 * self.noise
                if self.rises(self.upper / 2) and was_small and self.loss_upper - self.start <= self.noise:
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
        if not self.has_fallen and not self.falls_at(self.lower / 2):
            return self.result("not_descent", 0.0)  # a plateau that ends in a rise
        highest = self.start + delta * abs(self.start)
        while self.loss_upper > highest:
            middle = (self.lower + self.upper) / 2
            if self.upper <= (1 + rtol**2) * self.lower or not self.lower < middle < self.upper:
                return self.result("found", self.lower)
            if self.spent:
                return self.result("budget_spent", self.lower)
            self.rises(middle)
        return self.result("found", self.upper)
