import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_warmup.trainer import WarmupTrainingArguments

VOCAB, LENGTH = 50, 16


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


def make_dataset(size=64):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(size):
        ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        # Uneven token counts: micro-batches must be weighted by them.
        labels[: int(torch.randint(LENGTH - 2, (), generator=generator))] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


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
