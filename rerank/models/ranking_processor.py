"""vLLM's part of constrained rankings: logits of tokens that may not come next become -inf.

An engine gets it by name (`PROCESSOR` of `rerank.models.engine`), never by an entry point: engines that sample
rollouts for training stay free, so that the format is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rerank.models.engine import GRAMMAR
from rerank.models.ranking_grammar import Choices, RankingGrammar

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class Request:
    """A request of the batch.

    Attributes:
        choices: What may come next, as far as it has read.
        output: The tokens that are written, a list that vLLM extends.
    """

    choices: Choices
    output: Sequence[int]

    def read(self) -> Choices:
        """The choices after all that is written."""
        for token in self.output[self.choices.written :]:
            self.choices.push(token)
        return self.choices


class RankingProcessor(LogitsProcessor):
    """Constrains the requests that have a grammar among their extra_args; others of a batch are left alone."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, Request] = {}

    def is_argmax_invariant(self) -> bool:
        """False: greedy decoding is constrained too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that come, go and move."""
        process_dict_updates(self.requests, batch_update, _new_request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (batch, vocabulary), changed in place."""
        constrained: list[int] = []
        kept: tuple[list[int], list[int]] = ([], [])  # rows and columns
        banned: tuple[list[int], list[int]] = ([], [])
        for row, request in self.requests.items():
            choices = request.read()
            allowed = choices.allowed()
            rows, columns = banned if allowed is None else kept
            named = choices.forbidden() if allowed is None else allowed
            rows += [row] * len(named)
            columns += named
            if allowed is not None:
                constrained.append(row)
        values = logits[kept]
        logits[constrained] = -torch.inf
        logits[kept] = values
        logits[banned] = -torch.inf
        return logits


def _new_request(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Request | None:
    options = (params.extra_args or {}).get(GRAMMAR)
    return None if options is None else Request(Choices(RankingGrammar(**options)), output)
