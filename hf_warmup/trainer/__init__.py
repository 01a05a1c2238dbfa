"""Warmup for the Hugging Face Trainer: flags, optimizer, callback and model card."""

from hf_warmup.trainer.arguments import WarmupArguments, WarmupTrainingArguments
from hf_warmup.trainer.callback import WarmupCallback
from hf_warmup.trainer.compare import Comparison, compare_runs
from hf_warmup.trainer.optimizer import GIAdamWFactory
from hf_warmup.trainer.report import warmup_report

__all__ = [
    "Comparison",
    "GIAdamWFactory",
    "WarmupArguments",
    "WarmupCallback",
    "WarmupTrainingArguments",
    "compare_runs",
    "warmup_report",
]
