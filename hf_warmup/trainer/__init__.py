"""Warmup for the Hugging Face Trainer: flags, optimizer, callback and model card."""

try:
    from hf_warmup.trainer.arguments import WarmupArguments, WarmupTrainingArguments
    from hf_warmup.trainer.callback import WarmupCallback
    from hf_warmup.trainer.compare import Comparison, compare_runs
    from hf_warmup.trainer.optimizers import GIAdamWFactory, MuonFactory, muon_cls_and_kwargs
    from hf_warmup.trainer.report import Report, warmup_report
    from hf_warmup.trainer.sharpness import SharpnessCallback
    from hf_warmup.trainer.suggest import LearningRate, suggest_lr
except ModuleNotFoundError as error:
    raise ImportError(
        f"hf_warmup.trainer needs more than torch ({error}): pip install 'hf-warmup[trainer]', or -e '.[trainer]'"
    ) from error

__all__ = [
    "Comparison",
    "GIAdamWFactory",
    "LearningRate",
    "MuonFactory",
    "Report",
    "SharpnessCallback",
    "WarmupArguments",
    "WarmupCallback",
    "WarmupTrainingArguments",
    "compare_runs",
    "muon_cls_and_kwargs",
    "suggest_lr",
    "warmup_report",
]
