"""Counts of a log of requests, and the lines that tell of what is unusual in it."""

from typing import Any

import numpy as np

from rerank.data.requests.histories import Histories
from rerank.data.requests.log import RequestLog
from rerank.data.requests.rows import blocks


def of_requests(log: RequestLog, joined: Histories | None) -> dict[str, object]:
    """Counts of requests, and the click rate by place.

    A request is without a relevant item where no candidate has a grade above 0, all relevant where every judged one
    has. The history has the request's own feedback where it holds an item that is relevant in the request.
    """
    is_judged, is_relevant = ~np.isnan(log.relevance), log.relevance > 0
    num_judged, num_relevant = (np.bincount(log.owners, mask, len(log)) for mask in (is_judged, is_relevant))
    without_history, with_own_feedback = _count_histories(log, joined)
    return {
        "requests": len(log),
        "requests_without_history": without_history,
        "requests_without_relevant": int((num_relevant == 0).sum()),
        "requests_all_relevant": int(((num_relevant > 0) & (num_relevant == num_judged)).sum()),
        "history_has_own_feedback": with_own_feedback,
        "click_rate_by_place": _click_rate_by_place(log.places, is_judged, is_relevant),
    }


def _count_histories(log: RequestLog, joined: Histories | None) -> tuple[int, int]:
    """Requests without a history, and those whose history holds an item that is relevant in the request."""
    without, with_own = 0, 0
    for block in blocks(log, joined):
        start = 0
        for request, end in enumerate(block.ends.tolist(), block.start):
            shown = slice(log.starts[request], log.starts[request + 1])
            relevant = log.items[shown][log.relevance[shown] > 0]
            without += start == end
            with_own += bool(np.isin(relevant, block.items[start:end]).any())
            start = end
    return without, with_own


def _click_rate_by_place(places: np.ndarray, is_judged: np.ndarray, is_relevant: np.ndarray) -> list[dict[str, Any]]:
    """place (from 1), candidates shown there and judged, those clicked (a grade above 0), and their share."""
    shown, clicked = np.bincount(places[is_judged]), np.bincount(places[is_relevant])
    clicked = np.pad(clicked, (0, len(shown) - len(clicked)))
    return [
        {"place": place, "shown": num_shown, "clicked": num, "share": num / num_shown if num_shown else None}
        for place, (num_shown, num) in enumerate(zip(shown.tolist(), clicked.tolist(), strict=True), 1)
    ]


def notes(metrics: dict[str, Any]) -> list[str]:
    """Lines for the log, each on a count that is not 0."""
    told = {
        "requests_without_history": "{} of {} requests have no history",
        "requests_without_relevant": "{} of {} requests have no relevant candidate: they count zero end to end",
        "requests_all_relevant": "{} of {} requests have nothing but relevant candidates: they are left out",
        "history_has_own_feedback": "{} of {} requests have a relevant item in their own history; where that is the "
        "session's own feedback, set history_gap",
    }
    lines = [text.format(metrics[name], metrics["requests"]) for name, text in told.items() if metrics[name]]
    if metrics["items_without_metadata"]:
        lines.append(f"{metrics['items_without_metadata']} of {metrics['items']} items have no metadata: no text")
    if metrics["interactions_left_out"]:
        lines.append(f"{metrics['interactions_left_out']} interactions are left out: not before the held-out requests")
    if number := metrics["items_left_out_of_histories"]:
        lines.append(f"{number} items are left out of histories: their user took them in a request of a later split")
    lines += [f"{number} rows left out: {reason}" for reason, number in metrics["left_out"].items()]
    rates = metrics["click_rate_by_place"]
    some = [rates[place] for place in sorted({0, 1, 2, 4, 9, len(rates) - 1}) if place < len(rates)]
    shares = "; ".join(f"{rate['place']}: {rate['share']:.1%}" for rate in some if rate["share"] is not None)
    return [*lines, f"click rate by place: {shares}"]
