"""Time and memory of mining co-occurrence neighbours, against the double loop over each user's sequence.

    python -m tests.benchmarks.relations [--interactions 10000000] [--num_items 200000]

Interactions are synthetic: users with ten on average (geometric), items with a Zipf popularity. Seconds are the
median of --repeats rounds: in the first, a virtual machine may still have to find the memory. The loop runs once, on
the first --part of the interactions, where both must find the same. Its time is taken to grow in proportion, which
favours it: its dictionaries outgrow the caches. Peak memory is that of the process before the loop begins, with
interactions and imports. Ends with one JSON line.
"""

import argparse
import json
import resource
import statistics
import time
from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from rerank.losses._relations import co_occurrence_neighbours

MEAN_LENGTH = 10
WINDOW, NUM_NEIGHBOURS = 5, 10


def synthetic_interactions(number: int, num_items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """User and item of each interaction, by user."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(1 / MEAN_LENGTH, number)
    num_users = int(np.searchsorted(np.cumsum(lengths), number)) + 1
    users = np.repeat(np.arange(num_users), lengths[:num_users])[:number]
    share = np.cumsum(1 / np.arange(1, num_items + 1))
    ranks = np.searchsorted(share, rng.random(number) * share[-1])
    return users, rng.permutation(num_items)[ranks]


def neighbours_by_loop(users: np.ndarray, items: np.ndarray, num_items: int) -> list[list[int]]:
    """What `co_occurrence_neighbours` returns, pair by pair."""
    sequences: dict[int, list[int]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        sequences.setdefault(user, []).append(item)
    popularity = Counter(items.tolist())
    counts: list[Counter[int]] = [Counter() for _ in range(num_items)]
    for sequence in sequences.values():
        for place, item in enumerate(sequence):
            for other in sequence[max(place - WINDOW, 0) : place + WINDOW + 1]:
                if other != item:
                    counts[item][other] += 1
    found = []
    for count in counts:
        ranked = sorted(count, key=lambda other, count=count: (-count[other], -popularity[other], other))
        found.append((ranked + [-1] * NUM_NEIGHBOURS)[:NUM_NEIGHBOURS])
    return found


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interactions", type=int, default=10_000_000, help="(%(default)s)")
    parser.add_argument("--num_items", type=int, default=200_000, help="(%(default)s)")
    parser.add_argument("--part", type=int, default=1_000_000, help="interactions that the loop gets (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds to take the median of (%(default)s)")
    args = parser.parse_args()
    users, items = synthetic_interactions(args.interactions, args.num_items)
    rounds = []
    for _ in range(args.repeats):
        begun = time.perf_counter()
        co_occurrence_neighbours(users, items, args.num_items, WINDOW, NUM_NEIGHBOURS)
        rounds.append(time.perf_counter() - begun)
    seconds = statistics.median(rounds)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    users, items = users[: args.part], items[: args.part]
    begun = time.perf_counter()
    wanted = neighbours_by_loop(users, items, args.num_items)
    loop_rate = len(users) / (time.perf_counter() - begun)
    if co_occurrence_neighbours(users, items, args.num_items, WINDOW, NUM_NEIGHBOURS).tolist() != wanted:
        raise SystemExit(f"the loop finds other neighbours in the first {len(users)} interactions")

    speedup = args.interactions / seconds / loop_rate
    table = Table(title=f"{args.interactions:,} interactions, {args.num_items:,} items, window {WINDOW}")
    for column in ("seconds", "peak GB", f"loop on the first {len(users):,}, interactions/s", "speed-up"):
        table.add_column(column, justify="right")
    table.add_row(f"{seconds:.1f}", f"{peak_gb:.2f}", f"{loop_rate:,.0f}", f"{speedup:.1f}")
    Console().print(table)
    result = {"interactions": args.interactions, "seconds": seconds, "peak_gb": peak_gb, "speedup_vs_loop": speedup}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
