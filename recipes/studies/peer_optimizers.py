"""Optimizers that say they need no warmup, or no learning rate: not ours, and not all installed.

Schedule-free RAdam is of `schedulefree`, Prodigy of `prodigyopt`, Muon of torch as `MuonFactory` makes it.
ScheduleFree+ is written from its equations (arXiv:2605.19095).
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hf_warmup.trainer import MuonFactory

PACKAGES = {"RAdamScheduleFree": "schedulefree", "Prodigy": "prodigyopt"}


def missing(name: str) -> str:
    """What to install for an optimizer; empty if it is there."""
    if name == "Muon":
        return "" if hasattr(torch.optim, "Muon") else "torch>=2.9"
    package = PACKAGES.get(name.partition(" ")[0])
    return package if package and find_spec(package) is None else ""


def make_peer(
    name: str, model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float], steps: int
) -> Any:
    """By name, with the learning rate 1, over the parameter groups that the others have."""
    if name == "Muon":
        return MuonFactory()(model, lr=1.0, betas=betas, weight_decay=groups[0]["weight_decay"])
    if name == "RAdamScheduleFree":
        from schedulefree import RAdamScheduleFree

        return RAdamScheduleFree(groups, 1.0, betas)
    if name in ("Prodigy", "Prodigy safeguarded"):
        from prodigyopt import Prodigy

        # As its authors advise for a run with warmup.
        return Prodigy(groups, 1.0, betas, safeguard_warmup=name != "Prodigy")
    if name == "ScheduleFree+":
        return ScheduleFreePlus(groups, betas, steps)
    raise ValueError(f"no optimizer is called {name!r}")


class ScheduleFreePlus(torch.optim.Optimizer):
    """Adam whose learning rate is Polyak's step and whose decay is an average of the weights.

    With f the loss at y, b the weight of the average in y, and c = 1 in the first steps:

        η_t = f + b gᵀ(z - x) over √(π/2) ‖g‖₁, at least 0
        z ← z - η (m / (√v + ε) + η λ y),    x ← (1-c) x + c z,    y ← b x + (1-b) z,    c = max η² / Σ max η²

    b rises from .9 to .965 over the run, evenly in ln(1-b), and c is 1 for a tenth of it.

    Args:
        groups: Of parameters; their decay is λ.
        betas: Adam's.
        steps: Of the run.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], steps: int) -> None:
        super().__init__(groups, {"lr": 1.0})
        self.betas, self.steps, self.k, self.loss = betas, steps, 0, math.nan
        self.highest = self.total = 0.0
        self.at = "y"

    @torch.no_grad()
    def _move(self, to: str) -> None:
        for p, state in self.state.items():
            p.copy_(state[to])
        self.at = to

    def train(self) -> None:
        """Have the parameters be y."""
        self._move("y")

    def eval(self) -> None:
        """Have the parameters be x."""
        self._move("x")

    @torch.no_grad()
    def step(self) -> None:
        """The step, with `loss` at y."""
        params = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in params:
            if p not in self.state:
                zeros = {name: torch.zeros_like(p) for name in ("m", "v")}
                self.state[p] = {name: p.clone() for name in "xyz"} | zeros
        done = min(1.0, self.k / self.steps)
        b = 1 - math.exp(math.log(0.1) * (1 - done) + math.log(0.035) * done)
        norm = sum(float(p.grad.abs().sum()) for p, _ in params)
        along = sum(float((p.grad * (self.state[p]["z"] - self.state[p]["x"])).sum()) for p, _ in params)
        self.k += 1
        (beta1, beta2), lr = self.betas, max(0.0, self.loss + b * along) / (math.sqrt(math.pi / 2) * norm)
        lr *= self.param_groups[0]["lr"]
        self.highest = max(self.highest, lr)
        self.total += self.highest**2
        c = 1.0 if self.k <= self.steps / 10 else self.highest**2 / self.total
        for p, group in params:
            state = self.state[p]
            state["m"].lerp_(p.grad, 1 - beta1)
            state["v"].lerp_(p.grad.square(), 1 - beta2)
            scale = (state["v"] / (1 - beta2**self.k)).sqrt().add_(1e-8)
            update = state["m"] / (1 - beta1**self.k) / scale + lr * group["weight_decay"] * state["y"]
            state["z"].sub_(update, alpha=lr)
            state["x"].lerp_(state["z"], c)
            state["y"].copy_(b * state["x"] + (1 - b) * state["z"])
            p.copy_(state["y"])
