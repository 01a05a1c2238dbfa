import gc
import logging
import os
import socket

# Before transformers or datasets are imported: a look-up of the hub would stall for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Two threads that spin against each other make small tests twenty times slower.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Minutes each: the last of them would keep one of two workers busy alone.
LONGEST = ("processes", "commands", "smoke", "random_trainings", "stopping", "pretrain")


def pytest_collection_modifyitems(items):
    """These files first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def pytest_collection_finish():
    """Keep what is imported out of garbage collections: each training ends with one, which took half of its time."""
    gc.collect()
    gc.freeze()


class FailOnDeprecation(logging.Handler):
    """transformers announces many deprecations by logging, where filterwarnings cannot see them."""

    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            raise AssertionError(record.getMessage())


@pytest.fixture(autouse=True)
def deprecations_fail():
    handler = FailOnDeprecation()
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")):
            return connect(self, address)  # processes of one test talk to each other
        raise RuntimeError(f"tests run offline, refused {address}; build the model from a config")

    monkeypatch.setattr(socket.socket, "connect", refuse)
