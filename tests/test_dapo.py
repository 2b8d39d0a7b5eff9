"""DAPO's settings, its checks before anything is trained, and what is said about a training."""

import inspect
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_recipe import copy_stages
from trl import GRPOTrainer, ModelConfig

from rerank import dapo
from rerank.dapo.trainer import DapoTrainer
from rerank.launch import recipe
from rerank.models import base as base_model
from rerank.rollouts import store as rollouts
from rerank.rows import Prompter, column_names, reward_columns, training_rows

NDCG = [{"name": "ndcg"}]


def config(folder, **options):
    return dapo.DapoConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **options)


def check(rewards, training_args=None, run="nowhere", **options):
    args = dapo.DapoArguments(run_dir=str(run), rewards=rewards, **options)
    dapo.check(args, training_args or config("nowhere"), ModelConfig())


def test_defaults_are_those_of_dapo(tmp_path):
    defaults = config(tmp_path)
    # arXiv:2503.14476: token-level loss, clip-higher (sec. 4.1: 0.2 and 0.28), no KL, overlong filtering
    assert (defaults.loss_type, defaults.epsilon, defaults.epsilon_high) == ("dapo", 0.2, 0.28)
    assert defaults.beta == 0.0 and defaults.mask_truncated_completions
    assert not defaults.vllm_importance_sampling_correction  # the gap is held small instead
    assert defaults.use_vllm and defaults.vllm_mode == "colocate" and defaults.save_total_limit == 2


OVERRIDDEN = {  # method of TRL -> its parameters
    "_prepare_inputs": "self generation_batch",
    "_generate": "self prompts",
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size "
    "compute_entropy compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask "
    "spatial_shapes num_tiles image_sizes token_type_ids mm_token_type_ids image_position_ids",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "_save_checkpoint": "self model trial",
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "self inputs",
}


def test_overridden_methods_are_as_the_pinned_trl_has_them():
    ours = {*vars(DapoTrainer), *vars(DapoTrainer.__base__)} - {*vars(object), "__module__", "__dict__", "train"}
    assert {name for name in ours if name in dir(GRPOTrainer)} == {*OVERRIDDEN}
    for method, parameters in OVERRIDDEN.items():
        assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters) == parameters.split(), method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "sft"}, r"rows is 'sft' but must be one of dapo, all"),
        ({"outcome": "ndgc"}, r"outcome is 'ndgc', but the recipe's rewards report only rank_gain, ndcg$"),
        ({"rewards": []}, r"the recipe: rewards is \[\] but must be a list of at least one reward, such as"),
        ({"max_sampling_rounds": 0}, r"max_sampling_rounds is 0 but must be at least 1"),
        ({"group_forward": "maybe"}, r"group_forward is 'maybe' but must be one of auto, true, false"),
        ({"max_logp_gap": 0.0}, r"max_logp_gap is 0.0 but must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dapo.DapoArguments(**{"run_dir": "run", "rewards": NDCG, **options})


def test_every_reward_is_called_before_a_model_is_loaded(tmp_path):
    check([*NDCG, {"name": "rank_promotion"}, {"name": "well_formed", "condition": "promoted_or_kept_first"}])
    path = tmp_path / "plugin.py"
    path.write_text("def novelty(completions, **columns):\n    raise RuntimeError('|'.join(completions))\n")
    completions = r"<think>why</think><s_a_0><s_b_1><s_a_0><s_b_0>\|no ranking"
    with pytest.raises(ValueError, match=rf"novelty raised RuntimeError: {completions} \(row_id 0\); repair it"):
        check([{"name": f"{path}:novelty"}])


def test_groups_that_do_not_fit_are_refused(tmp_path):
    shape = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_generations": 4}
    for setting in ("auto", False, "false"):
        check(NDCG, config(tmp_path, **shape), group_forward=setting)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size is 6, but group_forward takes whole groups of"):
        check(NDCG, config(tmp_path, **shape), group_forward=True)
    parts = config(tmp_path, **shape)
    parts.steps_per_generation = 1
    message = r"a process samples 6 completions at a time .* which num_generations 4 does not divide; change one"
    with pytest.raises(ValueError, match=message):
        check(NDCG, parts)


def test_a_loss_that_would_count_masked_rows_is_refused(tmp_path):
    message = r"loss_type grpo would count the masked rows of padding groups; use one of dapo, cispo, vespo, or set"
    with pytest.raises(ValueError, match=message):
        check(NDCG, config(tmp_path, loss_type="grpo"))
    check(NDCG, config(tmp_path, loss_type="grpo"), dynamic_sampling=False)


def test_the_gain_over_a_training_is_that_of_its_last_fifth_over_its_first():
    rewards = [0.0, 2.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 10.0, 12.0]
    gain = dapo.gain_over_training(rewards)
    assert (gain["reward_first_fifth"], gain["reward_last_fifth"]) == (1.0, 11.0)
    # each fifth has variance 2 and size 2: the difference of 10 has standard error sqrt(2/2 + 2/2), and with equal
    # variances Welch has 2 degrees of freedom: 4.30265 * sqrt(2) = 6.08487
    assert gain["reward_gain_interval"] == pytest.approx([10 - 6.08487, 10 + 6.08487], abs=1e-4)
    short = dapo.gain_over_training([1.0, 2.0, 4.0])
    assert short == {"reward_first_fifth": 1.0, "reward_last_fifth": 4.0, "reward_gain_interval": None}


def write_groups(folder, *groups):
    """Rollouts, two a group, of (step, target_rank, mean reward); the two lie 0.5 around the mean."""
    rows = [
        {"step": step, "group": number, "target_rank": rank, "reward": reward + spread}
        for number, (step, rank, reward) in enumerate(groups)
        for spread in (-0.5, 0.5)
    ]
    folder.mkdir()
    version = {"schema_version": rollouts.SCHEMA_VERSION}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(version), folder / "part-0-0.parquet")
    return folder


def test_the_gain_at_equal_ranks_compares_rows_with_as_much_to_gain(tmp_path):
    first = [(0, 1, 0.0), (0, 1, 0.2), (0, 5, 0.4), (0, 5, 0.8), (0, 7, 0.9)]
    middle = [(step, 1, 0.0) for step in (1, 2, 3)]
    last = [(4, 1, 0.2), (4, 1, 0.4), (4, 5, 0.4), (4, 5, 0.6)]
    gain = dapo.gain_at_equal_ranks(write_groups(tmp_path / "rollouts", *first, *middle, *last))
    # rank 1: 0.3 - 0.1, rank 5: 0.5 - 0.6, rank 7 is in one fifth only; 7 groups have rank 1 and 4 rank 5
    wanted = 7 / 11 * 0.2 + 4 / 11 * -0.1
    # variances of two means 0.2 apart are 0.02, 0.4 apart 0.08
    error = ((7 / 11) ** 2 * (0.02 / 2 + 0.02 / 2) + (4 / 11) ** 2 * (0.08 / 2 + 0.02 / 2)) ** 0.5
    assert gain["reward_gain_at_equal_ranks"] == pytest.approx(wanted)
    interval = [wanted - 1.959964 * error, wanted + 1.959964 * error]
    assert gain["reward_gain_at_equal_ranks_interval"] == pytest.approx(interval, abs=1e-6)


def test_without_two_groups_of_a_rank_in_both_fifths_there_is_no_gain_at_equal_ranks(tmp_path):
    gain = dapo.gain_at_equal_ranks(write_groups(tmp_path / "rollouts", (0, 1, 0.0), (1, 1, 0.2), (1, 1, 0.4)))
    assert gain == {"reward_gain_at_equal_ranks": None, "reward_gain_at_equal_ranks_interval": None}


@pytest.mark.parametrize("name", ["naive", "literal", "report"])
def test_rewards_may_be_the_path_of_a_file_with_them(name):
    given = {"run_dir": "runs/toy", "use_cpu": True, "bf16": False, "rewards": f"recipes/rewards/{name}.yaml"}
    args, *_ = parsed = recipe.resolve("dapo", given, "7.yaml")
    rank, form, overlong = args.load_rewards()
    assert (overlong.name, overlong.weight, overlong.function.keywords) == ("overlong", 1.0, {"cache_tokens": 8})
    assert (rank.weight, form.weight) == (1.0, 0.2)
    conditions = [reward.condition and reward.condition.__name__ for reward in (rank, form)]
    wanted = {"naive": [None, None], "literal": [None, "promoted_or_first"], "report": ["not_a_suboptimal_copy", None]}
    assert conditions == wanted[name]
    assert recipe.resolved_recipe(parsed, given)["rewards"] == args.rewards  # a finished stage holds the list itself


def test_the_token_limit_that_overlong_starts_from_is_that_of_the_row(tmp_path):
    check([*NDCG, {"name": "overlong"}])  # with the paper's limit, while none is known
    with pytest.raises(ValueError, match="cache_tokens is 4096 but must be from 0 to the token limit .*, 64"):
        check([{"name": "overlong"}], config(tmp_path, max_completion_length=64))


@pytest.fixture(scope="module")
def prompter(toy_run):
    _, tokenizer = base_model.load_pretrained(str(toy_run.run / "sft/model"))
    return Prompter.of_run(toy_run.run, tokenizer)


@pytest.fixture
def prepare(toy_run, prompter):
    """Prepare the stage on the toy run."""

    def call(training_args, **options):
        args = dapo.DapoArguments(run_dir=str(toy_run.run), rewards=NDCG, **options)
        return dapo.prepare(args, training_args, prompter, toy_run.run / "sft/model")

    return call


def test_a_training_prompt_is_that_of_its_row(toy_run, prompter, prepare, tmp_path):
    prompts, _ = prepare(config(tmp_path))
    rows = {row.row_id: row for row in training_rows(toy_run.run, "dapo")}
    assert [row.row_id for row in prompts.rows] == sorted(rows)
    taken = [prompt.asked for prompt in prompts.take(0, len(rows))]
    wanted = {row_id: prompter.prompt(row) for row_id, row in rows.items()}
    assert {asked.row.row_id: asked.prompt for asked in taken} == wanted
    assert set(reward_columns(taken)) == {"prompts", *column_names()}
    assert {asked.max_completion_tokens for asked in taken} == {prompts.max_completion_tokens}


def test_training_without_traces_starts_from_the_control_of_the_sft_stage(toy_run, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    args = dapo.DapoArguments(run_dir=str(run), rewards=NDCG, without_trace=True)
    assert dapo.start_dir(args) == run / "sft/model_no_trace"
    check(NDCG, run=run, without_trace=True)
    shutil.rmtree(run / "sft/model_no_trace")
    with pytest.raises(FileNotFoundError, match="model_no_trace is missing; set no_trace_control: true in the sft"):
        check(NDCG, run=run, without_trace=True)


def test_lengths_that_the_recipe_leaves_open_come_from_the_sft_stage_and_prompts_beyond_are_named(prepare, tmp_path):
    options = config(tmp_path)
    prompts, held_out = prepare(options, rows="all")
    tokenizer = prompts.prompter.tokenizer
    rows = [*prompts.rows, *(asked.row for asked in held_out)]
    lengths = {row.row_id: len(tokenizer(prompts.prompter.prompt(row)).input_ids) for row in rows}
    assert options.vllm_max_model_length == max(lengths.values()) + options.max_completion_length
    assert options.max_completion_length > 30  # a trace of the toy
    room = max(lengths.values()) - 1
    long = [row_id for row_id, length in lengths.items() if length > room]
    shown = ", ".join(map(str, long[:3]))
    message = rf"^{len(long)} of {len(lengths)} prompts \(row_id {shown}[^)]*\) have more than {room} tokens, the long"
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, max_completion_length=16, vllm_max_model_length=room + 16), rows="all")


def test_of_many_rows_a_sample_is_measured_before_training_and_each_prompt_when_it_is_drawn(
    prepare, tmp_path, monkeypatch
):
    whole, options = prepare(config(tmp_path), rows="all", eval_rows=0)[0], {"rows": "all", "eval_rows": 0}
    lengths = [len(whole.prompter.tokenizer(whole.ask(row).prompt).input_ids) for row in whole.rows]
    monkeypatch.setattr(dapo, "places_to_check", lambda num_rows: [int(np.argmin(lengths))])
    training = config(tmp_path)
    prompts, _ = prepare(training, **options)
    assert training.vllm_max_model_length == min(lengths) + min(lengths) // 4 + training.max_completion_length
    taken = [[prompt.asked.prompt for prompt in of.take(0, 2 * len(lengths))] for of in (prompts, whole)]
    assert taken[0] == taken[1]
    monkeypatch.setattr(dapo, "places_to_check", lambda num_rows: [])
    short = config(tmp_path, vllm_max_model_length=max(lengths) + 15, max_completion_length=16)
    prompts, _ = prepare(short, **options)
    message = (
        rf"^1 of 1 prompts \(row_id \d+\) have more than {max(lengths) - 1} tokens, the longest {max(lengths)}: vllm"
    )
    with pytest.raises(ValueError, match=message):
        prompts.take(0, len(lengths))


def test_fewer_rows_than_a_step_has_groups_are_refused(toy_run, prepare, tmp_path):
    count = len(training_rows(toy_run.run, "dapo"))
    prepare(config(tmp_path, num_generations=2, per_device_train_batch_size=2 * count))
    message = rf"dapo has {count} training rows but samples {count + 1} groups at a time; make per_device_train_batch"
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, num_generations=2, per_device_train_batch_size=2 * (count + 1)))


def test_the_check_refuses_a_model_of_another_catalogue(toy_run, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    table = pq.read_table(run / "semantic_ids/semantic_ids.parquet")
    ids = ["<s_a_99><s_b_0>", *table["semantic_id"].to_pylist()[1:]]
    pq.write_table(table.set_column(2, "semantic_id", [ids]), run / "semantic_ids/semantic_ids.parquet")
    with pytest.raises(ValueError, match=r"semantic ids of another catalogue than the model's: .* lacks <s_a_99>"):
        check(NDCG, run=run)


def test_further_lists_are_trained_on_unless_the_recipe_leaves_them_out(toy_run, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    rows = [row.row_id for row in training_rows(toy_run.run, "dapo")]
    table = pq.read_table(run / "candidates/train.parquet")
    further = table["row_id"].to_numpy() == rows[0]
    numbers = table.column_names.index("list_number")
    pq.write_table(
        table.set_column(numbers, "list_number", [further.astype(np.int64)]), run / "candidates/train.parquet"
    )
    for options, expected in (({}, rows), ({"further_lists": False}, rows[1:])):
        args = dapo.DapoArguments(run_dir=str(run), rewards=NDCG, **options)
        assert dapo.lists_to_train_on(args).used.tolist() == expected


def test_rows_that_are_drawn_more_than_twice_are_warned_of_with_the_numbers(toy_run, tmp_path, caplog):
    count = len(training_rows(toy_run.run, "dapo"))
    batch = {
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
    }  # 6 groups a step
    for options, draws in (
        ({"max_steps": count // 3}, None),  # not above two
        ({"max_steps": count}, 6.0),
        ({"max_steps": count, "num_iterations": 2}, 3.0),  # completions are used twice
        ({"max_steps": -1, "num_train_epochs": 3}, 3.0),
    ):
        caplog.clear()
        check(NDCG, config(tmp_path, **batch, **options), run=toy_run.run)
        said = [record.getMessage() for record in caplog.records if "training rows" in record.getMessage()]
        assert [f"each of its {count} training rows {draws} times" in line for line in said] == [True] * bool(draws)
