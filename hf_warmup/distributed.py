"""Tensors and modules that torch has split over processes, told without importing what splits them.

`torch.distributed.tensor` takes as long to import as the rest of torch. Where it was not imported nothing can be of
it.
"""

import sys
from typing import Any

from torch import Tensor


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fsdp(module: Any) -> bool:
    """Whether it is a module of FSDP2, which gathers weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local(value: Any) -> Any:
    """This process's part of a DTensor; anything else as it is."""
    return value.to_local() if is_dtensor(value) else value


def whole(tensor: Any) -> Tensor:
    """All of a DTensor; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
