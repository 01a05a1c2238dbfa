"""GradInit: one scale per weight tensor, such that the first step of an optimizer lowers the loss most.

What warmup does about an initialization whose first steps go wrong, GradInit does to the initialization itself [1].
Let W_i be the tensors that are trained, m_i > 0 one scale of each, θ_m = {m_i W_i}, and g the gradient of a batch S
at θ_m. The scales minimize the loss that a second batch S~ has after the first step with learning rate η,

    L(S~; θ_m - η A[g])    subject to    ‖g‖_p ≤ γ,

with A[g] = g and p = 2 for SGD, and A[g] = sign(g) and p = 1 for Adam, whose first step is that. The constraint
keeps the scales from making the gradient so steep that the fall is one of this step only. Each iteration looks at
‖g‖_p first. If it is over γ the scales descend along ∇_m ‖g‖_p, else along ∇_m L(S~; θ_m - η A[g]). With H the
Hessian of L(S) at θ_m, ⟨·,·⟩_i the inner product over tensor i and g~ the gradient of L(S~) at θ_m - η A[g]

    ∂‖g‖₁ / ∂m_i = ⟨W, H sign(g)⟩_i        ∂L(S~) / ∂m_i = ⟨W, g~⟩_i             Adam: sign has the derivative 0
    ∂‖g‖₂ / ∂m_i = ⟨W, H g⟩_i / ‖g‖₂       ∂L(S~) / ∂m_i = ⟨W, g~ - η H g~⟩_i     SGD

so a second backward pass through the first is needed, of two batches in memory at once, and attention is computed in
its mathematical form, as the fused one has no second derivative. The scales are stepped by Adam, with their gradient
clipped to norm 1, and never fall below 0.01.

S and S~ share half of their examples [1]: a function of `losses` is half a batch, S the mean of two, S~ of the first
of them and a third. So BatchNorm sees half a batch; its statistics are not moved.

γ depends on the norm and on η. To first order the step lowers the loss by η ‖g‖_p^p, which can be no more than the
loss where that is nowhere negative. The default is where it would be all of it, γ = (L / η)^(1/p), with L the loss
of the first S. The norm at initialization itself is no good bound: a ReLU network of 10 layers with torch's own
initialization has next to no gradient, and with scales that may not raise it Adam trained it more slowly than
before.

Where this is not their code (zhuchen03/gradinit): the gradient of SGD's step itself is taken, as the equation has
it, where the code leaves -η H g~ out; the steps of both kinds share Adam's moments, and the norm that is clipped is
that of all scales together, where the code has each of them apart; and the lower bound is that of all tensors, where
theirs lets biases fall to 0.

[1] Zhu, Ni, Xu, Kong, Huang and Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and
    Efficient Training", NeurIPS 2021, arXiv:2102.08098.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_warmup.distributed import is_dtensor
from hf_warmup.numeric import positive, shown, whole
from hf_warmup.search.restore import hidden_gradients, traceless

_SMALLEST = 0.01  # [1]


def gradinit(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    *,
    lr: float,
    optimizer: Literal["adam", "sgd"] = "adam",
    gamma: float | None = None,
    steps: int = 390,
    scale_lr: float = 1e-2,
) -> dict[str, float]:
    """Multiply every trained tensor of a model that is not trained yet by a scale that makes its first step good.

    For a model that does not train, or only with a long warmup: a deep one without normalization, a post-LN
    Transformer. Call it before the optimizer makes its first step; a norm's weight and a tied tensor have one scale
    each, and a tensor of zeros keeps the scale 1.

    Example:
        >>> import itertools
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> half = lambda: (model(torch.ones(1, 2)) - 1).square().sum()
        >>> scales = gradinit(model, itertools.repeat(half), lr=0.01, optimizer="sgd", steps=200)
        >>> half().item() < 1, torch.equal(model.weight, torch.full((1, 2), 3.0) * scales["weight"])
        (True, True)

    Args:
        model: The model, in single or double precision, in the mode in which the losses are to be computed: `eval`
            for no dropout, as its authors have it.
        losses: A function per half batch, which returns its loss at the present weights of `model`. Two or three are
            taken in an iteration.
        lr: η of the step whose loss is minimized, in the units of that optimizer: the peak of the training to come.
        optimizer: Whose first step that is, `"adam"` (Lion and AdamW too) or `"sgd"`.
        gamma: The largest ‖g‖_p, of the 1-norm for Adam and the 2-norm for SGD. If None, as above.
        steps: Iterations; its authors make 390 or 780.
        scale_lr: Adam's learning rate for the scales; its authors have 1e-3 to 1e-1, by the network.

    Returns:
        The scale of every trained tensor by its name in `named_parameters`. The weights are the old ones times
        these, bit for bit; gradients, buffers, random numbers and all else that the model has are as before.

    Raises:
        ValueError: If an argument is out of range, the model trains nothing, or half precision or DTensors; if
            `losses` ends too early; or if the first loss is not positive and no `gamma` is given.
        RuntimeError: If a loss or a gradient is not finite. Then the weights are as before.
    """
    lr, scale_lr, steps = positive("lr", lr), positive("scale_lr", scale_lr), whole("steps", steps, 1)
    gamma = None if gamma is None else positive("gamma", gamma)
    if not isinstance(optimizer, str) or optimizer not in ("adam", "sgd"):
        raise ValueError(f'optimizer must be "adam" or "sgd", got {shown(optimizer)}')
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model must have parameters that require a gradient, got none")
    for name, p in named.items():
        if p.dtype not in (torch.float32, torch.float64) or is_dtensor(p):
            raise ValueError(f"model must be whole and in single or double precision, got {name} in {p.dtype}")
    params = list(named.values())
    scales = [torch.ones((), dtype=p.dtype, device=p.device, requires_grad=True) for p in params]
    adam = torch.optim.Adam(scales, scale_lr)
    halves = iter(losses)
    with ExitStack() as restored:
        restored.enter_context(traceless(model, apart=params, most_bytes=sum(p.nbytes for p in params)))
        restored.enter_context(hidden_gradients(params))
        restored.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in {p.device.type for p in params}:
            restored.enter_context(torch.autocast(device, enabled=False))
        restored.enter_context(torch.enable_grad())
        for step in range(steps):
            thetas = [m * p.detach() for m, p in zip(scales, params, strict=True)]
            first = _next(halves, step)
            with _in_place(model, params, thetas):
                loss = (first() + _next(halves, step)()) / 2
            gradient = torch.autograd.grad(loss, thetas, create_graph=True, materialize_grads=True)
            norm = _norm(gradient, optimizer)
            if not math.isfinite(size := norm.item()):
                raise RuntimeError(f"the gradient of iteration {step + 1} is not finite, of a loss of {loss.item()}")
            if gamma is None:
                gamma = _default(loss.item(), lr, optimizer)
            objective = norm
            if size <= gamma:
                step_of = torch.sign if optimizer == "adam" else lambda g: g
                moved = [t - lr * step_of(g) for t, g in zip(thetas, gradient, strict=True)]
                with _in_place(model, params, moved):
                    objective = (first() + _next(halves, step)()) / 2
                if not math.isfinite(after := objective.item()):
                    raise RuntimeError(f"the loss after the step of iteration {step + 1} is not finite but {after}")
            if objective.requires_grad:  # the gradient of a loss that is linear in the weights is a constant
                slopes = torch.autograd.grad(objective, scales, materialize_grads=True)
                for m, slope in zip(scales, slopes, strict=True):
                    m.grad = slope
                nn.utils.clip_grad_norm_(scales, 1.0)
                adam.step()
            with torch.no_grad():
                for m in scales:
                    m.clamp_(min=_SMALLEST)
    found = {name: m.item() for name, m in zip(named, scales, strict=True)}
    with torch.no_grad():
        for name, p in named.items():
            p.mul_(found[name])
    return found


def _norm(gradient: Iterable[Tensor], optimizer: str) -> Tensor:
    """The 1-norm for Adam, the 2-norm for SGD."""
    if optimizer == "adam":
        return torch.stack([g.abs().sum() for g in gradient]).sum()
    return torch.stack([g.square().sum() for g in gradient]).sum().sqrt()


def _default(loss: float, lr: float, optimizer: str) -> float:
    """The norm with which the step lowers the loss to zero, to first order."""
    if not loss > 0:
        raise ValueError(f"gamma must be given where the loss is not positive, got a loss of {loss}")
    return loss / lr if optimizer == "adam" else math.sqrt(loss / lr)


def _next(halves: Iterator[Callable[[], Tensor]], step: int) -> Callable[[], Tensor]:
    if (half := next(halves, None)) is None:
        raise ValueError(f"losses must last for three half batches a step, got to step {step + 1} with them")
    return half


@contextmanager
def _in_place(model: nn.Module, params: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Have the model compute with `values`, through which there is a gradient; a tied one in all its places."""
    twins = dict(zip(params, values, strict=True))
    tables = [m._parameters for m in model.modules()]
    entries = [(table, name, p) for table in tables for name, p in table.items() if p in twins]
    try:
        for table, name, p in entries:
            table[name] = twins[p]  # type: ignore[assignment]
        yield
    finally:
        for table, name, p in entries:
            table[name] = p
