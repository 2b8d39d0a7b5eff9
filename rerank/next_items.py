"""What a model finds as the next item: by beam search over the catalogue, or by its item head in one forward pass."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rerank import run_dir as runs
from rerank.beam_search import BeamResult, beam_search
from rerank.catalogue import Catalogue, check_vocabulary
from rerank.item_head import FILE as HEAD_FILE
from rerank.item_head import ItemHead
from rerank.item_rows import SETTINGS, ItemRows


@dataclass(frozen=True)
class NextItemModel:
    """A language model of next items and how it is asked.

    Attributes:
        model: A Hugging Face causal language model.
        rows: Makes its prompts; knows the catalogue, and how many items a prompt holds.
        mask_first: Whether probabilities are over the catalogue's continuations, as the model was trained.
        head: Its item head, if it has one.
    """

    model: Any
    rows: ItemRows
    mask_first: bool = False
    head: ItemHead | None = None

    @classmethod
    def load_midtrained(cls, run_dir: Path) -> "NextItemModel":
        """The mid-trained model of a run.

        Raises:
            FileNotFoundError: When there is none.
            ValueError: When it was made from other semantic ids than the run's, or does not know them.
        """
        folder = run_dir / "midtrain/model"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; run the midtrain stage first")
        if runs.is_finished(run_dir, "midtrain"):
            runs.check_inputs(run_dir, "midtrain")
        max_items = yaml.safe_load((run_dir / "midtrain/recipe.yaml").read_text())["max_items"]
        return cls(*_load(folder, Catalogue.load(run_dir), "semantic_id", max_items))

    @classmethod
    def load(cls, folder: Path) -> "NextItemModel":
        """A model that the sft stage trained on its task next_item, such as RUN_DIR/sft/model.

        Raises:
            FileNotFoundError: When the folder is not there, or not of such a model.
        """
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} has no {SETTINGS}; give a model of the sft stage with task next_item")
        settings = json.loads((folder / SETTINGS).read_text())
        model, rows = _load(folder, Catalogue.load(folder), settings["item_text"], settings["max_items"])
        head = ItemHead.load(folder).to(model.device) if (folder / HEAD_FILE).is_file() else None
        if head is not None and head.is_read:
            head.add_to(model.get_input_embeddings())
        return cls(model, rows, settings["mask_first"], head)

    def with_max_history(self, max_history: int) -> "NextItemModel":
        """The same model, asked with at most so many items."""
        return replace(self, rows=replace(self.rows, max_items=max_history + 1))

    def prompts(self, histories: Sequence[np.ndarray]) -> list[list[int]]:
        """Tokens of each history's prompt, of its latest items."""
        shown = self.rows.max_items - 1
        return [self.rows.next_item_prompt(np.asarray(history)[-shown:].tolist()) for history in histories]

    def by_beams(
        self, histories: Sequence[np.ndarray], num_items: int, num_beams: int, batch_size: int = 64
    ) -> BeamResult:
        """The items found most likely after each history, best first, items of the history left out.

        Args:
            histories: Of each row, oldest first.
            num_items: At most so many a row; fewer where the beams end in fewer.
            num_beams: Beams a row.
            batch_size: Rows decoded together.
        """
        return beam_search(
            self.model,
            self.prompts(histories),
            self.rows.index,
            num_beams,
            num_items,
            excluded=[set(np.asarray(history).tolist()) for history in histories],
            batch_size=batch_size,
            mask_first=self.mask_first,
        )

    def by_head(self, histories: Sequence[np.ndarray], num_items: int, batch_size: int = 64) -> BeamResult:
        """As `by_beams`, from the item head's scores after one forward pass; `logps` are over all items.

        Raises:
            ValueError: When the model has no head.
        """
        import torch

        if self.head is None:
            raise ValueError("the model has no item head; train it with the loss cllm4rec, or search with beams")
        found = BeamResult([], [])
        prompts, embeddings = self.prompts(histories), self.model.get_input_embeddings().weight
        with torch.inference_mode():
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                logps = self.head(self._last_states(prompts[part]), embeddings).log_softmax(dim=1)
                for row, history in enumerate(histories[part]):
                    logps[row, np.unique(np.asarray(history))] = -torch.inf
                best, items = logps.topk(min(num_items, logps.shape[1]), dim=1)
                for line, values in zip(items.tolist(), best.tolist(), strict=True):
                    kept = [place for place, value in enumerate(values) if value > -np.inf]
                    found.items.append([line[place] for place in kept])
                    found.logps.append([values[place] for place in kept])
        return found

    def by_both(
        self, histories: Sequence[np.ndarray], num_items: int, num_pooled: int = 40, batch_size: int = 64
    ) -> BeamResult:
        """The head's best `num_pooled` items of each row, by the sum of both log-probabilities: of the head and of the
        item's tokens, which are computed exactly for the pool. Two views of one model: a product of experts (Hinton,
        Neural Computation 14, 2002).

        Raises:
            ValueError: When the model has no head.
        """
        pool = self.by_head(histories, num_pooled, batch_size)
        found = BeamResult([[]] * len(histories), [[]] * len(histories))
        prompts = self.prompts(histories)
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            of_tokens = self.token_logps([prompts[row] for row in batch], [pool.items[row] for row in batch])
            for row, by_tokens in zip(batch, of_tokens, strict=True):
                both = np.array(pool.logps[row]) + by_tokens
                best = np.argsort(-both, kind="stable")[:num_items]
                found.items[row] = [pool.items[row][place] for place in best]
                found.logps[row] = both[best].tolist()
        return found

    def token_logps(self, prompts: Sequence[Sequence[int]], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of each prompt's items the log-probability of their tokens, exactly; a prompt is read once for all of them.

        Args:
            prompts: Tokens.
            items: Of each prompt, any number.
        """
        import torch

        from rerank.beam_decoder import BeamDecoder, why_copied

        # letters of shapes: B prompts, K items, L tokens of an item, V vocabulary, W children of a node
        shape = len(items), max(map(len, items)), max(map(len, self.rows.tokens))
        if not shape[1]:  # the histories hold every item
            return [np.zeros(0) for _ in items]
        tokens, is_there = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        nodes = np.full(shape, self.rows.index.root)
        for row, of_row in enumerate(items):
            for column, item in enumerate(of_row):
                length = len(self.rows.tokens[item])
                tokens[row, column, :length], is_there[row, column, :length] = self.rows.tokens[item], True
                nodes[row, column, :length] = self.rows.paths[item]
        total = np.zeros(shape[:2])
        with torch.inference_mode():
            decoder = BeamDecoder(self.model, prompts, shared=why_copied(self.model) is None)
            logits = decoder.logits.expand(-1, shape[1], -1)  # (B, K, V)
            for step in range(shape[2]):
                own = logits.gather(2, torch.from_numpy(tokens[:, :, step : step + 1]).to(logits.device))[:, :, 0]
                logps = own.double() - self._competing(logits, nodes[:, :, step]).double()
                total += np.where(is_there[:, :, step], logps.cpu().numpy(), 0.0)
                if step + 1 < shape[2]:
                    parents = np.broadcast_to(np.arange(shape[1]) if step else 0, shape[:2]).copy()
                    logits = decoder.step(parents, tokens[:, :, step])
        return [total[row, : len(of_row)] for row, of_row in enumerate(items)]

    def _competing(self, logits: Any, nodes: np.ndarray) -> Any:
        """(B, K) log of the sum that a token's probability is a share of, after the nodes (B, K)."""
        import torch

        if not self.mask_first:
            return logits.float().logsumexp(dim=2)
        _, counts, table = self.rows.index.child_table(nodes.ravel())
        legal = torch.from_numpy(self.rows.index.vocabulary[table].astype(np.int64)).to(logits.device)
        scores = logits.gather(2, legal.view(*nodes.shape, -1)).float()
        is_none = torch.from_numpy(np.arange(table.shape[1]) >= counts[:, None]).to(logits.device)
        return scores.masked_fill(is_none.view(scores.shape), -np.inf).logsumexp(dim=2)

    def _last_states(self, prompts: Sequence[list[int]]) -> Any:
        """(M, H) hidden states at the end of each prompt."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        device = self.model.device
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        states = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[torch.arange(len(prompts), device=device), lengths - 1]


def _load(folder: Path, catalogue: Catalogue, item_text: str, max_items: int) -> tuple[Any, ItemRows]:
    """The model of a folder, on the GPU where there is one, and what makes its prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_vocabulary(tokenizer, catalogue.semantic_ids, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    return model, ItemRows(catalogue, tokenizer, item_text, max_items)
