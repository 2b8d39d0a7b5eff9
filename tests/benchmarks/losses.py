"""Time and peak memory of an optimizer step with each loss, against plain TRL's SFTTrainer on the same batch.

A model of six million parameters beside its embeddings, random weights; a catalogue of 12,000 items of four tokens
from 256 codes a level; vocabularies of 8,000 and 50,000. A batch holds histories of twenty items, all but the first
under loss, with iirg half as many of them and as many relation rows, with cllm4rec also rows of content. A step is
collating, counting, forward, backward and AdamW. Times are medians of --repeats rounds, the methods taking turns,
after one round that does not count. Memory is what a process of its own has at most beyond what it had before the
model. iirg's overhead is per token under loss, as its rows are others; the other ratios are of whole steps. The JSON
line holds the ratios of the vocabulary where they are greater; cllm4rec's is of the head alone, with its rows of
content it is cllm4rec_content_overhead. On a quiet machine:

    python -m tests.benchmarks.losses
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

LEVELS, CODES, NUM_ITEMS, HISTORY = 4, 256, 12_000, 20
VOCABULARIES = (8_000, 50_000)
SHAPE = {"hidden_size": 256, "num_layers": 7, "num_heads": 4, "num_kv_heads": 4}
METHODS = {
    "trl": None,
    "nll": [{"name": "nll"}],
    "lml": [{"name": "lml"}],
    "msl": [{"name": "msl"}],
    "bear": [{"name": "bear"}],
    "iirg": [{"name": "nll"}, {"name": "iirg"}],
    "cllm4rec": [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"regularisation": 0}}],
    "cllm4rec with content": [{"name": "nll"}, {"name": "cllm4rec"}],
}


def make(method: str, vocabulary: int, num_rows: int, folder: str) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer with its optimizer, and the rows of its batch."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from rerank.catalogue import Catalogue, id_tokens, semantic_id_text
    from rerank.losses import _relations as relations
    from rerank.losses import load_losses
    from rerank.losses.iirg import PROMPTS, relation_rows
    from rerank.models import base as base_model
    from rerank.next_item.encoder import NEXT_ITEMS, NextItemEncoder
    from rerank.sft.trainer import LossTrainer

    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, CODES, (2 * NUM_ITEMS, LEVELS)), axis=0)[:NUM_ITEMS]
    texts = ["Next items: a title of some words", *PROMPTS.values()]  # whose words are single tokens, as in a real one
    tokenizer = base_model.train_tokenizer(texts, 400)
    model = base_model.make_small_model(base_model.SmallModelArguments(**SHAPE), tokenizer, seed=0)
    base_model.add_tokens(model, tokenizer, id_tokens(LEVELS, CODES), seed=0)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    texts = ["a title of some words"] * NUM_ITEMS
    catalogue = Catalogue([str(i) for i in range(NUM_ITEMS)], [semantic_id_text(c) for c in codes], texts, texts)
    losses = None if METHODS[method] is None else load_losses(METHODS[method], "next_item")
    encoder = NextItemEncoder(catalogue, tokenizer, "semantic_id", HISTORY, losses is not None and losses.constrained)

    def histories(num: int) -> list[dict[str, Any]]:
        return [encoder.row(NEXT_ITEMS, rng.integers(0, NUM_ITEMS, HISTORY).tolist(), 1) for _ in range(num)]

    tasks = {"next_item": histories(num_rows)}
    if method == "iirg":
        related = relations.random_neighbours(NUM_ITEMS, 5, seed=0)
        tasks["next_item"] = tasks["next_item"][: num_rows // 2]
        for name, prompt in PROMPTS.items():
            tasks[name] = relation_rows(encoder, prompt, related)[: num_rows // 4]
    if method == "cllm4rec with content":
        tasks["content"] = [encoder.text_row("Describe:", item, texts[item]) for item in range(num_rows)]
    rows = [row | {"task": n} for n, of_task in enumerate(tasks.values()) for row in of_task]
    rows = [row | {"number": number} for number, row in enumerate(rows)]
    config = SFTConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, per_device_train_batch_size=len(rows),
    )  # fmt: skip
    options = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if losses is None:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        trainer = SFTTrainer(model, config, **options)
    else:
        trainer = LossTrainer(model, config, losses, list(tasks), encoder=encoder, **options)
    trainer.create_optimizer()
    torch.manual_seed(0)
    return trainer, rows


def step(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Seconds of one optimizer step."""
    begin = time.perf_counter()
    batches = iter([trainer.data_collator(rows)])
    (batch,), num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch, num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - begin


def peak_bytes(method: str, vocabulary: int, num_rows: int) -> int:
    """Most memory of a process that takes two steps, beyond what it had before the model."""
    import torch  # noqa: F401  (imports are no part of a step)
    from trl import SFTTrainer  # noqa: F401

    import rerank.losses.cllm4rec
    import rerank.sft.trainer  # noqa: F401

    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer, rows = make(method, vocabulary, num_rows, folder)
        for _ in range(2):
            step(trainer, rows)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def memory_of(method: str, vocabulary: int, num_rows: int) -> int:
    """`peak_bytes` in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.losses", "--memory_of", method, "--rows", str(num_rows)]
    words += ["--vocabulary", str(vocabulary)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.strip().splitlines()[-1])


def times_of(vocabulary: int, num_rows: int, repeats: int) -> dict[str, tuple[float, int]]:
    """Of each method the median seconds of a step and its tokens under loss."""
    with tempfile.TemporaryDirectory() as folder:
        made = {method: make(method, vocabulary, num_rows, folder) for method in METHODS}
        seconds = defaultdict(list)
        for _ in range(repeats + 1):
            for method, (trainer, rows) in made.items():
                seconds[method].append(step(trainer, rows))
    count = {m: sum(label != -100 for row in rows for label in row["labels"]) for m, (_, rows) in made.items()}
    return {method: (statistics.median(values[1:]), count[method]) for method, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_bytes(args.memory_of, args.vocabulary, args.rows))
        return
    ratios, memory = defaultdict(list), defaultdict(list)
    table = Table("vocabulary", "loss", "ms a step", "tokens under loss", "time / TRL", "MB", "memory / TRL")
    for vocabulary in VOCABULARIES:
        times = times_of(vocabulary, args.rows, args.repeats)
        peaks = {method: memory_of(method, vocabulary, args.rows) for method in METHODS}
        for method, (seconds, count) in times.items():
            base, base_count = times["trl"]
            per_token = method == "iirg"
            ratio = seconds / count / (base / base_count) if per_token else seconds / base
            ratios[method].append(ratio)
            memory[method].append(peaks[method] / peaks["trl"])
            cells = [f"{seconds * 1000:.0f}", str(count), f"{ratio:.3f}" + (" a token" if per_token else "")]
            table.add_row(str(vocabulary), method, *cells, f"{peaks[method] / 1e6:.0f}", f"{memory[method][-1]:.3f}")
    Console().print(table)
    figures = {f"{name}_overhead": round(max(ratios[name]), 4) for name in ("bear", "msl", "iirg", "cllm4rec")}
    figures["cllm4rec_content_overhead"] = round(max(ratios["cllm4rec with content"]), 4)
    print(json.dumps(figures | {"bear_memory": round(max(memory["bear"]), 4)}))


if __name__ == "__main__":
    main()
