"""What a process holds of the parameters that an optimizer moves."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_warmup.distributed import is_dtensor, is_fsdp, local


@dataclass
class Shard:
    """A parameter, or this process's part of one."""

    tensor: Tensor  # its values, in their place
    grad: Callable[[int, int], Tensor]  # gives `elements` of its gradient
    state: dict[str, Any]  # of the optimizer, with tensors of the same elements

    def whole_grad(self) -> Tensor:
        """Its gradient, of all elements."""
        return self.grad(0, self.tensor.numel())


class Shards:
    """The parameters that an optimizer moves, as this process holds them: whole, or the local shards of DTensors.

    For models that are split in another way, derive from it.

    Args:
        optimizer: The optimizer, in accelerate's wrapper or not.
        module: The model; needed if it is one of FSDP2, whose modules may hold gathered weights.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module | None = None) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self.module = module
        if module is None and any(is_dtensor(p) for g in self.optimizer.param_groups for p in g["params"]):
            raise ValueError("module must be the model that the sharded parameters belong to, got None")

    def groups(self) -> list[tuple[dict[str, Any], list[Shard]]]:
        """Every parameter group of the optimizer, with its parameters that have a gradient."""
        return [
            (group, [self._shard(p) for p in group["params"] if p.grad is not None])
            for group in self.optimizer.param_groups
        ]

    def _shard(self, p: Tensor) -> Shard:
        state = {name: local(value) for name, value in self.optimizer.state.get(p, {}).items()}
        return Shard(local(p.detach()), functools.partial(elements, local(p.grad)), state)

    def largest_gradient(self) -> float:
        """The largest magnitude in this process's gradients; not finite if one is not, 0 if there are none."""
        return largest_magnitude([shard.whole_grad() for _, shards in self.groups() for shard in shards])

    def changed(self) -> None:
        """Carry the values to whatever the model computes with; called after every change of them."""
        self.evaluated()

    def evaluated(self) -> None:
        """Let go of what a forward pass without autograd left behind; called after every one."""
        # FSDP2 keeps the root's weights gathered then, so the next pass would not see that their shards changed.
        for module in self._gathering:
            module.reshard()

    @functools.cached_property
    def _gathering(self) -> list[Any]:
        """The modules that gather weights; not looked for where no loss is asked for."""
        return [] if self.module is None else [m for m in self.module.modules() if is_fsdp(m)]


def elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The elements of a tensor from `start` to `stop` in its flat order: flat, or, if they are all, in its shape."""
    return tensor.detach() if stop - start == tensor.numel() else tensor.detach().reshape(-1)[start:stop]


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude of all elements, in one device sync; NaN if there is one, 0 if there are none."""
    if not (held := [t for t in tensors if t.numel() > 0]):
        return 0.0
    norms = torch._foreach_norm(held, ord=math.inf)
    return float(torch.stack([norm.float().to(norms[0].device) for norm in norms]).max())


def params_of(optimizer: Optimizer) -> list[Any]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside wrappers that keep it as `optimizer` and step it, as accelerate's and DeepSpeed's do."""
    # An optimizer that makes something else of another's steps (Lookahead) is none of them.
    while hasattr(optimizer, "optimizer") and (
        not isinstance(optimizer, Optimizer)
        or type(optimizer).__module__.partition(".")[0] in ("accelerate", "deepspeed")
    ):
        optimizer = optimizer.optimizer
    return optimizer
