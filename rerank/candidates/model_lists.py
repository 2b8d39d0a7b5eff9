"""What a mid-trained model finds as the next item: beam search over the semantic ids of the catalogue."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rerank import run_dir as runs
from rerank.beam_search import BeamResult, beam_search
from rerank.catalogue import Catalogue, check_vocabulary
from rerank.prefix_index import PrefixIndex


def next_items(
    model: Any,
    tokenizer: Any,
    histories: Sequence[np.ndarray],
    catalogue: Catalogue,
    num_items: int,
    num_beams: int,
    max_history: int,
    batch_size: int = 64,
) -> BeamResult:
    """The items that a model finds most likely after each history, best first, items of the history left out.

    Args:
        model: A mid-trained model.
        tokenizer: Its own.
        histories: Of each row, oldest first.
        catalogue: All that may be found.
        num_items: At most so many a row; fewer where the beams end in fewer.
        num_beams: Beams a row.
        max_history: Items of the history in the prompt.
        batch_size: Rows decoded together.
    """
    from rerank.midtrain import next_item_prompt

    def token_ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False).input_ids

    prompts = [next_item_prompt(history, catalogue, max_history, tokenizer) for history in histories]
    seen = [set(np.asarray(history).tolist()) for history in histories]
    index = PrefixIndex.build(token_ids(catalogue.semantic_ids))
    return beam_search(model, token_ids(prompts), index, num_beams, num_items, excluded=seen, batch_size=batch_size)


def load_midtrained(run_dir: Path) -> tuple[Any, Any]:
    """The mid-trained model of a run, on the GPU where there is one, and its tokenizer.

    Raises:
        FileNotFoundError: When there is no mid-trained model.
        ValueError: When it was made from other semantic ids than the run's, or does not know them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_dir / "midtrain/model"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; run the midtrain stage first")
    if runs.is_finished(run_dir, "midtrain"):
        runs.check_inputs(run_dir, "midtrain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_vocabulary(tokenizer, Catalogue.load(run_dir).semantic_ids, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder).to(device).eval(), tokenizer


def model_lists(
    run_dir: Path, histories: list[np.ndarray], num_candidates: int, num_beams: int, max_history: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mid-trained model's lists, (R, N) items and (R, N) log-probabilities, items of the history left out.

    Args:
        run_dir: With finished data, semantic_ids and midtrain stages.
        histories: Of each row, oldest first.
        num_candidates: N.
        num_beams: Beams a row, at least N.
        max_history: Items of the history in the prompt.
        batch_size: Rows decoded together.

    Raises:
        FileNotFoundError: When there is no mid-trained model.
        ValueError: When the beams of a row end in fewer than N items.
    """
    model, tokenizer = load_midtrained(run_dir)
    sizes = num_candidates, num_beams, max_history, batch_size
    found = next_items(model, tokenizer, histories, Catalogue.load(run_dir), *sizes)
    for row, items in enumerate(found.items):
        if len(items) < num_candidates:
            raise ValueError(
                f"row {row}: {num_beams} beams found {len(items)} items of the {num_candidates} that a list needs; "
                "raise num_beams"
            )
    return np.array(found.items), np.array(found.logps)
