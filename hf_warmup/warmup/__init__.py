"""Rules for the learning rate of the next step, behind two protocols (`rule.py`)."""

from hf_warmup.warmup.guided import GuidedWarmup
from hf_warmup.warmup.persistent import PersistentCatapult
from hf_warmup.warmup.rule import Step, Warmup

__all__ = ["GuidedWarmup", "PersistentCatapult", "Step", "Warmup"]
