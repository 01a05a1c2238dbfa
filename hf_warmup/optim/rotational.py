"""Rotational AdamW: AdamW whose rows of weights keep their norm and turn by the same angle every step.

Under weight decay a row of weights that a normalization follows ends in an equilibrium: its norm stays where decay
and updates balance, and each step turns it by an expected angle of AdamW [1]

    η_r = √(2 η λ (1-β1) / (1+β1)).

On the way there, which takes about 1/(ηλ) steps, the angles are others, and mostly too large: one reading of what
warmup is for [2]. This optimizer has the equilibrium from the first step. With u the step of Adam at η = 1, of a
row w of norm n:

    once        w ← n (w - mean w) / ‖w - mean w‖
    direction   d = u - mean u,   d ← d - w (w·d) / n²
    angle       q ← 0.9 q + 0.1 ‖d‖²,   w ← w - η_r n d / √(q / (1-0.9^t))
    norm        w ← n w / ‖w‖

A parameter is rotated if it has two dimensions or more and its group has a decay; its rows are its first dimension.
Norms, biases, and whatever has no decay take AdamW's step, with η. The step is proportional to √η: a learning rate
twice as large turns by 1.4 times the angle.

[1] Kosson, Messmer and Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks",
    ICML 2024, arXiv:2305.17212.
[2] Kosson, Messmer and Jaggi, "Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training", NeurIPS
    2024, arXiv:2410.23922. Their LionAR is another optimizer in the same equilibrium.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from hf_warmup.numeric import boolean

_adamw_step = inspect.unwrap(AdamW.step)  # without the hooks that torch puts around every optimizer's


class RotationalAdamW(AdamW):
    """AdamW that is in its equilibrium from the first step on.

    For trainings with weight decay whose weights are followed by normalizations, as in Transformers and CNNs: their
    norms cannot be a reason to warm up then. It needs whole rows: one process, DDP, or FSDP2, which
    splits between rows.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, -3.0, 4.0, -4.0]]))
        >>> optimizer = RotationalAdamW([weight], lr=0.1, betas=(0.0, 0.95), weight_decay=0.05)
        >>> before = weight.detach().clone()
        >>> (weight * torch.tensor([1.0, -1.0, 0.0, 0.0])).sum().backward()
        >>> optimizer.step()
        >>> angle = torch.nn.functional.cosine_similarity(weight, before).arccos()
        >>> round(weight.norm().item(), 4), round(angle.tan().item(), 4)  # √(2 * 0.1 * 0.05) = 0.1
        (7.0711, 0.1)

    Args:
        params: As for AdamW. Their rows are centred at once, and keep their norms.
        lr: η.
        betas: β1 and β2.
        eps: ε of Adam.
        weight_decay: λ, which sets the angle, and decays nothing that is rotated.
        nesterov: Whether the direction looks ahead: that of β1 m_t + (1-β1) g_t in place of m_t, with the same
            correction of its bias as m_{t+1}.

    Raises:
        ValueError: If AdamW refuses an argument, or `nesterov` is not a boolean.
        RuntimeError: In `step`, if something has flattened the rows, as DeepSpeed's ZeRO does.
    """

    AVERAGE = 0.9  # of ‖d‖², over steps

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = False,
    ) -> None:
        self.nesterov = boolean("nesterov", nesterov)
        super().__init__(params, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and centre its rows.

        Args:
            param_group: Its parameters, and what differs from the defaults.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["rotated"] = [bool(group["weight_decay"]) and p.ndim > 1 for p in group["params"]]
        for p in self._params(group, rotated=True):
            rows = p.flatten(1)
            centred = rows - rows.mean(1, keepdim=True)
            norm = _norm(centred)
            # A row of zeros, as of a padding token, has no direction; nor has one of equal numbers.
            p.copy_(torch.where(norm > 0, centred * (_norm(rows) / norm), rows).view_as(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the step.

        Args:
            closure: Computes the loss again.

        Returns:
            What the closure returns; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in self._params(group, rotated=True):
                if p.grad is not None:
                    self._rotate(p, group)
        # AdamW over the same state: nothing of it has to be kept.
        inner = object.__new__(AdamW)
        groups = [
            {
                **group,
                "params": [p for p, rotated in zip(group["params"], group["rotated"], strict=True) if not rotated],
            }
            for group in self.param_groups
        ]
        inner.__setstate__({"defaults": self.defaults, "state": self.state, "param_groups": groups})
        _adamw_step(inner)
        return loss

    @staticmethod
    def _params(group: dict[str, Any], *, rotated: bool) -> list[Tensor]:
        pairs = list(zip(group["params"], group["rotated"], strict=False))
        if len(pairs) < len(group["rotated"]) or any(turns and p.ndim < 2 for p, turns in pairs):
            raise RuntimeError(
                "RotationalAdamW needs whole rows, and something has flattened its parameters, as DeepSpeed's ZeRO "
                "does: train on one process, with DDP or with FSDP2"
            )
        return [p for p, turns in pairs if turns is rotated]

    def _rotate(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["norm"] = _norm(p.flatten(1))
            state["square"] = torch.zeros_like(state["norm"])
        state["step"] += 1
        t, lr, (beta1, beta2) = state["step"].item(), group["lr"], group["betas"]
        m, v = state["exp_avg"].lerp_(p.grad, 1 - beta1), state["exp_avg_sq"]
        v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        ahead = m.lerp(p.grad, 1 - beta1) / (1 - beta1 ** (t + 1)) if self.nesterov else m / (1 - beta1**t)
        update = (ahead / ((v / (1 - beta2**t)).sqrt() + group["eps"])).flatten(1)
        rows, norm = p.flatten(1), state["norm"]
        d = update - update.mean(1, keepdim=True)
        d = d - rows * (rows * d).sum(1, keepdim=True) / norm.square().clamp_min(torch.finfo(p.dtype).tiny)
        state["square"].lerp_(d.square().sum(1, keepdim=True), 1 - self.AVERAGE)
        size = (state["square"] / (1 - self.AVERAGE**t)).sqrt() + 1e-8
        angle = math.sqrt(2 * lr * group["weight_decay"] * (1 - beta1) / (1 + beta1))
        turned = rows - angle * norm * d / size
        turned = turned * (norm / _norm(turned))
        plain = rows * (1 - lr * group["weight_decay"]) - lr * update  # of a row without a direction
        p.copy_(torch.where(norm > 0, turned, plain).view_as(p))


def _norm(rows: Tensor) -> Tensor:
    return rows.square().sum(1, keepdim=True).sqrt()
