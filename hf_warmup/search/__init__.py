"""The loss after a step that is not made, and the critical learning rate found with it."""

from hf_warmup.search.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.search.gradinit import gradinit
from hf_warmup.search.maximal_lr import MaxInitialLR, find_max_initial_lr
from hf_warmup.search.probe import has_momentum, loss_after_step, momentum_slope, update_slope

__all__ = [
    "CriticalLR",
    "MaxInitialLR",
    "find_critical_lr",
    "find_max_initial_lr",
    "gradinit",
    "has_momentum",
    "loss_after_step",
    "momentum_slope",
    "update_slope",
]
