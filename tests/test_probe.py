"""The probe on four rows of ten candidates, with figures by hand, and on a toy run as the dapo stage reads it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from toy_recipe import refusal
from toy_run import finish, rollout, write_items, write_rollouts, write_run, write_traces

from rerank import cli, probe, prompts
from rerank.launch import pipeline, recipe, run_dir
from rerank.probe import policies, scores
from rerank.probe.rows import NO_LIMIT, SEED, read_rows, reward_columns
from rerank.probe.scores import Scorer, best_blind_order
from rerank.prompts import PromptSettings, parse_completion
from rerank.rows import PromptedRow, Prompter, column_names, training_rows
from rerank.scoring import TRAINER_COLUMNS, load_rewards

CPU = "recipes/accelerate/cpu.yaml"
NAMES = [
    *("input_order", "no_trace", "swap_neighbours", "second_to_first", "reverse", "random_order", "last_to_first"),
    *("first_to_last", "best_fixed_order", "by_popularity", "duplicate", "omission", "foreign_item", "truncated"),
    *("empty", "junk", "junk_with_target", "oracle"),
]
NO_RANKING = ["duplicate", "omission", "foreign_item", "truncated", "empty", "junk", "junk_with_target"]
RANK, FORM = {"name": "rank_promotion"}, {"name": "well_formed", "weight": 0.2}
NAIVE = [RANK, FORM]
CONDITIONAL = [RANK, {**FORM, "condition": "promoted_or_kept_first"}]
LITERAL = [RANK, {**FORM, "condition": "promoted_or_first"}]
REPORT = [{"name": "auc", "condition": "not_a_suboptimal_copy"}, FORM]
TARGET_RANKS = {0: 1, 1: 4, 2: 5, 3: 7, 4: 6}  # by row_id; row 4 is for sft
SHOWN = list(range(2, 12))


def make_run(run, target_ranks=TARGET_RANKS):
    """Candidates 2 to 11 of twelve items in five rows; the higher its number, the more often an item was taken."""
    write_items(run / "data", 12)
    taken = [item for item in range(12) for _ in range(item)]
    others = range(100, 100 + len(taken))
    users = {"user": others, "item": taken, "position": [0] * len(taken), "split": ["train"] * len(taken)}
    finish(run / "data", interactions=pa.table(users))
    ids = {"item": range(12), "semantic_id": [f"<s_a_{n}><s_b_0>" for n in range(12)]}
    finish(run / "semantic_ids", semantic_ids=pa.table(ids))
    rows = [
        {"row_id": row, "user": row, "history": [0, 1], "candidates": SHOWN, "hit": True}
        | {"relevance": [float(place == rank) for place in range(1, 11)]}
        for row, rank in target_ranks.items()
    ]
    finish(run / "candidates", train=pa.Table.from_pylist(rows))
    settings = PromptSettings(ranking="number", item_fields=["semantic_id"], task="short")
    write_traces(run / "traces", dict(zip(TARGET_RANKS, ["dapo"] * 4 + ["sft"], strict=True)), settings)
    finish(run / "traces")
    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def outcomes(run, rewards, **keys):
    found = probe.probe({"run_dir": run, "rewards": rewards, **keys})
    return {outcome.policy: outcome for outcome in found.outcomes}


def test_the_naive_sum_pays_each_policy_as_by_hand(run):
    found = outcomes(run, NAIVE)
    assert list(found) == NAMES
    # targets at 4, 5 and 7 of ten; the oracle wins 3, 4 and 6 places
    assert found["oracle"].rank_gain == pytest.approx(13 / 3)
    assert found["oracle"].reward == pytest.approx(13 / 30 + 0.2)
    assert found["oracle"].parts == pytest.approx({"rank_promotion": 13 / 30, "well_formed": 0.2})
    # 0.5, 0.6 and 0.8 around 19/30: sqrt((0.01778 + 0.00111 + 0.02778) / 3)
    assert found["oracle"].spread == pytest.approx(0.1247, abs=1e-4)
    for name in ("input_order", "no_trace", "swap_neighbours", "second_to_first"):
        assert (found[name].rank_gain, found[name].reward) == (0, pytest.approx(0.2))
    # reversed: 4 -> 7, 5 -> 6, 7 -> 4
    assert found["reverse"].rank_gain == pytest.approx(-1 / 3)
    assert found["reverse"].above_no_op == pytest.approx(1 / 3)
    assert (found["last_to_first"].rank_gain, found["first_to_last"].rank_gain) == (-1, 1)
    # the fourth, fifth and seventh in the first three places: 16 - 6 places for three rows
    assert found["best_fixed_order"].rank_gain == pytest.approx(10 / 3)
    # more popular come later: the same as reversed
    assert found["by_popularity"].rank_gain == found["reverse"].rank_gain
    assert {name for name in NAMES if found[name].rank_gain is None} == set(NO_RANKING)
    assert {found[name].reward for name in NO_RANKING} == {-1.0}
    # the one row whose target is first: kept, reversed to 10, put second
    assert found["input_order"].reward_if_first == pytest.approx(0.2)
    assert found["reverse"].reward_if_first == pytest.approx(-9 / 10 + 0.2)
    assert found["last_to_first"].reward_if_first == pytest.approx(-1 / 10 + 0.2)


def test_shares_run_from_random_orders_to_the_oracle(run):
    # a random order puts the target at 5.5 on average, so that it wins 16/3 - 5.5 places: -1/6
    zero, lead = -1 / 60 + 0.2, 13 / 30 + 1 / 60
    found = outcomes(run, NAIVE)
    for name in ("input_order", "reverse", "best_fixed_order", "junk"):
        assert found[name].share == pytest.approx((found[name].reward - zero) / lead, abs=0.02), name
    assert found["oracle"].share == 1 and found["oracle"].gain_share == 1
    assert found["random_order"].share == pytest.approx(0, abs=0.35)  # of few draws
    assert found["first_to_last"].gain_share == pytest.approx((1 + 1 / 6) / (13 / 3 + 1 / 6), abs=0.02)


def test_groups_are_useful_where_their_halves_differ_in_the_recipes_outcome(run):
    found = outcomes(run, NAIVE)
    assert found["input_order"].useful_with_no_op == found["swap_neighbours"].useful_with_no_op == 0
    assert found["reverse"].useful_with_no_op == 1
    assert found["oracle"].useful_with_no_op == found["junk"].useful_with_random == 1
    rewards = [*NAIVE, {"name": "not_a_copy", "weight": 0.0}]  # a copy of the input order differs in it from all else
    by_copy = outcomes(run, rewards, outcome="not_a_copy")
    assert by_copy["input_order"].useful_with_no_op == 0
    assert by_copy["swap_neighbours"].useful_with_no_op == by_copy["last_to_first"].useful_with_no_op == 1
    assert by_copy["swap_neighbours"].reward == found["swap_neighbours"].reward
    with pytest.raises(ValueError, match="outcome is 'ndcg', but the recipe's rewards report only rank_gain, rank_pr"):
        outcomes(run, NAIVE, outcome="ndcg")


def test_the_naive_sum_fails_since_copying_costs_nothing(run):
    found = probe.probe({"run_dir": run, "rewards": NAIVE})
    assert found.passed is False
    assert re.fullmatch(
        r"input_order wins the target no place and earns [2-6] % of the oracle's lead over random orders "
        r"where its rank gain is [2-6] % \(at most -3 % between them is wanted: it must cost something\), "
        r"all of it from well_formed; "
        r"pay what is no rank only where the ranking helped, such as `condition: promoted_or_kept_first`",
        found.sentence,
    )


@pytest.mark.parametrize(
    ("rewards", "if_first"),
    [(CONDITIONAL, -9 / 10), (LITERAL, -9 / 10 + 0.2)],  # the literal reading pays the format for a demotion
)
def test_the_conditional_readings_pass_and_part_where_the_target_is_first(run, rewards, if_first):
    found = probe.probe({"run_dir": run, "rewards": rewards})
    assert found.passed is True
    # random orders promote with chances 3/10, 4/10 and 6/10: -1/60 + 0.2 * 13/30 in all; the oracle has 19/30
    zero = -1 / 60 + 0.2 * 13 / 30
    assert found.outcomes[0].share == pytest.approx(-zero / (19 / 30 - zero), abs=0.02)
    lead = r"of the oracle's lead over random orders where its rank gain is"
    assert re.match(rf"copying costs: \w+ earns -1[0-4] % {lead}", found.sentence)
    reverse = found.outcomes[NAMES.index("reverse")]
    assert reverse.reward == pytest.approx((-3 - 1 + 3) / 30 + 0.2 / 3)  # one of three targets rises
    assert reverse.reward_if_first == pytest.approx(if_first)


def test_the_identity_check_stops_copies_and_lets_near_copies_through(run):
    found = outcomes(run, REPORT)
    assert found["input_order"].reward == pytest.approx(0.2) and found["input_order"].share < -0.9
    # AUC of rank r of ten is (10 - r) / 9: 6/9, 5/9 and 3/9
    assert found["swap_neighbours"].reward == pytest.approx(14 / 27 + 0.2)
    assert {found[name].reward for name in NO_RANKING} == {0.0}
    sentence = probe.problem({"run_dir": run, "rewards": REPORT})
    assert (
        sentence.startswith("swap_neighbours wins the target no place and earns") and "72 % of what it is" in sentence
    )


MY = """
def constant(completions, **columns):
    return [1.0] * len(completions)

def ill_formed(completions, candidate_labels, **columns):
    from rerank.prompts import parse_completion
    pairs = zip(completions, candidate_labels)
    return [-float(parse_completion(text, labels).order is None) for text, labels in pairs]

def promoted_or_kept_first_or_no_ranking(**columns):
    from rewards.conditions.promoted_or_kept_first import promoted_or_kept_first
    return promoted_or_kept_first(**columns)
"""


@pytest.fixture
def my(tmp_path):
    (tmp_path / "my.py").write_text(MY)
    return lambda name, **keys: {"name": f"{tmp_path}/my.py:{name}", **keys}


@pytest.mark.parametrize("rewards", [NAIVE, CONDITIONAL, LITERAL, REPORT])
@pytest.mark.parametrize("value", [-3.0, 0.5, 40.0])
def test_a_constant_changes_neither_share_nor_verdict(run, my, rewards, value):
    plain = probe.probe({"run_dir": run, "rewards": rewards})
    moved = probe.probe({"run_dir": run, "rewards": [*rewards, my("constant", weight=value)]})
    assert moved.passed is plain.passed and moved.worst.policy == plain.worst.policy
    assert [o.share for o in moved.outcomes] == pytest.approx([o.share for o in plain.outcomes])


def test_the_format_as_a_penalty_is_the_format_as_a_reward(run, my):
    as_penalty = [RANK, my("ill_formed", weight=0.2)]
    paid, fined = (probe.probe({"run_dir": run, "rewards": rewards}) for rewards in (NAIVE, as_penalty))
    assert fined.passed is paid.passed is False
    assert [o.share for o in fined.outcomes] == pytest.approx([o.share for o in paid.outcomes])


def test_a_scale_changes_no_share(run):
    scaled = [{**entry, "weight": 7 * entry.get("weight", 1.0)} for entry in CONDITIONAL]
    plain, other = outcomes(run, CONDITIONAL), outcomes(run, scaled)
    assert [o.share for o in other.values()] == pytest.approx([o.share for o in plain.values()])


def test_a_small_rank_gain_excuses_nobody(tmp_path):
    """With targets at the end, junk that sometimes hits gains nothing: the bar of copies holds whatever they gain."""
    run = make_run(tmp_path / "run", {0: 1, 1: 2, 2: 10, 3: 6, 4: 3})
    found = probe.probe({"run_dir": run, "rewards": NAIVE})
    second = found.outcomes[NAMES.index("second_to_first")]
    assert second.rank_gain == pytest.approx(1 / 3) and second.kind == "copy"
    assert second.excess(0.25) > 0 and found.passed is False


def test_a_good_first_stage_does_not_condemn_a_reward(tmp_path):
    """Its copies earn more than random orders under any reward, since they win rank over them."""
    run = make_run(tmp_path / "run", {0: 1, 1: 2, 2: 2, 3: 3, 4: 2})
    for rewards, passed in ((CONDITIONAL, True), (NAIVE, False)):
        found = probe.probe({"run_dir": run, "rewards": rewards})
        copy = found.outcomes[0]
        assert copy.share > 0.4 and found.passed is passed
        assert (copy.beyond_rank < -0.1) is passed


def test_rows_on_which_copying_costs_nothing_under_any_reward_have_no_verdict(tmp_path, capsys):
    """Of two candidates a random order promotes half of the targets, and a copy none."""
    run = make_run(tmp_path / "run", {0: 1, 1: 2, 2: 2, 3: 2, 4: 2})
    path = run / "candidates/train.parquet"
    table = pq.read_table(path)
    for name in ("candidates", "relevance"):
        table = table.set_column(table.column_names.index(name), name, [[row[:2] for row in table[name].to_pylist()]])
    pq.write_table(table, path)
    for rewards in (NAIVE, CONDITIONAL):
        found = probe.probe({"run_dir": run, "rewards": rewards})
        assert found.passed is None and found.sentence.startswith("no verdict: on these rows copying earns")
    assert probe.problem({"run_dir": run, "rewards": NAIVE}) is None
    assert cli.main(["probe", str(write_recipe(tmp_path, run, CONDITIONAL))]) == 3


def test_a_blind_order_may_earn_no_more_than_its_rank_gain_and_a_quarter(run, tmp_path):
    (tmp_path / "my.py").write_text(
        "def backwards(completions, candidate_labels, **columns):\n"
        "    from rerank.prompts import parse_completion\n"
        "    orders = [parse_completion(text, labels).order for text, labels in zip(completions, candidate_labels)]\n"
        "    return [float(order is not None and order[0] == len(order) - 1) for order in orders]\n"
    )
    rewards = [*CONDITIONAL, {"name": f"{tmp_path}/my.py:backwards"}]
    found = probe.probe({"run_dir": run, "rewards": rewards})
    assert found.passed is False and found.worst.kind == "blind"
    assert "does not look at the row and earns" in found.sentence


def test_rewards_that_pay_nobody_for_ranking_better_fail(run):
    found = probe.probe({"run_dir": run, "rewards": [{"name": "rank_promotion", "weight": -1.0}]})
    assert found.sentence.startswith(
        "the oracle earns -0.433, no more than random orders, so that these rewards pay n"
    )
    assert found.passed is False and found.outcomes[0].share is None
    assert probe.table(found).row_count == len(NAMES)


@pytest.mark.parametrize("key", ["multi_objective_aggregation", "reward_weights"])
def test_options_of_trl_that_change_the_total_are_refused(run, key):
    with pytest.raises(ValueError, match=key):
        probe.probe({"run_dir": run, "rewards": NAIVE, key: "normalize_then_sum"})


def test_every_policy_writes_what_its_name_says(run):
    rows, _ = read_rows({"run_dir": run}, 0)
    row = rows[3]  # the target is the seventh
    fixed = best_blind_order(Scorer(load_rewards(NAIVE), "rank_gain", 1), rows)
    texts = {policy.__name__: policy(row, policies.random.Random(0)) for policy, _ in policies.all_of([row], fixed)}
    parsed = {name: parse_completion(text, row.labels) for name, text in texts.items()}
    orders = {name: parsed[name].order for name in NAMES if name not in NO_RANKING}
    shown = list(range(10))
    assert orders.pop("input_order") == orders.pop("no_trace") == shown
    assert orders.pop("reverse") == orders.pop("by_popularity") == shown[::-1]
    assert orders.pop("oracle") == [6, 0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert orders.pop("last_to_first") == [9, *shown[:9]] and orders.pop("first_to_last") == [*shown[1:], 0]
    assert orders.pop("second_to_first") == [1, 0, *shown[2:]]
    assert set(orders.pop("best_fixed_order")[:3]) == {3, 4, 6}
    swapped = orders.pop("swap_neighbours")
    assert swapped[6] == 6 and sum(a != b for a, b in enumerate(swapped)) == 2
    assert sorted(orders.pop("random_order")) == shown and orders == {}
    failures = {name: parsed[name].failure for name in NO_RANKING}
    assert failures.pop("truncated") in prompts.FAILURES
    assert failures == {
        **{"duplicate": "duplicate", "omission": "too_few", "foreign_item": "foreign_item"},
        **dict.fromkeys(("empty", "junk", "junk_with_target"), "no_trace_end"),
    }
    assert texts["junk_with_target"].split()[4] == "7,"
    assert parsed["no_trace"].trace == "" and parsed["oracle"].trace == "best 7"


def test_rows_scored_in_parts_earn_the_same(run, monkeypatch):
    rows, scorer = read_rows({"run_dir": run}, 0)[0], Scorer(load_rewards(NAIVE), "rank_gain", 3)
    whole = scorer.draw(policies.random_order, rows)
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", 3)
    parts = scorer.draw(policies.random_order, rows)
    assert len(rows) % 3 and whole.gains.shape == (3, len(rows)) and len(set(whole.gains.flatten())) > 2
    for name in ("parts", "outcomes", "gains"):
        assert (getattr(whole, name) == getattr(parts, name)).all()


def test_rows_are_those_of_the_recipe_and_without_traces_all_by_id(run):
    assert [row.row.row_id for row in read_rows({"run_dir": run}, 0)[0]] == [0, 1, 2, 3]
    assert len(read_rows({"run_dir": run, "rows": "all"}, 0)[0]) == 5
    assert len(read_rows({"run_dir": run, "rows": "all"}, 3)[0]) == 3
    with pytest.raises(ValueError, match="rows is 'some'; choose dapo or all"):
        read_rows({"run_dir": run, "rows": "some"}, 0)
    (run / "traces/stage.json").unlink()
    rows, what = read_rows({"run_dir": run}, 0)
    assert len(rows) == 5 and what == "rows (no traces yet)"
    assert rows[0].labels[0] == "<s_a_2><s_b_0>"
    assert policies.foreign_item(rows[0], policies.random.Random(0)).endswith("<s_a_999999><s_b_999999>")


def test_further_lists_of_a_row_are_left_out(run):
    path = run / "candidates/train.parquet"
    table, before = pq.read_table(path), read_rows({"run_dir": run}, 0)[0]
    numbers = [1 if row["row_id"] == before[0].row.row_id else 0 for row in table.to_pylist()]
    pq.write_table(table.append_column("list_number", pa.array(numbers)), path)
    assert [row.row for row in read_rows({"run_dir": run}, 0)[0]] == [row.row for row in before[1:]]


def test_the_popularity_of_a_rows_candidates_leaves_out_its_own_user(run):
    table = pq.read_table(run / "data/interactions.parquet").to_pylist()
    table += [{"user": 1, "item": item, "position": place, "split": "train"} for place, item in enumerate([0, 1, 5])]
    pq.write_table(pa.Table.from_pylist(table), run / "data/interactions.parquet")
    popularity = {row.row.user: row.popularity for row in read_rows({"run_dir": run}, 0)[0]}
    assert popularity[1] == SHOWN  # item n was taken n times by others, whatever user 1 took
    assert popularity[2] == [6 if item == 5 else item for item in SHOWN]


def test_rewards_get_all_that_the_trainer_gives_them(run):
    rows, _ = read_rows({"run_dir": run}, 0)
    columns = reward_columns(rows, ["<think>a b</think> 1 2", "", "a", "a a"])
    assert set(columns) == {*column_names(), *TRAINER_COLUMNS} - {"completions", "environments"}
    # <think> a b </think> 1 2 and the end; the end; two words; the same word twice has the same id
    assert [len(ids) for ids in columns["completion_ids"]] == [7, 1, 2, 3]
    assert columns["completion_ids"][3][0] == columns["completion_ids"][3][1] == columns["completion_ids"][2][0]
    assert "Candidates:\n 1.<s_a_2><s_b_0>" in columns["prompts"][0]


def test_the_token_limit_is_that_of_the_recipe_or_of_the_sft_stage(run):
    def limit(**keys):
        return read_rows({"run_dir": run, **keys}, 1)[0][0].max_completion_tokens

    assert limit() == limit(max_completion_length=None) == NO_LIMIT
    for folder, tokens in (("model", 20), ("model_no_trace", 9)):
        (run / "sft" / folder).mkdir(parents=True)
        (run / "sft" / folder / "generation.json").write_text(json.dumps({"max_completion_tokens": tokens}))
    assert (limit(), limit(without_trace=True), limit(max_completion_length=50)) == (20, 9, 50)
    # an answer of the oracle has 15 words, signs and tags, so that of 15 tokens it lacks none and of 14 one
    overlong = {"name": "overlong", "kwargs": {"cache_tokens": 1}}
    assert outcomes(run, [RANK, overlong], max_completion_length=16)["oracle"].parts["overlong"] == 0
    assert outcomes(run, [RANK, overlong], max_completion_length=14)["oracle"].parts["overlong"] == -1


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy run, as far as the dapo stage needs it, with traces: every other hit row is for dapo."""
    run = write_run(tmp_path_factory.mktemp("probe") / "run")
    rows = pq.read_table(run / "candidates/train.parquet", columns=["row_id", "hit"]).to_pylist()
    hits = [row["row_id"] for row in rows if row["hit"]]
    write_traces(run / "traces", {row: "dapo" if n % 2 else "sft" for n, row in enumerate(hits)})
    finish(run / "traces")
    (run / "dapo").rename(run / "old")
    return run


def test_rows_are_those_of_the_dapo_stage(toy):
    prompter = Prompter.of_run(toy)
    wanted = [prompter.ask(row, 16) for row in training_rows(toy, "dapo", needs_features=True)]
    rows, _ = read_rows({"run_dir": str(toy)}, 0)
    assert len(rows) > 3
    assert [PromptedRow(row.row, row.prompt, row.labels, row.max_completion_tokens) for row in rows] == wanted


def test_rows_and_groups_of_a_recipe_without_seed_or_size_are_those_of_the_dapo_stage(tmp_path):
    (_, config, *_) = recipe.resolve("dapo", {"run_dir": str(tmp_path), "rewards": NAIVE}, "r.yaml")
    assert (config.seed, config.num_generations) == (SEED, probe.GROUP_SIZE)


def write_function(folder: Path, body: str, columns: str = "") -> str:
    """The name of a user's reward or condition of one line."""
    (folder / "my.py").write_text(f"def f(completions, {columns}**others):\n    {body}\n")
    return f"{folder}/my.py:f"


def write_recipe(folder: Path, run: Path, rewards: list[dict], **keys) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "7_dapo.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(run), "rewards": rewards, "use_cpu": True, **keys}))
    return path


def test_a_run_stops_before_dapo_where_the_probe_fails(toy, tmp_path):
    path, said = write_recipe(tmp_path / "recipes", toy, NAIVE, rows="all"), []
    steps = pipeline.read_steps(path.parent, None, [])
    assert pipeline.run(steps, CPU, said.append) == 1
    (line,) = said
    assert line.startswith("[1/1] dapo: input_order wins the target no place and earns ")
    assert line.endswith(f"`rerank probe {path} --run-dir {toy}` shows more, and `probe: false` in the recipe trains "
                         "all the same")  # fmt: skip
    assert not run_dir.partial_dir(toy, "dapo").exists()


def test_the_probe_before_a_run_can_be_turned_off(toy, tmp_path):
    keys = {"run_dir": str(toy), "rewards": NAIVE, "rows": "all"}
    assert probe.problem(keys) is not None
    assert probe.problem({**keys, "probe": False}) is None
    assert probe.problem({**keys, "rewards": CONDITIONAL}) is None
    (args, *_) = recipe.resolve("dapo", {**keys, "probe": False}, "r.yaml")
    assert args.probe is False
    assert run_dir.difference("dapo", {**keys, "probe": False}, keys) is None  # it changes nothing that is trained


def test_the_command_prints_a_table_and_the_verdict(run, tmp_path, capsys):
    path = write_recipe(tmp_path, run, CONDITIONAL)
    assert cli.main(["probe", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "3 of 4 training rows of dapo, their target not first" in shown
    lines = {words[0]: words[1:] for words in map(str.split, shown.splitlines()) if words and words[0] in NAMES}
    assert list(lines) == NAMES and max(map(len, shown.splitlines()[:-1])) <= 80
    assert lines["oracle"][:5] == ["+4.33", "0.633", "100", "%", "0"]
    assert "copying costs: " in shown
    write_recipe(tmp_path, run, NAIVE)
    assert cli.main(["probe", str(path), "--rows", "4"]) == 1
    assert capsys.readouterr().err.startswith("rerank: input_order wins the target no place and earns ")


def test_the_command_needs_no_model_library(run, tmp_path):
    path = write_recipe(tmp_path, run, [*CONDITIONAL, {"name": "overlong", "weight": 0.1}])
    code = (
        "import sys; from rerank import cli; code = cli.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "probe", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_file_of_rewards_is_probed_on_a_run_and_with_the_keys_of_its_dapo_recipe(run, tmp_path, capsys):
    path = tmp_path / "naive.yaml"
    path.write_text(yaml.safe_dump({"rewards": NAIVE}))
    assert "naive.yaml: run_dir is missing; add it, or give --run-dir" in refusal(capsys, "probe", path)
    assert cli.main(["probe", str(path), "--run-dir", str(run)]) == 1
    assert "3 of 4 training rows of dapo" in capsys.readouterr().out
    (run / "dapo").mkdir()
    keys = {"run_dir": "elsewhere", "rows": "all", "rewards": CONDITIONAL, "overlong_tokens": 8}
    (run / "dapo/recipe.yaml").write_text(yaml.safe_dump(keys))
    assert cli.main(["probe", str(path), "--run-dir", str(run)]) == 1
    assert "4 of 5 training rows of dapo" in capsys.readouterr().out
    of_path = write_recipe(tmp_path, run, str(path))  # a recipe may name the file in place of the list
    assert cli.main(["probe", str(of_path)]) == 1
    assert "all of it from well_formed" in capsys.readouterr().err


NEW_COLUMN = """
import sys
import pyarrow as pa
from rerank.rows import prompter

prompter.REWARD_COLUMNS += (prompter.RewardColumn("num_shown", pa.int64(), lambda asked: len(asked.labels)),)
from rerank import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_new_reward_column_of_one_line_reaches_probe_and_rescoring(run, tmp_path):
    own = write_function(tmp_path, "return [n / 10 for n in num_shown]", "num_shown, ")
    path = write_recipe(tmp_path, run, [{"name": own}])
    write_rollouts(tmp_path / "rollouts", rollout())
    (part,) = (tmp_path / "rollouts").iterdir()
    pq.write_table((table := pq.read_table(part)).append_column("num_shown", pa.array([3])), part)
    pq.write_table(table, tmp_path / "rollouts/part-00000001-0.parquet")

    def run_with_column(*words):
        line = [sys.executable, "-c", NEW_COLUMN, *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True)

    probed = run_with_column("probe", path)
    assert probed.returncode == 1 and re.search(r"oracle\s+\+4\.33\s+1\.000", probed.stdout), probed
    words = ("replay", tmp_path, "--rewards", path, "--out", tmp_path / "out.parquet")
    assert "needs the column num_shown" in run_with_column(*words).stderr  # one part is older
    (tmp_path / "rollouts/part-00000001-0.parquet").unlink()
    assert run_with_column(*words).returncode == 0
    assert pq.read_table(tmp_path / "out.parquet")["new/f"].to_pylist() == [0.3]


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"num_generations": 1}, "", "num_generations is 1 but must be an integer of at least 2"),
        ({"rewards": []}, "", "rewards is [] but must be a list of at least one reward"),
        ({}, "--rows -1", "rows is -1 but must be at least 1, or 0 for all"),
        ({}, "--max-share 25", "max-share is 25.0 but must be from 0 to 1, such as 0.25"),
        ({}, "--run-dir nowhere", "run the stage data first (`rerank run RECIPE_DIR --out nowhere"),
    ],
)
def test_what_the_command_cannot_use_is_named(run, tmp_path, capsys, keys, words, message):
    path = write_recipe(tmp_path, run, **{"rewards": NAIVE, **keys})
    assert message in refusal(capsys, "probe", path, *words.split())


def test_what_the_run_lacks_is_named(run, tmp_path, capsys):
    path = write_recipe(tmp_path, run, NAIVE)
    split = {"row_id": list(TARGET_RANKS), "used_for": ["dapo", "sft", "sft", "sft", "sft"]}
    pq.write_table(pa.table(split), run / "traces/row_split.parquet")
    line = refusal(capsys, "probe", path)
    assert "the target of all 1 rows is first already, so there is nothing to gain; add rows" in line
    (run / "candidates/stage.json").unlink()
    line = refusal(capsys, "probe", path)
    assert f"the probe needs {run}/candidates, which is not there; run the stage candidates first (`rerank r" in line


@pytest.mark.parametrize(
    ("is_condition", "body", "message"),
    [
        (False, "return [1.0]", r"reward f returned 1 values for 3 completions \(first row_id 1\); return one value"),
        (False, "return [1 / (row - 3) for row in others['row_id']]", r"reward f raised Zero.* \(row_id 3\); repair"),
        (False, "return [1.0", r"my.py cannot be imported: SyntaxError: '\[' was never closed"),
        (True, "return others['price']", r"condition f of reward rank_promotion raised KeyError: .*\(row_id 1\)"),
        (True, "return [True]", r"condition f of reward rank_promotion returned 1 values for 3 completions"),
    ],
)
def test_broken_code_of_a_user_is_one_line_with_its_name_and_row(run, tmp_path, capsys, is_condition, body, message):
    own = write_function(tmp_path, body)
    path = write_recipe(tmp_path, run, [{**RANK, "condition": own} if is_condition else {"name": own}])
    assert re.search(message, refusal(capsys, "probe", path))
