"""Products of the Hessian of a loss and a vector, without the Hessian and without a trace.

With g(θ) the gradient of the loss of one fixed batch,

    H v = d/dθ (g(θ)ᵀ v):

a second backward pass, through the first. The fused kernels of scaled dot-product attention have no second
derivative, so its mathematical form is computed. A model in half precision is computed in single precision: the
curvature of its rounded loss is noise. Random numbers are the same in every product, so dropout is a part of the
loss.

Memory is that of a backward pass with its graph over one micro-batch, some times that of a training step's on the
same. [1] is the method.

Where a percent is enough, the difference of two gradients will do,

    H v ≈ (g(θ + εv) - g(θ)) / ε,    ε = √u / 10 · ‖θ‖ / ‖v‖,    u the machine epsilon:

half the time, the memory of a training step, and any kernels. Rounding in the gradient limits it, so that single
precision is needed here, and TF32 and autocast must be off.

[1] Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_warmup.distributed import is_dtensor
from hf_warmup.search.restore import RandomNumbers, traceless

LossFn = Callable[[], Tensor] | Sequence[Callable[[], Tensor]]
# Of √u, for the length of a difference: truncation has a larger constant than rounding.
_DIFFERENCE = 0.1


@contextmanager
def hessian_products(
    loss_fn: LossFn, params: Sequence[Tensor], *, module: nn.Module | None = None
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Give v ↦ H v, of flat vectors, and an empty one of their shape, device and precision; leave no trace."""
    with _prepared(params, module) as (leaves, numbers, like), sdpa_kernel(SDPBackend.MATH):
        yield _Hessian(loss_fn, leaves, numbers), like


@contextmanager
def gradient_differences(
    loss_fn: Callable[[], Tensor], params: Sequence[Tensor], *, module: nn.Module | None = None
) -> Iterator[tuple["GradientDifferences", Tensor]]:
    """As `hessian_products`, of one batch, by differences of gradients: to about a percent, for half the time."""
    with _prepared(params, module) as (leaves, numbers, like):
        products = GradientDifferences(loss_fn, leaves, numbers)
        try:
            yield products, like
        finally:
            products.give_back()


@contextmanager
def _prepared(
    params: Sequence[Tensor], module: nn.Module | None
) -> Iterator[tuple[list[Tensor], RandomNumbers, Tensor]]:
    if not params or len(set(params)) < len(params):
        raise ValueError(f"params must be different tensors that require a gradient, got {len(params)}")
    if any(is_dtensor(p) for p in params):
        raise ValueError("params must be whole tensors, got DTensors, through which there is no second derivative")
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    numbers = RandomNumbers()
    with ExitStack() as restored:
        restored.enter_context(traceless(module, apart=params, most_bytes=sum(p.nbytes for p in params)))
        twins = {} if module is None else restored.enter_context(_in_single_precision(module))
        leaves = [twins.get(p, p) for p in params]
        if any(_is_half(p) for p in leaves):
            raise ValueError("module must be the model that the half-precision parameters belong to")
        for device in {p.device.type for p in leaves}:
            restored.enter_context(torch.autocast(device, enabled=False))
        like = torch.empty(1, dtype=dtype, device=params[0].device).expand(sum(p.numel() for p in params))
        yield leaves, numbers, like


class _Hessian:
    """v ↦ H v."""

    def __init__(self, loss_fn: LossFn, leaves: list[Tensor], numbers: RandomNumbers) -> None:
        self._losses = [loss_fn] if callable(loss_fn) else list(loss_fn)
        self._keeps_graph = callable(loss_fn)
        self._kept: tuple[Tensor, ...] = ()
        self._leaves, self._numbers = leaves, numbers

    def __call__(self, v: Tensor) -> Tensor:
        leaves, sizes, total = self._leaves, [p.numel() for p in self._leaves], torch.zeros_like(v)
        parts = [part.view_as(p).to(p) for part, p in zip(v.split(sizes), leaves, strict=True)]
        self._numbers.restore()
        with torch.enable_grad():
            for loss_fn in self._losses:
                gradient = self._kept or torch.autograd.grad(loss_fn(), leaves, create_graph=True, allow_unused=True)
                self._kept = gradient if self._keeps_graph else ()
                # A gradient that does not depend on the parameters has no graph, and no part in H.
                pairs = [(g, u) for g, u in zip(gradient, parts, strict=True) if g is not None and g.requires_grad]
                if not pairs:
                    continue
                g, u = zip(*pairs, strict=True)
                rows = torch.autograd.grad(g, leaves, u, retain_graph=self._keeps_graph, allow_unused=True)
                for sum_, row in zip(total.split(sizes), rows, strict=True):
                    if row is not None:
                        sum_ += row.reshape(-1).to(sum_)
        return total


class GradientDifferences:
    """v ↦ (g(θ + εv) - g(θ)) / ε, with L(θ) and g(θ), which is None where the loss does not depend on θ."""

    def __init__(self, loss_fn: Callable[[], Tensor], leaves: list[Tensor], numbers: RandomNumbers) -> None:
        self._loss_fn, self._leaves, self._numbers = loss_fn, leaves, numbers
        self._start = [p.detach().clone() for p in leaves]
        self._norm = float(torch.stack([p.norm().double() for p in self._start]).norm()) or 1.0
        self.loss, self.gradient = self._pass()

    def __call__(self, v: Tensor) -> Tensor:
        """H v, of a flat vector, in a new one."""
        total = torch.zeros_like(v)
        size = float(v.norm())
        if not size > 0:
            return total
        epsilon = _DIFFERENCE * math.sqrt(torch.finfo(v.dtype).eps) * self._norm / size
        sizes = [p.numel() for p in self._leaves]
        with torch.no_grad():
            for p, at, part in zip(self._leaves, self._start, v.split(sizes), strict=True):
                p.copy_(at + epsilon * part.view_as(p).to(p))
        _, moved = self._pass()
        for sum_, g, before in zip(total.split(sizes), moved, self.gradient, strict=True):
            if g is not None and before is not None:
                sum_.copy_((g - before).reshape(-1)).div_(epsilon)
        return total

    @torch.no_grad()
    def give_back(self) -> None:
        """Put θ back in place."""
        for p, at in zip(self._leaves, self._start, strict=True):
            p.copy_(at)

    def _pass(self) -> tuple[Tensor, list[Tensor | None]]:
        self._numbers.restore()
        with torch.enable_grad():
            loss = self._loss_fn()
            gradient = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        return loss.detach(), list(gradient)


@contextmanager
def _in_single_precision(module: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Put copies in place of all half-precision parameters and buffers; the copy of each, one of a tied weight."""
    tables: list[dict[str, Any]] = [table for m in module.modules() for table in (m._parameters, m._buffers)]
    entries = [(table, name, t) for table in tables for name, t in table.items() if t is not None and _is_half(t)]
    twins = {t: t.detach().float().requires_grad_(t.requires_grad) for t in {t: t for _, _, t in entries}}
    try:
        for table, name, t in entries:
            table[name] = twins[t]
        yield twins
    finally:
        for table, name, t in entries:
            table[name] = t


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4
