"""Runs of several processes that share one launch, and so the imports: each is a fork of every launched process."""

import contextlib
import gc
import os
import random
import socket
import sys
import traceback

import torch
from torch import distributed as dist


def free_ports(num):
    """So many, at which nobody listens, below those that the system gives to whoever connects."""
    found = []
    for port in random.sample(range(10_000, 30_000), 200):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("localhost", port))
            found.append(port)
        if len(found) == num:
            return found
    raise RuntimeError(f"fewer than {num} ports are free")


def _on_gloo(rank, folder, work):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_two_processes(folder, work):
    """What `work(rank)` gives on each of two forks of this process, which have a process group of gloo."""
    torch.multiprocessing.start_processes(_on_gloo, (folder, work), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def in_fork(port, work):
    """`work`, which gives an exit status, in a fork of this process that meets those of the others at `port`."""
    # The launcher's own store knows the processes of the first run.
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    gc.freeze()  # what is imported is neither looked through nor copied in the fork
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(1)  # the launcher then ends the others
