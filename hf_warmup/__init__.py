"""Learning-rate warmup: GI-Adam and the critical learning rate, in torch alone.

The integration with the Hugging Face Trainer is `hf_warmup.trainer`.
"""

from hf_warmup.optim import GIAdamW
from hf_warmup.search import (
    CriticalLR,
    MaxInitialLR,
    find_critical_lr,
    find_max_initial_lr,
    gradinit,
    has_momentum,
    loss_after_step,
    momentum_slope,
    update_slope,
)
from hf_warmup.warmup import GuidedWarmup, LinearWarmup, PersistentCatapult, WarmupSchedule

__version__ = "0.2.0"

__all__ = [
    "CriticalLR",
    "GIAdamW",
    "GuidedWarmup",
    "LinearWarmup",
    "MaxInitialLR",
    "PersistentCatapult",
    "WarmupSchedule",
    "__version__",
    "find_critical_lr",
    "find_max_initial_lr",
    "gradinit",
    "has_momentum",
    "loss_after_step",
    "momentum_slope",
    "update_slope",
]
