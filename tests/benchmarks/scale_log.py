"""A seeded synthetic log of any size, written by DuckDB as Parquet parts with no row of it in Python, and its recipe.

Row n is a function of n and the seed alone. Items are Zipf-distributed (exponent 1, by the inverse of a continuous
distribution), each drawn independently: the harshest case for counts, whose pairs then differ most. Users have a power
law: the k-th has interactions in proportion to k^-0.5. One more user has a tenth of a small log, and a million
interactions of a log of ten million or more, spread over its whole time.
"""

from pathlib import Path

import duckdb

MOST_OF_ONE_USER = 1_000_000
MOST_USERS, LEAST_LENGTH = 333_333, 20  # three rows to rank a user: at most about a million; interactions a user
PART = 10_000_000
MEMORY = "2GB"
LOG = """
SELECT 'U' || lpad((CASE WHEN n % {every} = 0 THEN 0
        ELSE 1 + least(floor({users} * pow(hash(n, {seed}, 1) / 18446744073709551616.0, 2)), {users} - 1) END
    )::BIGINT::VARCHAR, 9, '0') AS user,
    'I' || lpad(
        least(floor(pow({items} + 1, hash(n, {seed}, 2) / 18446744073709551616.0)), {items})::BIGINT::VARCHAR, 9, '0'
    ) AS item,
    1500000000 + n // 3 AS time
FROM range({start}, {end}) AS numbers(n)
"""
ITEMS = """
SELECT 'I' || lpad((n + 1)::VARCHAR, 9, '0') AS item,
    'Item ' || (hash(n, {seed}, 3) % 20000)::VARCHAR || ' word' || (hash(n, {seed}, 4) % 5000)::VARCHAR AS title,
    'Category ' || (hash(n, {seed}, 5) % 100)::VARCHAR AS category
FROM range({items}) AS numbers(n)
"""
DATA = """run_dir: run
interactions: {folder}/log/*.parquet
items: {folder}/items.parquet
"""
CANDIDATES = "run_dir: run\n"


def num_users(interactions: int) -> int:
    """Users beside the one with the most interactions."""
    return max(min(interactions // LEAST_LENGTH, MOST_USERS), 1)


def write_log(folder: Path, interactions: int, items: int, seed: int = 0) -> None:
    """`log/*.parquet`, `items.parquet` and `recipe/` with the stages data and candidates, in a folder."""
    for name in ("log", "recipe", "duckdb"):
        (folder / name).mkdir(parents=True)
    every = max(interactions // MOST_OF_ONE_USER, 10)
    numbers = {"users": num_users(interactions), "items": items, "seed": seed, "every": every}
    with duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": str(folder / "duckdb")}) as con:
        con.execute(f"COPY ({ITEMS.format(**numbers)}) TO '{folder}/items.parquet'")
        for part, start in enumerate(range(0, interactions, PART)):
            query = LOG.format(**numbers, start=start, end=min(start + PART, interactions))
            con.execute(f"COPY ({query}) TO '{folder}/log/{part:05}.parquet'")
    (folder / "recipe/1_data.yaml").write_text(DATA.format(folder=folder))
    (folder / "recipe/4_candidates.yaml").write_text(CANDIDATES)
