"""Optimizers: GI-Adam, whose warmup is built in, and Muon with AdamW as one."""

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.optim.muon import MuonAdamW

__all__ = ["GIAdamW", "MuonAdamW"]
