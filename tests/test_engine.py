"""The engine's weights follow those of the trainer, its options, and TRL's loss on labelled tokens only.

Rollouts are on-policy: the gap between sampling and training log-probabilities stays small while weights move. Without
the weight sync, the same training exceeds the bound.
"""

import gc
import importlib
import json
import os
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.kernels import chunked_logprob
from trl.trainer import utils

from rerank import dapo
from rerank.dapo.trainer import GAP
from rerank.models import engine

BOUND, STEPS = 0.02, 5
OTHER_SAMPLING = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.5}
OUTPUTS = ("log_probs", "entropy", "is_top1")  # of the fused loss
pytestmark = pytest.mark.usefixtures("quiet_engine")
PROMPTS = ["Rank: the title", "History: a drama", "Candidates: of the", "a title of the drama"]


def evenness(completions, completion_ids, **columns):
    """The share of even token ids: differs between the completions of an untrained model."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def gaps_of_a_training(folder, tied, dtype):
    """Mean gap of each step, and the largest change of a weight over the training."""
    base = save_tiny_model(folder / "base", tied)
    (base / "generation_config.json").write_text(json.dumps(OTHER_SAMPLING))  # inherited, it would widen the gap
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dapo.DapoConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        save_strategy="no", gradient_checkpointing=False, max_steps=STEPS, learning_rate=2e-2,
        lr_scheduler_type="constant", per_device_train_batch_size=16, num_generations=4, max_completion_length=16,
        vllm_max_model_length=64, mask_truncated_completions=False,
        vllm_importance_sampling_correction=True,  # with which TRL logs the gap
    )  # fmt: skip
    engine.keep_weights_live()
    with engine.trl_engine_options(dtype=dtype, **engine.engine_options()):
        trainer = GRPOTrainer(
            model, evenness, config, train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        )  # fmt: skip
    try:
        trainer.train()
    finally:
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
        trainer.vllm_generation.llm = None
        gc.collect()
    gaps = [entry[GAP] for entry in trainer.state.log_history if GAP in entry]
    moved = max((value - before[name]).abs().max().item() for name, value in model.state_dict().items())
    return gaps, moved


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gap_stays_put_while_the_weights_move(tmp_path, tied, dtype):
    gaps, moved = gaps_of_a_training(tmp_path, tied, dtype)
    assert len(gaps) == STEPS and moved > 0.05
    assert max(gaps) < (BOUND if dtype == "bfloat16" else 1e-4)


def test_the_gap_grows_when_the_weights_are_not_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", lambda self: None)
    gaps, _ = gaps_of_a_training(tmp_path, True, "float32")
    assert gaps[0] < 1e-4 and gaps[-1] > BOUND


@pytest.mark.parametrize(("capability", "has_gpu", "dtype"), [
    ("AVX2", False, "float32"), ("DEFAULT", False, "float32"), ("AVX512", False, "auto"), ("AVX2", True, "auto"),
])  # fmt: skip
def test_on_cpu_no_graph_is_captured_and_float32_is_used_for_slow_bfloat16(monkeypatch, capability, has_gpu, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert engine.engine_dtype() == dtype and engine.engine_dtype("bfloat16") == "bfloat16"
    on_cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
    assert engine.engine_options() == ({} if has_gpu else on_cpu)


def test_a_lone_process_meets_its_engine_on_none_of_the_ports_that_trl_tries_first(monkeypatch):
    ports = []
    for _ in range(2):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        with engine.trl_engine_options():
            ports.append(os.environ["MASTER_PORT"])
    assert not {"29500", "23456", "12355", "12345"} & {*ports}
    monkeypatch.setenv("MASTER_PORT", "4711")  # of a launcher of several processes
    with engine.trl_engine_options():
        assert os.environ["MASTER_PORT"] == "4711"


def test_trl_builds_its_engine_with_the_options_only_inside():
    original = vllm_generation.LLM
    with pytest.raises(KeyError), engine.trl_engine_options(dtype="float32"):
        assert vllm_generation.LLM.keywords == {"dtype": "float32"}
        raise KeyError("a failing build")
    assert vllm_generation.LLM is original


@pytest.mark.parametrize(("module", "name", "patch"), [
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", engine.keep_weights_live),
    ("trl.trainer.utils", "_use_triton", engine.score_labelled_tokens_only),
])  # fmt: skip
def test_a_library_without_the_function_to_replace_is_refused(monkeypatch, module, name, patch):
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(RuntimeError, match=f"{module} has no {name}; install the (vLLM|TRL) version that pyproject"):
        patch()


def test_an_engine_starts_beside_objects_that_answer_to_any_name(tmp_path):
    import ibis.backends.duckdb as loaded  # the data stage's: its `C.__dict__` is a column of that name

    assert not isinstance(loaded.C.__dict__, dict)
    llm = engine.open_engine(save_tiny_model(tmp_path / "model"), max_length=64, dtype="float32")
    (answers,) = engine.generate(llm, ["Rank: the title"], 4, temperature=1.0, num_completions=2, seeds=[0])
    llm.llm_engine.engine_core.shutdown()
    assert all(0 < len(one.token_ids) <= 4 and one.truncated == (len(one.token_ids) == 4) for one in answers)


def test_an_engine_is_spread_over_the_gpus_that_are_asked_for_and_no_more_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="tensor_parallel_size is 2 but GPUs that this process sees are 1; lower it, or"
    ):
        engine.open_engine("model", tensor_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("vllm.LLM", dict)
    assert engine.open_engine("model", tensor_parallel_size=2)["tensor_parallel_size"] == 2
    assert engine.open_engine("model")["tensor_parallel_size"] == 1


def fused_loss(labels):
    """Loss, per-token outputs, the embedding's gradient and the number of tokens that were scored."""
    model = tiny_model(tiny_tokenizer())
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    with patch.object(chunked_logprob, "_forward_tile", wraps=chunked_logprob._forward_tile) as tile:
        out = model(input_ids=torch.arange(24).view(2, 12), labels=labels, fused_lm_head=True)
        out.loss.backward()
    return out, model.get_input_embeddings().weight.grad, sum(len(call.args[0]) for call in tile.call_args_list)


@pytest.mark.parametrize("labelled", [slice(8, 12), slice(0, 12), slice(12, 12)], ids=["answer", "all", "none"])
def test_loss_and_gradients_are_those_of_trl_and_only_labelled_tokens_are_scored(labelled, monkeypatch):
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)  # undone at the end
    labels = torch.full((2, 12), -100)
    labels[:, labelled] = torch.arange(24).view(2, 12)[:, labelled]
    slow, slow_grad, all_tokens = fused_loss(labels)
    engine.score_labelled_tokens_only()
    fast, fast_grad, some_tokens = fused_loss(labels)
    assert torch.allclose(slow.loss, fast.loss) and torch.allclose(slow_grad, fast_grad, atol=1e-7)
    for name in OUTPUTS:
        assert torch.allclose(getattr(slow, name).float(), getattr(fast, name).float(), atol=1e-6)
    assert (all_tokens, some_tokens) == (22, int((labels[:, 1:] != -100).sum()))


def test_other_devices_are_left_to_trl(monkeypatch):
    for module in (utils, chunked_logprob):
        monkeypatch.setattr(module, "_use_triton", lambda device: device.type == "cuda")
    engine.score_labelled_tokens_only()
    assert [utils._use_triton(torch.device(name)) for name in ("cpu", "cuda", "meta")] == [True, True, False]
