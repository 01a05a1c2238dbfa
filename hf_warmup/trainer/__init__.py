"""Warmup for the Hugging Face Trainer: flags, optimizer, callback and model card."""

from hf_warmup.trainer.arguments import WarmupArguments, WarmupTrainingArguments
from hf_warmup.trainer.callback import WarmupCallback
from hf_warmup.trainer.model_card import warmup_report
from hf_warmup.trainer.optimizer import GIAdamWFactory

__all__ = ["GIAdamWFactory", "WarmupArguments", "WarmupCallback", "WarmupTrainingArguments", "warmup_report"]
