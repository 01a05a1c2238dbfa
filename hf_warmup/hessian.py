"""Products of the Hessian of a loss and a vector, without the Hessian and without a trace.

With g(θ) the gradient of the loss of one fixed batch,

    H v = d/dθ (g(θ)ᵀ v):

a second backward pass, through the first. The fused kernels of scaled dot-product attention have no second
derivative, so its mathematical form is computed. A model in half precision is computed in single precision: the
curvature of its rounded loss is noise. Random numbers are the same in every product, so dropout is a part of the
loss.

Memory is that of a backward pass with its graph over one micro-batch, some times that of a training step's on the
same. [1] is the method.

[1] Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_warmup.probe import RandomNumbers, same_module

LossFn = Callable[[], Tensor] | Sequence[Callable[[], Tensor]]


@contextmanager
def hessian_products(
    loss_fn: LossFn, params: Sequence[Tensor], *, module: nn.Module | None = None
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Give the function v ↦ H v. On the way out everything is as it was, bit for bit.

    Args:
        loss_fn: Returns the loss of a fixed batch, a 0-d tensor with its graph. Or a sequence of such, one per
            micro-batch, whose losses add up to that of the batch. The graph of a single one is kept from product to
            product; in a sequence each is computed again, so that memory holds one at a time.
        params: Parameters θ, all of which require a gradient.
        module: The model, to restore its buffers and train/eval mode. Needed if parameters are in half precision.

    Raises:
        ValueError: If there are no parameters, one is there twice or is a DTensor (FSDP2 has no second derivative),
            or `module` is missing.

    Yields:
        The function, of vectors over the elements of all parameters one after another; and an empty vector of their
        shape (n,), device and precision: single, or double if a parameter is.
    """
    if not params or len(set(params)) < len(params):
        raise ValueError(f"params must be different tensors that require a gradient, got {len(params)}")
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError("params must be whole tensors, got DTensors, through which there is no second derivative")
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    numbers = RandomNumbers()
    with ExitStack() as restored:
        restored.callback(numbers.restore)
        twins: dict[Tensor, Tensor] = {}
        if module is not None:
            restored.enter_context(same_module(module))
            twins = restored.enter_context(_in_single_precision(module))
        leaves = [twins.get(p, p) for p in params]
        if any(_is_half(p) for p in leaves):
            raise ValueError("module must be the model that the half-precision parameters belong to")
        for device in {p.device.type for p in leaves}:
            restored.enter_context(torch.autocast(device, enabled=False))
        restored.enter_context(sdpa_kernel(SDPBackend.MATH))
        like = torch.empty(1, dtype=dtype, device=params[0].device).expand(sum(p.numel() for p in params))
        yield _Hessian(loss_fn, leaves, numbers), like


class _Hessian:
    def __init__(self, loss_fn: LossFn, leaves: list[Tensor], numbers: RandomNumbers) -> None:
        self._losses = [loss_fn] if callable(loss_fn) else list(loss_fn)
        self._keeps_graph = callable(loss_fn)
        self._kept: list[Tensor | None] | None = None
        self._leaves, self._numbers = leaves, numbers

    def __call__(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        parts = [part.view_as(p).to(p) for part, p in zip(self._split(v), self._leaves, strict=True)]
        self._numbers.restore()
        with torch.enable_grad():
            for loss_fn in self._losses:
                gradient = self._kept or self._gradient(loss_fn)
                if self._keeps_graph:
                    self._kept = gradient
                # A gradient that does not depend on the parameters has no graph, and no part in H.
                pairs = [
                    (g, part) for g, part in zip(gradient, parts, strict=True) if g is not None and g.requires_grad
                ]
                for sum_, row in zip(self._split(total), self._rows(pairs), strict=True):
                    if row is not None:
                        sum_ += row.reshape(-1).to(sum_)
        return total

    def _split(self, v: Tensor) -> tuple[Tensor, ...]:
        return v.split([p.numel() for p in self._leaves])

    def _gradient(self, loss_fn: Callable[[], Tensor]) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss_fn(), self._leaves, create_graph=True, allow_unused=True))

    def _rows(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
        if not pairs:
            return (None,) * len(self._leaves)
        gradient, v = zip(*pairs, strict=True)
        return torch.autograd.grad(gradient, self._leaves, v, retain_graph=self._keeps_graph, allow_unused=True)


@contextmanager
def _in_single_precision(module: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Put copies in place of all half-precision parameters and buffers.

    In the modules' tables, not in the parameters' `data`: a new dtype there would cost them their gradient hooks.

    Yields:
        The copy of each; a tied weight has one.
    """
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
