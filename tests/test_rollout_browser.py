import asyncio
import io

import pytest
from rich.console import Console
from textual.widgets import DataTable, Input, Static
from toy_recipe import refusal, run_command
from toy_run import damage_inside, rollout
from toy_run import write_rollouts as write

from rerank.catalogue import Catalogue
from rerank.rollouts import browser as rollout_browser
from rerank.rollouts.browser import GroupList, GroupScreen, RolloutBrowser
from rerank.rollouts.groups import RolloutGroups

NO_RANKING = {"order": None, "failure": "junk", "target_rank_after": None}
ATTACK = "[red]oops[/red]\x1b[2J[@click=app.quit]x[/] \u202eback"


def write_run(folder, *records):
    """A run with a catalogue of three items, the last without a title."""
    write(folder / "dapo/rollouts", *records)
    (folder / "dapo/model").mkdir()
    semantic_ids = ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>", "<s_a_1>"]
    Catalogue(["a", "b", "c"], semantic_ids, ["Alien", "[b]Brazil", ""], [""] * 3).save(folder / "dapo/model")
    return folder


def printed(*arguments, **options):
    console = Console(file=io.StringIO(), width=100)
    rollout_browser.inspect(*arguments, **options, console=console)
    return console.file.getvalue()


def rows_of(text):
    """The cells of the tables in a text, without their headings."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def browse(*folders, size=(200, 50)):
    """Decorates `check(app, pilot)`, which uses the browser of a run, or of two, without a terminal."""

    async def run(check):
        app = RolloutBrowser(RolloutGroups(*folders))
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await check(app, pilot)

    return lambda check: asyncio.run(run(check))


def cells(app):
    table = app.screen.query_one(DataTable)
    return [[cell.plain for cell in table.get_row_at(row)] for row in range(table.row_count)]


def shown(app):
    """The text of the screen as a terminal would show it, line by line."""
    return "\n".join("".join(part.text for part in strip) for strip in app.screen._compositor.render_strips())


def status(app):
    return app.screen.query_one("#status", Static).content.plain


def test_printing_shows_a_group_once_and_each_rollout(tmp_path):
    lost = rollout(completion=ATTACK, truncated=True, conditions={}, **NO_RANKING)
    write_run(tmp_path, rollout(), {**lost, "kept": False, "discard_reason": "all_equal"})
    text = printed(tmp_path)
    assert text.count("History") == 1
    assert "step 0, group 0, row 40, user 7: 2 rollouts" in text
    assert "rollout 1: target 2 -> 1, kept" in text
    assert "rollout 2: no ranking (junk), truncated, discarded (all_equal)" in text
    assert "[red]oops[/red]\\x1b[2J" in text and "\x1b" not in text and "\\u202eback" in text  # shown, never run
    rewards = "reward 0.500, advantage 1.250 (rank_promotion 0.333, well_formed none"
    assert f"{rewards} [condition not met])" in text and f"{rewards})" in text
    found = rows_of(text)
    assert found[:3] == [["1", "Alien", "* [b]Brazil", "2"], ["2", "* [b]Brazil", "Alien", "1"], ["3", "c", "c", "3"]]
    assert found[3:] == [["1", "Alien", "-", ""], ["2", "* [b]Brazil", "-", ""], ["3", "c", "-", ""]]


def test_printing_shows_the_incoming_order_of_shuffled_candidates(tmp_path):
    write(tmp_path, rollout(first_stage_ranks=[3, 1, 2], candidates=[30, 10, 20], order=[2, 0, 1]))
    shown = [["1", "* 10", "20", "2"], ["2", "20", "30", "3"], ["3", "30", "* 10", "1"]]
    assert rows_of(printed(tmp_path)) == shown


def test_printing_chooses_the_latest_groups_or_those_asked_for(tmp_path):
    write(tmp_path, *(rollout(step=step, group=group) for step in range(3) for group in range(2)))
    text = run_command("inspect", tmp_path, "--limit", "3")  # without a terminal
    headings = [line[:15] for line in text.splitlines() if line.startswith("step")]
    assert headings == ["step 2, group 0", "step 2, group 1", "step 1, group 0"]
    for options in ({"row_id": 41}, {"where": "row_id = 41 -- one or the other"}):
        text = printed(tmp_path, step=1, **options)
        assert text.count("step ") == 1 and "step 1, group 1, row 41" in text


def test_printing_against_another_run_shows_both_groups(tmp_path):
    write(tmp_path / "a", rollout(completion="first"))
    write(tmp_path / "b", rollout(completion="second", step=8))
    text = printed(tmp_path / "a", against=tmp_path / "b")
    places = [text.index(words) for words in ("step 0", "first", "against", "step 8", "second")]
    assert places == sorted(places)


@pytest.mark.parametrize(("words", "message"), [
    (["--against_step", 2], "against_step is 2 but there is no other run; give one with --against"),
    (["--step", 9, "--row", 1], "has no rollout with step = 9 and row_id = 1; its steps are 3 to 3"),
    (["--where", "reward > 5"], "has no rollout with reward > 5; its steps are 3 to 3"),
    (["--limit", 0], "limit is 0 but must be at least 1"),
    (["--step", 3, "--where", "not sql at all"], "rerank: 'not sql at all' is no filter: Parser Error"),
])  # fmt: skip
def test_what_is_not_there_is_refused(tmp_path, capsys, words, message):
    write(tmp_path, rollout(step=3))
    assert message in refusal(capsys, "inspect", tmp_path, *words)


def test_the_browser_lists_groups_sorts_and_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_browser, "PAGE_SIZE", 2)
    write(tmp_path, *(rollout(group=group, reward=reward) for group, reward in enumerate([0.3, 0.9, 0.1])))

    @browse(tmp_path)
    async def check(app, pilot):
        best = app.groups.columns.index("best")
        assert [row[2] for row in cells(app)] == ["0", "1"]
        assert "groups 1 to 2 of 3, by step ↓" in status(app)
        await pilot.press("n", "n")  # the second has nowhere to go
        assert [row[2] for row in cells(app)] == ["2"] and "groups 3 to 3 of 3" in status(app)
        await pilot.press("p")
        app.screen.query_one(DataTable).move_cursor(column=best)
        await pilot.press("s")
        assert [row[best] for row in cells(app)] == ["0.900", "0.300"] and "by best reward ↓" in status(app)
        await pilot.press("s")
        assert [row[best] for row in cells(app)] == ["0.100", "0.300"] and "by best reward ↑" in status(app)


def test_the_browser_filters_and_shows_what_is_no_filter(tmp_path):
    write(tmp_path, rollout(), rollout(group=1, kept=False))

    @browse(tmp_path)
    async def check(app, pilot):
        await pilot.press("slash")
        app.screen.query_one(Input).value = "kept = [b]false"
        await pilot.press("enter")
        assert "'kept = [b]false' is no filter: " in status(app) and len(cells(app)) == 2
        app.screen.query_one(Input).value = "kept = false"
        await pilot.press("enter")
        assert [row[2] for row in cells(app)] == ["1"] and "where kept = false" in status(app)
        assert not app.screen.query_one(Input).display
        await pilot.press("slash", "ctrl+u", *"step=8", "enter")
        assert cells(app) == [] and "no group where step=8" in status(app)
        await pilot.press("enter")  # nothing to open
        assert isinstance(app.screen, GroupList)


def test_a_group_opens_with_titles_orders_and_rewards_and_nothing_in_it_runs(tmp_path):
    prompt = "Candidates:<s_a_0><s_b_0><s_a_0><s_b_1><s_a_1><s_a_9>"
    lost = rollout(completion=ATTACK, prompt=prompt, **NO_RANKING)
    discarded = {"kept": False, "discard_reason": "all_equal", "advantage": None}
    write_run(tmp_path, rollout(prompt=prompt), {**lost, **discarded})

    @browse(tmp_path)
    async def check(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        text = shown(app)
        assert isinstance(app.screen, GroupScreen) and "\x1b" not in text
        assert "toy step 0, group 0, row 40, user 7: 2 rollouts" in text
        assert "Candidates:‹Alien›‹[b]Brazil›<s_a_1><s_a_9>" in text
        assert " 1 * [b]Brazil ↑2" in text and " 2 Alien ↓1" in text and " 3 c " in text
        assert "well_formed none [condition not met]" in text and "advantage 1.250" in text
        assert "advantage none" in text
        assert "no ranking: junk" in text and "rollout 2: no ranking (junk), discarded" in text
        assert "[red]oops[/red]\\x1b[2J[@click=app.quit]x[/]" in text and "\\u202eback" in text
        await pilot.press("t")
        await pilot.pause()
        assert "Candidates:<s_a_0><s_b_0><s_a_0><s_b_1>" in shown(app)
        await pilot.press("slash", "s", "escape")  # keys of the list mean nothing here
        assert isinstance(app.screen, GroupList)


def test_a_group_whose_file_is_damaged_is_named_and_the_list_stays(tmp_path):
    write(tmp_path, rollout(step=0), rollout(step=1))

    @browse(tmp_path)
    async def check(app, pilot):
        damage_inside(max(tmp_path.glob("part-*")))
        await pilot.press("enter")
        assert isinstance(app.screen, GroupList) and "part-00000001-0.parquet is damaged; delete it" in status(app)


def test_a_narrow_terminal_scrolls_to_the_last_completion(tmp_path):
    write(tmp_path, *(rollout(completion=f"text {number}") for number in range(8)))

    @browse(tmp_path, size=(80, 40))
    async def check(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        assert "text 7" not in shown(app)
        await pilot.press(*"nnnnnnn")
        await pilot.pause()
        assert "text 7" in shown(app)
        await pilot.press(*"ppppppp")
        await pilot.pause()
        assert "incoming order" in shown(app)


def test_two_runs_stand_beside_each_other(tmp_path):
    write(tmp_path / "a", rollout(completion="ours"))
    write(tmp_path / "b", rollout(completion="theirs", step=8))

    @browse(tmp_path / "a", tmp_path / "b")
    async def check(app, pilot):
        assert "other best after" in shown(app) and "against" in status(app)
        await pilot.press("enter")
        await pilot.pause()
        line = next(line for line in shown(app).splitlines() if "ours" in line)
        assert line.index("ours") < line.index("theirs")
