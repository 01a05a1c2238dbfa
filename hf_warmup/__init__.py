"""Learning-rate warmup: GI-Adam and the critical learning rate, in torch alone.

The integration with the Hugging Face Trainer is `hf_warmup.trainer`.
"""

from hf_warmup.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.gi_adam import GIAdamW
from hf_warmup.probe import loss_after_step

__all__ = ["CriticalLR", "GIAdamW", "find_critical_lr", "loss_after_step"]
