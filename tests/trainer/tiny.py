"""A tiny Llama and its data, for tests in this process and in others."""

import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

VOCAB, LENGTH = 50, 16

# `make test-gpu` runs the same trainings on a GPU.
DEVICE = os.environ.get("HF_WARMUP_TEST_DEVICE", "cpu")

# TrainingArguments' options of a short, quiet run that logs every step.
OPTIONS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": DEVICE == "cpu",
    "disable_tqdm": True,
}

# transformers 5.23 renamed it.
RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"

# A first descent, a valley after some 15 steps, and a bound that is out of reach.
GUIDED = {
    "warmup": "guided",
    "warmup_steps": 0,
    "max_steps": 40,
    "vocab": 5,
    "learning_rate": 10.0,
    "ramp_steps": 8.8,
}


class Last(TrainerCallback):
    """Acts behind warmup, which puts itself behind all that it knows of when training begins."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.append(callbacks.pop(callbacks.index(self)))


class Rates(TrainerCallback):
    """The learning rate that each step is really made with."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def make_model(seed=0, dropout=0.1):
    # Llama and not GPT-2, whose loss transformers 5.24 scales by (L-1)/L.
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_dataset(size=64, vocab=VOCAB, length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(size):
        ids = torch.randint(vocab, (length,), generator=generator)
        labels = ids.clone()
        # Uneven token counts: micro-batches must be weighted by them.
        labels[: int(torch.randint(length - 2, (), generator=generator))] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def start_of(trainer):
    """What the log says of the start of warmup, once."""
    (entry,) = [e for e in trainer.state.log_history if "warmup/init_lr" in e]
    return entry
