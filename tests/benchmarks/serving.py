"""Requests a second of `rerank serve` against plain `vllm serve`, and the cost of constrained decoding.

Requests of a model's test rows arrive at Poisson times of a fixed seed, at least 500 a rate after 50 of warm-up; the
figure of a server is the highest rate, found to 5 % by bisection, at which the 95th percentile of its seconds stays
below twice the median of an idle server. The plain server gets the same prompts as tokens, written before its time is
taken, by `/v1/completions`; its client parses the answers, and takes the input order where one is no ranking. Before
each rate the prefix cache of the server is emptied: only what its requests share is in it.

- `throughput_vs_plain`: the one rate over the other, the median of five rounds that alternate; `ndcg@5` stands beside.
- `changed_share`: rankings at temperature 0 that differ under load from those of the idle server.
- `constraint_overhead`: by batch size, seconds of decoding with the rules over those without, of requests whose free
  answer is a ranking; their prompts are in the engine's cache.
- `no_think_share`, `one_token_share`, `prefix_share_of_limit`: how many times faster answers without reasoning, those
  of one token, and prompts of lists that 32 users share are, over how many times fewer tokens they take
  (`serving_shares`).
- What a model cannot have is null: one that ranks by one token has no plain server beside it, and no overhead; only
  prompts of `layout: candidates_first` share their lists.
- `rates` has those of vLLM's `/generative_scoring` too: a score for each document, of a probability after it.
- `client_share`: of its core that the client was busy, at most; the server has the other cores.

A request that has no answer counts as slower than any; `failed` is the number of them at the rates that are given.
On a quiet machine (each part waits ten minutes for one); the same line again measures what the file lacks:

    python -m tests.benchmarks.serving --model runs/ml100k/dapo/model --out serving.jsonl
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rerank.launch import recipe
from rerank.models.ranking_grammar import RankingGrammar
from rerank.rank.encoder import ReadyRow
from rerank.rank.serve.snapshot import fingerprint
from tests.benchmarks import serving_load
from tests.benchmarks.serving_parts import Parts
from tests.benchmarks.serving_shares import shares
from tests.benchmarks.serving_sides import Requests, Side, parsed_order

BATCHES = (1, 16, 256)
SIDES = ("ours", "plain", "scoring")


def constraint_overhead(model_dir: Path, requests: Requests, repeats: int) -> dict[str, float] | None:
    """Seconds of decoding with the rules over those without, by batch size; None where no free answer is a ranking, or
    none is written."""
    if requests.one_token:
        return None
    from rerank.models import engine as vllm_engine

    limit = requests.ready[0].asked.max_completion_tokens
    longest = max(len(one.tokens) for one in requests.ready) + limit
    engine = vllm_engine.open_engine(model_dir, longest, constrained=True)

    def answers(ready: Sequence[ReadyRow], is_constrained: bool) -> tuple[float, list[str]]:
        rules = [one.rules if isinstance(one.rules, RankingGrammar) else None for one in ready]
        began = time.perf_counter()
        prompts = [one.asked.prompt for one in ready]
        found = vllm_engine.generate(engine, prompts, limit, grammars=rules if is_constrained else None)
        return time.perf_counter() - began, [completion.text for (completion,) in found]

    texts = answers(requests.ready, False)[1]
    valid = [one for one, text in zip(requests.ready, texts, strict=True) if parsed_order(one, text)]
    found = {}
    for size in BATCHES if valid else ():
        batch = [valid[place % len(valid)] for place in range(size)]
        ratios = []
        for _ in range(repeats + 1):
            free, constrained = answers(batch, False)[0], answers(batch, True)[0]
            ratios.append(constrained / free)
        found[str(size)] = round(statistics.median(ratios[1:]), 4)
    engine.llm_engine.engine_core.shutdown()
    return found or None


def identity(model_dir: Path) -> dict[str, str]:
    """A model as it is now, for `Parts`."""
    files = json.dumps(fingerprint(model_dir.resolve()), sort_keys=True).encode()
    return {"model": str(model_dir.resolve()), "files": hashlib.sha256(files).hexdigest()[:12]}


def figures(found: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """All figures of the parts that are there; null for one that there is none of."""
    by_round = [{name: found.get(f"round {number} {name}") for name in SIDES} for number in range(rounds)]
    ratios = [one["ours"]["rate"] / one["plain"]["rate"] for one in by_round if one["ours"] and one["plain"]]

    def of(name: str, key: str) -> list[Any]:
        values = [one[name][key] for one in by_round if one[name]]
        return [value for value in values if value is not None]

    return {
        "throughput_vs_plain": round(statistics.median(ratios), 4) if ratios else None,
        "rates": {name: [round(rate, 2) for rate in of(name, "rate")] for name in SIDES},
        "ndcg@5": {name: round(statistics.mean(of(name, "ndcg@5")), 4) for name in SIDES[:2] if of(name, "ndcg@5")},
        "changed_share": {name: max(of(name, "changed_share")) for name in SIDES if of(name, "changed_share")},
        "client_share": max((round(share, 2) for name in SIDES for share in of(name, "client_share")), default=None),
        "failed": {name: sum(of(name, "failed")) for name in SIDES},
        "constraint_overhead": found.get("overhead"),
        **(found.get("shares") or {}),
    }


def main() -> int:
    """Measure both servers in turn, and print the figures as JSON; the exit code is 1 where a part has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/ml100k/dapo/model"), help="of a run with test rows")
    parser.add_argument("--requests", type=int, default=500, help="a rate (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file of JSON lines: what is measured, and need not be again")
    args = parser.parse_args()
    requests, parts, model = Requests.of_model(args.model, 1000), Parts(args.out), identity(args.model)
    repeated = {**model, "repeats": args.rounds}
    longest = max(len(one.tokens) + one.asked.max_completion_tokens for one in requests.ready)
    serving_load.set_cache(args.model, BATCHES[-1], longest)
    with patch.dict(os.environ):  # of engines in this process; the servers have their own
        recipe.set_environment()
        parts.measure("overhead", repeated, lambda: constraint_overhead(args.model, requests, args.rounds))
        rows = requests.rows[: BATCHES[-1]]
        parts.measure("shares", repeated, lambda: shares(args.model, rows, requests.records, args.rounds))
    sides = [Side(name, getattr(requests, name)) for name in SIDES if name != "plain" or not requests.one_token]
    for number in range(args.rounds):
        for side in sides:
            before = parts.found.get(f"round {number - 1} {side.name}") or {}
            measured = partial(side.measure, args.model, requests, args.requests, number, before.get("rate"))
            parts.measure(f"round {number} {side.name}", {**model, "requests": args.requests}, measured)
    found = figures(parts.found, args.rounds)
    sys.stdout.write(json.dumps({**found, **({"missing": parts.missing} if parts.missing else {})}) + "\n")
    return int(bool(parts.missing))


if __name__ == "__main__":
    sys.exit(main())
