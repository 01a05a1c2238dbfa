"""Real networks to search on: GPT, BERT and a CNN with SGD, AdamW and GI-Adam, at init and after 100 steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_warmup import GIAdamW

TEXT = Path(__file__).parents[1] / "tiny" / "shakespeare.txt"
VOCAB, CONTEXT, BATCH = 128, 64, 16

# Learning rates at which each trains well on these models, for the 100 steps before the later search.
OPTIMIZERS: dict[str, tuple[Callable, float]] = {
    "SGD": (lambda p, lr: torch.optim.SGD(p, lr), 0.3),
    "AdamW": (lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1), 1e-3),
    "GIAdamW": (lambda p, lr: GIAdamW(p, lr, weight_decay=0.1), 3e-3),
}
MODELS = ("GPT", "BERT", "CNN")


@dataclass
class Case:
    """A model with gradients, about to make a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[], Tensor]
    loss: float  # that the gradients came from


def text_batches(seed: int) -> Iterator[Tensor]:
    """Random windows of the bytes of the tiny recipes' text (it is ASCII)."""
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([text[s : s + CONTEXT] for s in starts])


def image_batches(generator: torch.Generator, size: int = 64, noise: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Noisy gratings of 16 × 16 pixels in ten orientations and random phases."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    while True:
        labels = torch.randint(10, (size,), generator=generator)
        angles, phases = labels * torch.pi / 10, 2 * torch.pi * torch.rand(size, generator=generator)
        waves = torch.sin(angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y + phases[:, None, None])
        yield (waves + noise * torch.randn(size, 16, 16, generator=generator))[:, None], labels


def gpt(seed: int) -> tuple[nn.Module, Iterator[Callable[[], Tensor]]]:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model, (lambda ids=ids: model(input_ids=ids, labels=ids).loss for ids in text_batches(seed))


def bert(seed: int) -> tuple[nn.Module, Iterator[Callable[[], Tensor]]]:
    config = BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
    )
    model = BertForMaskedLM(config)
    masks = torch.Generator().manual_seed(seed)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for ids in text_batches(seed):
            masked = torch.rand(ids.shape, generator=masks) < 0.15
            inputs, labels = ids.masked_fill(masked, 1), ids.masked_fill(~masked, -100)
            yield lambda inputs=inputs, labels=labels: model(input_ids=inputs, labels=labels).loss

    return model, losses()


def cnn(seed: int) -> tuple[nn.Module, Iterator[Callable[[], Tensor]]]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 10),
    )
    batches = image_batches(torch.Generator().manual_seed(seed))
    return model, (lambda x=x, y=y: nn.functional.cross_entropy(model(x), y) for x, y in batches)


def make_case(model_name: str, optimizer_name: str, num_steps: int, seed: int) -> Case:
    """A model after `num_steps` steps, with the gradient of its next batch."""
    torch.manual_seed(seed)
    model, losses = {"GPT": gpt, "BERT": bert, "CNN": cnn}[model_name](seed)
    make, lr = OPTIMIZERS[optimizer_name]
    optimizer = make(model.parameters(), lr)
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        next(losses)().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_fn = next(losses)
    # The probe gives every forward the random numbers of this moment; so must the gradient's forward.
    state = torch.get_rng_state()
    loss = loss_fn()
    loss.backward()
    torch.set_rng_state(state)
    return Case(model, optimizer, loss_fn, loss.item())
