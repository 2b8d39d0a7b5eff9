"""First-stage lists of the mid-trained model: beam search over the semantic ids of the catalogue."""

from pathlib import Path

import numpy as np

from rerank.catalogue import Catalogue


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
        ValueError: When the beams of a row end in fewer than N items.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rerank.beam_search import beam_search
    from rerank.midtrain import next_item_prompt
    from rerank.prefix_index import PrefixIndex

    folder = run_dir / "midtrain/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    catalogue = Catalogue.load(run_dir)
    index = PrefixIndex.build([tokenizer(text, add_special_tokens=False).input_ids for text in catalogue.semantic_ids])
    prompts = [next_item_prompt(history, catalogue, max_history, tokenizer) for history in histories]
    seen = [set(history.tolist()) for history in histories]
    found = beam_search(
        model, tokenizer(prompts).input_ids, index, num_beams, num_candidates, excluded=seen, batch_size=batch_size
    )
    for row, items in enumerate(found.items):
        if len(items) < num_candidates:
            raise ValueError(
                f"row {row}: {num_beams} beams found {len(items)} items of the {num_candidates} that a list needs; "
                "raise num_beams"
            )
    return np.array(found.items), np.array(found.logps)
