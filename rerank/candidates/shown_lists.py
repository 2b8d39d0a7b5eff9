"""Lists that were shown, and what their users made of them, as far as a moment knows it.

L lists, J candidates of them that were judged.
"""

from dataclasses import dataclass, replace

import numpy as np

from rerank.rows import TargetRows


@dataclass(frozen=True)
class ShownLists:
    """Judged candidates of lists.

    A candidate counts as shown from its request on, and as chosen from the first feedback on that makes it relevant:
    at any moment what the log held then, whatever came later.

    Attributes:
        users, times: (L,) of the requests; a time is nan where unknown.
        owners, items: (J,) list and item of each candidate.
        chosen_at: (J,) when the item was chosen, inf for one that was not, nan where unknown.
    """

    users: np.ndarray
    times: np.ndarray
    owners: np.ndarray
    items: np.ndarray
    chosen_at: np.ndarray

    @classmethod
    def of(cls, rows: TargetRows) -> "ShownLists":
        """Those of requests."""
        assert rows.lists is not None
        lists, lengths = rows.lists, [len(items) for items in rows.lists.candidates]
        chosen_at = np.full(sum(lengths), np.inf)
        starts = np.cumsum([0, *lengths])
        told = np.concatenate([*lists.feedback, np.empty((0, 3))])
        places = np.repeat(starts[:-1], [len(of_row) for of_row in lists.feedback]) + told[:, 0].astype(np.int64)
        is_first = np.diff(places, prepend=-1) > 0
        chosen_at[places[is_first]] = told[is_first, 2]
        items = np.concatenate([*lists.candidates, np.empty(0, dtype=np.int64)])
        judged = np.flatnonzero(~np.isnan(np.concatenate([*lists.relevance, np.empty(0)])))
        owners = np.repeat(np.arange(len(lengths)), lengths)
        return cls(rows.users, lists.times, owners[judged], items[judged], chosen_at[judged])

    def part(self, until: float | None = None, without_users: np.ndarray | None = None) -> "ShownLists":
        """Those that were known before a moment, or without some users."""
        kept, chosen_at = np.ones(len(self.times), dtype=bool), self.chosen_at
        if until is not None:
            kept, chosen_at = self.times < until, np.where(self.chosen_at >= until, np.inf, self.chosen_at)
        if without_users is not None:
            kept = kept & ~np.isin(self.users, without_users)
        judged, owners = kept[self.owners], (np.cumsum(kept) - 1)[self.owners]
        lists = replace(self, users=self.users[kept], times=self.times[kept])
        return replace(lists, owners=owners[judged], items=self.items[judged], chosen_at=chosen_at[judged])

    def feedback(self, num_items: int) -> np.ndarray:
        """(2, items) lists whose user judged the item, and those in which it was relevant."""
        parts = self.items, self.items[self.chosen_at != np.inf]
        return np.stack([np.bincount(part, minlength=num_items) for part in parts])
