"""Time of our constrained beam search against what others use: same models, same users, same number of beams.

- Hugging Face `generate` with `prefix_allowed_tokens_fn` over a dictionary of prefixes, as MiniOneRec and LC-Rec do.
- vLLM's `LLM.beam_search`, unconstrained, which favours it: its `structured_outputs` only drops tokens from the
  2 * beams most likely ones, so a constrained run loses beams and finds fewer items.
- The bare model: one forward over the histories and one per further token for all beams, no search at all. It is run
  with shared and with copied histories and the faster counts; `ceiling` is Hugging Face's time over it.

Models have random weights (no method's time depends on them), catalogues random ids of four levels with 256 codes.
The constraint's time is all that `beam_search` spends outside of the model. Every figure is the median of --repeats
rounds, in which the methods take turns. On a quiet machine:

    python -m tests.benchmarks.beam_search
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rerank.catalogue import id_tokens
from rerank.launch import recipe
from rerank.next_item.beam_decoder import BeamDecoder
from rerank.next_item.beam_search import beam_search
from rerank.next_item.prefix_index import ARRAYS, PrefixIndex

LEVELS, CODES, NUM_WORDS = 4, 256, 100
NUM_ITEMS = 12_000
NUM_BEAMS = 10
HISTORY_ITEMS = (5, 20)  # fewest and most in a prompt
SHAPES = {
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 2},
    "6M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7, "num_attention_heads": 4},
}


def random_sequences(num_items: int, seed: int) -> np.ndarray:
    """Token sequences (n, L) of random ids; the id tokens come after the words."""
    codes = np.random.default_rng(seed).integers(0, CODES, (num_items, LEVELS))
    return codes + NUM_WORDS + CODES * np.arange(LEVELS)


def random_prompts(sequences: np.ndarray, num_users: int) -> list[list[int]]:
    """A few words and the ids of a history of random length, for each user."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(HISTORY_ITEMS[0], HISTORY_ITEMS[1] + 1, num_users)
    return [[1, 2, 3, 4, *sequences[rng.integers(0, len(sequences), n)].ravel().tolist()] for n in lengths]


def random_model(shape: dict[str, int]) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    vocab_size = NUM_WORDS + LEVELS * CODES
    config = Qwen3Config(vocab_size=vocab_size, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, **shape)
    config.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 256})
    return Qwen3ForCausalLM(config).eval()


class ForwardClock:
    """While open, counts a model's forward calls and the seconds in them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.calls, self.seconds = model, 0, 0.0

    def __enter__(self) -> "ForwardClock":
        self.hooks = [self.model.register_forward_pre_hook(self._begin), self.model.register_forward_hook(self._end)]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - self.begun


def batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Rows by length, as `beam_search` takes them."""
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def followers(sequences: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """A dictionary from each prefix to the tokens that may follow."""
    found: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for sequence in sequences.tolist():
        for depth, token in enumerate(sequence):
            found[tuple(sequence[:depth])].add(token)
    return {prefix: sorted(following) for prefix, following in found.items()}


def hugging_face(
    model: Any, prompts: Sequence[list[int]], allowed: dict[tuple[int, ...], list[int]], batch_size: int
) -> dict[int, list[tuple[int, ...]]]:
    """For each row, the sequences that Hugging Face's constrained beam search finds, best first."""
    found = {}
    for rows in batches(prompts, batch_size):
        width = max(len(prompts[row]) for row in rows)
        padded = torch.tensor([[0] * (width - len(prompts[row])) + prompts[row] for row in rows])
        output = model.generate(
            padded,
            attention_mask=(padded != 0).long(),
            num_beams=NUM_BEAMS,
            num_return_sequences=NUM_BEAMS,
            max_new_tokens=LEVELS,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, sent, width=width: allowed[tuple(sent[width:].tolist())],
        )
        lists = output[:, width:].view(len(rows), NUM_BEAMS, LEVELS).tolist()
        found.update({row: [tuple(ids) for ids in own] for row, own in zip(rows, lists, strict=True)})
    return found


def bare_seconds(model: Any, prompts: Sequence[list[int]], batch_size: int, shared: bool) -> float:
    """Seconds in the model alone: histories, then one token of every beam for each level but the last."""
    with torch.no_grad(), ForwardClock(model) as clock:
        for rows in batches(prompts, batch_size):
            decoder = BeamDecoder(model, [prompts[row] for row in rows], shared)
            parents = np.zeros((len(rows), NUM_BEAMS), dtype=np.int64)
            for _ in range(LEVELS - 1):
                decoder.step(parents, parents + NUM_WORDS)
                parents = np.tile(np.arange(NUM_BEAMS), (len(rows), 1))
    return clock.seconds


def constraint_seconds(model: Any, prompts: Sequence[list[int]], index: PrefixIndex, batch_size: int) -> float:
    """Seconds per step that `beam_search` spends outside of the model."""
    begun = time.perf_counter()
    with ForwardClock(model) as clock:
        beam_search(model, prompts, index, NUM_BEAMS, batch_size=batch_size)
    return (time.perf_counter() - begun - clock.seconds) / clock.calls


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def medians(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each measure; they take turns, after one round that does not count."""
    rounds = [{name: measure() for name, measure in measures.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(values[name] for values in rounds) for name in measures}


def against_hugging_face(
    model: Any, prompts: list[list[int]], sequences: np.ndarray, args: argparse.Namespace
) -> dict[str, float]:
    """Seconds of each method for all users, and the share of users for whom both searches find the same list."""
    index, allowed = PrefixIndex.build(sequences), followers(sequences)
    theirs = hugging_face(model, prompts, allowed, args.batch_size)
    ours = beam_search(model, prompts, index, NUM_BEAMS, batch_size=args.batch_size)
    found = [list(dict.fromkeys(tuple(sequences[item].tolist()) for item in items)) for items in ours.items]
    same = [found[row] == theirs[row] for row in range(len(prompts))]
    measures = {
        "hf": lambda: seconds(lambda: hugging_face(model, prompts, allowed, args.batch_size)),
        "ours": lambda: seconds(lambda: beam_search(model, prompts, index, NUM_BEAMS, batch_size=args.batch_size)),
        "bare_shared": lambda: bare_seconds(model, prompts, args.batch_size, shared=True),
        "bare_copied": lambda: bare_seconds(model, prompts, args.batch_size, shared=False),
    }
    return {**medians(measures, args.repeats), "same_lists": sum(same) / len(same)}


def against_vllm(model: Any, prompts: list[list[int]], index: PrefixIndex, repeats: int) -> dict[str, float]:
    """Seconds of vLLM's beam search and of ours for a few users; its engine is up before the clock starts."""
    from vllm.sampling_params import BeamSearchParams

    from rerank.models.engine import open_engine

    names = [*(f"w{number}" for number in range(NUM_WORDS)), *id_tokens(LEVELS, CODES)]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)
        engine = open_engine(Path(folder), max_length=256, dtype="float32")
    params = BeamSearchParams(beam_width=NUM_BEAMS, max_tokens=LEVELS, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    measures = {
        "vllm": lambda: seconds(lambda: engine.beam_search(requests, params)),
        "ours": lambda: seconds(lambda: beam_search(model, prompts, index, NUM_BEAMS)),
    }
    found = medians(measures, repeats)
    engine.llm_engine.engine_core.shutdown()
    return found


def against_size(model: Any, prompts: list[list[int]], sequences: np.ndarray, args: argparse.Namespace) -> dict:
    """How the constraint's time and the index grow from the small catalogue to the large one, memory-mapped."""
    codes = random_sequences(args.large, seed=2)
    begun = time.perf_counter()
    large = PrefixIndex.build(codes)
    build = time.perf_counter() - begun
    small = PrefixIndex.build(sequences)
    with tempfile.TemporaryDirectory() as folder:
        large.save(folder)
        mapped = PrefixIndex.load(folder)
        steps = medians(
            {
                "small": lambda: constraint_seconds(model, prompts, small, args.batch_size),
                "large": lambda: constraint_seconds(model, prompts, mapped, args.batch_size),
            },
            args.repeats,
        )
    num_bytes = sum(getattr(large, name).nbytes for name in ARRAYS)
    return {"step": steps, "bytes_per_item": num_bytes / len(large), "build": build}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--vllm-users", type=int, default=8, help="vLLM's beam search is slow; 0 leaves it out")
    parser.add_argument("--batch-size", type=int, default=32, help="rows at once, for all methods but vLLM's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=int, default=10_000_000, help="items of the large catalogue")
    args = parser.parse_args(words)
    recipe.set_environment()

    sequences = np.unique(random_sequences(NUM_ITEMS, seed=0), axis=0)
    prompts = random_prompts(sequences, args.users)
    results: dict[str, Any] = defaultdict(dict)
    for name, shape in SHAPES.items():
        model = random_model(shape)
        found = against_hugging_face(model, prompts, sequences, args)
        bare = min(found["bare_shared"], found["bare_copied"])
        results["parameters"][name] = sum(parameter.numel() for parameter in model.parameters())
        results["speedup_vs_hf"][name] = found["hf"] / found["ours"]
        results["ceiling"][name] = found["hf"] / bare
        results["share_of_ceiling"][name] = bare / found["ours"]
        results["same_lists_as_hf"][name] = found["same_lists"]
        rows = {key: value for key, value in found.items() if key != "same_lists"}
        print_table(f"{name}: {args.users} users, {len(sequences)} items, {NUM_BEAMS} beams", rows, args.users)
    size = against_size(random_model(SHAPES["1M"]), prompts, sequences, args)
    results["step_ratio_10m_vs_12k"] = size["step"]["large"] / size["step"]["small"]
    results["index_bytes_per_item"], results["index_build_seconds_10m"] = size["bytes_per_item"], size["build"]
    print(f"{args.large} items: index built in {size['build']:.1f} s, {size['bytes_per_item']:.1f} bytes an item")
    for name, value in size["step"].items():
        print(f"  constraint, {name} catalogue: {1e3 * value:.2f} ms a step of {args.batch_size} users")
    for name, shape in SHAPES.items() if args.vllm_users else ():
        few = prompts[: args.vllm_users]
        found = against_vllm(random_model(shape), few, PrefixIndex.build(sequences), args.repeats)
        results["speedup_vs_vllm"][name] = found["vllm"] / found["ours"]
        print_table(f"{name}: {len(few)} users, vLLM's beam search (unconstrained)", found, len(few))
    print(json.dumps(results))


def print_table(title: str, rows: dict[str, float], num_users: int) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:12s} {value:9.3f} s {1e3 * value / num_users:9.2f} ms a user")


if __name__ == "__main__":
    main()
