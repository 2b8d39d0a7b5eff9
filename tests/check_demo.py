"""Checks of a finished demo run, one line each; exit code 1 when one fails.

python -m tests.check_demo runs/ml100k [--short]

--short is for a run of fewer steps than the recipe's and without the control that learns no traces; it leaves out
what its model cannot reach.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

RANKERS = {"no_op", "random", "oracle", "transitions", "lambdamart", "midtrained", "sft", "sft_no_trace", "dapo"}
SCRIPT = re.compile(r"<script.*?</script>", re.DOTALL)  # may hold addresses: the page's policy lets none load
OUTSIDE = re.compile(r"""(\b(src|href)\s*=|\burl\(|@import)\s*["']?\s*(https?:)?//""", re.IGNORECASE)


def checks(run: Path, is_short: bool) -> Iterator[tuple[str, bool, object]]:
    """Name, outcome and value of each check."""
    dapo = json.loads((run / "dapo/metrics.json").read_text())
    gap = dapo["max_logp_gap"]
    yield "rollouts come from vLLM", dapo["rollout_engine"] == "vllm", dapo["rollout_engine"]
    yield "log-probability gap is at most 0.02", gap is not None and gap <= 0.02, gap

    results = json.loads((run / "evaluate/results.json").read_text())
    rows = results["rows"]
    expected = RANKERS - {"sft_no_trace"} if is_short else RANKERS
    yield f"all {len(expected)} rankers are there", set(rows) == expected, ", ".join(rows)
    yield "986 rows are ranked", results["n"] == 986, results["n"]
    failures, most = rows["dapo"]["parse_failure_share"], 0.5 if is_short else 0.03
    yield f"fewer than {most:.0%} of dapo's completions are no ranking", failures < most, f"{failures:.2%}"
    difference, (low, high) = rows["dapo"]["N@5_minus_no_op"], rows["dapo"]["N@5_interval"]
    if not is_short:
        yield "N@5 of dapo minus no_op is above zero", low > 0, f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"

    report = run / "evaluate/report.html"
    page = report.read_text(encoding="utf-8") if report.is_file() else ""
    yield "the report is written", "</html>" in page, report
    found = OUTSIDE.search(SCRIPT.sub("", page))
    yield "the report loads nothing from outside", found is None and "default-src 'none'" in page, found and found[0]


def main() -> int:
    """Print the checks of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--short", action="store_true")
    args, passed = parser.parse_args(), True
    for name, is_so, value in checks(args.run, args.short):
        print(f"{'ok' if is_so else 'FAILED'}: {name} ({value})")
        passed = passed and is_so
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
