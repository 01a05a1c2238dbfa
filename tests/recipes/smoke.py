"""Runs recipes one after another in the processes of one launch; each argument is a recipe's command as JSON."""

import json
import sys

import accelerate.state
import torch

import pretrain

for command in sys.argv[1:]:
    assert pretrain.run(json.loads(command)) == 0
    # The run has ended its process group; the next one begins its own.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert not torch.distributed.is_initialized()
