"""The largest learning rate that a network can begin its training with, by trying.

η* is the largest constant learning rate with which a network, from its initialization and without warmup, trains
at all [1]. It is found by bisection in ln η over short trainings. The critical learning rate η_c stands for it at a
hundredth of the cost: on 12 MLPs with the cross-entropy η* was 2 to 30 times η_c, as a network that a first step
throws uphill may still come to rest. With the squared loss it was below η_c on 3 of 12, down to a third.

[1] Iyer, Hanin and Rolnick, "Maximal Initial Learning Rates in Deep ReLU Networks", ICML 2023, arXiv:2212.07295.
    They train until a validation accuracy is reached; the test of success is the caller's here.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from hf_warmup.numeric import boolean, positive
from hf_warmup.search.restore import traceless


class MaxInitialLR(NamedTuple):
    """η*, between two learning rates that were tried.

    Attributes:
        lower: The largest that trains; 0 if none does.
        upper: The smallest above it that does not; infinity if all do.
        tried: All, in order.
    """

    lower: float
    upper: float
    tried: tuple[float, ...]


def find_max_initial_lr(
    model: nn.Module, trains: Callable[[float], bool], low: float, high: float, *, rtol: float = 1 / 8
) -> MaxInitialLR:
    """Bracket η* by short trainings, each from the weights that the model has now.

    To see what a search by forward passes stands for, and where a whole short training is cheap.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> def trains(lr):  # on w², whose gradient descent is stable below η = 1
        ...     optimizer = torch.optim.SGD(model.parameters(), lr)
        ...     for _ in range(100):
        ...         optimizer.zero_grad()
        ...         model.weight.square().sum().backward()
        ...         optimizer.step()
        ...     return model.weight.abs().item() < 1
        >>> found = find_max_initial_lr(model, trains, 0.01, 100.0)
        >>> found.lower < 1 <= found.upper < 1.125 * found.lower
        True

    Args:
        model: Is put back after every training: weights, gradients, buffers, and the random numbers of the process.
        trains: Trains the model in place at a learning rate, and says whether it has. It makes its own optimizer and
            reads its own data, from the start every time.
        low: Learning rate that is tried first.
        high: The one that is tried next.
        rtol: Relative width of the bracket wanted.

    Returns:
        The bracket.

    Raises:
        ValueError: If a number is out of range, `high` is not above `low`, or `trains` gives no truth value.
    """
    low, high, rtol = positive("low", low), positive("high", high), positive("rtol", rtol)
    if not low < high:
        raise ValueError(f"high must be above low, {low}, got {high}")
    tried: list[float] = []

    def succeeds(lr: float) -> bool:
        tried.append(lr)
        with traceless(model):
            return boolean("what trains returns", trains(lr))

    if not succeeds(low):
        return MaxInitialLR(0.0, low, tuple(tried))
    if succeeds(high):
        return MaxInitialLR(high, math.inf, tuple(tried))
    while high > (1 + rtol) * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if succeeds(middle) else (low, middle)
    return MaxInitialLR(low, high, tuple(tried))
