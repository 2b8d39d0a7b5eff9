"""The README.md of a trained model: its use, its origin, and its data's terms of use."""

from pathlib import Path

from rerank.launch import run_dir
from rerank.launch.files import write_text
from rerank.launch.stages import STAGES, load_stage

RANKER = """A re-ranker of recommendations

Reads a user's history and {num_candidates} candidates and {answer}, best first.
Rank new rows with `rerank rank FOLDER --rows FILE --out FILE`; the weights load with `AutoModelForCausalLM`."""
LANGUAGE_MODEL = """A language model that knows a catalogue

Knows every item as a few tokens, its semantic id, and is the start of a re-ranker (the stages sft and dapo). It is no
ranker itself. The weights load with `AutoModelForCausalLM`."""
WITHOUT_IDS = """A small language model that sorts lists

Knows the words of a catalogue's items and how to sort lists by their facts, and is the start of a re-ranker (the
stages sft and dapo). It is no ranker itself. The weights load with `AutoModelForCausalLM`."""
NEXT_ITEM = """A model of next items

Reads a user's history as items and writes the item that follows, by beam search over the catalogue. Load it with
`rerank.next_item.model.NextItemModel`, which brings its item head along where it has one (`item_head.safetensors`,
whose vectors the model reads, too, if it was trained so). The weights load with `AutoModelForCausalLM`."""
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


def ranker(shortest: int, longest: int, trace: bool, one_token: bool = False) -> str:
    """The title and paragraph of a ranking model, trained on lists of these lengths."""
    answer = "writes its reasons and then the candidates" if trace else "writes the candidates"
    if one_token:
        answer = "ranks them by the probabilities of their labels as the next token"
    num_candidates = str(longest) if shortest == longest else f"{shortest} to {longest}"
    return RANKER.format(num_candidates=num_candidates, answer=answer)


def write(folder: Path, run: str | Path, stage: str, what: str, base: str | None) -> None:
    """Write `folder`/README.md.

    Args:
        folder: The model's.
        run: The run, whose data stage is finished.
        stage: The model's last training stage.
        what: A title and a paragraph.
        base: The base model's name; None for a small model made from the recipe.
    """
    data = run_dir.read_metrics(run, "data")
    before = [name for name in list(STAGES)[: list(STAGES).index(stage)] if run_dir.is_finished(run, name)]
    text = CARD.format(
        what=what,
        base=base or "a small Qwen3-shaped one, trained from random weights",
        stages=", ".join(name for name in [*before, stage] if load_stage(name).trains),
        **{name: data[name] for name in ("items", "users", "interactions")},
        terms=data.get("terms") or "The recipe states none (`terms` of the data stage). Ask whoever owns the data.",
    )
    write_text(folder / "README.md", text)
