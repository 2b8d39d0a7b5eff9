"""The one patch to TRL: on CPU, its loss scores the tokens that have a label and no others, as it does on a GPU.

TRL computes log-probabilities, entropies and their gradients over the vocabulary without keeping the logits. With
Triton it does so for labelled tokens only; elsewhere for every position, because some accelerators recompile for each
shape. A CPU does not mind, and our prompts are several times as long as what is learned from them.
"""

from typing import Any


def score_labelled_tokens_only() -> None:
    """Let TRL's fused loss select labelled tokens on CPU too; other devices are left as they are.

    Raises:
        RuntimeError: When the installed TRL no longer has the function that is replaced.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    if not hasattr(utils, "_use_triton"):
        raise RuntimeError("trl.trainer.utils has no _use_triton; install the TRL version that pyproject.toml names")

    def selects(device: Any) -> bool:
        return device.type == "cpu" or chunked_logprob._use_triton(device)

    utils._use_triton = selects
