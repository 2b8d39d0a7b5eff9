"""vLLM's offline engine, on GPU or CPU, and the patches of vLLM and TRL that training on CPU needs.

On CPU, vLLM repacks every linear weight after loading and computes with the packed copy. Weights that TRL loads into
the live engine afterwards then fail to load, or, with tied embeddings, load and are not used: rollouts come from a
stale policy while the loss looks fine. `keep_weights_live` makes vLLM compute with the weight itself, so that TRL's
own weight sync is exact. The test of it is a gap between sampling and training log-probabilities that stays small over
optimizer steps (tests/test_engine.py).
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM, SamplingParams

    from rerank.models.ranking_grammar import RankingGrammar

PROCESSOR = "rerank.models.ranking_processor:RankingProcessor"
GRAMMAR = "ranking"  # of a request's extra_args: the values of its RankingGrammar


def keep_weights_live() -> None:
    """Make vLLM's CPU layers compute with their own weight. Call before an engine is built; a no-op on GPU."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if "dispatch_cpu_unquantized_gemm" not in vars(utils):
        raise RuntimeError(
            "vllm.model_executor.layers.utils has no dispatch_cpu_unquantized_gemm; "
            "install the vLLM version that pyproject.toml names, or rollouts would come from stale weights"
        )
    utils.dispatch_cpu_unquantized_gemm = _use_weight_itself
    if current_platform.is_cpu():
        vars(importlib.import_module("vllm.triton_utils.dispatcher"))["sys"] = _OwnModules()


def _use_weight_itself(layer: torch.nn.Module, remove_weight: bool) -> None:
    """In place of vLLM's dispatch: leave the weight alone and compute with it."""
    vars(layer)["cpu_linear"] = torch.nn.functional.linear


class _OwnModules:
    """Stands for `sys` in `vllm.triton_utils.dispatcher`, with vLLM's own modules only.

    As it starts on CPU, vLLM asks every object of every loaded module for its `__dict__`, and some of ibis's take that
    for the name of a column: an engine would not start in a process that has read data.
    """

    @property
    def modules(self) -> dict[str, ModuleType]:
        """Like `sys.modules`."""
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}


def score_labelled_tokens_only() -> None:
    """Let TRL's fused loss skip tokens without a label on CPU too; other devices are left as they are.

    TRL computes log-probabilities, entropies and their gradients without keeping the logits. With Triton it does so
    for labelled tokens only; elsewhere for every position, because some accelerators recompile for each shape. A CPU
    does not, and most tokens of a row are those of its prompt.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    if "_use_triton" not in vars(utils):
        raise RuntimeError("trl.trainer.utils has no _use_triton; install the TRL version that pyproject.toml names")

    def skips(device: torch.device) -> bool:
        return device.type == "cpu" or bool(chunked_logprob._use_triton(device))

    utils._use_triton = skips


def engine_options() -> dict[str, bool | int]:
    """Engine settings that depend on the machine alone.

    On CPU there is no graph capture (2.6 s to start instead of 29 s) and no chunked prefill: after a chunk, vLLM
    rewinds the random generator of a request with a seed, which a generator on CPU cannot. Completions of a group
    share the full blocks of their prompt; with vLLM's 128 tokens per block a short prompt has none.
    """
    on_cpu: dict[str, bool | int] = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
    return {} if torch.cuda.is_available() else on_cpu


def is_slow_in_bfloat16() -> bool:
    """Whether there is no GPU and the CPU is below AVX-512, so that bfloat16 is many times slower than float32."""
    return not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def engine_dtype(dtype: str = "auto") -> str:
    """The number format of an engine: `auto` is vLLM's (bfloat16 for float32), but float32 where that is slow."""
    return "float32" if dtype == "auto" and is_slow_in_bfloat16() else dtype


@contextlib.contextmanager
def trl_engine_options(**options: str | bool | int) -> Iterator[None]:
    """While a TRL trainer builds its colocated engine, pass it options that TRL has no argument for.

    The port between a single process and its engine is any free one: TRL tries the same four first, so that two runs
    which start together would share one.
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


def sleep_when_told(generation: "VLLMGeneration") -> Callable[[], None]:
    """Let TRL's colocated engine sleep only when told to; returns the function that tells it.

    With `vllm_enable_sleep_mode` TRL sends it to sleep after each call, which drops its weights, and sends all of them
    again before the next, in steps that sample several times too, though none has changed.
    """
    if "_llm_weights_sleeping" not in vars(generation):
        raise RuntimeError(
            "trl.generation.vllm_generation has no _llm_weights_sleeping; install the TRL version that pyproject.toml "
            "names, or weights would be sent again in every sampling round"
        )
    llm, generate, awake = generation.llm, generation.generate, set[str]()
    sleep, wake_up = llm.sleep, llm.wake_up

    def wake_parts(tags: list[str]) -> None:
        if asleep := [tag for tag in tags if tag not in awake]:
            wake_up(tags=asleep)
        awake.update(tags)

    def generate_awake(*args: Any, **kwargs: Any) -> tuple:
        found = generate(*args, **kwargs)
        generation._llm_weights_sleeping = False  # TRL believes so, after its call of `sleep`
        return found

    def rest() -> None:
        if awake:
            sleep(level=2)
        awake.clear()
        generation._llm_weights_sleeping = True

    llm.sleep, llm.wake_up, generation.generate = lambda level: None, wake_parts, generate_awake
    return rest


def open_engine(
    model_dir: str | Path,
    max_length: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    constrained: bool = False,
    tensor_parallel_size: int = 1,
) -> "LLM":
    """An offline vLLM engine on a model folder.

    Args:
        max_length: Prompt and completion together, in tokens; None for the model's own.
        dtype: As of `engine_dtype`.
        constrained: Whether `generate` can be given grammars.
        tensor_parallel_size: GPUs that share the model.
    """
    from vllm import LLM

    check_gpus(tensor_parallel_size)
    keep_weights_live()
    if constrained:  # Model Runner V2, on GPUs the default, takes processors of another form
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    options: dict[str, Any] = {"logits_processors": [PROCESSOR]} if constrained else {}
    return LLM(
        model=str(model_dir), max_model_len=max_length, seed=seed, dtype=engine_dtype(dtype),
        tensor_parallel_size=tensor_parallel_size, **options, **engine_options(),
    )  # fmt: skip


def check_gpus(tensor_parallel_size: int) -> None:
    """Refuse a model that is shared by more GPUs than there are."""
    if tensor_parallel_size > max(1, torch.cuda.device_count()):
        raise ValueError(
            f"tensor_parallel_size is {tensor_parallel_size} but GPUs that this process sees are "
            f"{torch.cuda.device_count()}; lower it, or give an --accelerate file of more GPUs, such as ddp.yaml"
        )


@dataclass(frozen=True)
class Completion:
    """One completion: text without its end token, its token ids, and whether the length limit cut it off."""

    text: str
    token_ids: list[int]
    truncated: bool


def sampling_params(
    max_tokens: int, grammar: "RankingGrammar | None" = None, temperature: float = 0.0, **options: Any
) -> "SamplingParams":
    """Of a completion, by default greedy; nothing is inherited from the model's generation_config but its end tokens.

    Args:
        max_tokens: Of the completion.
        grammar: Its rules, of a constrained engine; None where it is free.
        options: Further ones of vLLM.
    """
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=1.0, top_k=0,
        skip_special_tokens=False,  # an answer with one in it is no ranking
        extra_args=None if grammar is None else {GRAMMAR: grammar.as_options()}, **options,
    )  # fmt: skip


def generate(
    engine: "LLM",
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float = 0.0,
    num_completions: int = 1,
    seeds: Sequence[int] | None = None,
    grammars: "Sequence[RankingGrammar | None] | None" = None,
) -> list[list[Completion]]:
    """`num_completions` completions per prompt, by `sampling_params`.

    Args:
        prompts: As `prompts.render` makes them.
        grammars: Of each prompt's completions, which are free where there is none; of a constrained engine.
        seeds: Of each prompt, so that with `temperature` > 0 a second call repeats the first.
    """
    params = [
        sampling_params(
            max_tokens, grammars[i] if grammars else None, temperature=temperature, n=num_completions,
            seed=None if seeds is None else seeds[i],
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    outputs = engine.generate(list(prompts), params, use_tqdm=False)
    return [
        [Completion(o.text, list(o.token_ids), o.finish_reason == "length") for o in output.outputs]
        for output in outputs
    ]
