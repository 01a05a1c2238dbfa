"""GIAdamW in the place of the Trainer's AdamW, with the Trainer's own options and decay groups."""

from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_warmup.optim.gi_adam import GIAdamW
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
        # The method does not look at the trainer; asking it keeps the groups the Trainer's own.
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
            {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
        ]
        return GIAdamW(groups, **kwargs)


def gi_adam_cls_and_kwargs(args: TrainingArguments) -> tuple[type[GIAdamW], dict[str, Any]]:
    """GIAdamW with the options that `args` gives to AdamW, as `Trainer.optimizer_cls_and_kwargs` takes them."""
    # Without weight_decay, which the Trainer sets per group.
    if args.optim not in _ADAMW:
        names = " or ".join(name.value for name in _ADAMW)
        raise ValueError(
            f"gi_adam=True needs optim to be {names}, got {getattr(args.optim, 'value', args.optim)}: GI-Adam is "
            "AdamW with another start; leave gi_adam out to keep that optimizer"
        )
    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
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
        ours = trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(trainer.args)

        def created(create_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # With the options of now: a hyperparameter search changes them from trial to trial.
            nonlocal ours
            if trainer.optimizer_cls_and_kwargs is ours:
                ours = trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(trainer.args)
            return create_optimizer(*args, **kwargs)

        wrap(trainer, "create_optimizer", created)
        return
    chosen = trainer.optimizer_cls_and_kwargs[0]
    if not (isinstance(chosen, type) and issubclass(chosen, GIAdamW | GIAdamWFactory)):
        raise ValueError(
            f"gi_adam=True, but optimizer_cls_and_kwargs asks for {getattr(chosen, '__name__', chosen)}: leave "
            "one of them out"
        )
