"""Feature-learning strength: how far a network's weights have to move before its output is what it should be.

A network f trained as f / γ has one more knob than its learning rate [1]. With γ << 1 its weights hardly move, and
training is that of the linearized model; with γ >> 1 they have to grow, and with them its features. On an MLP of
depth L and the squared loss the learning rates that it bears go as

    γ²  for γ << 1,    γ^(2/L)  for γ >> 1,

which is also a test of what measures learning rates (tests/search/test_output_scale.py). Of the logits of a
classifier γ is the temperature of its softmax [2]. (The critical learning rate of the first step goes as γ^(1+1/L)
for γ >> 1: that step has to carry the weights all the way.)

[1] Atanasov, Meterez, Simon and Pehlevan, "The Optimization Landscape of SGD Across the Feature Learning Strength",
    arXiv:2410.04642.
[2] Agarwala, Schoenholz, Pennington and Dauphin, "Temperature check: theory and practice for training models with
    softmax-cross-entropy losses", arXiv:2010.07344.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_warmup.numeric import positive


def scale_output(model: nn.Module, gamma: float) -> RemovableHandle:
    """Divide what a model gives by γ, before its training and for all of it.

    To study how features are learned; the learning rate has to be found anew for each γ (`auto_lr` does).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> handle = scale_output(model, 4.0)
        >>> model(torch.ones(1, 2)).item()
        0.5

    Args:
        model: Gives a tensor. Of a model of transformers the layer that gives its logits is meant, tied to the
            embeddings or not, so that the loss it computes is one of the scaled logits.
        gamma: γ, positive.

    Returns:
        What takes the scale away again: `handle.remove()`. A checkpoint does not hold it.

    Raises:
        ValueError: If `gamma` is not positive.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return (model if head is None else head).register_forward_hook(partial(_divided, positive("gamma", gamma)))


def _divided(gamma: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output / gamma
