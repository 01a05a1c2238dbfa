"""Rules for the learning rate of the next step, and the schedule behind them."""

from hf_warmup.warmup.guided import GuidedWarmup
from hf_warmup.warmup.linear import LinearWarmup
from hf_warmup.warmup.loss_adaptive import LossAdaptiveWarmup
from hf_warmup.warmup.persistent import PersistentCatapult
from hf_warmup.warmup.rule import Step, Warmup
from hf_warmup.warmup.schedule import WarmupSchedule

__all__ = [
    "GuidedWarmup",
    "LinearWarmup",
    "LossAdaptiveWarmup",
    "PersistentCatapult",
    "Step",
    "Warmup",
    "WarmupSchedule",
]
