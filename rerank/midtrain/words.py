"""The words that the tokenizer of a small model has as one token each."""

import logging
import math
from typing import TYPE_CHECKING

from rerank.baselines.pairs import MANY_ITEMS
from rerank.grading import GRADES, trace_words
from rerank.launch import run_dir
from rerank.midtrain.documents import PROMPT_WORDS
from rerank.prompts import FACTS, word_labels
from rerank.prompts.facts import code_words, coded
from rerank.rows import has_lists
from rerank.rows.checks import list_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rerank.midtrain import MidtrainArguments

UNWEIGHTED = ("fit_history", "fit_recent")  # facts of the linear model, which knows the most popular items alone

logger = logging.getLogger(__name__)


def fixed_words(args: "MidtrainArguments", num_items: int = 0) -> list[str]:
    """The words that a small tokenizer has as one token each: of facts, labels, traces and short prompts.

    Args:
        args: Which facts and labels.
        num_items: Of the catalogue; in a large one the facts of the linear model are not known of every item.
    """
    names = [*FACTS, *(name for name in args.list_facts if name not in FACTS)]
    labels = word_labels("letter", args.longest_list) if args.list_labels == "letter" else []
    unknown = [coded(name, math.nan) for name in UNWEIGHTED] if num_items >= MANY_ITEMS else []
    return [*code_words(names, args.num_buckets), *unknown, *trace_words(args.longest_list, labels), *PROMPT_WORDS]


def warn_of_split_words(tokenizer: "PreTrainedTokenizerBase", args: "MidtrainArguments") -> None:
    """Say which words of the recipe's lists the vocabulary has no room for."""
    is_word = args.list_labels in ("number", "letter")
    labels = word_labels(args.list_labels, args.longest_list) if is_word else []
    words = [f" {word}" for word in (*code_words(args.list_facts, args.num_buckets), *GRADES, *labels)]
    split = [word for word, ids in zip(words, tokenizer(words).input_ids, strict=True) if len(ids) > 1]
    if split:
        logger.warning(
            "vocab_size %d leaves %d of %d words of lists in several tokens, such as %r; raise it",
            args.vocab_size, len(split), len(words), split[0],
        )  # fmt: skip


def warn_of_longer_lists(args: "MidtrainArguments") -> None:
    """Say that a log has longer lists than the exercises; of another first stage the lists are not known yet."""
    if not has_lists(args.run_dir):
        return
    path = run_dir.stage_dir(args.run_dir, "data") / "rows.parquet"
    _, longest = list_lengths(path)
    if longest > args.longest_list:
        logger.warning(
            "longest_list is %d but the longest list of %s has %d candidates: mid-training shows none as long, and to "
            "a small model numbers above %d are several tokens; set longest_list: %d, with a max_length for it",
            args.longest_list, path, longest, args.longest_list, longest,
        )  # fmt: skip
