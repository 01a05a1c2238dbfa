"""Optimizers that say they need no warmup, or no learning rate: not ours, and not all installed.

Schedule-free RAdam is of `schedulefree`, Prodigy of `prodigyopt`, Muon of torch as `MuonFactory` makes it.
ScheduleFree+ is written from its equations (arXiv:2605.19095), and AdaS, for convolutions, from what the code of its
authors computes (arXiv:2006.06587).
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
    package = PACKAGES.get(name)
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
    if name == "Prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, 1.0, betas)
    if name == "ScheduleFree+":
        return ScheduleFreePlus(groups, betas, steps)
    if name == "AdaS":  # the stream of images has no epochs: 30 of them a run
        return AdaS(model.parameters(), max(1, steps // 30))
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


class AdaS(torch.optim.SGD):
    """SGD with momentum whose learning rate follows how fast each convolution gains structure, epoch by epoch.

    W of a convolution is unfolded into a matrix with a row per input channel, and one with a row per output channel.
    Of either, with n its rows and d the singular values of its low-rank part (`low_rank`), the knowledge gain is
    Σ d / (n max d), and 0 without such a part; G is the mean of both. At the end of epoch t

        η_t = max(β η_(t-1) + G_t - G_(t-1), 1e-10),    η_0 after the first epoch, and as long as G is 0.

    What is no convolution, or one of 1 x 1, has the η of the convolution before it. This is arXiv:2006.06587 as its
    authors' later code has it (mahdihosseini/RMSGD, `src/adas/optim`); their first code does not wait while G is 0.

    Args:
        params: In the order of the network, with a convolution first.
        epoch_steps: Steps of an epoch.
        lr: η_0, of [that code] 0.03.
        beta: β.
        momentum: SGD's.
    """

    def __init__(
        self, params: Any, epoch_steps: int, lr: float = 0.03, beta: float = 0.8, momentum: float = 0.9
    ) -> None:
        params = list(params)
        # A group each, as each may have its own learning rate; `lr` of the group stays a factor of the caller's.
        super().__init__([{"params": [p]} for p in params], 1.0, momentum=momentum)
        self.epoch_steps, self.beta, self.start, self.k = epoch_steps, beta, lr, 0
        self.rates = [lr] * len(params)
        self.gains: list[float | None] = [None] * len(params)

    def step(self, closure: Any = None) -> Any:
        """The step, and after the last of an epoch the learning rates of the next."""
        factors = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] *= rate
        loss = super().step(closure)
        for group, factor in zip(self.param_groups, factors, strict=True):
            group["lr"] = factor
        self.k += 1
        if self.k % self.epoch_steps == 0:
            self._next_epoch()
        return loss

    def _next_epoch(self) -> None:
        for i, (group, before) in enumerate(zip(self.param_groups, self.gains, strict=True)):
            if not has_gain(group["params"][0]):
                self.rates[i] = self.rates[i - 1] if i else self.start
                continue
            gain = self.gains[i] = knowledge_gain(group["params"][0])
            if before is not None and (gain > 0 or self.rates[i] != self.start):
                self.rates[i] = max(self.beta * self.rates[i] + gain - before, 1e-10)


def has_gain(p: torch.Tensor) -> bool:
    """Whether that is the weight of a convolution over more than a pixel."""
    return p.dim() == 4 and 1 not in p.shape[2:]


@torch.no_grad()
def knowledge_gain(weight: torch.Tensor) -> float:
    """G of a convolution's weight."""
    gains = []
    for unfolded in (weight.transpose(0, 1).flatten(1), weight.flatten(1)):
        kept = low_rank(unfolded)
        gains.append(float(kept.sum() / kept.max()) / len(unfolded) if len(kept) else 0.0)
    return sum(gains) / 2


def low_rank(matrix: torch.Tensor) -> torch.Tensor:
    """The singular values of a matrix that empirical variational Bayes keeps, shrunk.

    The global solution of Nakajima, Sugiyama, Babacan and Tomioka (JMLR 14, 2013, and 16, 2015). With L ≤ M the
    sides, α = L/M, s the singular values, x = s² / (M σ²), t = 2.5129 √α and b = (1+t)(1+α/t), σ² minimizes

        Σ (x - ln x) + Σ_(x > b) (ln(τ+1) + α ln(τ/α + 1) - τ),    τ = ½ (x-1-α + √((x-1-α)² - 4α)),

    and s is kept where x > b, as s/2 (1 - (L+M) σ²/s² + √((1 - (L+M) σ²/s²)² - 4 L M σ⁴/s⁴)).
    """
    s = torch.linalg.svdvals(matrix.double())
    (small, large), energy = sorted(matrix.shape), s.square()
    alpha = small / large
    t = 2.5129 * math.sqrt(alpha)
    b = (1 + t) * (1 + alpha / t)
    if not energy.sum() > 0:
        return s[:0]
    rank = min(math.ceil(small / (1 + alpha)) - 1, small - 1)  # no more can be signal
    low = torch.maximum(energy[rank] / (large * b), energy[rank:].mean() / large).clamp(min=1e-12 * energy.max())
    ends = torch.stack([low.log(), (energy.sum() / (small * large)).log()])

    def free_energy(log_variance: torch.Tensor) -> torch.Tensor:
        x = (energy / large).clamp(min=1e-300) / log_variance.exp()[:, None]
        gap = (x - 1 - alpha).clamp(min=2 * math.sqrt(alpha))
        tau = 0.5 * (gap + (gap.square() - 4 * alpha).clamp(min=0).sqrt())
        kept = (tau + 1).log() + alpha * (tau / alpha + 1).log() - tau
        return (x - x.log() + torch.where(x > b, kept, 0.0)).sum(1)

    for _ in range(8):  # a grid, and finer ones about its least
        grid = torch.linspace(0, 1, 257, dtype=torch.float64) * (ends[1] - ends[0]) + ends[0]
        at = int(free_energy(grid).argmin())
        ends = grid[[max(at - 1, 0), min(at + 1, 256)]]
    variance = ends.mean().exp()
    s = s[energy > large * variance * b]
    r = 1 - (small + large) * variance / s.square()
    return s / 2 * (r + (r.square() - 4 * small * large * variance.square() / s**4).sqrt())
