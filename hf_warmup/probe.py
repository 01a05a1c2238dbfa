"""The loss after the step an optimizer is about to make, at any learning rate, without making it.

Let step(η) be what the optimizer does to the parameters θ with the gradients it holds now, its state and
learning rate η. The probe evaluates

    L(step(η)(θ)),

which for an update u that does not depend on η is the loss L(θ - η u) of `hf_warmup.critical_lr`. It asks
the optimizer itself for the step, so that momentum, bias corrections, weight decay, clipping of the update
and v_0 = g_0² are those of the real step: the loss equals, bit for bit, the loss after a real step.

A probe leaves no trace: parameters, optimizer state, gradients, random numbers, buffers and train/eval mode
are what they were, bit for bit, also when the loss raises. It costs one optimizer step and one forward pass,
and while it runs a copy of the parameters and of the optimizer's state.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def loss_after_step(
    optimizer: Optimizer, loss_fn: Callable[[], Tensor | float], lr: float, *, module: nn.Module | None = None
) -> float:
    """The loss after the step that `optimizer` would make now with learning rate `lr`.

    Args:
        optimizer: Holds the parameters, their gradients (as `step()` would see them: accumulated, unscaled,
            clipped) and its state. Any torch optimizer whose `step()` needs no closure.
        loss_fn: Returns the loss of one fixed batch at the current parameters, a 0-d tensor or a number. Runs
            without autograd, on the same random numbers every time, so the same dropout masks.
        lr: η. With parameter groups of several learning rates (`initial_lr`, where a scheduler has set it) the
            largest of them is meant, and the others keep their ratio to it. 0 evaluates the loss at θ.
        module: The model, to restore its buffers (BatchNorm's running statistics) and its train/eval mode.

    Returns:
        The loss, possibly not finite.

    Raises:
        ValueError: If `lr` is negative or not finite.
        RuntimeError: If a step hook is registered on the optimizer: it might act twice or leave a trace.
    """
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be at least 0 and finite, got {lr}")
    with ExitStack() as restored:
        restored.callback(RandomNumbers().restore)
        if module is not None:
            restored.enter_context(_same_module(module))
        if lr > 0:
            restored.enter_context(_same_optimizer(optimizer))
            _set_lr(optimizer, lr)
            optimizer.step()
        # Inside an autocast region of the caller, autocast would go on with the weights it cast before.
        restored.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        return float(loss_fn())


def _set_lr(optimizer: Optimizer, lr: float) -> None:
    bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for group, base in zip(optimizer.param_groups, bases, strict=True):
        value = lr if base == max(bases) else lr * base / max(bases)
        # A new tensor: the old one is what the group gets back.
        group["lr"] = torch.full_like(group["lr"], value) if isinstance(group["lr"], Tensor) else value


@contextmanager
def _same_optimizer(optimizer: Optimizer) -> Iterator[None]:
    """Restore parameters, state and options to what they were, bit for bit and in the same tensors.

    Raises:
        RuntimeError: If the optimizer has step hooks.

    Yields:
        Nothing.
    """
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise RuntimeError(
            f"cannot probe {type(optimizer).__name__}: it has step hooks, which a probe would run once per learning "
            "rate; remove them before the search and register them again after it"
        )
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = [p.clone() for p in params]  # copied back: θ - ηu + ηu is not θ in floating point
    attributes = dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    state = {p: _snapshot(s) for p, s in optimizer.state.items()}
    try:
        yield
    finally:
        if params:
            torch._foreach_copy_(params, values)
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
    for key, copy in copies.items():
        live[key].copy_(copy)
    return live


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
