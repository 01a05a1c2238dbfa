"""The loss of a causal model in parts: the logits of a whole batch are never held."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class Head(torch.nn.Linear):
    """An output layer that in training hands on the hidden states, of which the loss then makes logits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if self.training else self.logits(input)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)


class ChunkedLoss:
    """The loss of a model, which in training makes logits of a part of the tokens at a time, and again backward.

    Args:
        head: Hands the hidden states on.
        whole: The loss from logits.
        chunks: Parts.
    """

    def __init__(self, head: Head, whole: Callable[..., torch.Tensor], chunks: int) -> None:
        self.head, self.whole, self.chunks = head, whole, chunks

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self.head.training:
            return self.whole(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)
        labels = pad(labels, (0, 1), value=-100)[..., 1:]  # the state of a token foresees the next one
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch

        def part(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.head.logits(hidden)
            return self.whole(logits, None, vocab_size, num_items_in_batch=items, shift_labels=labels, **kwargs)

        parts = zip(logits.flatten(0, -2).chunk(self.chunks), labels.flatten().chunk(self.chunks), strict=True)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.stack([checkpoint(part, *those, **options) for those in parts]).sum()


def chunk_loss(model: PreTrainedModel, chunks: int) -> None:
    """Have a causal model train without the logits of a whole batch; its losses are what they were, to rounding.

    Raises:
        ValueError: If its loss is not its loss function of what its output layer makes: it is of logits with a soft
            cap, or has a term of the logits beside it. The model is left as it was.
    """
    head, whole, was_training = model.get_output_embeddings(), model.loss_function, model.training
    model.eval()  # no dropout
    fits = type(head) is torch.nn.Linear and _is_given_its_output(model, head)
    if fits:
        before = _loss(model)
        head.__class__ = Head
        model.loss_function = ChunkedLoss(head.train(), whole, chunks)
        fits = math.isclose(_loss(model), before, rel_tol=1e-4)
        if not fits:
            head.__class__ = torch.nn.Linear
    model.train(was_training)
    if not fits:
        model.loss_function = whole
        raise ValueError(
            f"loss_chunks must be 0 for {model.config.model_type}, whose loss is not of its output layer's logits "
            f"alone, got {chunks}"
        )


def _is_given_its_output(model: PreTrainedModel, head: torch.nn.Linear) -> bool:
    """Whether the loss function is given what the output layer makes, and nothing else."""
    whole, seen = model.loss_function, []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.loss_function = lambda logits, *args, **kwargs: seen.append(logits) or logits.sum()
    _loss(model)
    hook.remove()
    model.loss_function = whole
    return len(seen) == 2 and seen[0] is seen[1]


def _loss(model: PreTrainedModel) -> float:
    """Of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.item()
