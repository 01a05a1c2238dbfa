"""One of the processes of test_processes.py: trains and writes what it saw."""

import json
import sys
from pathlib import Path

from transformers import Trainer, set_seed

from hf_warmup.trainer import WarmupCallback, WarmupTrainingArguments

from tiny import OPTIONS, make_dataset, make_model

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
set_seed(0)
run = {"output_dir": str(folder / "run"), "max_steps": 6, "warmup_steps": 4}
args = WarmupTrainingArguments(**{**OPTIONS, **run, **options})
trainer = Trainer(make_model(dropout=0.0), args, train_dataset=make_dataset())
WarmupCallback.attach(trainer)
trainer.train()
weights = [p.detach().double().sum().item() for p in trainer.model.parameters()]
seen = {"world_size": args.world_size, "history": trainer.state.log_history, "weights": weights}
(folder / f"{args.process_index}.json").write_text(json.dumps(seen))
# Together, and without a process group: threads that are left alone may abort the exit.
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
