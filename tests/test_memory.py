"""Memory of training, reckoned from a configuration, against models that are made and passes that are run."""

import pytest
import torch
from huggingface_hub import constants
from tiny_model import sft_config, tiny_model, tiny_tokenizer
from transformers import LlamaConfig
from trl import ModelConfig, get_peft_config

from rerank import dapo
from rerank.launch import recipe
from rerank.models import memory
from rerank.traces import TracesArguments

CPU = "recipes/accelerate/cpu.yaml"
LORA = dict(use_peft=True, lora_r=4, lora_target_modules=["all-linear"])


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_tokenizer())


@pytest.mark.parametrize("adapter", [{}, LORA, {**LORA, "lora_modules_to_save": ["embed_tokens"]}])
def test_weights_are_those_of_the_model_that_is_trained(model, adapter):
    from peft import get_peft_model

    settings = ModelConfig(**adapter)
    trained = tiny_model(tiny_tokenizer())
    if adapter:
        config = get_peft_config(settings)
        config.ensure_weight_tying = "lora_modules_to_save" in adapter
        trained = get_peft_model(trained, config)
    every = {id(weight): weight for weight in trained.parameters()}.values()
    expected = sum(w.numel() for w in every), sum(w.numel() for w in every if w.requires_grad)
    assert memory.count_weights(model.config, settings) == expected


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16])  # the checkpoint's, which the recipe overrules
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_activations_are_those_that_a_real_forward_pass_keeps(model, dtype, autocast, made):
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, dtype=made
    )
    for of_model in (config, model.config):
        shape = memory.Shape(4, 128, dtype, autocast)
        real = (type(model)(of_model) if of_model is model.config else _llama(of_model)).to(dtype)
        kept = memory.saved_bytes(real.train(), shape)
        assert memory.activations(of_model, shape, checkpointing=False) == pytest.approx(kept, rel=0.15)
        real.gradient_checkpointing_enable({"use_reentrant": False})
        fewer = memory.saved_bytes(real, shape) + kept // of_model.num_hidden_layers
        assert memory.activations(of_model, shape, checkpointing=True) == pytest.approx(fewer, rel=0.15)
        assert fewer < kept / 1.5


def _llama(config):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config)


def test_shards_are_divided_among_the_devices(model, tmp_path):
    options, settings = sft_config(tmp_path), ModelConfig()
    alone, *sharded = [
        memory.training_need(model.config, options, settings, 64, recipe.load(f"recipes/accelerate/{name}.yaml"))
        for name in ("cpu", "zero2", "zero3", "fsdp2")
    ]
    num_weights = sum(weight.numel() for weight in model.parameters())
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * num_weights, 4 * num_weights, 8 * num_weights)
    parts = [(need.weights, need.gradients, need.optimizer) for need in sharded]
    eighth = num_weights / 8
    assert parts == [(4 * num_weights, 4 * eighth, 8 * eighth), *[(4 * eighth, 4 * eighth, 8 * eighth)] * 2]
    assert {need.activations for need in sharded} == {alone.activations}


@pytest.mark.parametrize(("name", "size"), [("cpu", 4), ("zero2", 12), ("fsdp2", 12)])
def test_of_16_bit_weights_a_float32_copy_is_counted_where_one_is_trained(model, tmp_path, name, size):
    where = {**recipe.load(f"recipes/accelerate/{name}.yaml"), "num_processes": 1}
    need = memory.training_need(model.config, sft_config(tmp_path), ModelConfig(dtype="bfloat16"), 64, where)
    assert need.optimizer == size * sum(weight.numel() for weight in model.parameters())


def test_the_cache_of_an_engine_is_counted(model, tmp_path, monkeypatch):
    def engine(where, **options):
        config = dapo.DapoConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
        return memory.training_need(model.config, config, ModelConfig(), 64, where, with_engine=True).engine

    weights = 2 * sum(weight.numel() for weight in model.parameters())
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert engine(recipe.load(CPU)) == weights + 3 * 2**30
    monkeypatch.setattr(memory, "there", lambda where: 80e9)
    gpu = recipe.load("recipes/accelerate/one_gpu.yaml")
    assert engine(gpu, vllm_gpu_memory_utilization=0.5) == 40e9
    assert 39e9 < engine(gpu, vllm_gpu_memory_utilization=0.5, vllm_enable_sleep_mode=True) < 40e9
    monkeypatch.setattr(memory, "there", lambda where: None)
    assert engine(gpu) == weights


def test_of_a_model_on_the_hub_it_is_said_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    keys = {"run_dir": "runs/none", "num_documents": 10, "model_name_or_path": "org/model"}
    stages = {
        "midtrain": recipe.resolve("midtrain", keys, ""),
        "sft": recipe.resolve("sft", {"run_dir": "runs/none"}, ""),
    }
    stages["traces"] = (TracesArguments(run_dir="runs/none", teacher="vllm", teacher_model="org/teacher"),)
    said = "of which this machine has not all: memory, chat template and tokenizer are not known until it has; "
    assert memory.estimates(stages, CPU) == [
        f"traces asks org/teacher, {said}`hf download org/teacher` brings it",
        f"midtrain starts from org/model, {said}`hf download org/model` brings it",
    ]


def test_a_batch_that_does_not_fit_is_named_with_the_cure():
    keys = {"run_dir": "runs/none", "num_documents": 10, "max_length": 512, "gradient_checkpointing": False}
    few, many = [
        memory.estimates({"midtrain": recipe.resolve("midtrain", {**keys, **more}, "a recipe")}, CPU)
        for more in ({}, {"per_device_train_batch_size": 100_000})
    ]
    assert len(few) == len(many) == 1
    assert few[0].startswith("midtrain takes about 0.") and few[0].endswith(" GB")
    assert many[0].endswith(
        "which is too much; lower per_device_train_batch_size or max_length, or set gradient_checkpointing: true, "
        "or set use_peft: true"
    )


def test_an_architecture_that_cannot_be_reckoned_is_said(tmp_path, model):
    from transformers import MixtralConfig

    config = MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    keys = {"run_dir": "runs/none", "num_documents": 10, "model_name_or_path": str(tmp_path), "max_length": 64}
    (line,) = memory.estimates({"midtrain": recipe.resolve("midtrain", keys, "a recipe")}, CPU)
    assert line.startswith("the memory that midtrain takes is not known: ")


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("auto", 2)])
def test_weights_and_moments_have_the_type_in_which_the_model_is_loaded(model, tmp_path, dtype, size):
    config = LlamaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, dtype="bfloat16")
    need = memory.training_need(config, sft_config(tmp_path), ModelConfig(dtype=dtype), 64, recipe.load(CPU))
    num_weights = sum(weight.numel() for weight in _llama(config).parameters())
    assert (need.weights, need.optimizer) == (size * num_weights, 2 * size * num_weights)
