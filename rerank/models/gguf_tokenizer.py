"""A tokenizer as its GGUF file describes it, where transformers 5.23 reads less (integrations/ggml.py)."""

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.prompts.chat import TEMPLATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a GGUF file, with its merges, the first token that it writes before every text, and the chat
    template that lies beside the file.

    SentencePiece's byte-pair encoding (Gemma) transformers reads as unigrams: they split " history" in three where the
    model knows one token, and saved and loaded again they are byte-pair encoding without merges.
    """
    tokenizer = copy.deepcopy(_read(path, path.stat().st_mtime_ns))
    template = path.parent / TEMPLATE_FILE
    if template.is_file():
        tokenizer.chat_template = template.read_text()
    return tokenizer


@lru_cache(maxsize=2)  # a large vocabulary takes half a minute; a stage asks when it checks and when it loads
def _read(path: Path, changed_at: int) -> "PreTrainedTokenizerBase":
    """The same without the template.

    Args:
        path: The file.
        changed_at: The file's time of change, so that another file of its name is read.
    """
    import gguf
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = gguf.GGUFReader(path).fields
    kind, writes_bos = (
        fields[name].contents() if name in fields else None
        for name in ("tokenizer.ggml.model", "tokenizer.ggml.add_bos_token")
    )
    read = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if kind == "llama" and read["type"] == "Unigram":
        scores = dict(read["vocab"])
        vocab = {token: place for place, token in enumerate(scores)}
        options = {"name_or_path": tokenizer.name_or_path, "chat_template": tokenizer.chat_template}
        merges = generate_merges(vocab, scores)
        tokenizer = type(tokenizer)(vocab=vocab, merges=merges, **tokenizer.special_tokens_map, **options)
    if writes_bos:
        tokenizer.add_bos_token = True
    return tokenizer
