import base64
import hashlib
import html
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from toy_run import cut_off, damage_inside, finish, rollout, write_rollouts, write_run

from rerank import cli, report
from rerank.catalogue import Catalogue
from rerank.evaluate import write_rankings
from rerank.launch.files import write_json
from rerank.models.ranker import read_answer
from rerank.report import cheating, rollouts, semantic_ids
from rerank.report import page as page_parts
from rerank.report.page import json_text
from rerank.report.rows import read_ranked_rows, sample_rows
from rerank.results import orders, overview
from rerank.results.orders import ShuffledRows
from rerank.results.rankings import EvaluatedRows, Ranking, difficulty, make_results
from rerank.results.slices import SplitLists
from rerank.rollouts.groups import RolloutGroups

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = "</pre></script><script>alert(2)</script>"


def toy_rollouts() -> list[dict]:
    """Two groups of each of two steps; one completion attacks the page, of another the bytes are no UTF-8."""
    prompt = "Candidates:<s_a_0><s_b_0><s_a_0><s_b_1><s_a_0><s_b_2>"
    lost = {"order": None, "failure": "no_trace_end", "target_rank_after": None, "reward": -1.0, "truncated": True}
    equal = {"kept": False, "discard_reason": "all_equal", "advantage": 0.0, "reward": 0.0}
    equal |= {"target_rank_after": 2, "order": [0, 1, 2]}
    groups = [
        (0, {}),
        (0, {"completion": ATTACK + "<!-- \x1b[2J & \udcff", **lost}),
        (1, {"completion": "<think></think>1,2,3", **equal}),
        (1, {"completion": "<think>same</think>1,2,3", **equal}),
    ]
    return [rollout(step, group, prompt=prompt, **changes) for step in range(2) for group, changes in groups]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose sft model moves the first candidate to the end, and writes no ranking on the last row."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run <b>")
    evaluated = EvaluatedRows.load(folder / "candidates", "test")
    num_rows, labels = len(evaluated.rows), [f"<s_a_{place}>" for place in range(4)]
    moved = f"<think>{ATTACK}</think>{''.join(labels[1:] + labels[:1])}"
    answers = [read_answer(text, 5, False, labels) for text in [moved] * (num_rows - 1) + [ATTACK]]
    rankings = [
        Ranking("no_op", [[0, 1, 2, 3]] * num_rows),
        Ranking("random", None),
        Ranking.of_answers("sft", answers, 1.0),
    ]
    write_rollouts(folder / "dapo/rollouts", *toy_rollouts())
    (folder / "evaluate").mkdir()
    results = make_results(rankings, evaluated, 50)
    results |= difficulty(rankings, evaluated, SplitLists.load(folder, "test"), 50)
    shuffled = ShuffledRows.of(evaluated.rows, 2)
    again = shuffled.as_given([[0, 1, 2, 3]] * (2 * num_rows))  # a ranker that copies what it is shown
    found = orders.summarize(rankings[0].orders, again, shuffled, 50)
    results["orders"] = {"num_orders": 2, "rows": num_rows, "rankers": {"sft": found}}
    write_json(folder / "evaluate/results.json", results)
    write_rankings(rankings, evaluated.rows, folder / "evaluate/rankings.parquet")
    report.write_report(folder, folder / "evaluate", folder / "evaluate/report.html")
    return folder


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "evaluate/report.html").read_text(encoding="utf-8")


def page_of(run: Path) -> str:
    """The page of a run so far."""
    report.write_report(run, run / "evaluate", run / "report.html")
    return (run / "report.html").read_text(encoding="utf-8")


def data_of(page: str, name: str):
    """The charts or the rollouts that a page carries; nothing in them can end their script."""
    text = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)[1]
    assert "<" not in text
    return json.loads(text)


def scripts_of(page: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)


def test_titles_names_and_completions_are_shown_and_never_run(page):
    assert "alert(2)</script>" not in page and "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page  # a title of the toy catalogue
    assert "&lt;/pre&gt;&lt;/script&gt;&lt;script&gt;alert(2)&lt;/script&gt;" in page
    assert "<h1>run &lt;b&gt;</h1>" in page
    assert len(scripts_of(page)) == 3


def test_only_scripts_named_by_their_hash_may_run_and_nothing_loads_from_outside(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert "default-src 'none'" in policy and "http" not in policy
    for script in scripts_of(page):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|<link|@import|url\(|https?://", markup)
    assert len(page.encode()) < 6_000_000


def test_the_page_holds_results_stages_notes_and_semantic_ids(run, page):
    assert "no_op" in page and "NDCG@5 minus that of the input order" in page
    assert "<dt>steps</dt><dd>12,345</dd>" in page and "<dt>no_trace / rows</dt><dd>7</dd>" in page
    assert "<dt>share</dt><dd>0.1235</dd>" in page and "<dt>reward_gain_interval</dt><dd>0.05, 0.15</dd>" in page
    assert "of 30 (" in page and '<h2 id="ids">Semantic ids</h2>' in page
    for name, value in semantic_ids.facts(semantic_ids.read_quality(run)):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_the_page_holds_the_further_tables_of_the_results(run, page):
    results = json.loads((run / "evaluate/results.json").read_text())
    rows = [line for line in re.findall(r"<tr>(.*?)</tr>", page.replace("\n", "")) if "<td" in line or "<th" in line]
    shown = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", line)).strip() for line in rows]
    for table in overview.further_tables(results):
        assert f'<h3 class="further">{table.title}</h3>' in page
        for cells in table.rows:
            assert " ".join(cells) in shown
    merged = results["orders"]["rankers"]["sft"]["merged"]
    chart = next(chart for chart in data_of(page, "charts") if chart["title"].startswith("NDCG@5 by the order"))
    points = {line["name"]: (line["x"], line["y"]) for line in chart["data"]}
    assert points["each other order"] == (results["orders"]["rankers"]["sft"]["by_order"], ["sft", "sft"])
    assert points["merged"] == ([merged["N@5"]], ["sft"])


def test_charts_hold_the_logged_values(page):
    charts = data_of(page, "charts")
    assert [chart["title"] for chart in charts][:2] == [
        "NDCG@5 minus that of the input order, 95 % intervals over users",
        "Rank of the relevant item, share of rows",
    ]
    reward = next(chart for chart in charts if chart["title"] == "DAPO reward")
    assert reward["data"][0]["y"][:3] == [0.1, 0.2, 0.3]
    # 30 points: a moving mean over 3, so (0.1 + 0.2) / 2 and (0.1 + 0.2 + 0.3) / 3 at its start
    assert reward["data"][1]["y"][:3] == pytest.approx([0.1, 0.15, 0.2])
    midtrain = [chart for chart in charts if chart["title"].startswith("Mid-training")]
    assert [[(line["name"], line["y"]) for line in chart["data"]] for chart in midtrain] == [
        [("loss", [3, 2]), ("loss_sequence", [5, 4]), ("loss_text", [1, 0])],
        [("eval_R@10", [0.25])],
    ]


def test_the_page_carries_every_rollout_of_a_small_run(page):
    data = data_of(page, "rollouts")
    assert "All 8 rollouts of the run." in page and data["num_rollouts"] == 8
    rollout = dict(zip(data["rollout_fields"], data["rollouts"][1], strict=True))
    assert rollout["completion"] == ATTACK + "<!-- \\x1b[2J & ?"  # bytes that were no UTF-8 were stored as ?
    values = [rollout[name] for name in ("failure", "truncated", "tokens", "reward")]
    assert values == ["no_trace_end", 1, 2, -1]
    assert data["rewards"] == ["rank_promotion", "well_formed"]
    assert rollout["reward_components"] == [0.3333, None] and rollout["conditions"] == [1]
    group = dict(zip(data["group_fields"], data["groups"][rollout["group"]], strict=True))
    titles = ["<script>alert(1)</script>", "Title 1", "Title 2"]
    items = [[title, f"<s_a_0><s_b_{place}>"] for place, title in enumerate(titles)]
    assert [data["items"][item] for item in group["candidates"]] == items


def test_the_page_holds_the_signs_of_cheating(page):
    # per step: one ranking of three copies nothing, two copy; one completion of four is no ranking
    assert "rankings that copy the input order</th><td>0.667<" in page
    assert "completions that are no ranking</th><td>0.250<" in page
    charts = {chart["title"]: chart for chart in data_of(page, "charts")}
    origins = charts["Where the item ranked first came from, share of rankings"]["data"][0]
    assert (origins["x"], origins["y"]) == ([1, 2, 3], [0.6667, 0.3333, 0])
    failures = charts["Completions that are no ranking, by kind"]["data"]
    assert {line["name"]: line["y"] for line in failures} == dict.fromkeys(("no_trace_end", "truncated"), [0.25, 0.25])


def test_of_a_big_run_groups_of_every_step_and_outcome_are_drawn_within_the_limit(tmp_path):
    equal = {"kept": False, "discard_reason": "all_equal"}
    records = [rollout(step, group, completion="x" * 500) for step in range(3) for group in range(20)]
    records += [rollout(step, 20, completion="y\x1b" * 250, **equal) for step in range(3)]
    write_rollouts(tmp_path, *records)
    drawn = rollouts.sample(RolloutGroups(tmp_path), max_bytes=12_000)
    assert len(json_text(drawn)) <= 12_000 and drawn["num_rollouts"] == 63
    kept = drawn["rollout_fields"].index("kept")
    found = [(drawn["groups"][rollout[0]][0], rollout[kept]) for rollout in drawn["rollouts"]]
    assert set(found) == {(step, is_kept) for step in range(3) for is_kept in (True, False)}
    assert 6 < len(found) < 20


def test_numbers_of_many_rollouts_are_read_in_parts(tmp_path, monkeypatch):
    write_rollouts(tmp_path, *(rollout(step, reward=step / 10) for step in range(5) for _ in range(3)))
    groups = RolloutGroups(tmp_path)
    whole = cheating.by_step(groups)
    monkeypatch.setattr(cheating, "ROLLOUTS_AT_ONCE", 7)
    assert whole.equals(cheating.by_step(groups))
    assert whole["reward"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_page_of_a_damaged_run_says_what_is_lost(tmp_path):
    write_rollouts(tmp_path / "dapo/rollouts", *map(rollout, range(4)))
    finish(tmp_path / "data")
    cut_off(tmp_path / "dapo/rollouts/part-00000002-0.parquet")
    page = page_of(tmp_path)
    assert "1 file of rollouts cut off or damaged and left out" in page
    assert "3 of 3 readable rollouts" in page and "All 3 rollouts" not in page
    damage_inside(tmp_path / "dapo/rollouts/part-00000001-0.parquet")
    assert "part-00000001-0.parquet is damaged; delete it." in page_of(tmp_path)


def test_long_lines_are_thinned_to_points_that_end_where_they_did():
    import plotly.graph_objects as go

    figure = go.Figure().add_scatter(x=list(range(2001)), y=[step / 2 for step in range(2001)])
    (line,) = page_parts.chart(figure, "loss")["data"]
    assert len(line["x"]) == len(line["y"]) == page_parts.MAX_POINTS
    assert (line["x"][0], line["x"][-1], line["y"][-1]) == (0, 2000, 1000)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium; apt-get install -y chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=list(itertools.product((390, 1280), ("light", "dark"))), ids=str)
def tab(request, browser, run):
    """The page in a browser, with all that it complained of and asked for."""
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab.complaints, tab.requests = [], []
    for event in ("console", "pageerror", "dialog"):
        tab.on(event, lambda happened: tab.complaints.append(str(happened)))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto((run / "evaluate/report.html").as_uri())
    yield tab
    tab.close()


def test_a_browser_draws_every_chart_runs_nothing_else_and_loads_nothing(tab, run, page):
    num_charts = page.count('class="chart"')
    assert num_charts > 10 and tab.locator(".chart svg.main-svg").count() >= num_charts
    assert tab.complaints == []
    requests = [url for url in tab.requests if not url.startswith(("blob:", "data:"))]
    assert requests == [(run / "evaluate/report.html").as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == tab.viewport_size["width"]


def test_rollouts_are_searched_and_sorted_in_a_browser(tab):
    rows = tab.locator("#rollout-rows tr")
    assert rows.count() == 8
    searches = {"TITLE 1 same discarded step:1": 1, "step:1 no_trace_end row:40": 1, "row:4": 0, "": 8}  # 4 is not 40
    for words, found in searches.items():
        tab.fill("#rollout-search", words)
        assert rows.count() == found and tab.inner_text("#rollout-count") == f"{found} of 8 rollouts"
    tab.select_option("#rollout-outcome", "moved up")
    assert [row.split()[:2] for row in rows.all_inner_texts()] == [["1", "40"], ["0", "40"]]
    tab.select_option("#rollout-outcome", "")
    for direction, rewards in (("descending", [0.5, 0.5, 0, 0, 0, 0, -1, -1]), ("ascending", [-1, -1, 0, 0, 0, 0])):
        tab.click("#rollout-head .c-reward button")
        assert tab.get_attribute("#rollout-head .c-reward", "aria-sort") == direction
        shown = [float(text) for text in tab.locator("#rollout-rows .c-reward").all_inner_texts()]
        assert shown[: len(rewards)] == rewards
    tab.click("#rollout-head .c-step button")
    tab.select_option("#rollout-outcome", "discarded")
    assert rows.count() == 4 and "stayed, discarded: all_equal" in rows.first.inner_text()
    assert tab.complaints == []


def test_a_group_opens_in_a_browser_and_its_attack_is_text(tab):
    tab.fill("#rollout-search", "alert(2) step:0")
    tab.click("#rollout-rows tr")
    group = tab.locator("#rollout-group")
    assert tab.inner_text("#rollout-group-title") == "Step 0, group 0, row 40, user 7: 2 rollouts"
    assert group.locator("section").count() == 3  # the incoming order and two rollouts
    chosen = group.locator(".chosen")
    assert chosen.locator("pre").inner_text() == ATTACK + "<!-- \\x1b[2J & ?"
    assert "no_trace_end, truncated, kept" in chosen.inner_text()
    other = group.locator("section").nth(1)
    assert "Title 1 ★ ↑ from 2" in other.inner_text() and "well_formed (condition not met)" in other.inner_text()
    group.locator("summary").click()
    assert "Candidates:‹<script>alert(1)</script>›‹Title 1›" in group.locator("details pre").inner_text()
    tab.uncheck("#rollout-titles")
    assert "Candidates:<s_a_0><s_b_0>" in group.locator("details pre").text_content()
    tab.click("#rollout-close")
    assert not group.is_visible()
    assert tab.complaints == [] and tab.locator("#rollout-group script").count() == 0


def test_samples_show_both_orders_with_the_target_marked(run, page):
    rows = read_ranked_rows(run, run / "evaluate", "test")
    results = json.loads((run / "evaluate/results.json").read_text())
    name, samples = sample_rows(rows, results, Catalogue.load(run))
    assert name == "sft"
    assert {sample["outcome"] for sample in samples} >= {"moved up", "moved down", "no ranking"}
    for sample in samples:
        before, after = sample["places"]
        assert sample["incoming"][before - 1]["relevant"]
        assert sample["outcome"] == "no ranking" or after == (4 if before == 1 else before - 1)
    failed = next(sample for sample in samples if sample["outcome"] == "no ranking")
    assert failed["failure"] == "no_trace_end" and failed["text"] == ATTACK and failed["outgoing"] is None
    assert '<p class="failure">no_trace_end</p>' in page


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.01, 0.03, "above the input order"), (-0.01, 0.03, "no clear difference"), (-0.3, -0.1, "below the input"),
])  # fmt: skip
def test_the_headline_says_what_the_interval_says(low, high, verdict):
    row = {"N@5": 0.52, "N@5_minus_no_op": 0.02, "N@5_interval": [low, high]}
    text = report.headline({"rows": {"no_op": {"N@5": 0.5}, "dapo": row}})
    assert verdict in text and "+4.0 % relative" in text
    assert text.endswith("The interval is over users; another training seed may lie outside.")


def test_a_run_so_far_says_what_is_missing(tmp_path, capsys):
    finish(tmp_path / "data", {"num_items": 12})
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    assert "There is no evaluation of this run yet; run the evaluate stage." in page
    assert "No training stage has logged yet" in page and "There are no semantic ids yet" in page
    assert page.count(f"{tmp_path} holds no rollouts; run the dapo stage") == 2
    assert "<dt>num_items</dt><dd>12</dd>" in page and len(scripts_of(page)) == 2


def test_rollouts_alone_are_reported(tmp_path):
    write_rollouts(tmp_path / "rollouts", rollout())
    data = data_of(page_of(tmp_path / "rollouts"), "rollouts")
    assert len(data["rollouts"]) == 1 and ["1", ""] in data["items"]  # no catalogue: items by number


def test_an_evaluation_of_another_task_is_named(tmp_path):
    for stage in ("data", "evaluate"):
        finish(tmp_path / stage)
    write_json(tmp_path / "evaluate/results.json", {"task": "next_item"})
    assert "The evaluation is of the task next_item; its table is evaluate/results.md." in page_of(tmp_path)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="absent is not a folder; give the folder of a run"):
        report.write_report(tmp_path / "absent", tmp_path, tmp_path / "report.html")
    with pytest.raises(ValueError, match="holds neither a finished stage nor rollouts; give the folder of a run"):
        report.write_report(tmp_path, tmp_path, tmp_path / "report.html")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "no/page.html")]) == 2
    assert "is not a folder; make it first" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
