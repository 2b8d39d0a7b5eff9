"""What a DAPO step costs, against plain TRL.

`group_forward_speedup`: a policy update (log-probabilities, entropies, loss, backward pass) of 8 completions of 190
tokens after a prompt of 2,200, by a Qwen3-shaped model of 6M parameters: seconds of GRPOTrainer's own method over
those of the group forward. `group_forward_memory`: the most that a process of its own has beyond what it had before
the model, group forward over TRL's, all 8 rows in one micro-batch. A third line has the time at a prompt of 250 and
completions of 110 with 1M parameters, in micro-batches too.

Both sides run in float32 weights under bfloat16 autocast, the faster numerics on a CPU, or without with --float32.
TRL's method may choose: after one round that does not count, its fastest of eager and sdpa attention with 1, 2, 4 or
8 rows a micro-batch is the one that is timed, as TRL is installed and with the trainers' patch, which leaves tokens
without a label out of the loss (`rerank.models.engine`); the figure is against the faster. Completions are equally
long, which suits TRL: without padding its attention needs no mask. Times are medians of --repeats rounds in one
process, the methods taking turns, ratios those to the group forward. On a quiet machine:

    python -m tests.benchmarks.dapo --run runs/ml100k

with the run of `make demo`, for the figures of `tests/benchmarks/dapo_steps.py`; `--parts` leaves some out.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tests.benchmarks.dapo_steps import rollout_figures, step_figures

PARTS = ("forward", "steps", "rollouts")
G, VOCABULARY = 8, 3_000
SHAPES = {
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 2},
    "6M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7, "num_attention_heads": 4},
}
POINTS = {"6M": (2200, 190), "1M": (250, 110)}  # tokens of the prompt and of a completion, by model
MAX_EAGER_TOKENS = 3_000  # of a micro-batch: more takes minutes, and gigabytes, at the longer point


@dataclass(frozen=True)
class Method:
    """One way to compute a policy update."""

    group: bool = False
    attention: str = "sdpa"
    rows: int = G  # of a micro-batch
    patched: bool = False  # without the tokens that have no label

    def __str__(self) -> str:
        if self.group:
            return "group forward"
        return f"TRL{', patched' if self.patched else ''}, {self.attention}, {self.rows} rows"


def make_model(shape: str) -> Any:
    """A model with random weights and TRL's fused head, as in a GRPOTrainer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, **SHAPES[shape]
    )
    model = Qwen3ForCausalLM(config).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def update(model: Any, method: Method, prompt_tokens: int, completion_tokens: int, float32: bool) -> float:
    """Seconds of one policy update of a group of G rows."""
    import torch
    from trl import GRPOTrainer
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from rerank.models import engine
    from rerank.models import group_attention as group_forward

    torch.manual_seed(0)
    prompt = torch.randint(VOCABULARY, (1, prompt_tokens)).expand(G, -1)
    ids = torch.cat([prompt, torch.randint(VOCABULARY, (G, completion_tokens))], dim=1)
    advantages = torch.linspace(-1, 1, G)[:, None]
    autocast = contextlib.nullcontext if float32 else lambda: torch.autocast("cpu", torch.bfloat16)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=autocast))
    model.set_attn_implementation(method.attention)
    if method.group:
        group_forward.prepare_model(model)
    utils._use_triton = chunked_logprob._use_triton
    if method.group or method.patched:
        engine.score_labelled_tokens_only()
    begin = time.perf_counter()
    for rows in torch.arange(G).split(method.rows):
        inputs = (model, ids[rows], torch.ones_like(ids[rows]), completion_tokens)
        if method.group:
            with autocast():
                logps, _ = group_forward.group_logps_and_entropies(*inputs, compute_entropy=True)
        else:
            plain = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__  # without TRL's own stop-watch
            logps, *_ = plain(trainer, *inputs, compute_entropy=True)
        ratios = torch.exp(logps - logps.detach())
        (-(ratios * advantages[rows]).sum() / (G * completion_tokens)).backward()
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds


def plain_methods(point: tuple[int, int], patched: bool) -> list[Method]:
    """TRL's ways worth trying."""
    ways = [Method(False, attention, rows, patched) for attention in ("sdpa", "eager") for rows in (1, 2, 4, 8)]
    return [way for way in ways if way.attention == "sdpa" or way.rows * sum(point) <= MAX_EAGER_TOKENS]


def times_of(shape: str, args: argparse.Namespace) -> dict[Method, list[float]]:
    """Seconds of each round of the group forward and of TRL's best, plain and patched."""
    model = make_model(shape)

    def run(method: Method) -> float:
        return update(model, method, *POINTS[shape], args.float32)

    run(Method(group=True))
    best = [min(plain_methods(POINTS[shape], patched), key=run) for patched in (False, True)]
    rounds = [{method: run(method) for method in (Method(group=True), *best)} for _ in range(args.repeats)]
    return {method: [seconds[method] for seconds in rounds] for method in rounds[0]}


def peak_bytes(shape: str, group: bool, float32: bool) -> int:
    """Most memory of this process in two updates of all rows at once, beyond what it had before the model."""
    from trl import GRPOTrainer  # noqa: F401  (imports are no part of an update)

    from rerank.models import group_attention  # noqa: F401

    before = _status("VmRSS")
    model = make_model(shape)
    for _ in range(2):
        update(model, Method(group=group), *POINTS[shape], float32)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def memory_of(group: bool, float32: bool) -> int:
    """`peak_bytes` at the longer point, in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.dapo", "--memory-of", "group" if group else "trl"]
    words += ["--float32"] if float32 else []
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.strip().splitlines()[-1])


def group_forward_figures(args: argparse.Namespace, show: Callable[[Any], None]) -> dict[str, float]:
    """`group_forward_speedup` and `group_forward_memory`, and the speed-up at the shorter point."""
    table = Table("model", "tokens", Column("method", no_wrap=True), "seconds", "ratio")
    speedups = {}
    for shape, (prompt_tokens, completion_tokens) in POINTS.items():
        times = {method: statistics.median(values) for method, values in times_of(shape, args).items()}
        group, *plain = times.values()
        speedups[shape] = min(plain) / group
        for method, seconds in times.items():
            cells = (str(method), f"{seconds:.3f}", f"{seconds / group:.2f}")
            table.add_row(shape, f"{prompt_tokens}+{completion_tokens}", *cells)
    show(table)
    memory = {group: memory_of(group, args.float32) for group in (True, False)}
    show(f"memory: {memory[True] / 1e6:.0f} MB, TRL {memory[False] / 1e6:.0f} MB, {G} rows in a micro-batch")
    return {
        "group_forward_speedup": round(speedups["6M"], 3),
        "group_forward_memory": round(memory[True] / memory[False], 3),
        "group_forward_speedup_short": round(speedups["1M"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure (all)")
    parser.add_argument("--run", default="runs/ml100k", help="a finished run, for whole steps (%(default)s)")
    parser.add_argument("--recipe", default="recipes/ml100k/7_dapo.yaml", help="of that run (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="whole steps that count (%(default)s)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--memory-of", choices=("group", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_bytes("6M", args.memory_of == "group", args.float32))
        return
    show = Console().print
    measure = {
        "forward": lambda: group_forward_figures(args, show),
        "steps": lambda: step_figures(args.run, args.recipe, args.steps, show),
        "rollouts": lambda: rollout_figures(args.repeats, show),
    }
    figures = {}
    for part in args.parts:
        figures |= measure[part]()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
