"""The sharpness λ of the loss, and what it says of the learning rate."""

from hf_warmup.sharpness.diagnosis import Diagnosis, diagnose
from hf_warmup.sharpness.measures import (
    CriticalSharpness,
    Sharpness,
    adam_preconditioner,
    critical_sharpness,
    sharpness,
    stability_threshold,
)

__all__ = [
    "CriticalSharpness",
    "Diagnosis",
    "Sharpness",
    "adam_preconditioner",
    "critical_sharpness",
    "diagnose",
    "sharpness",
    "stability_threshold",
]
