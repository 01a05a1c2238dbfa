"""Learning-rate warmup: GI-Adam and the critical learning rate, in torch alone.

The integration with the Hugging Face Trainer is `hf_warmup.trainer`.
"""

from hf_warmup.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.gi_adam import GIAdamW
from hf_warmup.guided import GuidedWarmup, PersistentCatapult
from hf_warmup.probe import loss_after_step, update_slope
from hf_warmup.schedule import ExponentialSchedule, SteeredSchedule, WarmupSchedule, steps_saved

__version__ = "0.1.0"

__all__ = [
    "CriticalLR",
    "ExponentialSchedule",
    "GIAdamW",
    "GuidedWarmup",
    "PersistentCatapult",
    "SteeredSchedule",
    "WarmupSchedule",
    "__version__",
    "find_critical_lr",
    "loss_after_step",
    "steps_saved",
    "update_slope",
]
