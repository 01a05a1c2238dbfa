"""Optimizers that say they need no warmup, or no learning rate: not ours, and not all installed.

Schedule-free RAdam is of `schedulefree`, Prodigy of `prodigyopt`, Muon of torch from 2.9 on. Muon is for the
matrices inside the network; embeddings, biases and norms are AdamW's at the same learning rate, as the scale of
Muon's update is matched to AdamW's.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

PACKAGES = {"RAdamScheduleFree": "schedulefree", "Prodigy": "prodigyopt"}


def missing(name: str) -> str:
    """What to install for an optimizer; empty if it is there."""
    if name == "Muon":
        return "" if hasattr(torch.optim, "Muon") else "torch>=2.9"
    package = PACKAGES.get(name)
    return package if package and find_spec(package) is None else ""


def make_peer(name: str, model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Any:
    """By name, with the learning rate 1, over the parameter groups that the others have."""
    if name == "Muon":
        return Muon(model, groups, betas)
    if name == "RAdamScheduleFree":
        from schedulefree import RAdamScheduleFree

        return RAdamScheduleFree(groups, 1.0, betas)
    if name == "Prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, 1.0, betas)
    raise ValueError(f"no optimizer is called {name!r}")


class Muon:
    """Muon for the matrices inside the network, AdamW for the rest, as one optimizer."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        decay = groups[0]["weight_decay"]
        inner = [p for p in groups[0]["params"] if p.dim() == 2 and p not in embeddings]
        rest = [p for p in groups[0]["params"] if p.dim() != 2 or p in embeddings]
        self.parts = [
            torch.optim.Muon(inner, 1.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([groups[0] | {"params": rest}, groups[1]], 1.0, betas),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()
