import pytest
import torch
from transformers import Trainer
from transformers.utils import logging

from hf_warmup.trainer import WarmupTrainingArguments

from tiny import DEVICE, OPTIONS, VOCAB, make_dataset, make_model

if DEVICE != "cpu":
    # Equal bits in two runs are what most of these tests ask for; make test-gpu sets CUBLAS_WORKSPACE_CONFIG.
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def verbosity():
    """A Trainer with `log_level` sets it for the whole process, and the next test's console would say nothing."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def make_trainer(tmp_path):
    """Makes a real Trainer on a real, tiny Llama; keyword arguments are TrainingArguments or Trainer's own.

    Of all tokens there is nothing to learn but noise; with a `vocab` of a few the loss has a first descent.
    """

    def make(
        cls=Trainer, *, model=None, args_cls=WarmupTrainingArguments, trainer_kwargs=None, vocab=VOCAB, **options
    ):
        run = {"output_dir": str(tmp_path / "run"), "max_steps": 12, "warmup_steps": 6, "learning_rate": 3e-3}
        args = args_cls(**{**OPTIONS, **run, **options})
        data = make_dataset(vocab=vocab)
        model = make_model() if model is None else model
        return cls(model, args, train_dataset=data, eval_dataset=data[:8], **(trainer_kwargs or {}))

    return make
