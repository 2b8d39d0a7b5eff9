"""The GPUs of a launch on one machine."""

import itertools
import os
import re
from collections.abc import Mapping
from typing import Any


def gpu_words(where: Mapping[str, Any]) -> list[str]:
    """Words of `accelerate launch` by which CUDA_VISIBLE_DEVICES goes before the `gpu_ids` of an accelerate file."""
    visible = _visible()
    if not visible or "gpu_ids" not in where:
        return []
    return ["--gpu_ids", ",".join(visible[: where.get("num_processes") or 1])]


def free_gpu(where: Mapping[str, Any]) -> str:
    """The first GPU that a launch leaves free on its machine, of those in CUDA_VISIBLE_DEVICES if it leaves one."""
    num_used = max(1, (where.get("num_processes") or 1) // (where.get("num_machines") or 1))
    if visible := _visible():
        if len(visible) > num_used:
            return visible[num_used]
        used = set(visible)
    else:
        used = set(re.findall(r"\d+", str(where.get("gpu_ids", "")))) or set(map(str, range(num_used)))
    return next(number for number in map(str, itertools.count()) if number not in used)


def has_gpu(name: str) -> bool:
    """Whether this machine has a GPU; true where that cannot be told, as on one without any or with some hidden."""
    if not name.isdecimal() or _visible():
        return True
    return int(name) < (_num_gpus() or 1 << 30)


def _visible() -> list[str]:
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
