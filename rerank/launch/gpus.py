"""The GPUs of a launch on one machine."""

import itertools
import os
import re
from collections.abc import Mapping
from typing import Any


def gpu_words(where: Mapping[str, Any]) -> list[str]:
    """Words of `accelerate launch` by which CUDA_VISIBLE_DEVICES goes before the `gpu_ids` of an accelerate file."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible or "gpu_ids" not in where:
        return []
    return ["--gpu_ids", ",".join(visible.split(",")[: where.get("num_processes") or 1])]


def free_gpu(where: Mapping[str, Any]) -> int:
    """The first GPU that a launch leaves free."""
    used = {int(number) for number in re.findall(r"\d+", str(where.get("gpu_ids", "")))}
    used = used or set(range(where.get("num_processes") or 1))
    return next(number for number in itertools.count() if number not in used)
