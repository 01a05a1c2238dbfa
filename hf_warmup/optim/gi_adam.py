"""GI-Adam: AdamW whose second moment starts at the first squared gradient.

Adam starts from v_0 = 0 and divides by 1 - β2^t to undo the bias that causes. GI-Adam starts from v_0 = g_0² and
keeps that division [1]:

    m_0 = 0, v_0 = g_0²
    m_t = β1 m_{t-1} + (1-β1) g_t,    v_t = β2 v_{t-1} + (1-β2) g_t²
    θ ← (1 - η w) θ - η (m_t / (1-β1^t)) / (√(v_t / (1-β2^t)) + ε)

with g the gradient, η the learning rate, w the decoupled weight decay (the paper has none). v̂ starts 1 / (1-β2)
times too large and that bias decays, so under a constant gradient the step length is η √(1 - β2^t): a warmup nobody
had to tune, 0.032 η at t = 1 and 0.9 η at t = 1660 for β2 = 0.999, but 0.22 η and 0.9 η at t = 32 for β2 = 0.95.

Only the birth of the state is written here; the update is torch's own, in its single-tensor, foreach and fused
kernels. Two choices differ from the authors' code [2]:

* g_0 there is the gradient of one batch drawn before training. Here it is the gradient of step 1 itself, which costs
  no backward pass. For their choice, call `seed_second_moment` with that batch's gradients; of several batches it
  makes v_0 = σ (E[g]² + Var[g]) = σ E[g²] [3], with σ the number that `v0` is.
* a parameter whose gradient is exactly zero (LoRA's A, a zero-initialised projection's input) would be born with
  v_0 = 0 and get no warmup. Here it waits, with its step count at 0, for its first non-zero gradient. This holds for
  whole parameters, not for the row of an embedding whose token is not in the first batch.

On many processes v_0 is the square of the gradient that AdamW would use, reduced and unscaled: under DDP, in the
shards of FSDP2 (DTensors), of which one that happens to be zero does not wait if another is not, and in the flat
partitions of DeepSpeed's ZeRO, each of which is a parameter of its own here.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405, GI-Adam; v_0 = α g_0² is a variant named there.
[2] `adam_init(grads=...)`, github.com/dayal-kalra/why-warmup at 877d887 (JAX, MIT).
[3] Abuduweili and Liu, "Revisiting the Initial Steps in Adaptive Gradient Descent Optimization", arXiv:2412.02153.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim.optimizer import ParamsT

from hf_warmup.distributed import is_dtensor, local, whole
from hf_warmup.numeric import positive, shown

# Without the hooks that torch puts around every optimizer's `step`: GIAdamW.step has its own.
_adamw_step = inspect.unwrap(torch.optim.AdamW.step)


class GIAdamW(torch.optim.AdamW):
    """AdamW with v_0 = g_0²: a drop-in replacement whose warmup is built in.

    Takes `torch.optim.AdamW`'s arguments and one more. The state has AdamW's keys and dtypes, so each loads the
    other's checkpoint and goes on.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = GIAdamW([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> round(1 - weight.item(), 4), round(0.1 * (1 - 0.95) ** 0.5, 4)
        (0.0224, 0.0224)

    Args:
        params: As for AdamW.
        lr: Learning rate η.
        betas: β1 and β2. The built-in warmup reaches 0.9 η after about 1.66 / (1-β2) steps.
        eps: ε, outside the root.
        weight_decay: Decoupled weight decay w.
        amsgrad: Divide by the largest v_t so far. It is counted from v_1 on.
        v0: Where the second moment starts: `"gradient"` (g_0²), or a positive number α (α g_0²).
        **options: AdamW's others. In a CUDA graph (`capturable`) once every parameter is born. With the fused kernel
            under `torch.amp.GradScaler` gradients arrive scaled: v_0 is the square of the unscaled gradient, and a
            step that overflows leaves no state.

    Attributes:
        v0: Where the second moment starts.

    Raises:
        ValueError: If `v0` is none of these, or AdamW refuses an argument.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        v0: str | float = "gradient",
        **options: Any,
    ) -> None:
        try:
            # Python's own, as it goes into checkpoints.
            v0 = v0 if isinstance(v0, str) and v0 == "gradient" else positive("v0", v0)
        except ValueError:
            raise ValueError(f'v0 must be "gradient" or a positive number, got {shown(v0)}') from None
        self.v0 = v0
        # Parameters with state whose gradients so far were exactly zero. Not in the state: whether a
        # parameter waits can be read off its state, at the price of a device sync.
        self._waiting: set[Tensor] = set()
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "v0": self.v0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._waiting = {
            p
            for p in self._parameters()
            if self._has_state(p) and self.state[p]["step"] == 0 and not whole(self.state[p]["exp_avg_sq"].any())
        }

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step: AdamW's, after v_0 has been set for parameters that are new."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if self._waiting or not all(map(self._has_state, self._parameters())):
                # Which parameters are born depends on the data; a compiled step is whole afterwards. A decorator
                # would import the compiler along with this file.
                torch.compiler.disable(self._step_with_births)()
            else:
                _adamw_step(self)
        return loss

    @torch.no_grad()
    def seed_second_moment(self, *grads: Sequence[Tensor | None]) -> None:
        """Set v_0 from gradients of the caller's choice, before the first step, as the authors' code does.

        Nothing else changes: neither the parameters' gradients nor random numbers.

        Example:
            >>> weight = torch.ones(1, requires_grad=True)
            >>> optimizer = GIAdamW([weight], v0=0.5)
            >>> batches = torch.tensor([1.0]), torch.tensor([3.0])
            >>> optimizer.seed_second_moment(*(torch.autograd.grad((weight * x).sum(), [weight]) for x in batches))
            >>> optimizer.state[weight]["exp_avg_sq"].item()  # 0.5 * (1² + 3²) / 2
            2.5

        Args:
            *grads: Of each batch one gradient per parameter, unscaled, in the order of the parameter groups; `v0`
                says what is made of them. Of several batches g_0² is the mean of the squares; None is counted as
                zero. A parameter whose gradients are all None or zero is born later, as usual.

        Raises:
            RuntimeError: If a parameter has state already.
            ValueError: If there is no batch, or the number of gradients or a shape differs from the parameters'.
        """
        params = list(self._parameters())
        if any(map(self._has_state, params)):
            raise RuntimeError(
                "seed_second_moment must be called before the first step: a parameter has state already"
            )
        if not grads:
            raise ValueError("grads must be those of at least one batch, got none")
        for batch in grads:
            if len(batch) != len(params):
                raise ValueError(f"grads must hold one gradient per parameter: got {len(batch)} for {len(params)}")
            for p, grad in zip(params, batch, strict=True):
                if grad is not None and grad.shape != p.shape:
                    raise ValueError(f"grads must be shaped like the parameters: got {grad.shape} for {p.shape}")
        kept = [p.grad for p in params]
        try:
            for p, *seen in zip(params, *grads, strict=True):
                p.grad = _root_mean_square([grad.detach().to(p) for grad in seen if grad is not None], len(grads))
            self._give_birth([p for p in params if p.grad is not None])
        finally:
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _has_state(self, p: Tensor) -> bool:
        # Not `p in self.state`: who only looks (DeepSpeed's ZeRO does) leaves an empty state behind.
        return bool(self.state.get(p))

    def _unborn(self) -> list[Tensor]:
        new = [p for p in self._parameters() if p in self._waiting or not self._has_state(p)]
        return [p for p in new if p.grad is not None]

    def _step_with_births(self) -> None:
        unborn = self._unborn()
        found_inf = getattr(self, "found_inf", None)
        overflow = bool(unborn) and found_inf is not None and bool(found_inf)
        if not overflow:
            self._give_birth(unborn)
        idle = {p: p.grad for p in unborn if overflow or p in self._waiting}
        try:
            for p in idle:
                p.grad = None  # AdamW passes over it: no state, no step counted.
            _adamw_step(self)
        finally:
            for p, grad in idle.items():
                p.grad = grad
        if not overflow:
            self._decay(idle)

    def _give_birth(self, params: list[Tensor]) -> None:
        """Make the state of `params`; those with a non-zero gradient get their v_0, the others wait."""
        for group in self.param_groups:
            self._init_group(group, [], [], [], [], [], [])
        grads = [_real(p.grad) for p in params if p.grad is not None]
        born = [p for p, nonzero in zip(params, _are_nonzero(grads), strict=True) if nonzero]
        self._waiting = (self._waiting | set(params)) - set(born)
        for p in born:
            _real(self.state[p]["exp_avg_sq"]).copy_(self._v0_of(_real(p.grad)))

    def _v0_of(self, g: Tensor) -> Tensor:
        """Where the second moment starts, for a gradient that may be scaled."""
        if (scale := getattr(self, "grad_scale", None)) is not None:
            # In single precision: a scaled half-precision gradient may be a normal number only there.
            g = g.to(torch.promote_types(g.dtype, torch.float32)) / scale.to(g.device)
        return g.square().mul_(1.0 if self.v0 == "gradient" else float(self.v0))

    def _decay(self, params: Iterable[Tensor]) -> None:
        """Decay `params` as AdamW does under a zero gradient."""
        chosen = set(params)
        for group in self.param_groups:
            for p in chosen.intersection(group["params"]):
                if group["weight_decay"] != 0:
                    p.mul_(1 - group["lr"] * group["weight_decay"])


def _real(tensor: Tensor | None) -> Tensor:
    """Complex numbers as pairs: Adam squares the parts one by one."""
    assert tensor is not None
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _root_mean_square(grads: list[Tensor], num: int) -> Tensor | None:
    """√E[g²] over `num` batches, of which those not in `grads` had none; of a single one the gradient itself."""
    if num == 1 or not grads:
        return grads[0] if grads else None
    mean = torch.zeros_like(grads[0], dtype=_at_least_single(grads[0]))
    for grad in grads:
        part = _real(grad.to(mean.dtype))
        _real(mean).addcmul_(part, part, value=1 / num)
    _real(mean).sqrt_()
    return mean.to(grads[0].dtype)


def _at_least_single(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _are_nonzero(tensors: list[Tensor]) -> list[bool]:
    """Whether each whole tensor has an element that is not zero (a NaN is none), in one device sync."""
    if not tensors:
        return []
    parts = [local(t) for t in tensors]
    # The largest magnitude is exact in every dtype, where a sum of squares may underflow. A shard may be empty.
    held = [t for t in parts if t.numel() > 0]
    norms = iter(torch._foreach_norm(held, ord=math.inf) if held else ())
    device = parts[0].device
    flags = torch.stack([(next(norms) if t.numel() > 0 else t.new_zeros(())).ne(0).to(device) for t in parts]).int()
    meshes: dict[Any, None] = dict.fromkeys(getattr(t, "device_mesh", None) for t in tensors if is_dtensor(t))
    for mesh in meshes:
        for dim in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MAX, mesh.get_group(dim))
    return flags.bool().tolist()
