"""Optimizers whose warmup is built in."""

from hf_warmup.optim.gi_adam import GIAdamW

__all__ = ["GIAdamW"]
