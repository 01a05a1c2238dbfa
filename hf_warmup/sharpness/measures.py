"""Sharpness: the largest curvature of the loss, and the learning rate at which it makes an optimizer unstable.

With H the Hessian of the loss of one fixed batch in the parameters θ, g its gradient, and P the diagonal that Adam
divides by,

    λ^H        = the largest eigenvalue of H                                    (sharpness)
    λ^(P⁻¹H)   = the largest eigenvalue of P⁻¹ H                                (pre-conditioned sharpness)
    P_t        = (1-β1^t) (√(v_t / (1-β2^t)) + ε),    v_t of the step to come, so with the current gradient in it
    λ_c        = 2 / η_c                                                        (critical sharpness)

Largest is meant algebraically. At a standard initialization the largest eigenvalue in magnitude is often negative,
and no instability. P⁻¹H is not symmetric; P^-½ H P^-½ is, and has the same eigenvalues.

H is known by its products with vectors (`hf_warmup.sharpness.hessian`), whose largest eigenvalue is found by
`hf_warmup.sharpness.lanczos`.

On a quadratic loss of curvature λ an optimizer's iterates grow above a threshold (`stability_threshold`), and λ over
the threshold is the stability ratio: 1 is the edge of stability [2]. With w the weight decay, which is part of the
gradient in torch's SGD and decoupled in AdamW,

    SGD                         2/η - w
    SGD, momentum β             (2+2β)/η - w                     at the first step (m_0 = 0)    2/η - w
    AdamW, GI-Adam, of λ^(P⁻¹H) (1+β1)/(1-β1) (2/η - w)          at the first step    (2/η - w)/(1-β1)

so 38/η for AdamW at β1 = .9 without decay, 20/η at the first step [1]. They follow from the roots z of the update's
characteristic polynomial, for AdamW with fixed P

    z² - (1 - ηw + β1 - η (1-β1) λ) z + β1 (1 - ηw) = 0,

of which one is -1 at the threshold. λ_c is another quantity: the curvature along the one step to come, which is
2 gᵀu / uᵀHu in the inverse, and at most λ on a quadratic.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405. Its eq. 6 prints P without the root; its code has it. First steps, decay: ours.
[2] Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", ICLR 2021,
    arXiv:2103.00065, and "Adaptive gradient methods at the edge of stability", arXiv:2207.14484.
[3] Kalra et al., "critical sharpness", arXiv:2601.16979: the definition of λ_c.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_warmup.numeric import number, positive, whole
from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.sharpness.hessian import LossFn, hessian_products
from hf_warmup.sharpness.lanczos import Eigenpair, largest_eigenpair

# Of the start: what is drawn at random beside the vectors of the last measurement, relative to them.
_FRESH = 0.1


@dataclass(frozen=True)
class Sharpness(Eigenpair):
    """The largest eigenvalue of the Hessian, or the pre-conditioned one, and what it cost.

    Attributes:
        value: λ, in loss / parameter²; pre-conditioned in 1 / lr. NaN if a product was not finite.
        vector: Its eigenvector of norm 1, over the elements of all parameters that require a gradient one after
            another; pre-conditioned that of P^-½ H P^-½.
        residual: Norm of (H - λ) times the vector: an eigenvalue lies within it of λ.
        converged: Whether the residual is as small as was asked.
        asymmetry: Largest |xᵀH y - yᵀH x| met, relative to the largest eigenvalue in magnitude: rounding, unless the
            loss is not the same in every product, or is rounded too much.
    """

    @property
    def hvps(self) -> int:
        """Products of the Hessian of the whole batch and a vector."""
        return self.num_products


def sharpness(
    loss_fn: LossFn,
    params: Iterable[Tensor],
    *,
    preconditioner: Mapping[Tensor, Tensor] | None = None,
    tol: float = 1e-3,
    max_hvps: int = 100,
    start: Tensor | None = None,
    module: nn.Module | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Sharpness:
    """The largest eigenvalue of the loss's Hessian.

    Leaves no trace: parameters, gradients, random numbers and, of `module`, buffers and train/eval mode are what
    they were.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> round(sharpness(lambda: (w * w * torch.tensor([1.0, 3.0])).sum() / 2, [w]).value, 3)
        3.0

    Args:
        loss_fn: Returns the loss of a fixed batch, a 0-d tensor with its graph. Or a sequence of such, one per
            micro-batch, whose losses **add up** to the loss of the batch: memory is then that of one micro-batch.
            Must be deterministic but for random numbers, and not enter autocast itself (one around the call is
            switched off). Of a model in DDP call the module inside: its reducer waits for a usual backward pass.
        params: Parameters θ. Those that do not require a gradient are held fixed.
        preconditioner: P, as a positive tensor of the parameter's shape for each: `adam_preconditioner(optimizer)`.
            Parameters without an entry are held fixed.
        tol: Largest residual wanted, relative to |λ|. λ itself is mostly far closer.
        max_hvps: Most products to spend.
        start: `vector` of an earlier measurement, to start from. Sets the cost, not the answer.
        module: The model, to restore its buffers and train/eval mode. Needed if it has parameters in half precision:
            it is then computed in single precision, with a copy of its weights.
        reduce: Under DDP, the mean over processes of the tensor it gets. Every process then has the same answer.

    Returns:
        Eigenvalue, vector and cost. A product takes about 3.5 forward and backward passes, or 2 if `loss_fn` is a
        single callable: its graph is then kept from product to product. The solver holds 8 copies of the
        parameters in single precision; up to five more, and what a backward pass with its graph takes, are held
        while a product is computed.

    Raises:
        ValueError: If an argument is out of range or of the wrong shape, there is nothing to differentiate in,
            a parameter is there twice or a DTensor (FSDP2 has no second derivative), or `module` is missing.
    """
    tol, max_hvps = positive("tol", tol), whole("max_hvps", max_hvps, 1)
    free = [p for p in params if p.requires_grad and (preconditioner is None or p in preconditioner)]
    if start is not None and start.shape != (num_elements := sum(p.numel() for p in free),):
        raise ValueError(f"start must be of shape ({num_elements},), got {tuple(start.shape)}")
    with hessian_products(loss_fn, free, module=module) as (hessian, like):
        scale = None if preconditioner is None else inverse_root([preconditioner[p] for p in free], like)
        options = {"tol": tol, "max_products": max_hvps, "reduce_dots": reduce}
        return sharpness_of(hessian, start_vector(like, start), scale, **options)


def sharpness_of(
    hessian: Callable[[Tensor], Tensor], start: Tensor, scale: Tensor | None, **options: Any
) -> Sharpness:
    """The same of flat products v ↦ H v, with P^-½ as `scale` and the options of `largest_eigenpair`."""
    reduce = options.get("reduce_dots")

    def product(v: Tensor) -> Tensor:
        result = hessian(v if scale is None else v * scale)
        result = result if reduce is None else reduce(result)
        return result if scale is None else result.mul_(scale)

    return Sharpness(**vars(largest_eigenpair(product, start, **options)))


@torch.no_grad()
def adam_preconditioner(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """P_t of the step that Adam, AdamW or GIAdamW would make now, so that it subtracts η m_t / P_t.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> (2 * w).sum().backward()
        >>> round(next(iter(adam_preconditioner(torch.optim.Adam([w])).values())).item(), 6)  # (1-β1) |g| in step 1
        0.2

    Args:
        optimizer: Holds the gradients as `step()` would see them: accumulated, unscaled, clipped. May not have made
            a step; of GIAdamW's v_0 this counts what its first step would set.

    Returns:
        P_t of every parameter that the step would move, in its shape, in single precision at least and the unit of a
        gradient. Costs one copy of the parameters, and before GIAdamW's first step two more while it runs.

    Raises:
        ValueError: If the optimizer is another.
    """
    adam = unwrap_optimizer(optimizer)
    if not isinstance(adam, torch.optim.Adam):
        raise ValueError(f"optimizer must be Adam, AdamW or GIAdamW, got {type(adam).__name__}")
    if isinstance(adam, GIAdamW):
        adam = _born(adam)
    moved: dict[Tensor, Tensor] = {}
    for group in adam.param_groups:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        for p in group["params"]:
            if p.grad is None or p in getattr(adam, "_waiting", ()):
                continue
            state, g = adam.state.get(p, {}), p.grad.to(torch.promote_types(p.dtype, torch.float32))
            if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
                g = (-g if group["maximize"] else g).add(p, alpha=group["weight_decay"])
            v = g.square() * (1 - beta2)
            # In double precision: 1 - β2 is a difference of nearly equal numbers.
            t = torch.ones((), dtype=torch.float64, device=p.device)
            if state:
                v = v.add_(state["exp_avg_sq"], alpha=beta2)
                t = t + state["step"].to(t)
            if group["amsgrad"] and state:
                v = torch.maximum(v, state["max_exp_avg_sq"])
            moved[p] = v.div_(1 - beta2**t).sqrt_().add_(group["eps"]).mul_(1 - beta1**t)
    return moved


def stability_threshold(optimizer: Optimizer, *, first_step: bool | None = None) -> float:
    """The curvature above which the optimizer's iterates grow at its present learning rate.

    Example:
        >>> stability_threshold(torch.optim.SGD([torch.ones(1)], lr=0.5))  # 2 / η
        4.0

    Args:
        optimizer: SGD, for λ^H; Adam, AdamW or GIAdamW, for λ^(P⁻¹H). Adam's own, coupled weight decay is left out:
            add ½ w ‖θ‖² to the loss whose λ is compared.
        first_step: Whether there is no momentum yet. Whether the optimizer has no state, if None.

    Returns:
        The threshold in the unit of λ, infinity if the learning rate is 0. λ over it is the stability ratio.

    Raises:
        ValueError: If the optimizer is another, or its groups differ in learning rate or momentum.
    """
    inner = unwrap_optimizer(optimizer)
    first_step = not getattr(inner, "state", {}) if first_step is None else first_step
    thresholds = [_threshold(inner, group, first_step) for group in groups_of(inner)]
    for name in ("lr", "betas", "momentum"):
        if any(group.get(name) != inner.param_groups[0].get(name) for group in inner.param_groups):
            raise ValueError(f"{name} must be the same in all parameter groups: there is no one threshold")
    return min(thresholds)


@dataclass(frozen=True)
class CriticalSharpness:
    """Curvature along the step to come, in 1 / lr, and the search for η_c.

    Where the search ended at its target or its budget λ_c is less than this. It is 0 if no learning rate raises the
    loss, infinity if every one does.
    """

    value: float
    search: CriticalLR


def critical_sharpness(
    loss_at: Callable[[float], float], *, previous: float | None = None, **options: Any
) -> CriticalSharpness:
    """λ_c = 2 / η_c by forward passes alone. Not the sharpness: it knows one direction.

    Example:
        >>> round(critical_sharpness(lambda lr: (1 - 20 * lr) ** 2, previous=20.0).value)  # η_c is 0.1
        20

    Args:
        loss_at: As for `find_critical_lr`, and so are the options and errors.
        previous: The last λ_c, where the search starts.
        **options: `target`, `slope`, `start`, `rtol`, `max_evals`.

    Returns:
        λ_c and the search: 4 to 6 forward passes from a good `previous`, one less with `start`, and `slope`.
    """
    last = math.inf if previous is None else number("previous", previous)
    search = find_critical_lr(loss_at, guess=2 / last if 0 < last < math.inf else None, **options)
    return CriticalSharpness(2 / search.value if search.value else math.inf, search)


def start_vector(like: Tensor, last: Tensor | None, fresh: float = _FRESH) -> Tensor:
    """The first vector: random, or the sum of the last one and some (`fresh`) of a random one."""
    # On the CPU, so that it is the same on every device.
    random = torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(0)).to(like.device)
    if last is None or not last.any():
        return random
    last = last.detach().to(like)
    # Not alone: near another eigenvector the largest eigenvalue would be missed.
    return last.add(random, alpha=fresh * float(last.norm() / random.norm()))


def inverse_root(diagonal: list[Tensor], like: Tensor) -> Tensor:
    """P^-½, flat."""
    flat = torch.cat([d.detach().reshape(-1).to(like) for d in diagonal])
    if not bool((flat > 0).all()):
        raise ValueError(f"preconditioner must be positive, got {float(flat.min())}")
    return flat.rsqrt_()


def _born(optimizer: GIAdamW) -> GIAdamW:
    """A twin with the same state, in which parameters that are new have the v_0 that the next step gives them."""
    twin = copy.copy(optimizer)
    twin._waiting = optimizer._waiting
    # v_0 is written in place.
    state = {
        p: {name: t.clone() for name, t in s.items()} if p in twin._waiting else s for p, s in optimizer.state.items()
    }
    twin.state = defaultdict(dict, {p: s for p, s in state.items() if s})
    if unborn := optimizer._unborn():
        twin._give_birth(unborn)
    return twin


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups of what must be an optimizer."""
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(f"optimizer must be SGD, Adam, AdamW or GIAdamW, got {type(optimizer).__name__}")
    return optimizer.param_groups


def _threshold(optimizer: Optimizer, group: dict[str, Any], first_step: bool) -> float:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if lr == 0:
        return math.inf
    if isinstance(optimizer, torch.optim.Adam):
        beta1 = float(group["betas"][0])
        decay = decay if group.get("decoupled_weight_decay", True) else 0.0
        return (2 / lr - decay) * (1 if first_step else 1 + beta1) / (1 - beta1)
    if isinstance(optimizer, torch.optim.SGD):
        beta, rest = group["momentum"], 1 - group["dampening"]
        if first_step:
            # torch's buffer starts as the gradient, without dampening.
            return 2 / lr / (1 + beta * group["nesterov"]) - decay
        # What one oscillation z = -1 adds up to in the buffer; Nesterov's step has the gradient itself beside it.
        gain = 1 + beta * rest / (1 + beta) if group["nesterov"] else rest / (1 + beta) if beta else 1
        return 2 / lr / gain - decay
    raise ValueError(f"optimizer must be SGD, Adam, AdamW or GIAdamW, got {type(optimizer).__name__}")
