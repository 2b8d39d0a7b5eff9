"""The dapo stage on another model than that of its run, and on prompts that bypass the reasoning."""

import shutil
from dataclasses import replace

import pytest
from test_dapo import NDCG, check
from toy_recipe import copy_stages

from rerank import dapo
from rerank.dapo.start import to_be_made
from rerank.models import base as base_model
from rerank.models import one_token
from rerank.prompts import EMPTY_TRACE, PromptSettings, prompt_ids
from rerank.rows import Prompter, training_rows


@pytest.fixture(scope="module")
def prompter(toy_run):
    return Prompter.of_run(toy_run.run, base_model.load_tokenizer(str(toy_run.run / "sft/model")))


def test_training_continues_from_a_model_of_another_run_with_the_same_prompts_and_items(toy_run, tmp_path):
    run, start = copy_stages(toy_run.run, tmp_path / "run", "sft"), tmp_path / "model"
    options = {"run": run, "start_model": str(start)}
    with pytest.raises(FileNotFoundError, match="config.json is missing; give a model folder of the sft or dapo"):
        check(NDCG, **options)
    with to_be_made([start]):  # by an earlier run of the same command
        check(NDCG, **options)
    shutil.copytree(toy_run.run / "dapo/model", start)
    check(NDCG, **options)
    assert dapo.start_dir(dapo.DapoArguments(run_dir=str(run), rewards=NDCG, start_model=str(start))) == start
    with pytest.raises(ValueError, match="without_trace is true; leave one of the two out"):
        check(NDCG, **options, without_trace=True)
    PromptSettings(max_history=3).save(start)
    with pytest.raises(ValueError, match="was trained on other prompts or items than those of .*run; give a model of"):
        check(NDCG, **options)


def test_prompts_that_bypass_the_reasoning_end_in_an_empty_trace_with_which_completions_begin(toy_run, prompter):
    row = training_rows(toy_run.run, "dapo")[0]
    asked = replace(prompter, bypass_reasoning=True).ask(row, 9)
    assert asked.prompt == prompter.prompt(row) + EMPTY_TRACE and asked.begun == EMPTY_TRACE
    assert prompter.ask(row, 9).begun == ""
    ids, bare = (prompt_ids(prompter.tokenizer, [text])[0] for text in (asked.prompt, prompter.prompt(row)))
    assert one_token.prompt_tokens(prompter.tokenizer, ids) == ids  # the first label comes next already
    assert one_token.prompt_tokens(prompter.tokenizer, bare) == ids
