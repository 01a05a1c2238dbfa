import pytest
from transformers import Trainer

from hf_warmup.trainer import WarmupTrainingArguments

from tiny import make_dataset, make_model


@pytest.fixture
def make_trainer(tmp_path):
    """Makes a real Trainer on a real, tiny Llama; keyword arguments are TrainingArguments or Trainer's own."""

    def make(cls=Trainer, *, model=None, args_cls=WarmupTrainingArguments, trainer_kwargs=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 12,
            "warmup_steps": 6,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = args_cls(**{**defaults, **options})
        data = make_dataset()
        model = make_model() if model is None else model
        return cls(model, args, train_dataset=data, eval_dataset=data[:8], **(trainer_kwargs or {}))

    return make
