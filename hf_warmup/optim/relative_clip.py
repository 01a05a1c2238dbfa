"""Relative global clipping: a gradient is too large where it would turn the weights too far.

SGD with weight decay on weights that a normalization follows ends where decay and updates balance: there the
gradient's norm is about √(2λ/η) ‖x‖. The step is held to a multiple of that [1]:

    g ← g min(1, c √(2λ/η) ‖x‖ / ‖g‖),        x ← x - η (g + λ x)

with ‖x‖ and ‖g‖ over all scale-invariant parameters together, and c = 2 (their √C). A fixed `max_grad_norm` means
another thing at every learning rate and norm of the weights; this one does not.

[1] Li, Bhojanapalli, Zaheer, Reddi and Kumar, "Robust Training of Neural Networks Using Scale Invariant
    Architectures" (SIBERT), ICML 2022, arXiv:2202.00980.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_warmup.distributed import whole
from hf_warmup.numeric import positive


@torch.no_grad()
def clip_grad_relative_(params: Iterable[Tensor], lr: float, weight_decay: float, *, factor: float = 2.0) -> Tensor:
    """Clip gradients against the norm of their weights, in place, before a step of SGD with weight decay.

    For SGD on weights whose scale does not matter: those that a normalization follows, and not its gains, biases,
    nor a head without one.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 100.0]])
        >>> clip_grad_relative_([weight], lr=0.5, weight_decay=0.01)  # to 2 √(2 * 0.01 / 0.5) * 5
        tensor(0.0200)
        >>> weight.grad
        tensor([[0., 2.]])

    Args:
        params: The scale-invariant parameters, with gradients.
        lr: η of the step to come.
        weight_decay: λ of the optimizer.
        factor: c.

    Returns:
        What the gradients were multiplied by: 1 where they were small enough.

    Raises:
        ValueError: If a number is not positive, or no parameter has a gradient.
    """
    pairs = [(p, p.grad) for p in params if p.grad is not None]
    if not pairs:
        raise ValueError("params must have gradients, got none with one")
    bound = positive("factor", factor) * math.sqrt(2 * positive("weight_decay", weight_decay) / positive("lr", lr))
    weights, gradients = (whole(nn.utils.get_total_norm(of)) for of in zip(*pairs, strict=True))
    scale = (bound * weights / gradients).clamp(max=1.0)  # of a gradient of zeros 1, as of infinity
    for _, gradient in pairs:
        gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return scale
