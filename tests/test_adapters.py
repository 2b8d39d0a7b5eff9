"""LoRA beside trained embeddings: one weight for tied tables, and no dropout in reinforcement learning."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rerank.models import adapters

LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_tables_stay_one_weight_trained_merged_and_saved(tmp_path, modules):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    config = adapters.lora_config(ModelConfig(**LORA, lora_modules_to_save=modules), model)
    trained = get_peft_model(model, config)
    ids = torch.arange(20).view(2, 10)
    trained(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    expected = trained.eval()(input_ids=ids).logits
    trained.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(tiny_model(tokenizer), str(tmp_path / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.tie_word_embeddings
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


def test_an_untied_model_trains_the_table_that_is_named():
    model = tiny_model(tiny_tokenizer(), tied=False)
    config = adapters.lora_config(ModelConfig(**LORA, lora_modules_to_save=["embed_tokens"]), model)
    trained = get_peft_model(model, config)
    assert {name.split(".")[-4] for name, p in trained.named_parameters() if "modules_to_save" in name} == {
        "embed_tokens"
    }


def test_reinforcement_learning_has_no_dropout():
    settings, model = ModelConfig(**LORA), tiny_model(tiny_tokenizer())
    assert adapters.lora_config(settings, model).lora_dropout == settings.lora_dropout > 0
    assert adapters.lora_config(settings, model, dropout=False).lora_dropout == 0
    assert adapters.lora_config(ModelConfig(), model) is None


def test_an_adapter_on_one_of_two_tied_tables_is_refused(tmp_path):
    settings = ModelConfig(**{**LORA, "lora_target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(
        ValueError, match="lora_target_modules holds lm_head, which this model ties to the other table"
    ):
        adapters.lora_config(settings, tiny_model(tiny_tokenizer()))
    assert adapters.lora_config(settings, tiny_model(tiny_tokenizer(), tied=False)) is not None
    folder = tmp_path / "model"
    tiny_model(tiny_tokenizer()).config.save_pretrained(folder)
    with pytest.raises(ValueError, match="lora_target_modules holds lm_head"):
        adapters.check_adapter(settings, folder)  # before it is loaded
    adapters.check_adapter(ModelConfig(lora_target_modules=["lm_head"]), folder)  # without use_peft


def test_a_module_that_the_model_lacks_is_refused_before_it_is_loaded(tmp_path):
    folder = tmp_path / "model"
    tiny_model(tiny_tokenizer()).config.save_pretrained(folder)
    known = "; it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, and all-linear"
    for names in (["q_prj"], ["q_proj", "q_prj"]):
        message = re.escape("lora_target_modules holds q_prj, but the model has no such module (did you mean q_proj?)")
        with pytest.raises(ValueError, match=message + known):
            adapters.check_adapter(ModelConfig(use_peft=True, lora_target_modules=names), folder)
    for names in (["q_proj"], ["self_attn.q_proj", "down_proj"], ["all-linear"], [r".*\.[qv]_proj"], None):
        adapters.check_adapter(ModelConfig(use_peft=True, lora_target_modules=names), folder)
    with pytest.raises(ValueError, match="lora_target_modules holds lm_head, which this model ties to the other"):
        adapters.check_adapter(ModelConfig(use_peft=True, lora_target_modules=["lm_head"]), folder)


def test_a_single_module_is_adapted_by_its_name():
    model = tiny_model(tiny_tokenizer())
    settings = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["q_proj"])
    trained = get_peft_model(model, adapters.lora_config(settings, model))
    names = {name.split(".lora_")[0] for name, p in trained.named_parameters() if p.requires_grad}
    assert len(names) == model.config.num_hidden_layers and all(name.endswith("self_attn.q_proj") for name in names)
