"""Warmup for the Hugging Face Trainer: flags, optimizer, callback and model card."""

from hf_warmup.trainer.arguments import WarmupArguments, WarmupTrainingArguments
from hf_warmup.trainer.callback import WarmupCallback
from hf_warmup.trainer.compare import Comparison, compare_runs
from hf_warmup.trainer.optimizers import GIAdamWFactory
from hf_warmup.trainer.report import warmup_report
from hf_warmup.trainer.sharpness import SharpnessCallback
from hf_warmup.trainer.suggest import LearningRate, suggest_lr

__all__ = [
    "Comparison",
    "GIAdamWFactory",
    "LearningRate",
    "SharpnessCallback",
    "WarmupArguments",
    "WarmupCallback",
    "WarmupTrainingArguments",
    "compare_runs",
    "suggest_lr",
    "warmup_report",
]
