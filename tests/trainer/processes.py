"""One of the processes of test_processes.py and test_deepspeed.py: trains as it is told and writes what it saw.

torchrun --nproc_per_node 2 processes.py FOLDER '[{"name": "linear", "backend": "fsdp2", "learning_rate": 3e-3}]'
"""

import gc
import importlib
import json
import os
import signal
import sys
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate.state import DistributedType, PartialState
from forking import in_fork
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from hf_warmup import GIAdamW
from hf_warmup.search.probe import loss_after_step
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer import SharpnessCallback, WarmupCallback, WarmupTrainingArguments, muon_cls_and_kwargs, step

from tiny import OPTIONS, VOCAB, make_dataset, make_model

FSDP2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def spread(backend, changes):
    """The options that ask for a backend: ddp, fsdp2, fsdp2_full (checkpoints), zero1 to 3, zero2_bf16, ..."""
    name, _, variant = backend.partition("_")
    if name == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {**FSDP2, "state_dict_type": f"{variant or 'sharded'}_state_dict".upper()},
        }
    if name.startswith("zero"):
        config = {
            # Gather layers when they are needed and not before, and keep the small weights gathered.
            "zero_optimization": {
                "stage": int(name[-1]),
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 100,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "checkpoint": {"load_universal": bool(os.environ.get("LOAD_UNIVERSAL"))},
        }
        return {"deepspeed": {**config, **changes}, "bf16": variant == "bf16"}
    return {}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def second_moments(trainer):
    """Adam's v by parameter, put together from all processes."""
    named = dict(trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters())
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = trainer.model_wrapped.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            # It linked them after its first group's first step, when the others had no state yet.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        return {name: safe_get_full_optimizer_state(p, "exp_avg_sq").clone() for name, p in named.items()}
    state = unwrap_optimizer(trainer.optimizer).state
    return {name: whole(state[p]["exp_avg_sq"]).clone() for name, p in named.items()}


def weights(trainer):
    named = dict(trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters())
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone() for name, p in named.items()}
    return {name: whole(p.detach()).clone() for name, p in named.items()}


def rule(scheduler):
    """What the rule of warmup has come to."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    return getattr(scheduler.lr_lambdas[0], "rule", None)


class Watcher(TrainerCallback):
    """Keeps v and the squared gradient of the first step, and kills where it is told to."""

    def __init__(self, trainer, kill):
        self.trainer, self.kill, self.kept = trainer, kill, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0 and not self.trainer.is_deepspeed_enabled:
            named = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped).named_parameters()
            self.kept["squares"] = {name: whole(p.grad).square() for name, p in named}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and isinstance(unwrap_optimizer(self.trainer.optimizer), GIAdamW):
            self.kept["second_moments"] = second_moments(self.trainer)
        if self.kill == [state.global_step, args.process_index]:
            os.kill(os.getpid(), signal.SIGKILL)


def with_memory(seen):
    """`loss_after_step`, noting the most bytes that it holds at once by itself, and that the forward pass does."""

    def peak(optimizer, loss_fn, lr, **kwargs):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            losses = loss_after_step(optimizer, loss_fn, lr, **kwargs)
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
        return losses, max(held), held[-1]

    def measured(optimizer, loss_fn, lr, **kwargs):
        for _ in range(2):  # the first may let go of what the training step left behind
            _, forward, _ = peak(optimizer, loss_fn, 0.0, **kwargs)
        _, own, left = peak(optimizer, lambda: 0.0, lr, **kwargs)
        shard = sum(s.tensor.nbytes for _, shards in kwargs["shards"].groups() for s in shards)
        seen.append({"own": own, "left": left, "forward": forward, "shard": shard})
        return loss_after_step(optimizer, loss_fn, lr, **kwargs)

    return measured


def held(trainer):
    """All weights of this process: the optimizer's, whole or in parts, and those the model computes with."""
    if trainer.is_deepspeed_enabled:
        zero = trainer.model_wrapped.optimizer
        masters = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
        return [t.clone() for t in (*masters, *(getattr(p, "ds_tensor", p.data) for p in trainer.model.parameters()))]
    params = [p for group in unwrap_optimizer(trainer.optimizer).param_groups for p in group["params"]]
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in params]


class Failing(Trainer):
    """Raises on process 1 while learning rates are tried."""

    def compute_loss(self, *args, **kwargs):
        if torch.is_grad_enabled():
            self.held_before = held(self)
        elif self.args.process_index == 1:
            raise RuntimeError("CUDA out of memory, they say")
        return super().compute_loss(*args, **kwargs)


class Unable(torch.optim.AdamW):
    """Raises on process 1 when it is to step."""

    def step(self, closure=None):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("CUDA out of memory, they say")
        return super().step(closure)


class Little(Trainer):
    """Has no memory for more than four sequences."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, num_items_in_batch)


def make_large_model():
    """2.6 million parameters: pieces of the probe are 1/100 of them, not a fixed least size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def counted(decide, counts):
    """`decide`, noting how many collectives it makes."""

    def counting(*args, **kwargs):
        with CommDebugMode() as made:
            decide(*args, **kwargs)
        counts.append(made.get_total_counts())

    return counting


class FeatureNorm(torch.nn.BatchNorm1d):
    """Batch norm over the last dimension: its running statistics are buffers, which DDP sends around."""

    def forward(self, hidden):
        return super().forward(hidden.flatten(0, 1)).view_as(hidden)


def run(
    folder,
    *,
    name,
    backend="ddp",
    kill=None,
    fails=None,
    memory=False,
    batch_norm=False,
    resume=None,
    config=None,
    tokens=VOCAB,
    differ=None,
    sharpness=None,
    muon=False,
    count=False,
    **options,
):
    set_seed(0)
    base = {"output_dir": str(folder / name), "max_steps": 6, "warmup_steps": 4, "gi_adam": True}
    args = WarmupTrainingArguments(**{**OPTIONS, **base, **spread(backend, config or {}), **options})
    if differ and args.process_index == 1:
        setattr(args, *differ)
    if backend.startswith("fsdp2"):
        # accelerate shards on accelerators only; on CPUs it would train with DDP and say nothing.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = make_large_model() if memory else make_model(dropout=0.0)
    if batch_norm:
        model.model.norm = FeatureNorm(model.config.hidden_size)
    kwargs = {"optimizer_cls_and_kwargs": muon_cls_and_kwargs(args)} if muon else {}
    if fails:
        # torchrun ends the others as soon as one has failed, on a busy machine before they could say what they saw.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if fails == "step":
        kwargs = {"optimizer_cls_and_kwargs": (Unable, {"lr": args.learning_rate})}
    cls = Failing if fails else Little if args.auto_find_batch_size else Trainer
    trainer = cls(model, args, train_dataset=make_dataset(vocab=tokens), **kwargs)
    callback, collectives = WarmupCallback.attach(trainer), []
    if count:
        callback.on_pre_optimizer_step = counted(callback.on_pre_optimizer_step, collectives)
    if sharpness:
        SharpnessCallback(**sharpness).attach(trainer)
    watcher, seen_memory = Watcher(trainer, kill), []
    trainer.add_callback(watcher)
    if memory:
        step.loss_after_step = with_memory(seen_memory)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RuntimeError as error:
        if fails:
            same = all(map(torch.equal, trainer.held_before, held(trainer)))
            told = {"error": str(error), "restored": same}
            (folder / f"{name}.{args.process_index}.json").write_text(json.dumps(told))
        raise
    seen = {
        "world_size": args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "history": trainer.state.log_history,
        "memory": seen_memory,
        "collectives": collectives,
        "rule": rule(trainer.lr_scheduler),
        "counts": [
            float(state["step"]) for state in unwrap_optimizer(trainer.optimizer).state.values() if "step" in state
        ],
        "buffers": [b.double().sum().item() for b in trainer.model.buffers()],
    }
    (folder / f"{name}.{args.process_index}.json").write_text(json.dumps(seen))
    # Gathering takes all processes.
    tensors = {**watcher.kept, "weights": weights(trainer)}
    if args.process_index == 0:
        torch.save(tensors, folder / f"{name}.pt")
    return trainer


def main(folder, runs):
    trainer = None
    for options in runs:
        try:
            trainer = run(folder, **options)
        except ValueError as error:
            if not options["name"].startswith("refused"):
                raise
            (folder / f"{options['name']}.0.json").write_text(json.dumps({"error": str(error)}))
    if trainer is not None:
        trainer.accelerator.wait_for_everyone()
    # Without the destructors of C++: on a busy machine a communication thread that is still joinable aborts one
    # exit in a hundred ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def forked(folder, runs):
    """Every run in a fork of its own, as DeepSpeed takes one Trainer per process."""
    importlib.import_module("deepspeed")  # before the forks, which then need not
    for options in runs:
        in_fork(options.pop("port"), lambda options=options: main(folder, [options]))


if __name__ == "__main__":
    gc.freeze()  # or every training ends with a look through all that is imported
    told = json.loads(sys.argv[2])
    (forked if "port" in told[0] else main)(Path(sys.argv[1]), told)
