"""`tests.benchmarks.pretrained`: its operations against torch's own counter, its refusal, and a round in small."""

import pytest
import torch
from benchmarks import busy, pretrained
from peft import LoraConfig, get_peft_model
from tiny_model import tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

ROWS, TOKENS, RANK = 2, 12, 3
ROTATIONS = 2 * TOKENS * 16  # angles of rotary positions, which no weight or pair takes: places by half a head's width


@pytest.fixture
def model():
    made = tiny_model(tiny_tokenizer())
    made.set_attn_implementation("eager")  # whose products the counter sees, of all pairs
    return made


def counted(model):
    ids = torch.randint(5, 40, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    return counter.get_total_flops() - ROTATIONS


def test_operations_are_those_that_torch_counts(model):
    tokens, pairs = ROWS * TOKENS, ROWS * TOKENS * TOKENS
    assert pretrained.operations(model, tokens, tokens, pairs) == counted(model)
    without_head = pretrained.operations(model, tokens, 0, pairs)
    head = model.get_output_embeddings().weight.numel()
    assert counted(model) - without_head == 6 * tokens * head
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    assert pretrained.operations(adapted, tokens, tokens, pairs) == counted(adapted)


def test_tokens_and_pairs_are_those_of_rows_written_out():
    sizes = pretrained.Sizes(rows=2, micro_batches=3, row_tokens=5, prompt_tokens=4, completion_tokens=2)
    assert sizes.sft_tokens == 30 and sizes.sft_pairs == 6 * (1 + 2 + 3 + 4 + 5)
    # three tokens of the prompt, then of each of 8 completions the prompt's last token and the first of its own
    assert sizes.packed_tokens == 3 + 8 * 2 and sizes.packed_pairs == (1 + 2 + 3) + 8 * (4 + 5)
    assert sizes.plain_tokens == 8 * 6


def test_a_busy_machine_is_refused():
    busy.refuse_busy(0.1)
    with pytest.raises(
        SystemExit, match="the machine is busy: its processors were 42% in use over 3 s, and may be 10%"
    ):
        busy.refuse_busy(0.42)
    assert 0 <= busy.busy_share(0.05) <= 1


def test_a_round_of_a_tiny_model_has_every_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PRODUCT_SECONDS", 0.001)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.resize_token_embeddings(pretrained.VOCABULARY, mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sizes = pretrained.Sizes(2, 2, 24, 6, 20, 8)
    (found,) = pretrained.rounds(str(tmp_path), False, sizes, 1, bf16=True, quiet=False)
    assert list(found) == [
        "gflops_of_limit", "sft_tokens_a_second", "sft_share_of_limit", "dapo_share_of_limit",
        "dapo_share_of_token_ratio", "bf16_over_float32",
    ]  # fmt: skip
    assert all(value > 0 for value in found.values())
