"""vLLM's offline engine, on GPU or CPU, and the one patch that keeps its CPU weights in step with training.

On CPU, vLLM repacks every linear weight after loading and computes with the packed copy. Weights that TRL loads into
the live engine afterwards then fail to load, or, with tied embeddings, load and are not used: rollouts come from a
stale policy while the loss looks fine. `keep_weights_live` makes vLLM compute with the weight itself, so that TRL's
own weight sync is exact. The proof is the gap between sampling and training log-probabilities staying put over
optimizer steps (tests/test_vllm_cpu.py).
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def keep_weights_live() -> None:
    """Make vLLM's CPU layers compute with their own weight. Call before an engine is built; a no-op on GPU.

    Raises:
        RuntimeError: When the installed vLLM no longer has the function that is replaced.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError(
            "vllm.model_executor.layers.utils has no dispatch_cpu_unquantized_gemm; "
            "install the vLLM version that pyproject.toml names, or rollouts would come from stale weights"
        )
    utils.dispatch_cpu_unquantized_gemm = _use_weight_itself
    if current_platform.is_cpu():
        dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")
        dispatcher.sys = _OwnModules()


def _use_weight_itself(layer: torch.nn.Module, remove_weight: bool) -> None:
    """In place of vLLM's dispatch: leave the weight alone and compute with it."""
    layer.cpu_linear = torch.nn.functional.linear


class _OwnModules:
    """What `vllm.triton_utils.dispatcher` sees of `sys`: vLLM's own modules.

    As it starts on CPU, vLLM asks every object of every loaded module for its `__dict__`, and some of ibis's take that
    for the name of a column: an engine would not start in a process that has read data.
    """

    @property
    def modules(self) -> dict[str, Any]:
        """As `sys.modules`."""
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}


def engine_options() -> dict[str, Any]:
    """Engine settings that depend on the machine alone.

    On CPU, no graph capture (2.6 s to start instead of 29 s), and prompts are read whole: after a part of one, vLLM
    winds the random generator of a request with a seed back, which a generator on CPU cannot. Members of a group share
    whole blocks of their prompt, of which a short one has none with vLLM's 128 tokens a block.
    """
    on_cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
    return {} if torch.cuda.is_available() else on_cpu


def is_slow_in_bfloat16() -> bool:
    """Whether there is no GPU and the CPU is below AVX-512, so that bfloat16 takes it many times as long."""
    return not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def engine_dtype(dtype: str = "auto") -> str:
    """The number format of an engine: vLLM's `auto` makes bfloat16 of float32, ours not where that is slow."""
    return "float32" if dtype == "auto" and is_slow_in_bfloat16() else dtype


@contextlib.contextmanager
def trl_engine_options(**options: Any) -> Iterator[None]:
    """While a TRL trainer builds its colocated engine, pass it options that TRL has no argument for.

    The port on which a lone process meets its engine is any free one: TRL tries the same four first, so that two runs
    which start together would meet on one.
    """
    from torch.distributed.elastic.utils.distributed import get_free_port
    from trl.generation import vllm_generation

    os.environ.setdefault("MASTER_PORT", str(get_free_port()))
    original = vllm_generation.LLM
    vllm_generation.LLM = functools.partial(original, **options)
    try:
        yield
    finally:
        vllm_generation.LLM = original


def open_engine(model_dir: str | Path, max_length: int | None = None, seed: int = 0, dtype: str = "auto") -> Any:
    """An offline vLLM engine on a model folder.

    Args:
        max_length: Prompt and completion together, in tokens; None for the model's own.
        dtype: As vLLM's; `auto` by `engine_dtype`.
    """
    from vllm import LLM

    keep_weights_live()
    return LLM(
        model=str(model_dir), max_model_len=max_length, seed=seed, dtype=engine_dtype(dtype), **engine_options()
    )


@dataclass(frozen=True)
class Completion:
    """One completion: text without special tokens, its token ids, and whether the length limit cut it off."""

    text: str
    token_ids: list[int]
    truncated: bool


def generate(
    engine: Any,
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float = 0.0,
    num_completions: int = 1,
    seed: int | None = None,
    progress: bool = True,
) -> list[list[Completion]]:
    """`num_completions` completions of each prompt; nothing is inherited from the model's generation_config.

    Args:
        prompts: As `prompts.render` makes them.
        seed: With `temperature` > 0, seeds request i with seed + i, so that a second call repeats the first.
    """
    from vllm import SamplingParams

    shared = {"max_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "top_k": 0, "n": num_completions}
    params = [SamplingParams(**shared, seed=None if seed is None else seed + i) for i in range(len(prompts))]
    outputs = engine.generate(list(prompts), params, use_tqdm=progress)
    return [
        [Completion(o.text, list(o.token_ids), o.finish_reason == "length") for o in output.outputs]
        for output in outputs
    ]
