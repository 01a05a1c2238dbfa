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
from hf_warmup.sharpness.output_scale import scale_output

__all__ = [
    "CriticalSharpness",
    "Diagnosis",
    "Sharpness",
    "adam_preconditioner",
    "critical_sharpness",
    "diagnose",
    "scale_output",
    "sharpness",
    "stability_threshold",
]
