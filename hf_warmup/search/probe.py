"""The loss after the step an optimizer is about to make, at any learning rate, without making it.

Let step(η) be what the optimizer does to the parameters θ with the gradients it holds now, its state and learning
rate η. The probe evaluates L(step(η)(θ)), which for an update u that does not depend on η is the loss L(θ - η u) of
`hf_warmup.search.critical_lr`. It asks the optimizer itself for the step, so that momentum, bias corrections, weight
decay, clipping of the update and v_0 = g_0² are those of the real step: the loss equals, bit for bit, the loss after
a real step.

A probe leaves no trace (`hf_warmup.search.restore`), also when the loss raises. It costs one optimizer step and one
forward pass, and holds one copy of the parameters while it runs. torch's optimizers act on every element alone, so
the step is made on one piece of the parameters after another, each with copies of its piece of the gradients and of
the state; of an optimizer that is not known to do so all gradients and the whole state are copied. A slope needs no
parameter moved: it steps copies of an eighth of them at a time.

On many processes each moves what it holds (`Shards`), in place and without gathering it. Every process must then
probe the same learning rates, and the losses, which are its own, are to be averaged over them.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from hf_warmup.distributed import local
from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.restore import hidden_gradients, traceless
from hf_warmup.search.shards import Shard, Shards, elements, params_of, unwrap_optimizer

# Optimizers whose step moves every element by its own gradient and state only.
_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
} | {GIAdamW}
# The same of optimizers that are not imported here, by the names of their modules and classes.
_ELEMENTWISE_NAMES = {
    f"schedulefree.{name.lower()}_schedulefree.{name}ScheduleFree" for name in ("AdamW", "RAdam", "SGD")
}
# Elements stepped at once: at least so many, and at most about one part in so many of all. Slopes, which copy no
# other parameters, may use larger parts. A multiple of 64, so that a kernel cuts a piece into the same vectors.
_PIECE, _PIECES, _FEW_PIECES = 2**14, 100, 8


@torch.no_grad()
def loss_after_step(
    optimizer: Optimizer,
    loss_fn: Callable[[], Tensor | float],
    lr: float,
    *,
    module: nn.Module | None = None,
    shards: Shards | None = None,
) -> float:
    """The loss after the step that `optimizer` would make now with learning rate `lr`.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer, loss = torch.optim.SGD([weight]), lambda: weight.square().sum()
        >>> loss().backward()
        >>> [loss_after_step(optimizer, loss, lr) for lr in (0.0, 0.5, 1.0)], weight.item()
        ([1.0, 0.0, 1.0], 1.0)

    Args:
        optimizer: Holds the parameters, their gradients (as `step()` would see them: accumulated, unscaled, clipped)
            and its state. Any torch optimizer whose `step()` needs no closure, in accelerate's wrapper or not.
        loss_fn: Returns the loss of one fixed batch at the current parameters, a 0-d tensor or a number. Runs
            without autograd, on the same random numbers every time, so the same dropout masks. What it changes is
            put back.
        lr: η; 0 evaluates the loss at θ. Of parameter groups with several learning rates (`initial_lr`, where a
            scheduler has set it) the largest is meant, and the others keep their ratio to it.
        module: The model, to put back what its forward pass changes (BatchNorm's running statistics, counters).
            Needed if it is one of FSDP2.
        shards: What this process holds of the parameters, if they are neither whole nor DTensors.

    Returns:
        The loss, possibly not finite.

    Raises:
        ValueError: If `lr` is negative or not finite, no parameter has a gradient, the optimizer's step needs a
            closure, or the parameters are DTensors and `module` is None.
        RuntimeError: If the optimizer has step hooks, which might act twice, or acts on whole parameters where
            `shards` has parts; or if the loss moves what cannot be put back: an iterator, or a tensor that is no
            parameter and larger than all of them.
    """
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be at least 0 and finite, got {lr}")
    shards = Shards(optimizer, module) if shards is None else shards
    with _evaluating(shards, (module, loss_fn), _moved(shards, lr) if lr > 0 else None):
        return float(loss_fn())


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether the optimizer moves the parameters along earlier gradients too: Adam's kin, and SGD with momentum.

    Example:
        >>> [has_momentum(make([torch.ones(1)])) for make in (torch.optim.AdamW, torch.optim.SGD)]
        [True, False]

    Returns:
        Whether every parameter group has β1 or momentum. Not of schedule-free optimizers, which average weights.
    """
    made = unwrap_optimizer(optimizer)
    return all(_momentum(made, group) for group in made.param_groups)


def is_schedule_free(group: dict[str, Any]) -> bool:
    """Whether a parameter group is one of a schedule-free optimizer, of any library."""
    return "weight_lr_power" in group


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """The β1 or momentum of a group, by whatever name libraries give it; nothing or 0 if it has none."""
    if is_schedule_free(group):
        return None  # its β averages weights, and a step without a gradient moves nothing
    if betas := group.get("betas"):
        # bitsandbytes' RMSprop has its α and its momentum there.
        return betas[1 if type(optimizer).__name__.startswith("RMSprop") else 0]
    return group.get("beta1") or group.get("momentum")


@contextmanager
def _evaluating(shards: Shards, roots: Sequence[Any], moved: AbstractContextManager[Any] | None) -> Iterator[None]:
    """Let a loss be computed where `moved` has the parameters, or where they are; leave no trace in `roots`."""
    params = params_of(shards.optimizer)
    held = [p for p in params if p.grad is not None]
    size = sum(p.nbytes for p in params)
    with ExitStack() as restored:
        # A forward pass may write into the parameters that are not moved.
        still = [p for p in params if moved is None or p.grad is None]
        roots = [*roots, *(p for p in still if type(p) in (Tensor, nn.Parameter) and type(shards) is Shards)]
        apart = [shards.optimizer, *(held if moved is not None else ())]
        restored.enter_context(traceless(*roots, apart=apart, most_bytes=2 * size))
        if moved is not None:
            # `changed` may be a collective: twice on every process, also where the step raises.
            restored.callback(shards.changed)
            try:
                restored.enter_context(moved)
            finally:
                shards.changed()
        restored.enter_context(hidden_gradients(held))
        restored.callback(shards.evaluated)
        # Inside an autocast region of the caller, autocast would go on with the weights it cast before.
        restored.callback(torch.clear_autocast_cache)
        torch.clear_autocast_cache()
        yield


@torch.no_grad()
def update_slope(
    optimizer: Optimizer, lr: float, *, module: nn.Module | None = None, shards: Shards | None = None
) -> float:
    """The slope gᵀu at which the loss starts down along the step that `optimizer` would make now.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> weight.square().sum().backward()
        >>> round(update_slope(torch.optim.SGD([weight]), lr=0.1), 3)  # the gradient is 2
        4.0

    Args:
        optimizer: As for `loss_after_step`, and so are the errors; its gradients must be those of the loss itself,
            not clipped.
        lr: η, positive, at which the step is taken to measure u = (θ - step(η)(θ)) / η, of the size that is probed:
            rounding blurs a step that is far smaller than θ.
        module: The model, if it is one of FSDP2.
        shards: As for `loss_after_step`.

    Returns:
        gᵀu, in units of the loss per learning rate; of parameters that are sharded this process's part of the sum.
        Costs an optimizer step, no forward pass, and leaves no trace.
    """
    return _slope(optimizer, lr, torch.clone, module, shards)


@torch.no_grad()
def momentum_slope(
    optimizer: Optimizer, lr: float, *, module: nn.Module | None = None, shards: Shards | None = None
) -> float:
    """The slope gᵀu at which the loss starts down along the step that the momentum alone would make.

    u is that of a step with gradients of zero, in which the present batch had no part; g the gradient of that batch.
    A positive slope says that what earlier batches have left still descends on a new one. See `has_momentum`.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> for batch in (1.0, -1.0):  # the gradients of two batches
        ...     weight.grad = torch.tensor([batch])
        ...     print(round(momentum_slope(optimizer, lr=0.1), 3))
        ...     optimizer.step()
        0.0
        -0.9

    Returns:
        As `update_slope`, with the same arguments and errors. Clipped gradients change its size and not its sign.
    """
    return _slope(optimizer, lr, torch.zeros_like, module, shards)


def gradient_norm(shards: Shards) -> float:
    """The norm of all gradients, in one device sync; of parameters that are sharded that of this process's part."""
    grads = [shard.whole_grad() for _, held in shards.groups() for shard in held]
    return float(nn.utils.get_total_norm(grads)) if grads else 0.0


def _slope(
    optimizer: Optimizer,
    lr: float,
    gradient: Callable[[Tensor], Tensor],
    module: nn.Module | None,
    shards: Shards | None,
) -> float:
    """gᵀu along the step that would be made with `gradient` of every gradient g."""
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    shards = Shards(optimizer, module) if shards is None else shards
    if _is_elementwise(shards.optimizer):
        return _inner(_updates(shards, lr, gradient)) / lr
    params = params_of(shards.optimizer)
    grads = [local(p.grad) for p in params if p.grad is not None]
    with hidden_gradients(params, gradient), _moved(shards, lr) as starts:
        return _inner((value - shard.tensor, grad) for (shard, value), grad in zip(starts, grads, strict=True)) / lr


def _updates(shards: Shards, lr: float, gradient: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The update, times `lr`, that is made with other gradients, and the gradient; the parameters stay in place."""
    _check_steps(shards)
    for piece, parts in _pieces(shards, lr, _FEW_PIECES, gradient):
        with _no_global_hooks():
            piece.step()
        yield from ((part.values - part.tensor, part.grad) for part in parts)
        del piece, parts  # before the next copies are made


def _inner(updates: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The sum of the products of updates and their gradients."""
    pairs = (map(torch.view_as_real, pair) if pair[0].is_complex() else pair for pair in updates)
    parts = [(u * grad).sum(dtype=torch.float64) for u, grad in pairs]
    # One wait for the device, and a sum in the order of the parameters.
    return sum(torch.stack([part.to(parts[0].device) for part in parts]).tolist()) if parts else 0.0


def _groups_at(optimizer: Optimizer, lr: float) -> list[dict[str, Any]]:
    """The parameter groups with η in place of the largest learning rate; the others keep their ratio to it."""
    groups = optimizer.param_groups
    bases = [float(group.get("initial_lr", group["lr"])) for group in groups]
    lrs = [lr if base == max(bases) else lr * base / max(bases) for base in bases]
    # A new tensor: the old one is what the group gets back.
    return [
        {**group, "lr": torch.full_like(group["lr"], own) if isinstance(group["lr"], Tensor) else own}
        for group, own in zip(groups, lrs, strict=True)
    ]


@contextmanager
def _moved(shards: Shards, lr: float) -> Iterator[list[tuple[Shard, Tensor]]]:
    """Make the step on the parameters alone, and undo it bit for bit; each shard and its value before the step."""
    _check_steps(shards)
    held = [shard for _, members in shards.groups() for shard in members]
    # Copied back: θ - ηu + ηu is not θ in floating point.
    values = [shard.tensor.clone() for shard in held]
    # A forward pass may put another tensor in a weight's place, as one that is kept normalized.
    plain = [p for p in params_of(shards.optimizer) if type(p) in (Tensor, nn.Parameter)]
    places = [p.data for p in plain]
    try:
        with _no_global_hooks():
            if _is_elementwise(shards.optimizer):
                for piece, _ in _pieces(shards, lr, _PIECES):
                    piece.step()
            else:
                _step_and_restore_state(shards.optimizer, lr)
        yield list(zip(held, values, strict=True))
    finally:
        for p, place in zip(plain, places, strict=True):
            if p.data_ptr() != place.data_ptr():
                p.data = place
        if held:
            torch._foreach_copy_([shard.tensor for shard in held], values)


def _check_steps(shards: Shards) -> None:
    """Refuse an optimizer whose step cannot be made and undone on `shards`."""
    optimizer = shards.optimizer
    name = type(optimizer).__name__
    if needs_closure(optimizer):
        raise ValueError(f"cannot probe {name}: its step needs a closure, which makes forward passes of its own")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise RuntimeError(
            f"cannot probe {name}: it has step hooks, which a probe would run once per learning "
            "rate; remove them before the search and register them again after it"
        )
    params = params_of(optimizer)
    if type(shards) is Shards and params and all(p.grad is None for p in params):
        raise ValueError(
            f"cannot probe {name}: none of its {len(params)} parameters has a gradient; call backward() before, on a "
            "loss of the model that this optimizer was made for"
        )
    if not _is_elementwise(optimizer) and type(shards) is not Shards:
        raise RuntimeError(
            f"cannot probe {name} on {type(shards).__name__}: its step looks at more than a "
            "part of a parameter; use GIAdamW or an optimizer of torch.optim that moves every element alone"
        )


def _is_elementwise(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    return kind in _ELEMENTWISE or f"{kind.__module__}.{kind.__qualname__}" in _ELEMENTWISE_NAMES


class _Part(NamedTuple):
    """Some elements of a shard."""

    values: Tensor  # in their place
    grad: Tensor  # flat, or in the shape of the shard
    tensor: Tensor  # what is stepped, with the gradient that the step sees: `values`, or a copy
    state: dict[str, Any]  # a copy of the optimizer's


def _pieces(
    shards: Shards, lr: float, num_pieces: int, gradient: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[Optimizer, list[_Part]]]:
    """Optimizers like that of `shards`, each of some parts of them, with copies of their state."""
    members = [held for _, held in shards.groups()]
    size = max(_PIECE, sum(shard.tensor.numel() for held in members for shard in held) // num_pieces // 64 * 64)
    for group, held in zip(_groups_at(shards.optimizer, lr), members, strict=True):
        piece: list[_Part] = []
        for part in _parts(held, size, gradient):
            piece.append(part)
            if sum(other.values.numel() for other in piece) >= size:
                yield _like(shards.optimizer, group, piece), piece
                piece = []
                del part
        if piece:
            yield _like(shards.optimizer, group, piece), piece


def _parts(held: Iterable[Shard], size: int, gradient: Callable[[Tensor], Tensor] | None) -> Iterator[_Part]:
    """Parts of at most about `size` elements: views of them, or copies of them with other gradients."""
    for shard in held:
        p, num_elements = shard.tensor, shard.tensor.numel()
        like_p = {k: v for k, v in shard.state.items() if isinstance(v, Tensor) and v.shape == p.shape}
        whole = num_elements <= size or not all(
            type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in (p, *like_p.values())
        )
        for start in (0,) if whole else range(0, num_elements, size):
            stop = num_elements if whole else min(start + size, num_elements)
            # Views, of what is contiguous.
            values, grad = elements(p, start, stop), shard.grad(start, stop)
            tensor = values if gradient is None else values.clone()
            # A copy: some steps write into the gradient, as foreach SGD's with Nesterov's momentum does.
            tensor.grad = (gradient or torch.clone)(grad)
            state = {k: elements(v, start, stop) if k in like_p else v for k, v in shard.state.items()}
            # Of a small tensor, as a step count is, deepcopy takes thirty times as long.
            state = {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
            yield _Part(values, grad, tensor, state)


def _like(optimizer: Optimizer, group: dict[str, Any], piece: list[_Part]) -> Optimizer:
    twin = object.__new__(type(optimizer))
    groups = [{**group, "params": [part.tensor for part in piece]}]
    state = defaultdict(dict, {part.tensor: part.state for part in piece if part.state})
    twin.__setstate__({**optimizer.__getstate__(), "param_groups": groups, "state": state})
    return twin


def _step_and_restore_state(optimizer: Optimizer, lr: float) -> None:
    """Step `optimizer` itself on copies of its gradients, and give it back state, options and attributes."""
    params = params_of(optimizer)
    with (
        traceless(vars(optimizer), optimizer, *map(vars, params), apart=params),
        hidden_gradients(params, torch.clone),
    ):
        for group, other in zip(optimizer.param_groups, _groups_at(optimizer, lr), strict=True):
            group.update(other)
        optimizer.step()


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Keep the hooks that torch calls at every optimizer's step from seeing steps that are undone."""
    hooks: list[Any] = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    held = [(named, dict(named)) for named in hooks]
    try:
        for named in hooks:
            named.clear()
        yield
    finally:
        for named, before in held:
            named.update(before)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step cannot be made without a function that computes the loss."""
    # That of the class: a scheduler wraps the one of the object.
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
    return any(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments)
