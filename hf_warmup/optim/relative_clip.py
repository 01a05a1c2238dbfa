"""Relative global clipping: gradients that are long beside the weights they are of are cut, for SGD and no warmup.

Where a network computes the same with weights x of any length (all of them before a normalization), a gradient g is
orthogonal to x. SGD with weight decay λ then makes x longer by η² ‖g‖² and shorter by 2ηλ ‖x‖², to first order, and
ends where the two balance, at ‖g‖ = √(2λ/η) ‖x‖. Weights that start too short for that are thrown far out by their
first steps. The paper clips what is √C times the gradient of the balance [1]:

    g ← min(1, √C √(2λ/η) ‖x‖ / ‖g‖) g,    then    x ← x - η (g + λ x)

with both norms over all of x together, and √C = 2. A clipped step makes ‖x‖² at most 1 + 2 (C-1) ηλ + η²λ² times as
large.

[1] Li, Bhojanapalli, Zaheer, Reddi and Kumar, "Robust Training of Neural Networks Using Scale Invariant
    Architectures", ICML 2022, arXiv:2202.00980.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_warmup.distributed import whole
from hf_warmup.numeric import not_negative, positive


@torch.no_grad()
def clip_grad_relative_(
    parameters: Tensor | Iterable[Tensor], lr: float, weight_decay: float, sqrt_c: float = 2.0
) -> Tensor:
    """Clip the gradients of scale-invariant weights to √C √(2λ/η) times the norm of the weights, in place.

    Called between `backward()` and the `step()` of `torch.optim.SGD`, with the η and λ of that step; gradients of
    other parameters are not looked at.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> weight.grad = torch.tensor([-40.0, 30.0])
        >>> round(clip_grad_relative_([weight], lr=0.5, weight_decay=0.25).item(), 4)  # 2 √(2 * 0.25 / 0.5) 5 / 50
        0.2
        >>> [round(g, 4) for g in weight.grad.tolist()]
        [-8.0, 6.0]

    Args:
        parameters: The scale-invariant weights, x; DTensors too. One without a gradient counts with its length.
        lr: η. At 0 nothing is clipped.
        weight_decay: λ, as SGD has it.
        sqrt_c: √C.

    Returns:
        The factor, a 0-d tensor: 1 where nothing is clipped, NaN where a gradient is.

    Raises:
        ValueError: If a number is out of range, or there are no parameters.
    """
    eta, decay = not_negative("lr", lr), positive("weight_decay", weight_decay)
    bound = positive("sqrt_c", sqrt_c) * (2 * decay) ** 0.5
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not params:
        raise ValueError("parameters must hold at least one, got none")
    grads = [p.grad for p in params if p.grad is not None]
    norm, length = (whole(nn.utils.get_total_norm(tensors)) for tensors in (grads, params))
    # Not divided by η or ‖g‖, which may be 0.
    limit, norm = bound * length, eta**0.5 * norm
    factor = torch.where(norm <= limit, torch.ones_like(norm), limit / norm)
    for grad in grads:
        grad.mul_(factor.to(grad.device, grad.dtype))
    return factor
