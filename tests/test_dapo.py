"""DAPO's settings, its checks before anything is trained, and what is said about a training."""

import inspect
import shutil

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


def check(rewards, training_args=None, **options):
    training_args = training_args or config("nowhere")
    dapo.check(dapo.DapoArguments(run_dir="nowhere", rewards=rewards, **options), training_args, ModelConfig())


def plugin(folder, body):
    path = folder / "plugin.py"
    path.write_text(f"def novelty(completions, **columns):\n    {body}\n")
    return [{"name": f"{path}:novelty"}]


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
        ({"max_sampling_rounds": 0}, r"max_sampling_rounds is 0 but must be at least 1"),
        ({"max_logp_gap": 0.0}, r"max_logp_gap is 0.0 but must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dapo.DapoArguments(run_dir="run", rewards=NDCG, **options)


def test_every_reward_is_called_before_a_model_is_loaded(tmp_path):
    check([*NDCG, {"name": "rank_promotion"}, {"name": "well_formed", "condition": "promoted_or_kept_first"}])
    with pytest.raises(ValueError, match=r"novelty raised KeyError: 'title' \(row_id 0\); repair it"):
        check(plugin(tmp_path, "return [columns['title'] for _ in completions]"))


def test_groups_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"GRPO requires at least 2 generations per prompt"):
        config(tmp_path, num_generations=1)
    shape = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_generations": 4}
    check(NDCG, config(tmp_path, **shape), group_forward=False)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size is 6, but group_forward takes whole groups of"):
        check(NDCG, config(tmp_path, **shape))
    message = r"a process samples 6 completions at a time .* which num_generations 4 does not divide; change one"
    with pytest.raises(ValueError, match=message):
        parts = config(tmp_path, **shape)
        parts.steps_per_generation = 1
        check(NDCG, parts)


def test_a_loss_that_would_count_masked_rows_is_refused(tmp_path):
    message = r"loss_type grpo would count the masked rows of padding groups; use one of dapo, cispo, vespo, or set"
    with pytest.raises(ValueError, match=message):
        check(NDCG, config(tmp_path, loss_type="grpo"))
    check(NDCG, config(tmp_path, loss_type="grpo"), dynamic_sampling=False)


def test_a_reward_sees_a_ranking_and_junk_in_the_check(tmp_path):
    body = "raise RuntimeError(completions[0] + '|' + completions[1])"
    with pytest.raises(ValueError, match=r"<think>why</think><s_a_0><s_b_1><s_a_0><s_b_0>\|no ranking"):
        check(plugin(tmp_path, body))


def test_the_gain_over_a_training_is_that_of_its_last_fifth_over_its_first():
    rewards = [0.0, 2.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 10.0, 12.0]
    gain = dapo.gain_over_training(rewards)
    assert (gain["reward_first_fifth"], gain["reward_last_fifth"]) == (1.0, 11.0)
    # each fifth has variance 2 and size 2: the difference of 10 has standard error sqrt(2/2 + 2/2), and with equal
    # variances Welch has 2 degrees of freedom: 4.30265 * sqrt(2) = 6.08487
    assert gain["reward_gain_interval"] == pytest.approx([10 - 6.08487, 10 + 6.08487], abs=1e-4)


def test_a_short_training_has_a_gain_without_an_interval():
    gain = dapo.gain_over_training([1.0, 2.0, 4.0])
    assert gain == {"reward_first_fifth": 1.0, "reward_last_fifth": 4.0, "reward_gain_interval": None}


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


RECIPE = {"run_dir": "runs/toy", "use_cpu": True, "bf16": False}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"overlong_tokens": 8},
            r"^7.yaml: .*'overlong_tokens'.* \{name: overlong, kwargs: \{cache_tokens: N\}\}",
        ),
        ({"invalid_reward": -1.0}, r"^7.yaml: .*'invalid_reward'.* rank_promotion pays -1 to what is no ranking"),
        ({"rewards": 3}, "^3 does not exist; give the path of a recipe file"),
        ({"rewards": []}, "^7.yaml: the recipe: rewards is .* but must be a list of at least one reward"),
        ({"rewards": [{"name": "ndgc"}]}, r"^7.yaml: rewards has no 'ndgc' \(did you mean ndcg\?\)"),
        ({"rewards": [{"name": "ndcg", "when": "promoted"}]}, "^7.yaml: .* 'when', which is called 'condition' now"),
    ],
)
def test_keys_of_rewards_are_refused_in_one_line(keys, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipe.resolve("dapo", {**RECIPE, "rewards": NDCG, **keys}, "7.yaml")


@pytest.mark.parametrize("name", ["naive", "literal", "report"])
def test_rewards_may_be_the_path_of_a_file_with_them(name):
    given = {**RECIPE, **recipe.read_overrides([f"--rewards=recipes/rewards/{name}.yaml"])}
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
    with pytest.raises(
        ValueError, match="cache_tokens is 4096 but must be from 0 to the token limit of a completion, 64"
    ):
        check([{"name": "overlong"}], config(tmp_path, max_completion_length=64))


@pytest.fixture(scope="module")
def toy_prompter(toy_run):
    _, tokenizer = base_model.load_pretrained(str(toy_run.run / "sft/model"))
    return Prompter.of_run(toy_run.run, tokenizer)


def test_a_training_prompt_is_that_of_its_row(toy_run, toy_prompter, tmp_path):
    args = dapo.DapoArguments(run_dir=str(toy_run.run), rewards=NDCG)
    prompts = dapo.prepare(args, config(tmp_path), toy_prompter, toy_run.run / "sft/model")
    rows = {row.row_id: row for row in training_rows(toy_run.run, "dapo")}
    assert [row.row_id for row in prompts.rows] == sorted(rows)
    taken = [prompt.asked for prompt in prompts.take(0, len(rows))]
    assert {asked.row.row_id: asked.prompt for asked in taken} == {
        i: toy_prompter.prompt(row) for i, row in rows.items()
    }
    assert set(reward_columns(taken)) == {"prompts", *column_names()}
    assert {asked.max_completion_tokens for asked in taken} == {prompts.max_completion_tokens}


def test_a_shuffled_row_shows_its_evidence_in_the_same_order(toy_run, toy_prompter):
    row = training_rows(toy_run.run, "dapo")[0]
    plain, shuffled = (toy_prompter.ask(shown, 16) for shown in (row, row.shuffled([2, 0, 3, 1])))
    assert shuffled.labels == [plain.labels[place] for place in (2, 0, 3, 1)]
    lines = plain.prompt.replace("<|assistant|>", "").splitlines()
    shown = shuffled.prompt.replace("<|assistant|>", "").splitlines()
    assert sorted(shown) == sorted(lines) and shown != lines


def test_training_without_traces_starts_from_the_control_of_the_sft_stage(toy_run, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    args = dapo.DapoArguments(run_dir=str(run), rewards=NDCG, without_trace=True)
    assert dapo.start_dir(args) == run / "sft/model_no_trace"
    dapo.check(args, config(tmp_path), ModelConfig())
    shutil.rmtree(run / "sft/model_no_trace")
    with pytest.raises(FileNotFoundError, match="model_no_trace is missing; set no_trace_control: true in the sft"):
        dapo.check(args, config(tmp_path), ModelConfig())


def test_lengths_that_the_recipe_leaves_open_come_from_the_sft_stage(toy_run, toy_prompter, tmp_path):
    options = config(tmp_path)
    args = dapo.DapoArguments(run_dir=str(toy_run.run), rewards=NDCG, rows="all")
    prompts = dapo.prepare(args, options, toy_prompter, toy_run.run / "sft/model")
    longest = max(dapo.prompt_lengths(prompts).values())
    assert options.vllm_max_model_length == longest + options.max_completion_length
    assert options.max_completion_length > 30  # a trace of the toy


def test_prompts_that_do_not_fit_are_counted_and_named(toy_run, toy_prompter, tmp_path):
    args = dapo.DapoArguments(run_dir=str(toy_run.run), rewards=NDCG)
    prompts = dapo.prepare(args, config(tmp_path), toy_prompter, toy_run.run / "sft/model")
    lengths = {r.row_id: len(toy_prompter.tokenizer(toy_prompter.prompt(r)).input_ids) for r in prompts.rows}
    room = max(lengths.values()) - 1
    long = [row_id for row_id, length in lengths.items() if length > room]
    options = config(tmp_path, max_completion_length=16, vllm_max_model_length=room + 16)
    shown = ", ".join(map(str, long[:3]))
    message = (
        rf"^{len(long)} of {len(lengths)} prompts \(row_id {shown}[^)]*\) have more than {room} tokens, the longest"
    )
    with pytest.raises(ValueError, match=message):
        dapo.prepare(args, options, toy_prompter, toy_run.run / "sft/model")


def test_a_split_that_leaves_no_rows_for_dapo_is_refused(toy_run, toy_prompter, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    split = pq.read_table(run / "traces/row_split.parquet")
    everything = pa.table({"row_id": split["row_id"], "used_for": ["sft"] * len(split)})
    pq.write_table(everything, run / "traces/row_split.parquet")
    args = dapo.DapoArguments(run_dir=str(run), rewards=NDCG)
    with pytest.raises(ValueError, match=r"no training rows are left for dapo; lower rows_for_sft"):
        dapo.prepare(args, config(tmp_path), toy_prompter, run / "sft/model")
    shutil.rmtree(run)


def test_fewer_rows_than_a_step_has_groups_are_refused(toy_run, toy_prompter, tmp_path):
    args = dapo.DapoArguments(run_dir=str(toy_run.run), rewards=NDCG)
    count = len(training_rows(toy_run.run, "dapo"))
    message = rf"dapo has {count} training rows but samples {count + 1} groups at a time; make per_device_train_batch"
    enough, too_many = (
        config(tmp_path, num_generations=2, per_device_train_batch_size=2 * num_groups)
        for num_groups in (count, count + 1)
    )
    dapo.prepare(args, enough, toy_prompter, toy_run.run / "sft/model")
    with pytest.raises(ValueError, match=message):
        dapo.prepare(args, too_many, toy_prompter, toy_run.run / "sft/model")


def test_the_check_refuses_a_model_of_another_catalogue(toy_run, tmp_path):
    run = copy_stages(toy_run.run, tmp_path / "run", "sft")
    table = pq.read_table(run / "semantic_ids/semantic_ids.parquet")
    ids = ["<s_a_99><s_b_0>", *table["semantic_id"].to_pylist()[1:]]
    pq.write_table(table.set_column(2, "semantic_id", [ids]), run / "semantic_ids/semantic_ids.parquet")
    args = dapo.DapoArguments(run_dir=str(run), rewards=NDCG)
    with pytest.raises(ValueError, match=r"semantic ids of another catalogue than the model's: .* lacks <s_a_99>"):
        dapo.check(args, config(tmp_path), ModelConfig())
