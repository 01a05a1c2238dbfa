"""The loss of a causal model in parts: the logits of a whole batch are never held."""

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
        ValueError: If its loss is of anything but what its output layer makes, such as logits with a soft cap.
    """
    head, whole, seen = model.get_output_embeddings(), model.loss_function, []
    if type(head) is torch.nn.Linear:
        was_training, ids = model.training, torch.zeros(1, 2, dtype=torch.long)
        hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model.loss_function = lambda logits, *args, **kwargs: seen.append(logits) or logits.sum()
        try:
            with torch.no_grad():
                model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        finally:
            model.loss_function = whole
            model.train(was_training)
            hook.remove()
    if len(seen) != 2 or seen[0] is not seen[1]:
        raise ValueError(
            f"loss_chunks must be 0 for {model.config.model_type}, whose loss is not of its output layer's logits, "
            f"got {chunks}"
        )
    head.__class__ = Head
    model.loss_function = ChunkedLoss(head, whole, chunks)
