"""Learning-rate warmup: GI-Adam and the critical learning rate, in torch alone.

The integration with the Hugging Face Trainer is `hf_warmup.trainer`.
"""

from hf_warmup.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.diagnosis import Diagnosis, diagnose
from hf_warmup.gi_adam import GIAdamW
from hf_warmup.probe import along_step, has_momentum, loss_after_step, momentum_slope, update_slope
from hf_warmup.schedule import ExponentialSchedule, SteeredSchedule, WarmupSchedule, steps_saved
from hf_warmup.sharpness import (
    CriticalSharpness,
    Sharpness,
    adam_preconditioner,
    critical_sharpness,
    stability_threshold,
)
from hf_warmup.warmup import GuidedWarmup, PersistentCatapult

__version__ = "0.1.0"

__all__ = [
    "CriticalLR",
    "CriticalSharpness",
    "Diagnosis",
    "ExponentialSchedule",
    "GIAdamW",
    "GuidedWarmup",
    "PersistentCatapult",
    "Sharpness",
    "SteeredSchedule",
    "WarmupSchedule",
    "__version__",
    "adam_preconditioner",
    "along_step",
    "critical_sharpness",
    "diagnose",
    "find_critical_lr",
    "has_momentum",
    "loss_after_step",
    "momentum_slope",
    "stability_threshold",
    "steps_saved",
    "update_slope",
]
