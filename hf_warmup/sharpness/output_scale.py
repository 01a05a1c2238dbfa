"""Feature-learning strength: a network's output divided by γ.

    f_γ(x) = f(x) / γ

is all there is to it [1], and what it does to training is much: a small γ makes the network train like a linear
model of its features at initialization (lazy), a large γ makes it learn features first (rich). In front of a softmax
γ is its temperature, and 1/γ the scale β of the logits that [2] has. A learning rate does not carry over from one γ
to another. With J the Jacobian of f, of a homogeneous network of L layers with weights of order one, the error
½ (f/γ - y)² and gradient descent

    lazy, γ ≪ 1:    H ≈ γ⁻² (JᵀJ + f ∇²f) / N,    so λ ∝ γ⁻² and η_c ∝ γ²,
    rich, γ ≫ 1:    f has to grow to γ y, so the weights to γ^(1/L), and J to γ^((L-1)/L). Once it has,
                    λ ∝ γ⁻² γ^(2 (L-1)/L) = γ^(-2/L), and η_c ∝ γ^(2/L), as the best learning rate [1].

The second line is true of a network that has learned, and not of the first step, where g ≈ -Jᵀy / (γ N) and
H ≈ -Σ y ∇²f / (γ N) is indefinite, so that λ ∝ γ⁻¹. Where H is positive along g, η_c = 2 gᵀg / gᵀHg ∝ γ. Where it is
negative the loss falls on until f is 2 γ y, which a homogeneous f is after a way η ‖g‖ ∝ γ^(1/L): η_c ∝ γ^(1+1/L).
Which of the two, the initialization decides. (Of two layers with tanh f grows linearly in the end, and η_c ∝ γ².)
So the η_c of the first step is above what a rich network bears later by γ^(1-2/L) or γ^(1-1/L) times, and a warmup
that starts there starts too high.

Slopes of ln η_c over ln γ that `find_critical_lr` measures, networks of width 32 on 64 examples, 3 initializations:

    layers                      γ .001 to .01    γ 1000 to 10,000, loss at 20%    [1]
    2, linear, ReLU             2.00, 2.00       1.00, 1.03                       1
    3, linear, ReLU             2.00, 2.00       .67, .66                         .67
    4, linear, ReLU             2.00, 2.00       .50, .79                         .5

and, at the first step with γ from 10⁴ to 10⁵, 1.00 or 1.50 to 1.52 of two linear layers (4 of 8 initializations
each), 1.00 or 1.35 to 1.40 of three. A network of four ReLU layers had not reached the law.

f itself is divided, and not f minus the output f_0 at initialization, which would need a copy of the network for
good. Where γ is small f_0 / γ is large; zero the last layer and f_0 is zero exactly.

[1] Atanasov, Meterez, Simon and Pehlevan, "The Optimization Landscape of SGD Across the Feature Learning Strength",
    ICLR 2025, arXiv:2410.04642.
[2] Agarwala, Pennington, Dauphin and Schoenholz, "Temperature check: theory and practice for training models with
    softmax-cross-entropy losses", arXiv:2010.07344.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_warmup.numeric import positive


def scale_output(module: nn.Module, gamma: float) -> RemovableHandle:
    """Divide what `module` puts out by γ, from now on.

    For a network whose output is a tensor `module` is the network. A model of transformers puts out many things and
    computes its loss inside: there `module` is the layer that makes its logits, of a language model
    `model.get_output_embeddings()`, of a classifier `model.score` or `model.classifier`; loss, logits, evaluation
    and generation then all have f / γ. Call it before the Trainer is made.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> f = model(torch.ones(2)).item()
        >>> handle = scale_output(model, 4.0)
        >>> model(torch.ones(2)).item() == f / 4
        True
        >>> handle.remove()
        >>> model(torch.ones(2)).item() == f
        True

    Args:
        module: The module whose output is f.
        gamma: γ.

    Returns:
        What takes it away again by `remove()`. γ is no weight: a checkpoint does not have it, and a model that is
        loaded has to be given it again. Scaled twice, a module divides twice. Code that takes the weight of the last
        layer and multiplies by it itself, as fused losses do (Liger), does not see it.

    Raises:
        ValueError: If `gamma` is not positive and finite, `module` is none, or, when it is called, it puts out
            something else than a tensor.
    """
    gamma = positive("gamma", gamma)
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be a torch module, got {type(module).__name__}")

    def divide(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"module must put out a tensor, got {type(output).__name__} from {type(module).__name__}: "
                "scale the layer that makes the logits, as model.get_output_embeddings()"
            )
        return output / gamma

    return module.register_forward_hook(divide)
