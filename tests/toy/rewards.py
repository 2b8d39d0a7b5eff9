"""A reward beside its recipe, as a user adds one."""

import re


def share_of_ids(completions, **columns):
    """The share of a completion's characters that lie within semantic ids, in [0, 1]."""
    ids = ["".join(re.findall(r"<s_[a-z]+_[0-9]+>", text)) for text in completions]
    return [len(found) / max(1, len(text)) for found, text in zip(ids, completions, strict=True)]
