import pytest
from toy_run import damage_inside, rollout
from toy_run import write_rollouts as write

from rerank.catalogue import Catalogue
from rerank.rollouts.groups import RolloutGroups, find_catalogue


def test_a_line_counts_what_the_group_holds(tmp_path):
    stale = rollout(reward=1.5, target_rank_after=1, kept=False, discard_reason="stale")
    failed = rollout(reward=-1.0, order=None, failure="junk", target_rank_after=None)
    write(tmp_path, rollout(reward=0.5, target_rank_after=3), stale, failed)
    (line,) = RolloutGroups(tmp_path).page()
    assert line == {
        "step": 0, "round": 0, "group": 0, "row_id": 40, "user": 7, "rollouts": 3, "kept": 2, "discarded": "stale",
        "best": 1.5, "mean": pytest.approx(1 / 3), "failures": 1, "before": 2, "after": 1, "matching": 3,
    }  # fmt: skip


def test_groups_come_latest_step_first_or_by_any_column_in_pages(tmp_path):
    rewards = {(0, 0): 0.3, (0, 1): 0.9, (1, 0): 0.1, (1, 1): 0.5}
    write(tmp_path, *(rollout(step=step, group=group, reward=r) for (step, group), r in rewards.items()))
    groups = RolloutGroups(tmp_path)

    def keys(**options):
        return [(line["step"], line["group"]) for line in groups.page(**options)]

    assert keys() == [(1, 0), (1, 1), (0, 0), (0, 1)]
    assert keys(sort="best") == [(0, 1), (1, 1), (0, 0), (1, 0)]
    assert keys(sort="best", descending=False, offset=1, limit=2) == [(0, 0), (1, 1)]


def test_two_sampling_rounds_of_a_step_are_two_groups(tmp_path):
    write(tmp_path, rollout(round=0), rollout(round=1, completion="again"))
    groups = RolloutGroups(tmp_path)
    assert [line["round"] for line in groups.page()] == [1, 0]
    assert [rollout["completion"] for rollout in groups.read(groups.page()[0])] == ["again"]


def test_a_filter_keeps_groups_with_a_rollout_that_meets_it_and_marks_those(tmp_path):
    lost = {"kept": False, "target_rank_after": 3}
    write(tmp_path, rollout(), rollout(**lost), rollout(group=1), rollout(group=1))
    groups = RolloutGroups(tmp_path)
    groups.filter("kept = false and target_rank_after > target_rank -- worse than before")
    assert groups.num_groups == 1
    (line,) = groups.page()
    assert (line["group"], line["rollouts"], line["matching"]) == (0, 2, 1)
    assert [rollout["matches"] for rollout in groups.read(line)] == [True, False]
    for where in ("failure = 'junk'", "reward_components['rank_promotion'] > 0.5", '"order"[1] = 0'):
        groups.filter(where)
        assert groups.num_groups == 0 and groups.page() == []
    groups.filter(" ")
    assert groups.num_groups == 2


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("show me the bad ones", "Parser Error: syntax error"),
        ("kep = false", 'Referenced column "kep" not found'),
        ("true; DROP VIEW rollouts", "Parser Error"),
        ("count(*) > 3", "aggregate functions are not allowed"),
        ("completion::int > 3", "Could not convert string"),
        ("'", "unterminated"),
        ("error('never')", "never"),
        ("step", "its values are BIGINT"),
        ("best > 0.5", "columns: step, run"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line_and_the_list_stays(tmp_path, where, reason):
    write(tmp_path, rollout(completion="\x1b[2J"))
    groups = RolloutGroups(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        groups.filter(where)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and 'write one such as "kept = false"' in text
    assert groups.num_groups == 1 and len(groups.page()) == 1


def test_another_runs_latest_group_of_a_row_stands_beside_it(tmp_path):
    write(tmp_path / "a", rollout(reward=1.0), rollout(group=1), rollout(group=2))
    write(tmp_path / "b", rollout(step=4, reward=2.0), rollout(step=5, reward=3.0), rollout(group=1))
    groups = RolloutGroups(tmp_path / "a", tmp_path / "b")
    lines = groups.page()
    shown = [[line[name] for name in ("row_id", "best", "other_step", "other_best", "difference")] for line in lines]
    assert shown == [[40, 1.0, 5, 3.0, -2.0], [41, 0.5, 0, 0.5, 0.0]]
    assert [rollout["reward"] for rollout in groups.read_other(lines[0])] == [3.0]
    groups.filter("reward = 1.0")
    assert groups.num_groups == 1


def test_a_run_against_itself_shows_each_row_beside_its_last_visit_or_its_last_up_to_a_step(tmp_path):
    write(tmp_path, *(rollout(step=step) for step in (0, 2, 4, 6)), rollout(step=5, group=1))
    for options, wanted in (({}, [(4, 6), (2, 6), (0, 6)]), ({"against_step": 3}, [(6, 2), (4, 2), (0, 2)])):
        lines = RolloutGroups(tmp_path, tmp_path, **options).page()
        assert [(line["step"], line["other_step"]) for line in lines] == wanted


@pytest.mark.parametrize(
    ("against", "options", "message"),
    [
        ("a", {"against_step": -1}, "has no row that .* met up to step -1; give a later step"),
        ("a", {}, "met no row twice, so that it cannot be held against itself; give another run"),
        ("b", {}, "a and .*b have no row in common; give two runs of one recipe's rows"),
    ],
)
def test_runs_without_a_common_row_are_refused(tmp_path, against, options, message):
    write(tmp_path / "a", rollout())
    write(tmp_path / "b", rollout(group=1))
    with pytest.raises(ValueError, match=message):
        RolloutGroups(tmp_path / "a", tmp_path / against, **options)


def test_a_part_that_is_damaged_inside_is_named_when_the_list_or_its_group_is_read(tmp_path):
    write(tmp_path, rollout(step=0), rollout(step=1))
    groups = RolloutGroups(tmp_path)
    lines = groups.page()
    damage_inside(max(tmp_path.glob("part-*")))
    for read in (lambda: groups.read(lines[0]), lambda: groups.filter("step > 0"), lambda: RolloutGroups(tmp_path)):
        with pytest.raises(ValueError, match="part-00000001-0.parquet is damaged; delete it"):
            read()
    assert groups.page() == lines and len(groups.read(lines[1])) == 1


@pytest.mark.parametrize("given", ["run", "run/dapo", "run/dapo/rollouts"])
def test_titles_are_found_from_any_folder_of_the_run(tmp_path, given):
    (tmp_path / "run/dapo/model").mkdir(parents=True)
    write(tmp_path / "run/dapo/rollouts", rollout())
    Catalogue(["a"], ["<s_a_1>"], ["Alien"], [""]).save(tmp_path / "run/dapo/model")
    catalogue = find_catalogue(tmp_path / given)
    assert catalogue is not None and catalogue.titles == ["Alien"]
