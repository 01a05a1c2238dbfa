"""GradInit: scales for the weights at initialization with which the first step of the optimizer does most.

Where layers are out of proportion to each other, as behind the residual connections of a post-LN Transformer, the
first steps are good for some and too large for others, and warmup lets the network settle first. GradInit finds a
scale m_i for every weight tensor, θ_m = (m_1 W_1, ..., m_k W_k), and changes nothing else [1]:

    minimize over m   L(S̃; θ_m - η A[g]),    g = ∇L(S; θ_m),    subject to ‖g‖_p <= γ

where η A[g] is the optimizer's first step: of SGD A[g] = g and p = 2, of Adam A[g] = sign g and p = 1. S is a batch,
and S̃ is half S, half another: here the mean of two losses. In every iteration the constraint goes first,

    ‖g‖_p > γ:    m goes down ∂‖g‖_p / ∂m,            else down ∂L(S̃; θ_m - η A[g]) / ∂m

by Adam, with a gradient of norm 1 at most and m_i >= 0.01. As ∂/∂m_i of anything is its gradient at θ_i times W_i,

    of ‖g‖_p:   Wᵀ H ∇‖g‖_p          of SGD's loss:   Wᵀ (v - η H v)          of Adam's:   Wᵀ v

with v = ∇L(S̃; ·) behind the step and H the Hessian of L(S) before it. The sign has no derivative.

[1] Zhu, Ni, Xu, Kong, Huang and Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and
    Efficient Training", NeurIPS 2021, arXiv:2102.08098.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_warmup.numeric import positive, shown, whole
from hf_warmup.search.restore import RandomNumbers, traceless

_LEAST = 0.01  # of a scale


def gradinit(
    model: nn.Module,
    losses: Iterator[Callable[[], Tensor]],
    lr: float,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    gamma: float | None = None,
    steps: int = 100,
    scale_lr: float = 1e-2,
) -> dict[str, float]:
    """Scale the weights of a model that has just been initialized, before its optimizer is made.

    For architectures that cannot do without warmup, as a post-LN BERT. It costs about 3 training steps per iteration
    and the memory of a backward pass with its graph.

    Example:
        >>> import itertools
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x = torch.randn(64, 4)
        >>> losses = itertools.repeat(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean())
        >>> scales = gradinit(model, losses, lr=1e-2)
        >>> scales["0.weight"] > 1, scales["2.weight"] > 1
        (True, True)

    Args:
        model: Its parameters that require a gradient are scaled, tied ones as one. A tensor of zeros stays.
        losses: Loss functions of batches, each of which can be called more than once. Two are taken per iteration.
        lr: η of the step looked ahead.
        optimizer: Whose step it is.
        gamma: γ; the norm at initialization if None: the loss is to fall without a larger gradient.
        steps: Iterations.
        scale_lr: Learning rate of the scales.

    Returns:
        The scale of each parameter, by its name. The model has the scaled weights; its gradients and buffers and the
        random numbers are as before.

    Raises:
        ValueError: If an argument is out of range, or the model has nothing to train.
        RuntimeError: If the loss or the norm of its gradient is not finite; the model is then as it was.
    """
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f'optimizer must be "adam" or "sgd", got {shown(optimizer)}')
    lr, scale_lr, steps = positive("lr", lr), positive("scale_lr", scale_lr), whole("steps", steps, 1)
    gamma = None if gamma is None else positive("gamma", gamma)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model must have parameters that require a gradient, got none")
    search = _Search(list(named.values()), lr, optimizer == "adam", gamma)
    scales = torch.ones(len(named), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scales], scale_lr)
    with traceless(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for _ in range(steps):
            scales.grad = search.direction(scales.tolist(), next(losses), next(losses))
            nn.utils.clip_grad_norm_([scales], 1.0)
            adam.step()
            with torch.no_grad():
                scales.clamp_(min=_LEAST)
    with torch.no_grad():
        for p, scale in zip(named.values(), scales.tolist(), strict=True):
            p.mul_(scale)
    return dict(zip(named, scales.tolist(), strict=True))


class _Search:
    def __init__(self, params: Sequence[Tensor], lr: float, adam: bool, gamma: float | None) -> None:
        self.params, self.lr, self.adam, self.gamma = params, lr, adam, gamma
        self.start = [p.detach().clone() for p in params]

    def direction(self, scales: list[float], loss: Callable[[], Tensor], other: Callable[[], Tensor]) -> Tensor:
        """The gradient in the scales."""
        self._put([w * scale for w, scale in zip(self.start, scales, strict=True)])
        numbers = RandomNumbers()
        gradient = self._gradient(loss, create_graph=True)
        powers = torch.stack([(g.abs() if self.adam else g.square()).sum() for g in gradient]).sum()
        norm = powers if self.adam else powers.sqrt()
        if not norm.isfinite():
            raise RuntimeError(f"gradinit needs a loss with a finite gradient, got one of norm {norm.item()}")
        self.gamma = norm.item() if self.gamma is None else self.gamma
        if norm.item() > self.gamma:
            return self._per_scale(torch.autograd.grad(norm, self.params, allow_unused=True))
        step = [g.detach().sign() if self.adam else g.detach() for g in gradient]
        before = [p.detach().clone() for p in self.params]
        self._put([w - self.lr * u for w, u in zip(before, step, strict=True)])
        halves = [self._gradient(of) for of in (loss, other)]
        ahead = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
        self._put(before)
        if not self.adam:
            numbers.restore()  # the same dropout as before
            gradient = self._gradient(loss, create_graph=True)
            product = torch.stack([(g * v).sum() for g, v in zip(gradient, ahead, strict=True)]).sum()
            curved = torch.autograd.grad(product, self.params, allow_unused=True)
            ahead = [v if h is None else v - self.lr * h for v, h in zip(ahead, curved, strict=True)]
        return self._per_scale(ahead)

    def _gradient(self, loss: Callable[[], Tensor], create_graph: bool = False) -> list[Tensor]:
        made = torch.autograd.grad(loss(), self.params, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, made, strict=True)]

    def _per_scale(self, along: Sequence[Tensor | None]) -> Tensor:
        dots = [0.0 if g is None else float((g.double() * w).sum()) for g, w in zip(along, self.start, strict=True)]
        return torch.tensor(dots, dtype=torch.float64)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.params, values, strict=True):
            p.copy_(value)
