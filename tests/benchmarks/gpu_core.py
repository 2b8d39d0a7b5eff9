"""A check of the group forward on a GPU, against TRL's own method: values, gradients, speed and memory.

    make gpu-core        # or: python -m tests.benchmarks.gpu_core

It needs torch, transformers, accelerate, trl and peft, neither vLLM nor data nor a registry: models are shaped like
Qwen3 and have random weights. Without CUDA a tiny model runs on the CPU, which proves nothing about a GPU. It takes at
most --minutes: what does not fit in is left out, and named.

Each case is a number format: float32, float32 weights under bfloat16 autocast (TRL's default), bfloat16 weights. Two
groups of ragged completions are computed by TRL's method and by the group forward, and both compared with TRL's in
float32: `logp_error` is the mean difference of a log-probability, `gradient_error` the length of the difference of all
gradients over that of the gradient. A case passes where the group forward's errors are at most twice TRL's, plus what
float32 may differ by. `speedup` is the median seconds of TRL's update of a group over the group forward's, the two
taking turns; `memory` the group forward's peak beyond the model over TRL's. Layers are checkpointed, as by default.

The last line is JSON; the exit code is 1 where a case fails.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rerank.models import group_attention, group_kernels

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500},
    "0.1B": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
}  # fmt: skip
ROOM_FOR_LARGEST = 40e9  # bytes
FLOAT32_LOGP, FLOAT32_GRADIENT = 1e-4, 2e-3  # sums in another order
ERROR_RATIO = 2.0


@dataclass(frozen=True)
class Format:
    """Number format of the weights, and whether bfloat16 autocast is on."""

    name: str
    weights: torch.dtype
    autocast: bool = False


FORMATS = (
    Format("float32", torch.float32),
    Format("float32, bf16 autocast", torch.float32, autocast=True),
    Format("bfloat16", torch.bfloat16),
)


@dataclass(frozen=True)
class Batch:
    """Padded rows (B, T) of whole groups, their mask, and tokens of a completion."""

    ids: torch.Tensor
    mask: torch.Tensor
    completion: int


@dataclass(frozen=True)
class Sizes:
    """Tokens of a prompt and of a completion, and completions of a group."""

    prompt: int
    completion: int
    group: int


def make_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    """The same random weights each time, with TRL's fused head."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], tie_word_embeddings=True, bos_token_id=None))
    model = model.to(device, dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def make_batch(prompts: Sequence[int], sizes: Sizes, vocabulary: int, device: str, ragged: bool) -> Batch:
    """A group per prompt length; ragged completions are between one token and all."""
    generator, width = torch.Generator().manual_seed(1), max(prompts)
    rows, masks = [], []
    for length in prompts:
        prompt = torch.randint(vocabulary, (width,), generator=generator)
        for member in range(sizes.group):
            written = 1 + (sizes.completion - 1) * (member + 1) // sizes.group if ragged else sizes.completion
            completion = torch.randint(vocabulary, (sizes.completion,), generator=generator)
            places = torch.arange(width + sizes.completion)
            rows.append(torch.cat([prompt, completion]))
            masks.append(((places >= width - length) & (places < width + written)).long())
    return Batch(torch.stack(rows).to(device), torch.stack(masks).to(device), sizes.completion)


def forward(model: Any, batch: Batch, is_group: bool, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies (B, C), by either way."""

    def context() -> Any:
        return torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=autocast)

    inputs = (model, batch.ids, batch.mask, batch.completion)
    if is_group:
        group_attention.prepare_model(model)
        with context():
            logps, entropies = group_attention.group_logps_and_entropies(*inputs, compute_entropy=True)
    else:
        model.set_attn_implementation("sdpa")
        trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=context))
        plain = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__  # without TRL's own stop-watch
        logps, entropies, *_ = plain(trainer, *inputs, compute_entropy=True)
    assert entropies is not None
    return logps, entropies


def values_and_gradient(model: Any, batch: Batch, is_group: bool, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of completion tokens, and the gradient of a loss with a weight for each, as one vector."""
    logps, entropies = forward(model, batch, is_group, autocast)
    mask = batch.mask[:, -batch.completion :].bool()
    weights = torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps) * mask
    ((logps + 0.1 * entropies) * weights).sum().div(mask.sum()).backward()
    gradient = torch.cat([weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    return logps.detach().float()[mask], gradient


def errors(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Mean difference of a log-probability, and length of that of the gradients over the gradient's."""
    gradient = (found[1] - exact[1]).norm() / exact[1].norm()
    return (found[0] - exact[0]).abs().mean().item(), gradient.item()


def seconds_and_peak(model: Any, batch: Batch, is_group: bool, autocast: bool) -> tuple[float, int]:
    """Of an update of a group; the peak is 0 without CUDA."""
    on_cuda = batch.ids.is_cuda
    before = 0
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    logps, _ = forward(model, batch, is_group, autocast)
    logps.mean().backward()
    if on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds, torch.cuda.max_memory_allocated() - before if on_cuda else 0


def kernel_name(shape: str, form: Format, device: str) -> str:
    """The kernel that attends."""
    heads, size = SHAPES[shape], SHAPES[shape]["head_dim"]
    dtype = torch.bfloat16 if form.autocast else form.weights
    tensors = [
        torch.empty(1, heads[name], 8, size, dtype=dtype, device=device)
        for name in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    ]
    kernel = group_kernels.kernel_of(*tensors)
    return "none: in turn, with copies" if kernel is None else kernel.name


def measure(shape: str, form: Format, sizes: Sizes, device: str, rounds: int) -> dict[str, Any]:
    """The figures of a case."""
    vocabulary = SHAPES[shape]["vocab_size"]
    ragged = make_batch([sizes.prompt // 3, sizes.prompt // 4], sizes, vocabulary, device, ragged=True)
    exact = values_and_gradient(make_model(shape, torch.float32, device), ragged, False, False)
    gc.collect()  # TRL's head makes a model refer to itself
    model = make_model(shape, form.weights, device)
    plain, group = (errors(values_and_gradient(model, ragged, way, form.autocast), exact) for way in (False, True))
    del exact
    gc.collect()
    even = make_batch([sizes.prompt], sizes, vocabulary, device, ragged=False)
    runs: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    for number in range(rounds + 1):
        for way, found in runs.items():
            once = seconds_and_peak(model, even, way, form.autocast)
            found += [once] if number else []  # the first compiles kernels
    seconds = {way: statistics.median(one for one, _ in found) for way, found in runs.items()}
    peaks = {way: max(peak for _, peak in found) for way, found in runs.items()}
    bounds = [
        ERROR_RATIO * theirs + more for theirs, more in zip(plain, (FLOAT32_LOGP, FLOAT32_GRADIENT), strict=True)
    ]
    return {
        "model": shape,
        "format": form.name,
        "kernel": kernel_name(shape, form, device),
        "passes": all(ours <= bound for ours, bound in zip(group, bounds, strict=True)),  # nan does not
        "logp_error": group[0],
        "logp_error_trl": plain[0],
        "gradient_error": group[1],
        "gradient_error_trl": plain[1],
        "seconds": seconds[True],
        "speedup": seconds[False] / seconds[True],
        "memory": peaks[True] / peaks[False] if peaks[False] else None,
    }


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, in which float32 products would have ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def line(case: dict[str, Any]) -> str:
    """A row of the table."""
    memory = "" if case["memory"] is None else f"{case['memory']:.2f}"
    return (
        f"{case['model']:5} {case['format']:23} {case['kernel']:36} {'yes' if case['passes'] else 'NO':6} "
        f"{case['logp_error']:8.1e} {case['logp_error_trl']:8.1e} {case['gradient_error']:8.1e} "
        f"{case['gradient_error_trl']:8.1e} {case['seconds']:8.3f} {case['speedup']:8.2f} {memory:>6}"
    )


HEADINGS = (
    f"{'model':5} {'format':23} {'kernel':36} {'passes':6} {'logp':>8} {'TRL':>8} {'gradient':>8} {'TRL':>8} "
    f"{'seconds':>8} {'speed-up':>8} {'memory':>6}"
)


def cases(device: str) -> tuple[list[tuple[str, Format]], Sizes]:
    """Models and formats, and the tokens of a group."""
    if device == "cpu":
        return [("tiny", form) for form in FORMATS], Sizes(48, 12, 4)
    room = torch.cuda.get_device_properties(0).total_memory
    shapes = ["0.1B", "0.6B"] if room >= ROOM_FOR_LARGEST else ["0.1B"]
    return [(shape, form) for shape in shapes for form in FORMATS], Sizes(2200, 190, 8)


def run(device: str, rounds: int, minutes: float, show: Callable[[str], None]) -> dict[str, Any]:
    """All cases, as they fit into the time."""
    chosen, sizes = cases(device)
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    if device == "cpu":
        show("no CUDA here: a tiny model on the CPU, whose kernel is another; this proves nothing about a GPU")
    show(f"{name}, torch {torch.__version__}: {sizes.group} completions of {sizes.completion} after {sizes.prompt}")
    show(HEADINGS)
    begin, found, left_out = time.monotonic(), list[dict[str, Any]](), list[str]()
    for shape, form in chosen:
        longest = max((case["took"] for case in found), default=0.0)
        if time.monotonic() - begin + longest > 60 * minutes:
            left_out.append(f"{shape}, {form.name}")
            continue
        began = time.monotonic()
        with exact_float32():
            found.append(measure(shape, form, sizes, device, rounds))
        found[-1]["took"] = time.monotonic() - began
        show(line(found[-1]))
    if left_out:
        show(f"left out after {minutes} minutes: {'; '.join(left_out)}")
    passes = not left_out and all(case["passes"] for case in found)
    return {"device": name, "cuda": device == "cuda", "passes": passes, "left_out": left_out, "cases": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="updates that are timed, per way (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins that would end later (%(default)s)")
    args = parser.parse_args()
    found = run("cuda" if torch.cuda.is_available() else "cpu", args.rounds, args.minutes, print)
    print(json.dumps(found))
    sys.exit(0 if found["passes"] else 1)


if __name__ == "__main__":
    main()
