"""Does this training need warmup? What can be known before it, in the time of 16 to 28 steps.

At θ_0, on the batch of the first step and with the preconditioner P that Adam would have there, λ is λ^(P⁻¹H), or
λ^H for SGD, and η_c the critical learning rate of the first step. Two measures of η_trgt follow:

    stability ratio    λ over the threshold at η_trgt (`stability_threshold`): the linear theory, of all directions
    η_trgt / η_c       what one step along the optimizer's own update bears

On small GPTs the first is far too careful for Adam and the second far too generous, so η_trgt is safe if both allow
it, needs warmup if neither does, and lies between otherwise.

A few steps at a stable learning rate then say where λ is going without being forced [1]. In progressive sharpening
it rises, up to the threshold of the learning rate that is reached: warmup meets the threshold again and again while
η is small, where an instability (a catapult) is mild and leaves a flatter region. In sharpness reduction it falls by
itself: warmup waits until λ is below the threshold of η_trgt. P changes in these steps as well, and λ^(P⁻¹H) falls
with it while θ stands still. So λ is compared with one P, that of the last step, and what P does is said apart.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements", NeurIPS 2024,
    arXiv:2406.09405, section 4. The measures' limits are ours.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_warmup.numeric import number, positive, whole
from hf_warmup.search.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.search.probe import loss_after_step
from hf_warmup.search.restore import RandomNumbers, traceless
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.sharpness.hessian import gradient_differences
from hf_warmup.sharpness.measures import (
    adam_preconditioner,
    groups_of,
    inverse_root,
    sharpness_of,
    stability_threshold,
    start_vector,
)

Regime = Literal["progressive sharpening", "sharpness reduction", "neither"]

# With a residual of a quarter λ is known to about a fifth, but its change, from the same vector, to about a tenth.
_CHANGE = 1.25
# Of differences of gradients in single precision it is below .01; under autocast to bf16 above .3.
_ASYMMETRY = 0.1


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a training before it.

    Attributes:
        kind: Which λ it is about, `hessian` or `preconditioned`.
        sharpness: λ at the start, with the P of the first step.
        num_steps: How many steps were made to see where it goes.
        before: λ at the start, with the P that Adam has after these steps.
        after: λ after these steps, with the same P and on the same batch.
        target_lr: η_trgt.
        stability_ratio: λ at the start over the threshold of a first step with η_trgt: above 1 it is unstable.
        critical_lr: The search for η_c, which ends at η_trgt.
    """

    kind: Literal["hessian", "preconditioned"]
    sharpness: float
    num_steps: int
    before: float
    after: float
    target_lr: float
    stability_ratio: float
    critical_lr: CriticalLR

    @property
    def regime(self) -> Regime:
        """Where λ is going by itself."""
        return regime_of(self.before, self.after)

    @property
    def needs_warmup(self) -> bool | None:
        """Whether η_trgt needs warmup; None if the two measures do not agree."""
        above = self.critical_lr.status not in ("above_target", "never_rises")
        if above == (self.stability_ratio > 1):
            return above
        return None

    def __str__(self) -> str:
        name = {"hessian": "λ^H", "preconditioned": "λ^(P⁻¹H)"}[self.kind]
        verdict = {
            True: f"η_trgt = {self.target_lr:.3g} needs warmup: both measures say that its first step is unstable.",
            False: f"η_trgt = {self.target_lr:.3g} needs no warmup at the start: both measures allow it.",
            None: f"η_trgt = {self.target_lr:.3g} lies between the two measures: warm up, or let the run find out "
            "(warmup=guided).",
        }[self.needs_warmup]
        lower, upper = self.critical_lr.lower, self.critical_lr.upper
        # One end of the bracket is open where the search ended at η_trgt.
        critical = f"between {lower:.3g} and {upper:.3g}" if math.isfinite(upper) else f"above {lower:.3g}"
        alone = f"P alone takes {name} to {self.before:.3g} in {self.num_steps} steps, as it averages gradients. "
        return (
            f"{verdict} {name} = {self.sharpness:.3g} is {self.stability_ratio:.3g} times the threshold of a first "
            f"step with it, and η_c of that step is {critical}. "
            f"{alone + 'With that P, ' if self.kind == 'preconditioned' else ''}"
            f"{explain(name, self.before, self.after)}"
        )


def regime_of(first: float, later: float) -> Regime:
    """Where a sharpness is going that was `first` and is `later`: `neither` within a quarter, or if not positive."""
    if first > 0 and later > _CHANGE * first:
        return "progressive sharpening"
    return "sharpness reduction" if 0 < later < first / _CHANGE else "neither"


def explain(name: str, first: float, later: float) -> str:
    """What that regime means for warmup, in a sentence or two that call λ `name`."""
    change = f"{name} goes from {first:.3g} to {later:.3g}"
    return {
        "progressive sharpening": f"{change}, progressive sharpening: it rises until training is at the edge of "
        "stability, and warmup has it meet that edge while the learning rate is small and a catapult is mild.",
        "sharpness reduction": f"{change}, sharpness reduction: it falls by itself, and warmup need only wait for it.",
        "neither": f"{change}, and shows neither progressive sharpening nor sharpness reduction so far.",
    }[regime_of(first, later)]


def diagnose(
    optimizer: Optimizer,
    loss_fns: Sequence[Callable[[], Tensor]],
    target_lr: float,
    *,
    module: nn.Module | None = None,
    num_steps: int = 8,
    tol: float = 0.25,
    max_hvps: int = 15,
) -> Diagnosis:
    """Say before training whether η_trgt needs warmup, and what warmup will do.

    Takes the time of 16 to 28 training steps of a small GPT, and leaves no trace: afterwards parameters, optimizer,
    gradients, random numbers and, of `module`, buffers and train/eval mode are what they were.

    Args:
        optimizer: SGD, Adam, AdamW or GIAdamW, in accelerate's wrapper or not, before its first step.
        loss_fns: Each returns the training loss of one batch, with its graph, not under an autocast of its own (one
            around the call is switched off). The first one is measured; the steps take them in turn.
        target_lr: η_trgt.
        module: The model, to restore its buffers and train/eval mode. Needed if it is in half precision.
        num_steps: Steps between the measurements, at half the edge of stability or at `target_lr` if that is less.
            In three steps λ may fall where it then rises for a long way.
        tol: Largest relative residual of λ.
        max_hvps: Most Hessian-vector products of a measurement: two for SGD, three for Adam. Fewer cost less; but
            what has not converged cannot be compared.

    Returns:
        The diagnosis; `print` it for a few sentences.

    Raises:
        ValueError: If an argument is out of range, or there is no threshold for the optimizer.
        RuntimeError: If the loss or its gradient is not finite at the start, or the gradient too coarse: products
            with the Hessian are differences of gradients, good to a percent in single precision.
    """
    target_lr, tol = positive("target_lr", target_lr), number("tol", tol)
    if not loss_fns:
        raise ValueError("loss_fns must hold at least one function, got none")
    num_steps, max_hvps = whole("num_steps", num_steps, 1), whole("max_hvps", max_hvps, 2)
    inner = unwrap_optimizer(optimizer)
    params = [p for group in groups_of(inner) for p in group["params"] if p.requires_grad]
    adam = isinstance(inner, torch.optim.Adam)
    # The weights, as much again of the model, and what the optimizer may hold.
    most_bytes = 4 * sum(p.nbytes for p in params)
    grads = [p.grad for p in params if p.grad is not None]  # never written to
    with traceless(*params, module, vars(inner), apart=grads, most_bytes=most_bytes) as start:
        numbers = RandomNumbers()
        for group in inner.param_groups:
            group["lr"] = target_lr

        def measured(p: Tensor | None = None, last: Tensor | None = None) -> tuple[float, Tensor, Tensor | None]:
            """λ, its vector and P^-½: `p`, or that of the step with this batch's gradient, which is kept."""
            numbers.restore()
            with gradient_differences(loss_fns[0], params, module=module) as (hessian, like):
                if not torch.isfinite(hessian.loss):
                    raise RuntimeError(f"the loss is {float(hessian.loss)} at the start: check the data and the model")
                for q, g in zip(params, hessian.gradient, strict=True):
                    q.grad = None if g is None else g.to(q)
                if p is None and adam:
                    diagonal = adam_preconditioner(inner)  # infinite where the step would move nothing
                    p = inverse_root([diagonal.get(q, torch.full_like(q, math.inf)) for q in params], like)
                if last is None:
                    # The gradient lies in directions of large curvature; half at random, as it may miss one.
                    pairs = zip(hessian.gradient, params, strict=True)
                    parts = [(torch.zeros_like(q) if g is None else g).reshape(-1).to(like) for g, q in pairs]
                    steepest = torch.cat(parts)
                    begin = start_vector(like, steepest.mul_(1.0 if p is None else p), fresh=1.0)
                else:
                    begin = start_vector(like, last)
                found = sharpness_of(hessian, begin, p, tol=tol, max_products=max_hvps)
            if found.asymmetry > _ASYMMETRY:
                raise RuntimeError(
                    "the gradient is too coarse for the sharpness: products with the Hessian are "
                    f"{found.asymmetry:.0%} from symmetric. Give the loss in single precision, without autocast or "
                    "TF32, and from torch's random numbers only"
                )
            return found.value, found.vector, p

        first, vector, _ = measured()
        if not math.isfinite(first):
            raise RuntimeError(f"the sharpness is {first} at the start: check the data and the model")
        threshold = stability_threshold(inner, first_step=True)
        numbers.restore()
        critical = find_critical_lr(
            lambda lr: loss_after_step(inner, loss_fns[0], lr, module=module), target=target_lr
        )
        for group in inner.param_groups:
            group["lr"] = min(target_lr, 0.5 * target_lr * threshold / first) if first > 0 else target_lr
        inner.step()  # with the gradient that was measured
        for loss_fn in itertools.islice(itertools.cycle(loss_fns), 1, num_steps):
            inner.zero_grad()
            loss_fn().backward()
            inner.step()
        after, vector, p_later = measured(last=vector)
        before = first
        if adam:
            start.restore()
            before, _, _ = measured(p_later, vector)
    kind: Literal["hessian", "preconditioned"] = "preconditioned" if adam else "hessian"
    return Diagnosis(kind, first, num_steps, before, after, target_lr, first / threshold, critical)
