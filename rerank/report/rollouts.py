"""The rollouts that the report carries: all of a small run, else whole groups of every step and outcome.

They stand in the page as data, which its script shows as text. Control characters are spelled out here already.
"""

import math
from collections.abc import Sequence
from typing import Any

from rerank.catalogue import Catalogue
from rerank.report.page import json_text
from rerank.rollouts.groups import RolloutGroups
from rerank.rollouts.schema import GROUP_KEYS, Rollout
from rerank.rollouts.text import visible

MAX_BYTES = 4_300_000  # of data in the page
GROUP_FIELDS = (*GROUP_KEYS, "row_id", "user", "prompt", "history", "candidates", "relevance", "first_stage_ranks")
ITEM_FIELDS = ("history", "candidates")
ROLLOUT_FIELDS = (
    *("completion", "failure", "truncated", "order", "positive_rank", "positive_rank_after", "reward", "advantage"),
    *("reward_components", "conditions", "tokens", "kept", "discard_reason"),
)
# Groups are drawn one from each step and outcome, then a second, until the estimated bytes are used up: a `<` takes
# six bytes in the page, and what surrounds the texts about 150 a completion and 200 a group.
_DRAW = """
WITH sizes AS (
    SELECT {keys}, sum(strlen(replace(completion, '<', '123456')) + 150)
        + any_value(strlen(replace(prompt, '<', '123456')) + 200) AS bytes
    FROM rollouts GROUP BY {keys}
), drawn AS (
    SELECT *, row_number() OVER (PARTITION BY step, kept > 0, failures > 0, sign("before" - after)
        ORDER BY hash(row_id, round, "group")) AS turn
    FROM listed JOIN sizes USING ({keys})
), chosen AS (
    SELECT {keys}, sum(bytes) OVER (ORDER BY turn, hash({keys}) ROWS UNBOUNDED PRECEDING) AS total FROM drawn
)
SELECT {fields}, len(completion_ids) AS tokens
FROM rollouts SEMI JOIN (FROM chosen WHERE total <= {max_bytes}) USING ({keys})
ORDER BY {keys}, reward DESC, completion
"""


def sample(groups: RolloutGroups, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Rollouts of the groups that fit into `max_bytes` of JSON, as the page's script reads them.

    Returns:
        `num_rollouts` of the run; `items`, title and semantic id of each; `rewards`, their names; `groups` and
        `rollouts`: lists of values in the order of `group_fields` and `rollout_fields`. There items are places in
        `items`, the first value of a rollout is the place of its group, its components stand in the order of
        `rewards`, and its conditions are the places of the rewards whose condition was not met.
    """
    num_rollouts = groups.rollouts.query("SELECT count(*) AS n FROM rollouts")["n"][0].as_py()
    estimated_bytes = max_bytes
    while True:
        packed = {"num_rollouts": num_rollouts, **_packed(_draw(groups, estimated_bytes), groups.catalogue)}
        if len(json_text(packed).encode()) <= max_bytes:
            return packed
        estimated_bytes = estimated_bytes * 9 // 10  # control characters take more than estimated


def _draw(groups: RolloutGroups, max_bytes: int) -> list[Rollout]:
    keys = ", ".join(f'"{key}"' for key in GROUP_KEYS)
    fields = ", ".join(f'"{name}"' for name in (*GROUP_FIELDS, *ROLLOUT_FIELDS) if name != "tokens")
    table = groups.rollouts.query(_DRAW.format(keys=keys, fields=fields, max_bytes=max_bytes))
    return list(table.to_pylist(maps_as_pydicts="strict"))


def _packed(drawn: Sequence[Rollout], catalogue: Catalogue | None) -> dict[str, Any]:
    places: dict[int, int] = {}  # item -> its place in `items`
    groups: dict[tuple[int, ...], tuple[int, list[Any]]] = {}  # place and GROUP_FIELDS of each
    rewards = list(dict.fromkeys(name for rollout in drawn for name in rollout["reward_components"]))
    rollouts = []
    for rollout in drawn:
        key = tuple(rollout[name] for name in GROUP_KEYS)
        if key not in groups:
            items = {name: [places.setdefault(item, len(places)) for item in rollout[name]] for name in ITEM_FIELDS}
            grades = [_short(grade) for grade in rollout["relevance"]]
            group = {**rollout, **items, "relevance": grades, "prompt": visible(rollout["prompt"])}
            groups[key] = len(groups), [group[name] for name in GROUP_FIELDS]
        rollouts.append([groups[key][0], *_values(rollout, rewards)])
    fields = {"group_fields": GROUP_FIELDS, "rollout_fields": ("group", *ROLLOUT_FIELDS), "rewards": rewards}
    shown = [values for _, values in groups.values()]
    return {**fields, "items": _items(list(places), catalogue), "groups": shown, "rollouts": rollouts}


def _values(rollout: Rollout, rewards: Sequence[str]) -> list[Any]:
    """ROLLOUT_FIELDS of a rollout, numbers as short as they are shown, rewards in the order of their names."""
    changed = rollout | {name: _short(rollout[name]) for name in ("reward", "advantage")}
    changed["completion"] = visible(rollout["completion"])
    changed["reward_components"] = [_short(rollout["reward_components"].get(name)) for name in rewards]
    changed["conditions"] = [rewards.index(name) for name, is_met in rollout["conditions"].items() if not is_met]
    return [changed[name] for name in ROLLOUT_FIELDS]


def _short(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)  # JSON knows no NaN


def _items(items: Sequence[int], catalogue: Catalogue | None) -> list[list[str]]:
    if catalogue is None:
        return [[str(item), ""] for item in items]
    names = [visible(catalogue.titles[item] or catalogue.item_ids[item]) for item in items]
    return [[name, catalogue.semantic_ids[item]] for name, item in zip(names, items, strict=True)]
