"""Muon for the matrices inside a network and AdamW for everything else, as one optimizer with one learning rate.

Muon steps along the momentum whose singular values are made equal:

    B_t = μ B_{t-1} + (1-μ) G_t
    O_t = NS((1-μ) G_t + μ B_t)                      about U Vᵀ of its singular value decomposition
    W_{t+1} = (1 - ηλ) W_t - 0.2 η √max(n, m) O_t

for a weight W of n × m. NS are five Newton-Schulz steps. The factor gives the update the size of AdamW's, so that
one η and one λ serve both. Embeddings, the head, norms and biases are AdamW's. Both steps are torch's own.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, kellerjordan.github.io/posts/muon.
The factor: Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer


class MuonAdamW(Optimizer):
    """Muon and AdamW behind one optimizer interface: a schedule, a checkpoint and a probe see one.

    A group with `muon=True` is Muon's, and has `momentum`; any other is AdamW's, and has `betas`. The state dict is
    that of any torch optimizer.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> matrix, *others = model.parameters()
        >>> optimizer = MuonAdamW([{"params": [matrix], "muon": True}, {"params": others}], lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()

    Args:
        params: Parameter groups, at least one of them with `muon=True`, whose parameters are matrices. An option in
            a group is that group's.
        lr: η, for both.
        betas: β1 and β2 of AdamW.
        eps: AdamW's.
        weight_decay: λ, for both.
        momentum: μ.
        nesterov: Whether Muon's step looks ahead, as in the equation.
        fused: Whether AdamW runs torch's fused kernel; torch decides if None.

    Raises:
        ValueError: If no group is Muon's, one has a parameter that is no matrix, or a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        fused: bool | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"MuonAdamW needs torch.optim.Muon, which came with torch 2.9; got {torch.__version__}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "momentum": momentum, "nesterov": nesterov, "fused": fused})
        if not any(group["muon"] for group in self.param_groups):
            raise ValueError("params must be groups, of which at least one has muon=True, got none")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, Muon's if it has `muon=True`.

        Args:
            param_group: Its parameters, and what differs from the defaults.
        """
        group = {**param_group, "muon": bool(param_group.get("muon"))}
        own = ("momentum", "nesterov") if group["muon"] else ("betas", "eps", "fused")
        options = {name: self.defaults[name] for name in ("lr", "weight_decay", *own)}
        # torch's own check what they are given, and complete the group.
        if group["muon"]:
            torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw", **options)
        else:
            AdamW([group], **options)
        complete = set(group)
        super().add_param_group(group)
        for name in group.keys() - complete:  # the options of the other
            del group[name]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the step.

        Args:
            closure: Computes the loss again.

        Returns:
            What the closure returns; None without one.

        Raises:
            RuntimeError: If one of Muon's parameters is no matrix any more, as under DeepSpeed's ZeRO.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        for kind, is_muon in ((torch.optim.Muon, True), (AdamW, False)):
            groups = [group for group in self.param_groups if bool(group["muon"]) is is_muon]
            if is_muon and any(p.ndim != 2 for group in groups for p in group["params"]):
                raise RuntimeError(
                    "Muon needs whole matrices, and something has flattened them, as DeepSpeed's ZeRO does: train on "
                    "one process, with DDP or with FSDP2"
                )
            # An optimizer of that kind over the same groups and state: nothing of it has to be kept.
            inner = object.__new__(kind)
            inner.__setstate__({"defaults": {}, "state": self.state, "param_groups": groups})
            inspect.unwrap(kind.step)(inner)  # the hooks of all optimizers see one step, and not three
        return loss
