"""The loss after the step an optimizer is about to make, at any learning rate, without making it.

Let step(η) be what the optimizer does to the parameters θ with the gradients it holds now, its state and
learning rate η. The probe evaluates

    L(step(η)(θ)),

which for an update u that does not depend on η is the loss L(θ - η u) of `hf_warmup.critical_lr`. It asks
the optimizer itself for the step, so that momentum, bias corrections, weight decay, clipping of the update
and v_0 = g_0² are those of the real step: the loss equals, bit for bit, the loss after a real step.

A probe leaves no trace: parameters, optimizer state, gradients, random numbers, buffers and train/eval mode
are what they were, bit for bit, also when the loss raises. It costs one optimizer step and one forward pass.
While it runs it holds one copy of the parameters, on their device or on the CPU. torch's optimizers act on every
element alone, so the step is made on one piece of the parameters after another, each with its own copy of its
piece of the state; of an optimizer that is not known to do so the whole state is copied too. A slope of the momentum
needs no parameter moved: it steps copies of an eighth of them at a time.

On many processes each moves what it holds: everything, or the local shards of DTensors (FSDP2), in place and
without gathering them. `Shards` says what that is, and can be told of other ways to split a model. Every process
must then probe the same learning rates, and the losses, which are its own, are to be averaged over them.
"""

import copy
import functools
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_warmup.gi_adam import GIAdamW

# Optimizers whose step moves every element by its own gradient and state only.
_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
} | {GIAdamW}
# Elements stepped at once: at least so many, and at most about one part in so many of all; larger parts where no
# parameter is copied but those. A multiple of 64, so that a kernel cuts a piece into the same vectors as the whole.
_PIECE, _PIECES, _FEW_PIECES = 2**14, 80, 8


@dataclass
class Shard:
    """A parameter, or this process's part of one.

    Attributes:
        tensor: Its values, in their place.
        grad: Gives the elements of its gradient from `start` to `stop`, counted in the flat order of `tensor`: flat,
            or in the shape of `tensor` if they are all.
        state: Of the optimizer, with tensors of the same elements.
    """

    tensor: Tensor
    grad: Callable[[int, int], Tensor]
    state: dict[str, Any]

    def whole_grad(self) -> Tensor:
        """Its gradient, of all elements."""
        return self.grad(0, self.tensor.numel())


class Shards:
    """The parameters that an optimizer moves, as this process holds them: whole, or the local shards of DTensors.

    For models that are split in another way, derive from it.

    Args:
        optimizer: The optimizer, in accelerate's wrapper or not.
        module: The model; needed if it is one of FSDP2, whose modules may hold gathered weights.

    Attributes:
        optimizer: The innermost optimizer.
        module: The model.

    Raises:
        ValueError: If the parameters are DTensors and `module` is None.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module | None = None) -> None:
        self.optimizer = innermost(optimizer)
        self.module = module
        if module is None and any(isinstance(p, DTensor) for g in self.optimizer.param_groups for p in g["params"]):
            raise ValueError("module must be the model that the sharded parameters belong to, got None")

    def groups(self) -> list[tuple[dict[str, Any], list[Shard]]]:
        """Every parameter group of the optimizer, with its parameters that have a gradient."""
        return [
            (group, [self._shard(p) for p in group["params"] if p.grad is not None])
            for group in self.optimizer.param_groups
        ]

    def _shard(self, p: Tensor) -> Shard:
        grad, state = _local(p.grad), self.optimizer.state.get(p, {})
        assert grad is not None

        def cut(start: int, stop: int) -> Tensor:
            return grad.detach() if stop - start == grad.numel() else grad.detach().reshape(-1)[start:stop]

        return Shard(_local(p.detach()), cut, {name: _local(value) for name, value in state.items()})

    def largest_gradient(self) -> float:
        """The largest magnitude in this process's gradients; not finite if one is not, 0 if there are none."""
        grads = [shard.whole_grad() for _, shards in self.groups() for shard in shards]
        return largest_magnitude(grads)

    def changed(self) -> None:
        """Carry the values to whatever the model computes with; called after every change of them."""
        self.evaluated()

    def evaluated(self) -> None:
        """Let go of what a forward pass without autograd left behind; called after every one."""
        # FSDP2 keeps the root's weights gathered then, so the next pass would not see that their shards changed.
        for module in self._gathering:
            module.reshard()

    @functools.cached_property
    def _gathering(self) -> list[FSDPModule]:
        """The modules that gather weights; not looked for where no loss is asked for."""
        return [] if self.module is None else [m for m in self.module.modules() if isinstance(m, FSDPModule)]


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude of all elements, in one device sync; NaN if there is one, 0 if there are none."""
    norms = torch._foreach_norm([t for t in tensors if t.numel() > 0], ord=math.inf)
    return float(torch.stack([norm.float().to(norms[0].device) for norm in norms]).max()) if norms else 0.0


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def loss_after_step(
    optimizer: Optimizer,
    loss_fn: Callable[[], Tensor | float | Sequence[Tensor | float]],
    lr: float,
    *,
    module: nn.Module | None = None,
    copy_on_cpu: bool = False,
    shards: Shards | None = None,
) -> Any:
    """The loss after the step that `optimizer` would make now with learning rate `lr`.

    Args:
        optimizer: Holds the parameters, their gradients (as `step()` would see them: accumulated, unscaled,
            clipped) and its state. Any torch optimizer whose `step()` needs no closure, in accelerate's wrapper
            or not.
        loss_fn: Returns the loss of one fixed batch at the current parameters, a 0-d tensor or a number, or a
            sequence of the losses of several batches. Runs without autograd, on the same random numbers every
            time, so the same dropout masks.
        lr: η. With parameter groups of several learning rates (`initial_lr`, where a scheduler has set it) the
            largest of them is meant, and the others keep their ratio to it. 0 evaluates the loss at θ.
        module: The model, to restore its buffers (BatchNorm's running statistics) and its train/eval mode. Needed
            if it is one of FSDP2.
        copy_on_cpu: Keep the copy of the parameters in the CPU's memory: slower, for when the GPU's is full.
        shards: What this process holds of the parameters, if they are neither whole nor DTensors.

    Returns:
        The loss as a float, possibly not finite; a list of floats if `loss_fn` returned a sequence.

    Raises:
        ValueError: If `lr` is negative or not finite, or the parameters are DTensors and `module` is None.
        RuntimeError: If a step hook is registered on the optimizer: it might act twice or leave a trace. Or if the
            optimizer acts on whole parameters and `shards` has parts.
    """
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be at least 0 and finite, got {lr}")
    shards = Shards(optimizer, module) if shards is None else shards
    with _evaluating(shards, module, _moved(shards, lr, copy_on_cpu) if lr > 0 else None):
        losses = loss_fn()
        return [float(loss) for loss in losses] if isinstance(losses, Sequence) else float(losses)


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether the optimizer moves the parameters along earlier gradients too: Adam's kin, and SGD with momentum.

    Args:
        optimizer: In accelerate's wrapper or not.

    Returns:
        Whether every parameter group has β1 or momentum.
    """
    groups = innermost(optimizer).param_groups
    return all(group["betas"][0] > 0 if "betas" in group else group.get("momentum", 0) > 0 for group in groups)


@contextmanager
def _evaluating(shards: Shards, module: nn.Module | None, moved: AbstractContextManager[Any] | None) -> Iterator[None]:
    """Let a loss be computed where `moved` has the parameters, or where they are; leave no trace of it."""
    with ExitStack() as restored:
        restored.callback(RandomNumbers().restore)
        if module is not None:
            restored.enter_context(same_module(module))
        if moved is not None:
            # `changed` may be a collective: twice on every process, also where the step raises.
            restored.callback(shards.changed)
            try:
                restored.enter_context(moved)
            finally:
                shards.changed()
        restored.callback(shards.evaluated)
        # Inside an autocast region of the caller, autocast would go on with the weights it cast before.
        restored.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        yield


@torch.no_grad()
def update_slope(optimizer: Optimizer, lr: float, *, module: nn.Module | None = None) -> float:
    """The slope gᵀu at which the loss starts down along the step that `optimizer` would make now.

    Args:
        optimizer: As for `loss_after_step`; its gradients must be those of the loss itself, not clipped.
        lr: η at which the step is taken to measure u = (θ - step(η)(θ)) / η; any will do where u does not depend
            on it. Of the size that is probed: rounding blurs a step that is far smaller than θ.
        module: The model, if it is one of FSDP2.

    Returns:
        gᵀu, in units of the loss per learning rate; of parameters that are sharded this process's part of the sum.
        Costs an optimizer step, no forward pass.

    Raises:
        ValueError: If `lr` is not positive and finite.
    """
    with along_step(optimizer, lambda: math.nan, lr, module=module) as (_, slope):
        return slope


@torch.no_grad()
def momentum_slope(
    optimizer: Optimizer,
    lr: float,
    *,
    module: nn.Module | None = None,
    copy_on_cpu: bool = False,
    shards: Shards | None = None,
) -> float:
    """The slope gᵀu at which the loss starts down along the step that the momentum alone would make.

    u is that of a step with gradients of zero, in which the present batch had no part; g the gradient of that batch.
    A positive slope says that what earlier batches have left still descends on a new one. See `has_momentum`.

    Args:
        optimizer: As for `loss_after_step`. Clipped gradients change the slope's size and not its sign.
        lr: η at which the step is taken to measure u, as for `update_slope`.
        module: The model, if it is one of FSDP2.
        copy_on_cpu: Hold less at a time, in more and smaller steps; where an optimizer acts on more than each
            element alone, as for `loss_after_step`.
        shards: As for `loss_after_step`.

    Returns:
        gᵀu, in units of the loss per learning rate; of parameters that are sharded this process's part of the sum.
        Costs an optimizer step, no forward pass, and leaves no trace.

    Raises:
        ValueError: If `lr` is not positive and finite, or the parameters are DTensors and `module` is None.
        RuntimeError: As for `loss_after_step`.
    """
    shards = _moving(optimizer, lr, module, shards)
    if _is_elementwise(shards.optimizer):
        return _slope(_momentum_updates(shards, lr, _PIECES if copy_on_cpu else _FEW_PIECES)) / lr
    with _zero_gradients(shards.optimizer) as grads, _moved(shards, lr, copy_on_cpu) as starts:
        updates = (value.to(shard.tensor.device) - shard.tensor for shard, value in starts)
        return _slope(zip(updates, map(_local, grads), strict=True)) / lr


def _moving(optimizer: Optimizer, lr: float, module: nn.Module | None, shards: Shards | None) -> Shards:
    """What a step of `lr`, which must be one, moves."""
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    return Shards(optimizer, module) if shards is None else shards


def _momentum_updates(shards: Shards, lr: float, num_pieces: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The update, times `lr`, that the momentum alone would make, and the gradient; the parameters stay in place."""
    _check_steps(shards)
    for piece, parts in _pieces(shards, lr, num_pieces, momentum_alone=True):
        piece.step()
        yield from ((part.values - part.tensor, part.grad) for part in parts)
        del piece, parts  # before the next copies are made


def _slope(updates: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The sum of the products of updates and their gradients."""
    parts = [(u * grad).sum(dtype=torch.float64) for u, grad in updates]
    # One wait for the device, and a sum in the order of the parameters.
    return sum(torch.stack([part.to(parts[0].device) for part in parts]).tolist()) if parts else 0.0


@contextmanager
def along_step(
    optimizer: Optimizer,
    loss_fn: Callable[[], Tensor | float],
    lr: float,
    *,
    module: nn.Module | None = None,
    shards: Shards | None = None,
) -> Iterator[tuple[Callable[[float], float], float]]:
    """The loss along the line of the step that `optimizer` would make now, for many learning rates at little cost.

    The step is made once, at `lr`, and gives u = (θ - step(lr)(θ)) / lr; a trial is then L(θ - η u): a forward pass
    and nothing else. It is `loss_after_step` up to rounding where u does not depend on η, as for SGD, Adam and
    AdamW, and holds two copies of the parameters where that holds one. Leaves no trace.

    Args:
        optimizer: As for `loss_after_step`; with parameter groups of several learning rates the largest is meant.
        loss_fn: As for `loss_after_step`, of one batch.
        lr: The learning rate at which the step is made; of the size of those tried.
        module: The model; needed if it is one of FSDP2.
        shards: As for `loss_after_step`.

    Yields:
        The loss as a function of η, and the slope gᵀu at which it starts down, with the gradients that the
        optimizer holds; of parameters that are sharded this process's part of the sum.

    Raises:
        ValueError: If `lr` is not positive and finite, or the parameters are DTensors and `module` is None.
        RuntimeError: As for `loss_after_step`.
    """
    shards = _moving(optimizer, lr, module, shards)
    with torch.no_grad(), _moved(shards, lr, copy_on_cpu=False) as starts:
        updates = [(value - shard.tensor).div_(lr) for shard, value in starts]
    slope = _slope((u, shard.whole_grad()) for u, (shard, _) in zip(updates, starts, strict=True))
    tensors, values = [shard.tensor for shard, _ in starts], [value for _, value in starts]

    @contextmanager
    def moved(eta: float) -> Iterator[None]:
        try:
            torch._foreach_add_(tensors, updates, alpha=-eta)
            yield
        finally:
            torch._foreach_copy_(tensors, values)

    @torch.no_grad()
    def loss_at(eta: float) -> float:
        with _evaluating(shards, module, moved(eta) if eta > 0 else None):
            return float(loss_fn())

    yield loss_at, slope


def _lrs(optimizer: Optimizer, lr: float) -> list[float]:
    """η for each group: the largest is meant, the others keep their ratio to it."""
    bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return [lr if base == max(bases) else lr * base / max(bases) for base in bases]


def _with_lr(group: dict[str, Any], lr: float) -> dict[str, Any]:
    # A new tensor: the old one is what the group gets back.
    return {**group, "lr": torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr}


@contextmanager
def _moved(shards: Shards, lr: float, copy_on_cpu: bool) -> Iterator[list[tuple[Shard, Tensor]]]:
    """Make the step on the parameters alone; undo it on the way out, bit for bit.

    Raises:
        RuntimeError: If the optimizer has step hooks, or acts on more than the shards.

    Yields:
        Each shard and its value before the step.
    """
    _check_steps(shards)
    held = [shard for _, members in shards.groups() for shard in members]
    # Copied back: θ - ηu + ηu is not θ in floating point.
    values = [shard.tensor.to("cpu", copy=True) if copy_on_cpu else shard.tensor.clone() for shard in held]
    try:
        if _is_elementwise(shards.optimizer):
            for piece, _ in _pieces(shards, lr, _PIECES):
                piece.step()
        else:
            _step_and_restore_state(shards.optimizer, lr)
        yield list(zip(held, values, strict=True))
    finally:
        if held:
            torch._foreach_copy_([shard.tensor for shard in held], values)


def _check_steps(shards: Shards) -> None:
    """Refuse an optimizer whose step cannot be made and undone on `shards`.

    Raises:
        RuntimeError: If it has step hooks, or acts on more than the shards.
    """
    optimizer = shards.optimizer
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise RuntimeError(
            f"cannot probe {type(optimizer).__name__}: it has step hooks, which a probe would run once per learning "
            "rate; remove them before the search and register them again after it"
        )
    if not _is_elementwise(optimizer) and type(shards) is not Shards:
        raise RuntimeError(
            f"cannot probe {type(optimizer).__name__} on {type(shards).__name__}: its step looks at more than a "
            "part of a parameter; use GIAdamW or an optimizer of torch.optim that moves every element alone"
        )


def _is_elementwise(optimizer: Optimizer) -> bool:
    # RI-Adam's norm is over all parameters.
    return type(optimizer) in _ELEMENTWISE and getattr(optimizer, "v0", None) != "random"


@dataclass
class _Part:
    """Some elements of a shard.

    Attributes:
        values: Them, in their place.
        grad: Their gradient, flat or in their shape.
        tensor: What is stepped, with the gradient that the step sees: `values`, or a copy.
        state: A copy of the optimizer's, of these elements.
    """

    values: Tensor
    grad: Tensor
    tensor: Tensor
    state: dict[str, Any]


def _pieces(
    shards: Shards, lr: float, num_pieces: int, momentum_alone: bool = False
) -> Iterator[tuple[Optimizer, list[_Part]]]:
    """Optimizers like that of `shards`, each of some parts of them, with copies of their state."""
    groups = shards.groups()
    size = max(_PIECE, sum(shard.tensor.numel() for _, held in groups for shard in held) // num_pieces // 64 * 64)
    for (group, held), group_lr in zip(groups, _lrs(shards.optimizer, lr), strict=True):
        piece: list[_Part] = []
        for part in _parts(held, size, momentum_alone):
            piece.append(part)
            if sum(other.values.numel() for other in piece) >= size:
                yield _like(shards.optimizer, group, group_lr, piece), piece
                piece = []
                del part
        if piece:
            yield _like(shards.optimizer, group, group_lr, piece), piece


def _parts(held: Iterable[Shard], size: int, momentum_alone: bool) -> Iterator[_Part]:
    """Parts of at most about `size` elements: views of them, or copies of them with gradients of zero."""
    for shard in held:
        p, num_elements = shard.tensor, shard.tensor.numel()
        like_p = {k: v for k, v in shard.state.items() if isinstance(v, Tensor) and v.shape == p.shape}
        whole = num_elements <= size or not all(
            type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in (p, *like_p.values())
        )
        for start in (0,) if whole else range(0, num_elements, size):
            stop = num_elements if whole else min(start + size, num_elements)

            def cut(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
                return tensor.detach() if stop - start == tensor.numel() else tensor.detach().view(-1)[start:stop]

            values, grad = cut(p), shard.grad(start, stop)
            tensor = values.clone() if momentum_alone else values
            tensor.grad = torch.zeros_like(tensor) if momentum_alone else grad
            state = {k: cut(v).clone() if k in like_p else _copied(v) for k, v in shard.state.items()}
            yield _Part(values, grad, tensor, state)


def _copied(value: Any) -> Any:
    # Of a small tensor, as a step count is, deepcopy takes thirty times as long.
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _like(optimizer: Optimizer, group: dict[str, Any], lr: float, piece: list[_Part]) -> Optimizer:
    twin = object.__new__(type(optimizer))
    groups = [{**_with_lr(group, lr), "params": [part.tensor for part in piece]}]
    state = defaultdict(dict, {part.tensor: part.state for part in piece if part.state})
    twin.__setstate__({**optimizer.__getstate__(), "param_groups": groups, "state": state})
    return twin


def _step_and_restore_state(optimizer: Optimizer, lr: float) -> None:
    """Step `optimizer` itself, and give it back state, options and attributes."""
    with same_state(optimizer):
        for group, group_lr in zip(optimizer.param_groups, _lrs(optimizer, lr), strict=True):
            group.update(_with_lr(group, group_lr))
        optimizer.step()


@contextmanager
def _zero_gradients(optimizer: Optimizer) -> Iterator[list[Tensor]]:
    """Zeros in the place of the gradients, which are given."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    try:
        for p in params:
            p.grad = torch.zeros_like(p.grad)
        yield grads
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


@contextmanager
def same_state(optimizer: Optimizer) -> Iterator[None]:
    """Give an optimizer back its state, options and attributes, in the same tensors.

    Args:
        optimizer: Without a wrapper.

    Yields:
        Nothing.
    """
    attributes = dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    state = {p: _snapshot(s) for p, s in optimizer.state.items()}
    try:
        yield
    finally:
        for p in [p for p in optimizer.state if p not in state]:
            del optimizer.state[p]
        for p, (live, copies) in state.items():
            optimizer.state[p].clear()
            optimizer.state[p].update(_restored(live, copies))
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        vars(optimizer).clear()
        vars(optimizer).update(attributes)


def _snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return dict(state), {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}


def _restored(live: dict[str, Any], copies: dict[str, Tensor]) -> dict[str, Any]:
    for key, value in copies.items():
        live[key].copy_(value)
    return live


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer inside wrappers that keep it as `optimizer`, as accelerate's do."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class RandomNumbers:
    """The state of every random number generator when this was made: Python's, numpy's (if loaded), torch's."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python, self._numpy = random.getstate(), numpy.random.get_state() if numpy else None
        self._cpu = torch.get_rng_state()
        self._devices = [_device_module().get_rng_state(i) for i in range(torch.accelerator.device_count())]

    def restore(self) -> None:
        """Set every generator to that state."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for i, state in enumerate(self._devices):
            _device_module().set_rng_state(state, i)


def _device_module() -> Any:
    return torch.get_device_module(torch.accelerator.current_accelerator())


@contextmanager
def same_module(module: nn.Module) -> Iterator[None]:
    """Give back every submodule's train/eval mode and every buffer.

    DDP sends its buffers around before a forward pass and, after one without autograd, not before the next. The
    step that is probed has sent them, so no pass does here, and what the next one does is left as it was.

    Args:
        module: The model.

    Yields:
        Nothing.
    """
    modules = list(module.modules())
    replicas = [(m, m.require_forward_param_sync) for m in modules if isinstance(m, DistributedDataParallel)]
    modes = [(m, m.training) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules if m._buffers]
    values = [(b, b.clone()) for _, named in buffers for b in named.values() if b is not None]
    try:
        for replica, _ in replicas:
            replica.require_forward_param_sync = False
        yield
    finally:
        for replica, broadcasts in replicas:
            replica.require_forward_param_sync = broadcasts
        for m, training in modes:
            m.training = training  # not train(): that would set the children too
        for m, named in buffers:
            m._buffers.update(named)  # a forward may put a new tensor in a buffer's place
        for buffer, value in values:
            buffer.copy_(value)
