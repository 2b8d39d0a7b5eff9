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
from rerank.launch import recipe
from rerank.models import engine

BOUND, STEPS = 0.02, 5
OTHER_SAMPLING = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.5}
OUTPUTS = ("log_probs", "entropy", "is_top1")  # of the fused loss
PROMPTS = ["Rank: the title", "History: a drama", "Candidates: of the", "a title of the drama"]


def evenness(completions, completion_ids, **columns):
    """The share of even token ids: differs between the completions of an untrained model."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(autouse=True)
def quiet_engine():
    """TRL and vLLM write into the environment; leave it as it was."""
    with patch.dict(os.environ, {**recipe.ENVIRONMENT, "OMP_NUM_THREADS": "1"}):
        yield


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


@pytest.mark.parametrize(
    ("tied", "dtype"), [(True, "float32"), (False, "float32"), (True, "bfloat16"), (False, "bfloat16")]
)
def test_the_gap_stays_put_while_the_weights_move(tmp_path, tied, dtype):
    gaps, moved = gaps_of_a_training(tmp_path, tied, dtype)
    assert len(gaps) == STEPS and moved > 0.05
    assert max(gaps) < (BOUND if dtype == "bfloat16" else 1e-4)


def test_the_gap_grows_when_the_weights_are_not_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", lambda self: None)
    gaps, _ = gaps_of_a_training(tmp_path, True, "float32")
    assert gaps[0] < 1e-4 and gaps[-1] > BOUND


def test_the_engine_starts_without_graph_capture_on_cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
    assert engine.engine_options() == options
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine.engine_options() == {}


@pytest.mark.parametrize(
    ("capability", "has_gpu", "asked", "dtype"),
    [
        ("AVX2", False, "auto", "float32"),
        ("DEFAULT", False, "auto", "float32"),
        ("AVX512", False, "auto", "auto"),
        ("AVX2", True, "auto", "auto"),
        ("AVX2", False, "bfloat16", "bfloat16"),
    ],
)
def test_a_cpu_that_is_slow_in_bfloat16_computes_in_float32(monkeypatch, capability, has_gpu, asked, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert engine.engine_dtype(asked) == dtype


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


@pytest.mark.parametrize(
    ("module", "name", "patch"),
    [
        ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", engine.keep_weights_live),
        ("trl.trainer.utils", "_use_triton", engine.score_labelled_tokens_only),
    ],
)
def test_a_library_without_the_function_to_replace_is_refused(monkeypatch, module, name, patch):
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(RuntimeError, match=f"{module} has no {name}; install the (vLLM|TRL) version that pyproject"):
        patch()


def test_an_engine_starts_beside_objects_that_answer_to_any_name(tmp_path):
    import ibis.backends.duckdb as loaded  # the data stage's: its `C.__dict__` is a column of that name

    assert not isinstance(loaded.C.__dict__, dict)
    llm = engine.open_engine(save_tiny_model(tmp_path / "model"), max_length=64, dtype="float32")
    (answers,) = engine.generate(llm, ["Rank: the title"], 4, temperature=1.0, num_completions=2, seed=0)
    llm.llm_engine.engine_core.shutdown()
    assert all(0 < len(answer.token_ids) <= 4 for answer in answers)
    assert all(answer.truncated == (len(answer.token_ids) == 4) for answer in answers)


@pytest.fixture
def skip_unlabelled(monkeypatch):
    """A call that applies the patch, which ends with the test."""
    monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
    return engine.score_labelled_tokens_only


def fused_loss(labels):
    """Loss, per-token outputs, the embedding's gradient and the number of tokens that were scored."""
    model = tiny_model(tiny_tokenizer())
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    scored = []
    tile = chunked_logprob._forward_tile
    chunked_logprob._forward_tile = lambda *args, **kwargs: (scored.append(len(args[0])), tile(*args, **kwargs))[1]
    try:
        out = model(input_ids=torch.arange(24).view(2, 12), labels=labels, fused_lm_head=True)
        out.loss.backward()
    finally:
        chunked_logprob._forward_tile = tile
    return out, model.get_input_embeddings().weight.grad, sum(scored)


@pytest.mark.parametrize("labelled", [slice(8, 12), slice(0, 12), slice(12, 12)], ids=["answer", "all", "none"])
def test_loss_and_gradients_are_those_of_trl_and_only_labelled_tokens_are_scored(labelled, skip_unlabelled):
    labels = torch.full((2, 12), -100)
    labels[:, labelled] = torch.arange(24).view(2, 12)[:, labelled]
    slow, slow_grad, all_tokens = fused_loss(labels)
    skip_unlabelled()
    fast, fast_grad, some_tokens = fused_loss(labels)
    assert torch.allclose(slow.loss, fast.loss) and torch.allclose(slow_grad, fast_grad, atol=1e-7)
    for name in OUTPUTS:
        assert torch.allclose(getattr(slow, name).float(), getattr(fast, name).float(), atol=1e-6)
    assert (all_tokens, some_tokens) == (22, int((labels[:, 1:] != -100).sum()))


def test_other_devices_are_left_to_trl(skip_unlabelled, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: device.type == "cuda")
    skip_unlabelled()
    assert [utils._use_triton(torch.device(name)) for name in ("cpu", "cuda", "meta")] == [True, True, False]
