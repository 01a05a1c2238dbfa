"""Optimizers that say they need no warmup, or no learning rate: not ours, and not all installed.

Schedule-free RAdam is of `schedulefree`, Prodigy of `prodigyopt`, Muon of torch as `MuonFactory` makes it.
"""

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


def make_peer(name: str, model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Any:
    """By name, with the learning rate 1, over the parameter groups that the others have."""
    if name == "Muon":
        return MuonFactory()(model, lr=1.0, betas=betas, weight_decay=groups[0]["weight_decay"])
    if name == "RAdamScheduleFree":
        from schedulefree import RAdamScheduleFree

        return RAdamScheduleFree(groups, 1.0, betas)
    if name == "Prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, 1.0, betas)
    raise ValueError(f"no optimizer is called {name!r}")
