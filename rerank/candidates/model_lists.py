"""Lists of a language model: what it finds as the next item, in the whole catalogue."""

from pathlib import Path

import numpy as np

from rerank.next_items import NextItemModel


def model_lists(
    model: NextItemModel, histories: list[np.ndarray], num_candidates: int, num_beams: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A model's lists, (R, N) items and (R, N) log-probabilities, items of the history left out.

    Args:
        model: Mid-trained, or trained on next items.
        histories: Of each row, oldest first.
        num_candidates: N.
        num_beams: Beams a row, at least N; 0 for the model's item head.
        batch_size: Rows decoded together.

    Raises:
        ValueError: When a row has fewer than N items.
    """
    if num_beams:
        found = model.by_beams(histories, num_candidates, num_beams, batch_size)
    else:
        found = model.by_head(histories, num_candidates, batch_size)
    for row, items in enumerate(found.items):
        if len(items) < num_candidates:
            cure = "raise num_beams" if num_beams else "lower num_candidates"
            raise ValueError(f"row {row}: found {len(items)} items of the {num_candidates} that a list needs; {cure}")
    return np.array(found.items), np.array(found.logps)


def load_model(run_dir: Path, model_dir: str | None, max_history: int) -> NextItemModel:
    """The model that makes the lists: of a folder, or the run's mid-trained one."""
    found = NextItemModel.load(Path(model_dir)) if model_dir else NextItemModel.load_midtrained(run_dir)
    return found.with_max_history(max_history)
