"""Maximal initial learning rate: the largest at which a short training from one initialization still succeeds.

Let success(η) say whether a training from θ_0 with the constant learning rate η, for a fixed number of steps on the
same data, gets where it should, as to a given accuracy. The maximal initial learning rate is

    η* = sup { η : success(η) },

found by bisection in ln η, the next learning rate being the geometric mean of the largest known to succeed and the
smallest known to fail [1]. It is to the beginning of a training what the critical learning rate η_c
(`find_critical_lr`) is to its first step, and larger as a rule, as a loss that rises at first may come down again.
That is no law. On ReLU networks trained by gradient descent for 30 or 40 steps to half or more of the accuracy, 32
and 128 wide, η* was .68 to 107 times η_c with the input layer fixed (3 and 6 layers; 1 of 12 below 1) and .63 to 53
times with it trained like the others (2 and 4 layers; 3 of 20 below 1). η* is well told by depth times width where
the input layer learns slowly, and the network is wide against its depth [1]. Here both fell with depth and with
width with that layer fixed (tests/search/test_maximal_lr.py); with it trained η* did not fall with the width of two
layers.

It costs two trainings for the ends and log2(ln(high / low) / ln(1 + rtol)) between them. That a training which
begins at η* also goes on well it does not say.

[1] Iyer, Hanin and Rolnick, "Maximal Initial Learning Rates in Deep ReLU Networks", ICML 2023, arXiv:2212.07295.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_warmup.numeric import boolean, positive
from hf_warmup.search.restore import traceless


@dataclass(frozen=True)
class MaxInitialLR:
    """What a search for η* found.

    Attributes:
        lower: The largest learning rate that succeeded below all that failed; 0 if even `low` failed.
        upper: The smallest that failed; infinity if even `high` succeeded.
        runs: Every (η, success) that was tried, in order.
    """

    lower: float
    upper: float
    runs: tuple[tuple[float, bool], ...]

    @property
    def value(self) -> float:
        """η*: the middle of the bracket in ln η; `lower` if there is no bracket."""
        return math.sqrt(self.lower) * math.sqrt(self.upper) if self.lower and self.upper < math.inf else self.lower


def find_max_initial_lr(
    succeeds: Callable[[float], bool], *, low: float, high: float, rtol: float = 1 / 16
) -> MaxInitialLR:
    """Bracket the largest learning rate at which a short training succeeds.

    To choose the peak of a training without warmup, or to hold another estimate of it against the truth.

    Example:
        >>> import functools, torch
        >>> def train(weight, lr):
        ...     optimizer = torch.optim.SGD([weight], lr)
        ...     for _ in range(200):
        ...         optimizer.zero_grad()
        ...         (20 * weight.square()).sum().backward()  # λ = 40
        ...         optimizer.step()
        ...     return weight.item() ** 2 < 1
        >>> weight = torch.ones(1, requires_grad=True)
        >>> found = find_max_initial_lr(functools.partial(train, weight), low=1e-4, high=1.0)
        >>> found.lower <= 2 / 40 < found.upper, weight.item()
        (True, 1.0)

    Args:
        succeeds: Trains with the learning rate that it is given, and returns whether it succeeded, which a loss that
            is not finite has not. What it can reach (the model, the optimizer, generators of random numbers) is put
            back after every training, so each begins where the first one did, and nothing of them is left. It must
            take its data from what can be put back: a list, not a loader's iterator.
        low: A learning rate that should succeed, and is tried first.
        high: One that should fail, and is tried second.
        rtol: Relative width of the bracket at which to stop.

    Returns:
        The bracket and what was tried. If success is not monotone in η the bracket is still true.

    Raises:
        ValueError: If `low`, `high` or `rtol` is not positive and finite, `high` not above `low`, or `succeeds`
            returns something else than True or False.
        RuntimeError: If a training has moved what cannot be put back, as an iterator.
    """
    low, high, rtol = positive("low", low), positive("high", high), positive("rtol", rtol)
    if not high > low:
        raise ValueError(f"high must be above low, got {high} and {low}")
    runs: list[tuple[float, bool]] = []

    def success(lr: float) -> bool:
        with traceless(succeeds):
            runs.append((lr, boolean("what succeeds returns", succeeds(lr))))
        return runs[-1][1]

    if not success(low):
        return MaxInitialLR(0.0, low, tuple(runs))
    if success(high):
        return MaxInitialLR(high, math.inf, tuple(runs))
    while high > (1 + rtol) * low:
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:  # no float is left between them
            break
        if success(middle):
            low = middle
        else:
            high = middle
    return MaxInitialLR(low, high, tuple(runs))
