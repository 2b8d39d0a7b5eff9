"""The README.md of a trained model folder: what it is, what it was made from, and its data's terms of use."""

from pathlib import Path

from rerank import run_dir

RANKER = """A re-ranker of recommendations

Reads a user's history and {num_candidates} candidates and writes {answer}, best first.
Rank new rows with `rerank rank FOLDER --rows FILE --out FILE`; the weights load with `AutoModelForCausalLM`."""
LANGUAGE_MODEL = """A language model that knows a catalogue

Knows every item as a few tokens, its semantic id, and is the start of a re-ranker (the stages sft and dapo). It is no
ranker itself. The weights load with `AutoModelForCausalLM`."""
NEXT_ITEM = """A model of next items

Reads a user's history as items and writes the item that follows, by beam search over the catalogue. Load it with
`rerank.next_items.NextItemModel`, which brings its item head along where it has one (`item_head.safetensors`, whose
vectors the model reads, too, if it was trained so). The weights load with `AutoModelForCausalLM`."""
CARD = """\
---
library_name: transformers
tags: [recommendation, re-ranking]
---
# {what}

- Base model: {base}
- Stages of training: {stages}
- Items: {items}; users: {users}; interactions: {interactions}

## Terms of the data

{terms}
"""


def ranker(num_candidates: int, trace: bool) -> str:
    """What a ranking model's card says of it."""
    answer = "its reasons and then the candidates" if trace else "the candidates"
    return RANKER.format(num_candidates=num_candidates, answer=answer)


def write(folder: Path, run: str | Path, stage: str, what: str, base: str | None) -> None:
    """Write `folder`/README.md.

    Args:
        folder: Of the model.
        run: The run, whose data stage is finished.
        stage: The last of `run_dir.TRAINING_STAGES` that the model went through.
        what: A title and a paragraph.
        base: The base model's name; None for one made from the recipe.
    """
    data = run_dir.read_metrics(run, "data")
    text = CARD.format(
        what=what,
        base=base or "a small Qwen3-shaped one, trained from random weights",
        stages=", ".join(run_dir.TRAINING_STAGES[: run_dir.TRAINING_STAGES.index(stage) + 1]),
        **{name: data[name] for name in ("items", "users", "interactions")},
        terms=data.get("terms") or "The recipe states none (`terms` of the data stage). Ask whoever owns the data.",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
