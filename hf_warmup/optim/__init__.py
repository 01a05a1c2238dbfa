"""Optimizers: GI-Adam, whose warmup is built in, Muon with AdamW as one, and what others name in place of warmup."""

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.optim.muon import MuonAdamW
from hf_warmup.optim.relative_clip import clip_grad_relative_
from hf_warmup.optim.rotational import RotationalAdamW

__all__ = ["GIAdamW", "MuonAdamW", "RotationalAdamW", "clip_grad_relative_"]
