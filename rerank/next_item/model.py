"""A model of next items, asked by beam search, by its item head in one forward pass, or for given items.

R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence

from rerank.catalogue import Catalogue, check_vocabulary
from rerank.launch import run_dir as runs
from rerank.metrics import best_first
from rerank.models.base import with_exact_attention
from rerank.next_item.beam_decoder import BeamDecoder, log_total, shared_cache_obstacle, valid_logits
from rerank.next_item.beam_search import BeamResult, batches_by_length, beam_search
from rerank.next_item.encoder import NextItemEncoder, load_tokenizer
from rerank.next_item.item_head import FILE as HEAD_FILE
from rerank.next_item.item_head import ItemHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rerank.rows import RankingRow

Histories = Sequence[np.ndarray] | Sequence[Sequence[int]]  # R lists of items, oldest first


@dataclass(frozen=True)
class NextItemModel:
    """A language model of next items and how it is asked.

    Attributes:
        model: A Hugging Face causal language model.
        encoder: Makes its prompts; knows the catalogue, the number of items in a prompt, and whether probabilities
            are over the catalogue's valid continuations.
        head: Its item head, if it has one.
    """

    model: "PreTrainedModel"
    encoder: NextItemEncoder
    head: ItemHead | None = None

    @classmethod
    def load_midtrained(cls, run_dir: Path, dtype: str = "auto") -> "NextItemModel":
        """The mid-trained model of a run, in its own precision or another.

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
        encoder = NextItemEncoder(Catalogue.load(run_dir), load_tokenizer(folder), "semantic_id", max_items)
        return cls(_load(folder, encoder, dtype), encoder)

    @classmethod
    def load(cls, folder: Path) -> "NextItemModel":
        """A model that the sft stage trained on its task next_item, such as RUN_DIR/sft/model."""
        encoder = NextItemEncoder.load(folder)
        model = _load(folder, encoder)
        head = ItemHead.load(folder).to(model.device) if (folder / HEAD_FILE).is_file() else None
        if head is not None and head.is_read:
            head.add_to(model.get_input_embeddings())
        return cls(model, encoder, head)

    def with_max_history(self, max_history: int) -> "NextItemModel":
        """The same model, asked with at most the last `max_history` items."""
        return replace(self, encoder=replace(self.encoder, max_items=max_history + 1))

    def prompts(self, histories: Histories) -> list[list[int]]:
        """Tokens of each history's prompt, of its latest items."""
        shown = self.encoder.max_items - 1
        return [self.encoder.next_item_prompt(np.asarray(history)[-shown:].tolist()) for history in histories]

    def by_beams(
        self, histories: Histories, num_items: int, num_beams: int, batch_size: int = 64, exclude_seen: bool = True
    ) -> BeamResult:
        """The items found most likely after each history, best first.

        Args:
            histories: Of each row, oldest first.
            num_items: At most, per row; fewer where the beams end in fewer.
            num_beams: Beams a row.
            batch_size: Rows decoded together.
            exclude_seen: Whether the items of a history are left out.
        """
        seen = [set(np.asarray(history).tolist()) if exclude_seen else set() for history in histories]
        return beam_search(
            self.model, self.prompts(histories), self.encoder.index, num_beams, num_items, excluded=seen,
            batch_size=batch_size, constrained=self.encoder.constrained,
        )  # fmt: skip

    def by_head(
        self, histories: Histories, num_items: int, batch_size: int = 64, exclude_seen: bool = True
    ) -> BeamResult:
        """As `by_beams`, from the item head's scores after one forward pass; `logps` are over all items."""
        if self.head is None:
            raise ValueError("the model has no item head; train it with the loss cllm4rec, or search with beams")
        found = BeamResult([], [])
        prompts, embeddings = self.prompts(histories), self.model.get_input_embeddings().weight
        with torch.inference_mode():
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                logps = self.head(self._last_states(prompts[part]), embeddings).log_softmax(dim=1)
                for row, history in enumerate(histories[part] if exclude_seen else ()):
                    logps[row, np.unique(np.asarray(history))] = -torch.inf
                best, items = logps.topk(min(num_items, logps.shape[1]), dim=1)
                for line, values in zip(items.tolist(), best.tolist(), strict=True):
                    num_free = sum(value > -np.inf for value in values)  # the items of the history come last
                    found.items.append(line[:num_free])
                    found.logps.append(values[:num_free])
        return found

    def by_both(self, histories: Histories, num_items: int, num_pooled: int = 40, batch_size: int = 64) -> BeamResult:
        """The head's best `num_pooled` items of each row, by the sum of both log-probabilities: of the head and of the
        item's tokens. Two views of one model: a product of experts (Hinton, Neural Computation 14, 2002).
        """
        pool, found = self.by_head(histories, num_pooled, batch_size), BeamResult([], [])
        by_tokens = self.token_logps(histories, pool.items, batch_size)
        for items, by_head, logps in zip(pool.items, pool.logps, by_tokens, strict=True):
            both = np.array(by_head) + logps
            best = best_first(both)[:num_items]
            found.items.append([items[place] for place in best])
            found.logps.append(both[best].tolist())
        return found

    def token_logps(
        self, histories: Histories, items: Sequence[Sequence[int]], batch_size: int = 64
    ) -> list[np.ndarray]:
        """Log-probability of each row's items (K,) after its history, exactly.

        Args:
            histories: Of each row, oldest first.
            items: Of each row, any number.
            batch_size: Rows read together.
        """
        return [logps.sum(axis=1) for logps, _ in self.token_scores(histories, items, batch_size)]

    def token_scores(
        self, histories: Histories, items: Sequence[Sequence[int]], batch_size: int = 64
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each token of each row's items (K, L), after the history and the item's own tokens before, its
        log-probability and the number of valid tokens that are more probable; both 0 after an item's end.

        A prompt is read once for all its items. L is the length of the catalogue's longest item.
        """
        prompts = self.prompts(histories)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for batch in batches_by_length(prompts, batch_size):
            logps, better = self._token_scores([prompts[row] for row in batch], [items[row] for row in batch])
            found |= {row: (logps[k, : len(items[row])], better[k, : len(items[row])]) for k, row in enumerate(batch)}
        return [found[row] for row in range(len(prompts))]

    def _token_scores(
        self, prompts: Sequence[Sequence[int]], items: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`token_scores` of one batch, (B, K, L) each, for B prompts with at most K items."""
        shape = len(items), max(map(len, items)), max(map(len, self.encoder.tokens))
        nodes, logps, is_there = np.full(shape, self.encoder.index.root), np.zeros(shape), np.zeros(shape, dtype=bool)
        tokens, better = np.zeros((2, *shape), dtype=np.int64)
        for row, of_row in enumerate(items):
            for column, item in enumerate(of_row):
                place = row, column, slice(len(self.encoder.tokens[item]))
                tokens[place], nodes[place] = self.encoder.tokens[item], self.encoder.paths[item]
                is_there[place] = True
        if not is_there.any():  # the histories hold every item
            return logps, better
        with torch.inference_mode():
            decoder = BeamDecoder(self.model, prompts, shared=shared_cache_obstacle(self.model) is None)
            logits = decoder.logits.expand(-1, shape[1], -1)  # (B, K, V)
            for step in range(int(is_there.sum(axis=2).max())):
                if step:
                    parents = np.broadcast_to(np.arange(shape[1]) if step > 1 else 0, shape[:2]).copy()
                    logits = decoder.step(parents, tokens[:, :, step - 1])
                own = logits.gather(2, torch.from_numpy(tokens[:, :, step : step + 1]).to(logits.device))
                valid, _, _ = valid_logits(logits, nodes[:, :, step], self.encoder.index)
                total = log_total(logits, valid, self.encoder.constrained)
                logps[:, :, step] = (own[:, :, 0].double() - total.double()).cpu().numpy()
                better[:, :, step] = (valid > own).sum(dim=2).cpu().numpy()
        return np.where(is_there, logps, 0.0), np.where(is_there, better, 0)

    def _last_states(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """(M, H) hidden states at the end of each prompt."""
        device = self.model.device
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        states: torch.Tensor = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[torch.arange(len(prompts), device=device), lengths - 1]


def likelihood_orders(model: NextItemModel, rows: "Sequence[RankingRow]", batch_size: int) -> list[list[int]]:
    """Positions of each row's candidates by falling likelihood after its history."""
    logps = model.token_logps([row.history for row in rows], [row.candidates for row in rows], batch_size)
    return [best_first(of_row) for of_row in logps]


def _load(folder: Path, encoder: NextItemEncoder, dtype: str = "auto") -> "PreTrainedModel":
    """The model of a folder, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    check_vocabulary(encoder.tokenizer, encoder.catalogue.semantic_ids, folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = with_exact_attention(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]
