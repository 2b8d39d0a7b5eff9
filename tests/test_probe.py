"""The probe on four rows of five candidates, with figures by hand, and on a toy run as the dapo stage reads it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from toy_recipe import refusal, run_command
from toy_run import finish, rollout, write_items, write_rollouts, write_run, write_traces

from rerank import cli, probe, prompts
from rerank.launch import pipeline, recipe, run_dir
from rerank.probe import policies
from rerank.probe.rows import NO_LIMIT, SEED, read_rows, reward_columns
from rerank.prompts import PromptSettings, parse_completion
from rerank.rows import PromptedRow, Prompter, column_names, shuffle, training_rows
from rerank.scoring import TRAINER_COLUMNS

CPU = "recipes/accelerate/cpu.yaml"
NAMES = [policy.__name__ for policy in policies.POLICIES]
NO_RANKING = ["duplicate", "omission", "foreign_item", "truncated", "empty", "junk", "junk_with_target"]
RANK, FORM = {"name": "rank_promotion"}, {"name": "well_formed", "weight": 0.2}
NAIVE = [RANK, FORM]
CONDITIONAL = [RANK, {**FORM, "condition": "promoted_or_kept_first"}]
LITERAL = [RANK, {**FORM, "condition": "promoted_or_first"}]
REPORT = [{"name": "auc", "condition": "not_a_suboptimal_copy"}, FORM]
TARGET_RANKS = {0: 1, 1: 2, 2: 3, 3: 5, 4: 4}  # by row_id; row 4 is for sft


@pytest.fixture
def run(tmp_path):
    """Candidates 2 to 6 of eight items in five rows; the higher its number, the more often an item was taken."""
    run = tmp_path / "run"
    write_items(run / "data", 8)
    taken = [item for item in range(8) for _ in range(item)]
    users = {"user": range(len(taken)), "item": taken, "position": [0] * len(taken), "split": ["train"] * len(taken)}
    finish(run / "data", interactions=pa.table(users))
    ids = {"item": range(8), "semantic_id": [f"<s_a_{n}><s_b_0>" for n in range(8)]}
    finish(run / "semantic_ids", semantic_ids=pa.table(ids))
    rows = [
        {"row_id": row, "user": row, "history": [0, 1], "candidates": [2, 3, 4, 5, 6], "hit": True}
        | {"relevance": [float(place == rank) for place in range(1, 6)]}
        for row, rank in TARGET_RANKS.items()
    ]
    finish(run / "candidates", train=pa.Table.from_pylist(rows))
    settings = PromptSettings(ranking="number", item_fields=["semantic_id"], task="short")
    write_traces(run / "traces", dict(zip(TARGET_RANKS, ["dapo"] * 4 + ["sft"], strict=True)), settings)
    finish(run / "traces")
    return run


def outcomes(run, rewards, **keys):
    found = probe.probe({"run_dir": run, "rewards": rewards, **keys})
    return {outcome.policy: outcome for outcome in found.outcomes}


def test_the_naive_sum_pays_each_policy_as_by_hand(run):
    found = outcomes(run, NAIVE)
    assert list(found) == NAMES and NAMES[0] == "input_order" and NAMES[-1] == "oracle"
    # targets at 2, 3 and 5 of five; the oracle wins 1, 2 and 4 places
    assert found["oracle"].rank_gain == pytest.approx(7 / 3)
    assert found["oracle"].reward == pytest.approx(7 / 3 / 5 + 0.2)
    assert found["oracle"].parts == pytest.approx({"rank_promotion": 7 / 15, "well_formed": 0.2})
    # 0.4, 0.6 and 1.0 around 2/3: sqrt((0.0711 + 0.0044 + 0.1111) / 3)
    assert found["oracle"].spread == pytest.approx(0.2494, abs=1e-4)
    for name in ("input_order", "no_trace", "swap_neighbours"):
        assert (found[name].rank_gain, found[name].reward) == (0, pytest.approx(0.2))
    # reversed: 2 -> 4, 3 -> 3, 5 -> 1
    assert found["reverse"].rank_gain == pytest.approx(2 / 3)
    assert found["reverse"].above_no_op == pytest.approx(1 / 3)
    # last to first: 2 -> 3, 3 -> 4, 5 -> 1
    assert found["last_to_first"].rank_gain == pytest.approx(2 / 3)
    # more popular come later: the same as reversed
    assert found["by_popularity"].rank_gain == found["reverse"].rank_gain
    assert {name for name in NAMES if found[name].rank_gain is None} == set(NO_RANKING)
    assert {found[name].reward for name in NO_RANKING} == {-1.0}
    # the one row whose target is first: kept, reversed to 5, put second
    assert found["input_order"].reward_if_first == pytest.approx(0.2)
    assert found["reverse"].reward_if_first == pytest.approx(-4 / 5 + 0.2)
    assert found["last_to_first"].reward_if_first == pytest.approx(-1 / 5 + 0.2)


def test_groups_are_useful_where_their_halves_differ_in_the_recipes_outcome(run):
    found = outcomes(run, NAIVE)
    assert found["input_order"].useful_with_no_op == found["swap_neighbours"].useful_with_no_op == 0
    assert found["reverse"].useful_with_no_op == pytest.approx(2 / 3)  # the third of five stays third
    assert found["oracle"].useful_with_no_op == found["junk"].useful_with_random == 1
    rewards = [*NAIVE, {"name": "not_a_copy", "weight": 0.0}]  # a copy of the input order differs in it from all else
    by_copy = outcomes(run, rewards, outcome="not_a_copy")
    assert by_copy["input_order"].useful_with_no_op == 0
    assert by_copy["swap_neighbours"].useful_with_no_op == by_copy["last_to_first"].useful_with_no_op == 1
    assert by_copy["swap_neighbours"].reward == found["swap_neighbours"].reward
    with pytest.raises(ValueError, match="outcome is 'ndcg', but the recipe's rewards report only rank_gain, rank_pr"):
        outcomes(run, NAIVE, outcome="ndcg")


def test_the_naive_sum_fails_since_copies_live_off_the_format(run):
    found = probe.probe({"run_dir": run, "rewards": NAIVE})
    assert not found.passed
    assert found.sentence == (
        "input_order wins the target no place and yet earns 30 % of the oracle's reward (0.200 of 0.667, the bar is "
        "25 %), all of it from well_formed; pay it only where the ranking helped, such as "
        "`condition: promoted_or_kept_first`"
    )
    assert probe.probe({"run_dir": run, "rewards": NAIVE}, max_share=0.31).passed


@pytest.mark.parametrize(
    ("rewards", "if_first"),
    [(CONDITIONAL, -4 / 5), (LITERAL, -4 / 5 + 0.2)],  # the literal reading pays the format for a demotion
)
def test_the_conditional_readings_pass_and_part_where_the_target_is_first(run, rewards, if_first):
    found = probe.probe({"run_dir": run, "rewards": rewards})
    assert found.passed and found.share(found.worst) <= 0.25
    assert found.sentence.startswith("no policy without rank gain earns more than 25 % of the oracle's reward; the m")
    reverse = found.outcomes[NAMES.index("reverse")]
    assert reverse.reward == pytest.approx((-2 + 0 + 4) / 3 / 5 + 0.2 / 3)  # one of three targets rises
    assert reverse.reward_if_first == pytest.approx(if_first)


def test_the_identity_check_stops_copies_and_lets_near_copies_through(run):
    found = outcomes(run, REPORT)
    assert found["input_order"].reward == pytest.approx(0.2)
    # AUC of rank r of five is (5 - r) / 4: 3/4, 2/4 and 0
    assert found["swap_neighbours"].reward == pytest.approx(5 / 12 + 0.2)
    assert {found[name].reward for name in NO_RANKING} == {0.0}
    sentence = probe.problem({"run_dir": run, "rewards": REPORT})
    assert "earns 51 % of the oracle's reward (0.617 of 1.200" in sentence and "68 % of it from auc" in sentence


def test_rewards_that_pay_nobody_for_ranking_better_fail(run):
    found = probe.probe({"run_dir": run, "rewards": [{"name": "rank_promotion", "weight": -1.0}]})
    assert found.sentence.startswith("the oracle earns -0.467, so that these rewards pay nobody")
    assert not found.passed and found.share(found.worst) is None
    assert probe.table(found).row_count == len(NAMES)


def test_every_policy_writes_what_its_name_says(run):
    rows, _ = read_rows({"run_dir": run}, 0)
    row = rows[3]  # the target is last
    texts = {policy.__name__: policy(row, policies.random.Random(0)) for policy in policies.POLICIES}
    parsed = {name: parse_completion(text, row.labels) for name, text in texts.items()}
    orders = {name: parsed[name].order for name in NAMES if name not in NO_RANKING}
    assert orders.pop("input_order") == orders.pop("no_trace") == [0, 1, 2, 3, 4]
    assert orders.pop("reverse") == orders.pop("by_popularity") == [4, 3, 2, 1, 0]
    assert orders.pop("oracle") == orders.pop("last_to_first") == [4, 0, 1, 2, 3]
    swapped = orders.pop("swap_neighbours")
    assert swapped[4] == 4 and sum(a != b for a, b in enumerate(swapped)) == 2
    assert sorted(orders.pop("random_order")) == [0, 1, 2, 3, 4] and orders == {}
    failures = {name: parsed[name].failure for name in NO_RANKING}
    assert failures.pop("truncated") in prompts.FAILURES
    assert failures == {
        **{"duplicate": "duplicate", "omission": "too_few", "foreign_item": "foreign_item"},
        **dict.fromkeys(("empty", "junk", "junk_with_target"), "no_trace_end"),
    }
    assert texts["junk_with_target"].split()[4] == "5,"
    assert parsed["no_trace"].trace == "" and parsed["oracle"].trace == "best 5"


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


def test_candidates_are_shuffled_as_in_the_first_epoch_of_dapo(run):
    plain = read_rows({"run_dir": run}, 0)[0]
    for keys, seed in (({}, SEED), ({"seed": 7}, 7)):
        shuffled = read_rows({"run_dir": run, "shuffle_candidates": True, **keys}, 0)[0]
        assert [row.row for row in shuffled] == [shuffle(row.row, seed, epoch=0) for row in plain]
        assert any(row.row.ranks != (1, 2, 3, 4, 5) for row in shuffled)
        for before, after in zip(plain, shuffled, strict=True):
            assert after.row.target_rank == before.row.target_rank
            assert after.labels == ["1", "2", "3", "4", "5"]  # they number what is shown
            assert after.popularity == list(after.row.candidates)  # item n was taken n times


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
    # an answer of the oracle has 10 words, signs and tags, so that of 10 tokens it lacks none and of 9 one
    overlong = {"name": "overlong", "kwargs": {"cache_tokens": 1}}
    assert outcomes(run, [RANK, overlong], max_completion_length=11)["oracle"].parts["overlong"] == 0
    assert outcomes(run, [RANK, overlong], max_completion_length=9)["oracle"].parts["overlong"] == -1


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
    path, said = write_recipe(tmp_path / "recipes", toy, NAIVE), []
    steps = pipeline.read_steps(path.parent, None, [])
    assert pipeline.run(steps, CPU, said.append) == 1
    (line,) = said
    assert line.startswith("[1/1] dapo: input_order wins the target no place and yet earns ")
    assert line.endswith(f"`rerank probe {path} --run-dir {toy}` shows more, and `probe: false` in the recipe trains "
                         "all the same")  # fmt: skip
    assert not run_dir.partial_dir(toy, "dapo").exists()


def test_the_probe_before_a_run_can_be_turned_off(toy, tmp_path):
    keys = {"run_dir": str(toy), "rewards": NAIVE}
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
    assert lines["oracle"][:5] == ["+2.33", "0.667", "0.249", "100", "%"]
    assert "no policy without rank gain earns more than 25 % of" in shown
    write_recipe(tmp_path, run, NAIVE)
    assert cli.main(["probe", str(path), "--rows", "4"]) == 1
    assert capsys.readouterr().err.startswith("rerank: input_order wins the target no place and yet earns 30 % of ")
    assert cli.main(["probe", str(path), "--max-share", "0.5"]) == 0


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
    assert "3 of 4 training rows of dapo" in run_command("probe", path, "--run-dir", run, "--max-share", 0.5)
    (run / "dapo").mkdir()
    keys = {"run_dir": "elsewhere", "rows": "all", "rewards": CONDITIONAL, "overlong_tokens": 8}
    (run / "dapo/recipe.yaml").write_text(yaml.safe_dump(keys))
    assert "4 of 5 training rows of dapo" in run_command("probe", path, "--run-dir", run, "--max-share", 0.5)
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

    probed = run_with_column("probe", path, "--max-share", 1)
    assert probed.returncode == 0 and re.search(r"oracle\s+\+2\.33\s+0\.500", probed.stdout), probed
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
