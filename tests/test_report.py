import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from toy_run import write_run

from rerank import report, run_dir
from rerank.evaluate import write_rankings
from rerank.evaluate.generation import read_answer
from rerank.evaluate.results import Ranking, Sampling, make_results
from rerank.evaluate.rows import read_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = "</pre></script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose sft model moves the first candidate to the end, and writes no ranking on the last row."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run <b>")
    evaluated = read_rows(folder / "candidates", "test")
    orders = [[1, 2, 3, 0] for _ in evaluated.rows]
    labels = ["<s_a_0>", "<s_a_1>", "<s_a_2>", "<s_a_3>"]
    texts = [f"<think>{ATTACK}</think>" + "".join(labels[position] for position in order) for order in orders]
    texts[-1] = ATTACK
    answers = [read_answer(text, 5, False, labels) for text in texts]
    rankings = [
        Ranking("no_op", [[0, 1, 2, 3] for _ in evaluated.rows]),
        Ranking("random", None),
        Ranking.of_answers("sft", answers, 1.0),
    ]
    sampling = Sampling(evaluated.users, 50, 0)
    results = make_results(rankings, evaluated.relevance, "test", evaluated.hit_share, evaluated.num_all, sampling)
    (folder / "evaluate").mkdir()
    run_dir.write_json(folder / "evaluate/results.json", results)
    write_rankings(rankings, evaluated.rows, folder / "evaluate/rankings.parquet")
    report.write_report(folder, folder / "evaluate", folder / "evaluate/report.html")
    return folder


def test_the_page_has_the_section_on_semantic_ids(run, page):
    from rerank.semantic_ids import id_report

    assert "<h2>Semantic ids</h2>" in page
    for name, value in id_report.facts(id_report.read_quality(run)):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "evaluate/report.html").read_text(encoding="utf-8")


def scripts_of(page: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)


def test_titles_names_and_completions_are_shown_and_never_run(page):
    assert "alert(2)</script>" not in page and "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page  # a title of the toy catalogue
    assert "&lt;/pre&gt;&lt;/script&gt;&lt;script&gt;alert(2)&lt;/script&gt;" in page
    assert "<h1>run &lt;b&gt;</h1>" in page
    assert len(scripts_of(page)) == 2


def test_only_scripts_named_by_their_hash_may_run_and_nothing_loads_from_outside(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert "default-src 'none'" in policy and "http" not in policy
    for script in scripts_of(page):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|<link|@import|url\(|https?://", markup)
    assert len(page.encode()) < 6_000_000


def test_the_page_holds_results_stages_and_notes(page):
    assert "no_op" in page and "NDCG@5 minus that of the input order" in page
    assert "<dt>steps</dt><dd>12,345</dd>" in page and "<dt>no_trace / rows</dt><dd>7</dd>" in page
    assert "<dt>share</dt><dd>0.1235</dd>" in page and "<dt>reward_gain_interval</dt><dd>0.05, 0.15</dd>" in page
    assert "of 30 (" in page


def test_charts_hold_the_logged_values(page):
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)[1])
    assert [chart["title"] for chart in charts][:2] == [
        "NDCG@5 minus that of the input order, 95 % intervals",
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


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing; install it with: apt-get install -y chromium")
def test_a_browser_draws_every_chart_and_runs_nothing_else(run, page, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    address = (run / "evaluate/report.html").as_uri()
    line = [CHROMIUM, *options, "--virtual-time-budget=10000", "--enable-logging=stderr", address]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    num_charts = page.count('class="chart"')
    assert num_charts > 2
    container = r'id="chart\d+"[^>]*><div class="plot-container.*?<svg class="main-svg"'
    drawn = re.findall(container, done.stdout, re.DOTALL)
    assert len(drawn) == num_charts
    assert not [text for text in done.stderr.splitlines() if "CONSOLE" in text]  # no error, nothing that was refused


def test_samples_show_both_orders_with_the_target_marked(run, page):
    rows = report.read_ranked_rows(run, run / "evaluate", "test")
    results = json.loads((run / "evaluate/results.json").read_text())
    from rerank.catalogue import Catalogue

    name, samples = report.sample_rows(rows, results, Catalogue.load(run))
    assert name == "sft"
    assert {sample["outcome"] for sample in samples} >= {"moved up", "moved down", "no ranking"}
    for sample in samples:
        before, after = sample["places"]
        assert sample["incoming"][before - 1]["relevant"]
        assert sample["outcome"] == "no ranking" or after == (4 if before == 1 else before - 1)
    failed = next(sample for sample in samples if sample["outcome"] == "no ranking")
    assert failed["failure"] == "no_trace_end" and failed["text"] == ATTACK and failed["outgoing"] is None
    assert '<p class="failure">no_trace_end</p>' in page


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.03, "above the input order"), (-0.01, 0.03, "no clear difference"), (-0.3, -0.1, "below the input")],
)
def test_the_headline_says_what_the_interval_says(low, high, verdict):
    row = {"N@5": 0.52, "N@5_minus_no_op": 0.02, "N@5_interval": [low, high]}
    text = report.headline({"rows": {"no_op": {"N@5": 0.5}, "dapo": row}})
    assert verdict in text and "+4.0 % relative" in text


def test_a_run_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results.json is missing; run the evaluate stage first"):
        report.write_report(tmp_path, tmp_path / "evaluate", tmp_path / "report.html")
