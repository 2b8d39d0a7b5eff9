"""How likely a mid-trained model finds each candidate as the next item.

B rows, N candidates of a row, C all candidates of a batch, L semantic-id levels, T tokens of a prompt, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rerank.catalogue import Catalogue


def likelihood_orders(
    model_dir: Path, rows: Sequence[dict[str, Any]], catalogue: Catalogue, max_history: int, batch_size: int
) -> list[list[int]]:
    """The candidates of each row by falling likelihood of their semantic ids after the history."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rerank.evaluate.rows import best_first
    from rerank.midtrain import next_item_prompt

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [next_item_prompt(row["history"], catalogue, max_history, tokenizer) for row in rows]
    labels = [[catalogue.semantic_ids[item] for item in row["candidates"]] for row in rows]
    orders = []
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        orders += [best_first(logps) for logps in candidate_logps(model, tokenizer, prompts[batch], labels[batch])]
    return orders


def candidate_logps(
    model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    """Log-probability of each row's labels after its prompt, (N,) a row.

    A prompt is read once; its key-value cache is repeated for the candidates. Labels have the same number of tokens.
    """
    import torch

    encoded = tokenizer(
        list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)  # (B, T)
    ids = tokenizer(list(itertools.chain(*labels)), add_special_tokens=False).input_ids
    targets = torch.tensor(ids, device=model.device)  # (C, L)
    counts = torch.tensor([len(row) for row in labels])
    row_of = torch.repeat_interleave(torch.arange(len(labels)), counts).to(model.device)  # (C,)
    with torch.inference_mode():
        positions = (encoded.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        read = model(**encoded, position_ids=positions, use_cache=True, logits_to_keep=1)
        logits = read.logits[row_of]  # (C, 1, V)
        if targets.shape[1] > 1:
            read.past_key_values.batch_select_indices(row_of)
            mask = torch.cat([encoded.attention_mask[row_of], torch.ones_like(targets[:, :-1])], dim=1)
            positions = positions[row_of, -1:] + 1 + torch.arange(targets.shape[1] - 1, device=model.device)
            rest = model(
                targets[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=read.past_key_values
            )
            logits = torch.cat([logits, rest.logits], dim=1)  # (C, L, V)
        logps = logits.float().log_softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0].sum(dim=1)  # (C,)
    return [part.cpu().numpy() for part in logps.split(counts.tolist())]
