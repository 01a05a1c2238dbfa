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
piece of the state; of an optimizer that is not known to do so the whole state is copied too.
"""

import copy
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_warmup.gi_adam import GIAdamW

# Optimizers whose step moves every element by its own gradient and state only.
_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
} | {GIAdamW}
# Elements stepped at once: at least so many, and at most about this part of all. A multiple of 64, so that a
# kernel cuts a piece into the same vectors as the whole.
_PIECE, _PIECES = 2**14, 80


@torch.no_grad()
def loss_after_step(
    optimizer: Optimizer,
    loss_fn: Callable[[], Tensor | float | Sequence[Tensor | float]],
    lr: float,
    *,
    module: nn.Module | None = None,
    copy_on_cpu: bool = False,
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
        module: The model, to restore its buffers (BatchNorm's running statistics) and its train/eval mode.
        copy_on_cpu: Keep the copy of the parameters in the CPU's memory: slower, for when the GPU's is full.

    Returns:
        The loss as a float, possibly not finite; a list of floats if `loss_fn` returned a sequence.

    Raises:
        ValueError: If `lr` is negative or not finite.
        RuntimeError: If a step hook is registered on the optimizer: it might act twice or leave a trace.
    """
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be at least 0 and finite, got {lr}")
    optimizer = innermost(optimizer)
    with ExitStack() as restored:
        restored.callback(RandomNumbers().restore)
        if module is not None:
            restored.enter_context(_same_module(module))
        if lr > 0:
            restored.enter_context(_moved(optimizer, lr, copy_on_cpu))
        # Inside an autocast region of the caller, autocast would go on with the weights it cast before.
        restored.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        losses = loss_fn()
        return [float(loss) for loss in losses] if isinstance(losses, Sequence) else float(losses)


@torch.no_grad()
def update_slope(optimizer: Optimizer, lr: float) -> float:
    """The slope gᵀu at which the loss starts down along the step that `optimizer` would make now.

    Args:
        optimizer: As for `loss_after_step`; its gradients must be those of the loss itself, not clipped.
        lr: η at which the step is taken to measure u = (θ - step(η)(θ)) / η; any will do where u does not depend
            on it. Of the size that is probed: rounding blurs a step that is far smaller than θ.

    Returns:
        gᵀu, in units of the loss per learning rate. Costs an optimizer step, no forward pass.

    Raises:
        ValueError: If `lr` is not positive and finite.
    """
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    optimizer = innermost(optimizer)
    with _moved(optimizer, lr, copy_on_cpu=False) as starts:
        products = [((v - p) * p.grad).sum(dtype=torch.float64) for p, v in starts if p.grad is not None]
        return sum(float(product) for product in products) / lr


def _lrs(optimizer: Optimizer, lr: float) -> list[float]:
    """η for each group: the largest is meant, the others keep their ratio to it."""
    bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return [lr if base == max(bases) else lr * base / max(bases) for base in bases]


def _with_lr(group: dict[str, Any], lr: float) -> dict[str, Any]:
    # A new tensor: the old one is what the group gets back.
    return {**group, "lr": torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr}


@contextmanager
def _moved(optimizer: Optimizer, lr: float, copy_on_cpu: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Make the step on the parameters alone; undo it on the way out, bit for bit.

    Raises:
        RuntimeError: If the optimizer has step hooks.

    Yields:
        Each parameter and its value before the step.
    """
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise RuntimeError(
            f"cannot probe {type(optimizer).__name__}: it has step hooks, which a probe would run once per learning "
            "rate; remove them before the search and register them again after it"
        )
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Copied back: θ - ηu + ηu is not θ in floating point.
    values = [p.to("cpu", copy=True) if copy_on_cpu else p.clone() for p in params]
    try:
        if _is_elementwise(optimizer):
            for piece in _pieces(optimizer, lr):
                piece.step()
        else:
            _step_and_restore_state(optimizer, lr)
        yield list(zip(params, values, strict=True))
    finally:
        if params:
            torch._foreach_copy_(params, values)


def _is_elementwise(optimizer: Optimizer) -> bool:
    # RI-Adam's norm is over all parameters.
    return type(optimizer) in _ELEMENTWISE and getattr(optimizer, "v0", None) != "random"


def _pieces(optimizer: Optimizer, lr: float) -> Iterator[Optimizer]:
    """Optimizers like `optimizer` over its parameters' own memory, a piece at a time, with copies of their state."""
    num_elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    size = max(_PIECE, num_elements // _PIECES // 64 * 64)
    for group, group_lr in zip(optimizer.param_groups, _lrs(optimizer, lr), strict=True):
        piece: dict[Tensor, dict[str, Any]] = {}
        for part, state in _parts(optimizer, group["params"], size):
            piece[part] = state
            if sum(p.numel() for p in piece) >= size:
                yield _like(optimizer, group, group_lr, piece)
                piece = {}
        if piece:
            yield _like(optimizer, group, group_lr, piece)


def _parts(optimizer: Optimizer, params: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Views of at most about `size` elements, with their gradient, and a copy of their state."""
    for p in params:
        if p.grad is None:
            continue
        state = optimizer.state.get(p, {})
        like_p = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
        plain = all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in (p, p.grad, *like_p.values()))
        whole = p.numel() <= size or not plain
        for start in (0,) if whole else range(0, p.numel(), size):

            def cut(tensor: Tensor, start: int = start, whole: bool = whole) -> Tensor:
                return tensor.detach() if whole else tensor.detach().view(-1)[start : start + size]

            part = cut(p)
            part.grad = cut(p.grad)
            yield part, {k: cut(v).clone() if k in like_p else copy.deepcopy(v) for k, v in state.items()}


def _like(optimizer: Optimizer, group: dict[str, Any], lr: float, piece: dict[Tensor, dict[str, Any]]) -> Optimizer:
    twin = object.__new__(type(optimizer))
    groups = [{**_with_lr(group, lr), "params": list(piece)}]
    state = defaultdict(dict, {p: s for p, s in piece.items() if s})
    twin.__setstate__({**optimizer.__getstate__(), "param_groups": groups, "state": state})
    return twin


def _step_and_restore_state(optimizer: Optimizer, lr: float) -> None:
    """Step `optimizer` itself, and give it back state, options and attributes, in the same tensors."""
    attributes = dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    state = {p: _snapshot(s) for p, s in optimizer.state.items()}
    try:
        for group, group_lr in zip(optimizer.param_groups, _lrs(optimizer, lr), strict=True):
            group.update(_with_lr(group, group_lr))
        optimizer.step()
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
def _same_module(module: nn.Module) -> Iterator[None]:
    """Give back every submodule's train/eval mode and every buffer."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(m, dict(m._buffers)) for m in module.modules() if m._buffers]
    values = [(b, b.clone()) for _, named in buffers for b in named.values() if b is not None]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training  # not train(): that would set the children too
        for m, named in buffers:
            m._buffers.update(named)  # a forward may put a new tensor in a buffer's place
        for buffer, value in values:
            buffer.copy_(value)
