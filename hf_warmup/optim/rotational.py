"""Rotational AdamW: AdamW in the equilibrium that weight decay leads to, from the first step on.

The gradient of a weight before a normalization is orthogonal to it, so AdamW's steps make it longer and weight decay
makes it shorter. The two balance after about 1 / (ηλ) steps. From then on every row of a weight keeps its length and
turns by the same angle in each step, in the mean [1]:

    η_r = √(2 η λ (1-β1) / (1+β1))

with η the learning rate and λ the decoupled weight decay. Before that rows turn by other angles, at the start often
by much larger ones, and warmup is one way to bear them [2]. Here length and angle are those of the equilibrium from
the first step on, and weight decay does nothing but set η_r. For a row w, with the direction of Adam
u = (m_t / (1-β1^t)) / (√(v_t / (1-β2^t)) + ε):

    once    w ← ‖w‖ (w - mean w) / ‖w - mean w‖,   n = ‖w‖
    step    d = u - mean u,   d ← d - w <d, w> / n²
            q ← 0.9 q + 0.1 ‖d‖²,   d ← d / (√(q / (1 - 0.9^t)) + 1e-8)
            w ← w - η_r n d,   w ← n w / ‖w‖

As d is orthogonal to w, a row turns by arctan η_r in the first step, whatever its gradient. Nesterov's momentum is
(β1 m_t + (1-β1) g_t) / (1-β1^(t+1)) in place of m_t / (1-β1^t): both are g under a constant gradient g.

Rows are those of the first dimension: the neurons of a linear layer, the tokens of an embedding (and the inputs of
transformers' Conv1D, as in GPT-2); all that is behind it is flattened. What has no rows, gains and biases, and what
has no weight decay takes the step of AdamW. Two choices are ours:

* a row that is constant, as one of zeros is, has no direction: for all of the run it takes the step of AdamW with
  decay, along u. So do LoRA's B and a projection that starts at zero. Rows of one or two numbers cannot turn once
  their mean is 0, and are AdamW's too.
* rows are centred in every step, which without rounding changes nothing after the first. So there is no flag to
  keep, and a step with η = 0, as torch makes one to load a checkpoint into, moves nothing.

The step grows with √η: a slope in units of the learning rate (`momentum_slope`) holds at the η at which it is taken.
As the first step centres the rows, its loss at η → 0 is not the loss at θ. Where it is probed, call `center_rows`
before its gradients are computed.

DDP changes nothing, and FSDP2 leaves rows whole: the step is that of one process. A parameter that is split along
another dimension is refused, and so are ZeRO's flat partitions.

[1] Kosson, Messmer and Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks",
    ICML 2024, arXiv:2305.17212.
[2] The same, "Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training", arXiv:2410.23922.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from hf_warmup.distributed import is_dtensor
from hf_warmup.numeric import boolean

_DECAY, _EPS = 0.9, 1e-8  # of the mean of ‖d‖², and under it [1]


class RotationalAdamW(Optimizer):
    """AdamW that turns every row of a matrix by the angle of its equilibrium and keeps the row's length.

    To train without warmup, or to see what of warmup's use is the angles of the first steps. Takes the η and λ of
    AdamW, in the usual groups: weight decay for matrices, none for gains and biases.

    Example:
        >>> weight = torch.tensor([[5.0, -5.0, 0.0, 0.0]], requires_grad=True)
        >>> optimizer = RotationalAdamW([weight], lr=0.1, betas=(0.0, 0.999), weight_decay=0.2)
        >>> weight.grad = torch.tensor([[0.0, 0.0, 7.0, -7.0]])
        >>> optimizer.step()  # η_r = √(2 * 0.1 * 0.2) = 0.2
        >>> round(weight.norm().item() ** 2, 3), round(-weight[0, 2].item() / weight[0, 0].item(), 3)
        (50.0, 0.2)

    Args:
        params: As for AdamW.
        lr: Learning rate η.
        betas: β1, which may be high, and β2.
        eps: ε, outside the root.
        weight_decay: λ. A group in which it is 0 is AdamW's.
        nesterov: Whether rows turn along Nesterov's momentum. What takes the step of AdamW does not.

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with options of its own."""
        group = {**self.defaults, **param_group}
        boolean("nesterov", group["nesterov"])
        # Checks them, and completes the group.
        AdamW([group], group["lr"], group["betas"], group["eps"], group["weight_decay"])
        if any(p.is_complex() for p in group["params"]):
            raise ValueError("params must be real numbers, got complex ones")
        super().add_param_group(group)

    @torch.no_grad()
    def center_rows(self) -> None:
        """Do now what the first step would do to the weights beside the step: give every row a mean of 0."""
        for p, _ in self._matrices():
            norm, w = _polar(p)
            p.copy_(torch.where(norm > 0, norm * w, p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Turn the rows, and make AdamW's step of all else.

        Args:
            closure: Gives the loss, and the gradients with it.

        Returns:
            That loss, if there is a closure.

        Raises:
            RuntimeError: If no parameter has rows, as under DeepSpeed's ZeRO, rows are split over processes, or a
                gradient is sparse.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        matrices = dict(self._matrices())
        groups = [{**g, "params": [p for p in g["params"] if p not in matrices]} for g in self.param_groups]
        # An AdamW over the same state: nothing of it has to be kept.
        inner = object.__new__(AdamW)
        inner.__setstate__({"defaults": {}, "state": self.state, "param_groups": groups})
        inspect.unwrap(AdamW.step)(inner)  # the hooks of all optimizers see one step, and not two
        for p, group in matrices.items():
            if p.grad is not None:
                self._turn(p, group)
        return loss

    def _matrices(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The parameters whose rows turn, with their groups."""
        if all(p.dim() < 2 for group in self.param_groups for p in group["params"]):
            raise RuntimeError(
                "RotationalAdamW needs matrices, and there is none: something has flattened them, as DeepSpeed's ZeRO "
                "does; train on one process, with DDP or with FSDP2"
            )
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1 and p.shape[1:].numel() > 2 and group["weight_decay"] != 0:
                    if is_dtensor(p) and not all(s.is_replicate() or s.is_shard(0) for s in p.placements):
                        raise RuntimeError(
                            f"RotationalAdamW needs whole rows, got a parameter split as {p.placements}"
                        )
                    yield p, group

    def _turn(self, p: Tensor, group: dict[str, Any]) -> None:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        grad, state = cast(Tensor, p.grad), self.state[p]
        if grad.is_sparse:
            raise RuntimeError("RotationalAdamW needs dense gradients, got a sparse one")
        if "step" not in state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        t = seen = float(state["step"])
        momentum = state["exp_avg"].lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["nesterov"]:
            momentum, seen = momentum.lerp(grad, 1 - beta1), t + 1
        u = momentum / (1 - beta1**seen) / ((second / (1 - beta2**t)).sqrt() + group["eps"])

        rows, (norm, w) = tuple(range(1, p.dim())), _polar(p)
        d = u - u.mean(rows, keepdim=True)
        d = d - w * (d * w).sum(rows, keepdim=True)
        square = d.square().sum(rows, keepdim=True)
        if "norm" not in state:
            # In the parameter's own precision, in which a checkpoint is loaded.
            state.update(norm=norm.to(p.dtype), square=square.to(p.dtype))
        # q / (1 - 0.9^t) itself, whose step has this weight.
        state["square"].lerp_(square.to(p.dtype), (1 - _DECAY) / (1 - _DECAY**t))
        if lr != 0:
            angle = math.sqrt(2 * lr * decay * (1 - beta1) / (1 + beta1))
            turned = w - angle * d / (state["square"].sqrt() + _EPS)
            turned *= state["norm"] / torch.linalg.vector_norm(turned, dim=rows, keepdim=True)
            p.copy_(torch.where(state["norm"] > 0, turned, (1 - lr * decay) * p - lr * u))


def _polar(p: Tensor) -> tuple[Tensor, Tensor]:
    """The length of every row, and its direction with mean 0; 0 of one that is constant up to rounding."""
    rows, x = tuple(range(1, p.dim())), p.to(torch.promote_types(p.dtype, torch.float32))
    centered = x - x.mean(rows, keepdim=True)
    norm, spread = (torch.linalg.vector_norm(t, dim=rows, keepdim=True) for t in (x, centered))
    limits = torch.finfo(x.dtype)
    # Below it the direction would be that of the errors of rounding.
    turns = spread > p.shape[1:].numel() * limits.eps * norm
    return torch.where(turns, norm, 0.0), centered / spread.clamp_min(limits.tiny)
