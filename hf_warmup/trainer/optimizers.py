"""GIAdamW and Muon in the place of the Trainer's AdamW, with the Trainer's own options and decay groups."""

from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.optim.muon import MuonAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.wrapping import wrap

# What `optim` may say when GIAdamW takes its place: the optimizers that are torch's AdamW.
_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


class GIAdamWFactory:
    """Makes a GIAdamW for a model, in transformers' optimizer-factory protocol.

    `Trainer(..., optimizer_cls_and_kwargs=(GIAdamWFactory, {"lr": 6e-4, "weight_decay": 0.1}))`: the Trainer
    calls the class without arguments, and the instance with the model and the keyword arguments.
    """

    def __call__(self, model: nn.Module, *, weight_decay: float = 0.0, **kwargs: Any) -> GIAdamW:
        """Make the optimizer, with weight decay on the parameters that the Trainer would decay.

        Args:
            model: Its parameters that require a gradient are optimized.
            weight_decay: Decay of all but biases and normalisation weights, which get none.
            **kwargs: Everything else `GIAdamW` takes.

        Returns:
            The optimizer, with two parameter groups: decayed and not.
        """
        decayed = _decayed(model)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
            {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
        ]
        return GIAdamW(groups, **kwargs)


def _decayed(model: nn.Module) -> set[str]:
    # The method does not look at the trainer; asking it keeps the groups the Trainer's own.
    return set(Trainer.get_decay_parameter_names(cast(Any, None), model))


class MuonFactory:
    """Makes a `MuonAdamW` for a model, in transformers' optimizer-factory protocol.

    `Trainer(..., optimizer_cls_and_kwargs=(MuonFactory, {"lr": 2e-3, "weight_decay": 0.1}))`, or
    `optimizer_cls_and_kwargs=muon_cls_and_kwargs(args)` with the options of `args`. Muon has the weights of the
    linear layers inside the model. AdamW has the rest: embeddings, the head (what is outside of `model.base_model`;
    of a plain module the last linear layer), norms, biases, convolutions, and a layer's experts in one tensor.
    """

    def __call__(self, model: nn.Module, *, weight_decay: float = 0.0, **kwargs: Any) -> MuonAdamW:
        """Make the optimizer, with weight decay on the parameters that the Trainer would decay.

        Args:
            model: Its parameters that require a gradient are optimized.
            weight_decay: Decay of all but biases and normalisation weights, which get none.
            **kwargs: Everything else `MuonAdamW` takes.

        Returns:
            The optimizer, with three parameter groups at most: Muon's, AdamW's with decay and without.

        Raises:
            ValueError: If there is no matrix for Muon.
        """
        decayed, inside = _decayed(model), _inner_matrices(model)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups.setdefault((id(p) in inside, name in decayed), []).append(p)
        if not any(is_muon for is_muon, _ in groups):
            raise ValueError(f"{type(model).__name__} has no matrix inside that is trained: Muon has nothing to do")
        made = [
            {"params": params, "muon": is_muon, "weight_decay": weight_decay if decays else 0.0}
            for (is_muon, decays), params in groups.items()
        ]
        return MuonAdamW(made, **kwargs)


def _inner_matrices(model: Any) -> set[int]:
    """The ids of the weights of linear layers that are neither an embedding nor the head."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's is around it
    base = getattr(model, "base_model", model)
    linear = [(name, m) for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    apart: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        apart.append(head)
    elif base is model and not getattr(model, "base_model_prefix", "") and linear:
        # The last one, with what PEFT has put around it.
        last = _without_adapter(linear[-1][0])
        apart += [m for name, m in linear if _without_adapter(name) == last]
    outside = {id(p) for m in apart for p in m.parameters()}
    return {id(m.weight) for _, m in linear if m.weight.ndim == 2} - outside


def _without_adapter(name: str) -> str:
    return name.partition(".lora_")[0].partition(".base_layer")[0]


def muon_cls_and_kwargs(args: TrainingArguments) -> tuple[type[MuonFactory], dict[str, Any]]:
    """Muon and AdamW with the options that `args` gives to AdamW.

    Args:
        args: Supplies learning_rate, weight_decay and the adam_* options.

    Returns:
        What `Trainer.optimizer_cls_and_kwargs` takes.
    """
    return MuonFactory, {"weight_decay": args.weight_decay, **_adamw_options(args)}


def _adamw_options(args: TrainingArguments) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def gi_adam_cls_and_kwargs(args: TrainingArguments) -> tuple[type[GIAdamW], dict[str, Any]]:
    """GIAdamW with the options that `args` gives to AdamW, as `Trainer.optimizer_cls_and_kwargs` takes them."""
    # Without weight_decay, which the Trainer sets per group.
    if args.optim not in _ADAMW:
        names = " or ".join(name.value for name in _ADAMW)
        raise ValueError(
            f"gi_adam=True needs optim to be {names}, got {getattr(args.optim, 'value', args.optim)}: GI-Adam is "
            "AdamW with another start; leave gi_adam out to keep that optimizer"
        )
    kwargs = _adamw_options(args)
    if args.optim == OptimizerNames.ADAMW_TORCH_FUSED:
        kwargs["fused"] = True
    return GIAdamW, kwargs


def use_gi_adam(trainer: Trainer) -> None:
    """Have `trainer` make a GIAdamW; refused if it has, or was told to make, another optimizer."""
    given = trainer.optimizer
    if given is not None:
        if not isinstance(unwrap_optimizer(given), GIAdamW):
            raise ValueError(
                "gi_adam=True, but the trainer has an optimizer of its own, "
                f"{type(unwrap_optimizer(given)).__name__}: pass it a GIAdamW, or leave gi_adam out to keep that one"
            )
        return
    if trainer.optimizer_cls_and_kwargs is None:
        wrap(trainer, "create_optimizer", _OptionsOfNow(trainer).created)
        return
    chosen = trainer.optimizer_cls_and_kwargs[0]
    if not (isinstance(chosen, type) and issubclass(chosen, GIAdamW | GIAdamWFactory)):
        raise ValueError(
            f"gi_adam=True, but optimizer_cls_and_kwargs asks for {getattr(chosen, '__name__', chosen)}: leave "
            "one of them out"
        )


class _OptionsOfNow:
    """GIAdamW with the trainer's options of now: a hyperparameter search changes them from trial to trial."""

    # An object and no closure: a deep copy of the trainer then has its own.
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.ours = trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(trainer.args)

    def created(self, create_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if self.trainer.optimizer_cls_and_kwargs is self.ours:
            self.ours = self.trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(self.trainer.args)
        return create_optimizer(*args, **kwargs)
