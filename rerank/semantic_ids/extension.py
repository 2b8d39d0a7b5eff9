"""Ids of a catalogue that extends another run's: its items keep theirs, new ones get ids from its tokenizer.

N items, M items of the other run, L levels, D embedding columns, E co-engagement columns.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from rerank.launch import named_files, run_dir
from rerank.launch.files import fingerprint
from rerank.models import names
from rerank.models.saving import encoder_of
from rerank.models.text_embeddings import find_encoder
from rerank.semantic_ids import embeddings as sources
from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.assignment import assign, assign_codes, assigned_codes, check_room, load_semantic_ids
from rerank.semantic_ids.tokenizer import Tokenizer

FREE = ("run_dir", "extends", "encoder", "embeddings", "encoder_batch_size")  # options that may differ from the run's
LEAST_COSINE = 0.99  # median over items of one text: below, it is another encoder; half precision gives 0.9999
MOST_COMPARED = 1000  # items


@dataclass(frozen=True)
class OldIds:
    """The ids that are extended.

    Attributes:
        run: Folder of their run.
        item_ids, texts: (M,) of its items.
        codes: (M, L).
        tokenizer: That made them.
    """

    run: Path
    item_ids: list[str]
    texts: list[str]
    codes: np.ndarray
    tokenizer: Tokenizer

    @property
    def folder(self) -> Path:
        """Of its semantic_ids stage."""
        return run_dir.stage_dir(self.run, "semantic_ids")

    @classmethod
    def load(cls, args: SemanticIdsArguments) -> "OldIds":
        """Those that a recipe extends; a run that is not there or not finished is refused."""
        assert args.extends is not None
        run = Path(names.locate(args.extends, "extends"))
        for stage in ("data", "semantic_ids"):
            if not run_dir.is_finished(run, stage):
                raise FileNotFoundError(
                    f"extends is {args.extends}, which has no finished {stage} stage; give the folder of another run"
                )
        if run.resolve() == Path(args.run_dir).resolve():
            raise ValueError(f"extends is {args.extends}, the run itself; give an older run, or another run_dir")
        folder = run_dir.stage_dir(run, "semantic_ids")
        return cls(run, *sources.read_items(run), load_semantic_ids(folder).codes, Tokenizer.load(folder))

    def rows(self, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Places among `item_ids` of the items that the old run has, and their places there."""
        place_of = {item_id: place for place, item_id in enumerate(self.item_ids)}
        pairs = [(here, place_of[item_id]) for here, item_id in enumerate(item_ids) if item_id in place_of]
        here, there = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return here, there


def check(args: SemanticIdsArguments) -> OldIds:
    """Refuse a run that cannot be extended with this recipe: its encoder and every option of its ids must be the same.

    Raises:
        FileNotFoundError, ValueError: Naming the key, both values and the cure.
    """
    old = OldIds.load(args)
    recipe = yaml.safe_load((old.folder / "recipe.yaml").read_text())
    for option in dataclasses.fields(args):
        value, there = getattr(args, option.name), recipe.get(option.name)
        if option.name not in FREE and option.name in recipe and value not in (option.default, there):
            raise ValueError(
                f"{option.name} is {value} but {there} in {args.extends}, whose tokenizer is kept; leave it out, or "
                "leave extends out to make new ids"
            )
    _check_encoder(args, old)
    if run_dir.is_finished(args.run_dir, "data"):
        item_ids, texts = sources.read_items(args.run_dir)
        here, _ = old.rows(item_ids)
        if not len(here):
            raise ValueError(
                f"extends is {args.extends}, which has none of the {len(item_ids)} items; give another run"
            )
        num_ids = len(old.item_ids) + len(item_ids) - len(here)
        check_room(num_ids, old.tokenizer.levels, old.tokenizer.codebook_size)
        if args.embeddings is not None:
            found = sources.read_embeddings(args.embeddings, item_ids)
            check_embeddings(args, old, item_ids, texts, found)
    return old


def _check_encoder(args: SemanticIdsArguments, old: OldIds) -> None:
    """Refuse an encoder of another name and content than that of the old run."""
    known = encoder_of(old.run)
    if args.encoder is None or known is None:  # vectors are compared once they are there
        return
    found = Path(find_encoder(args.encoder))
    is_same = args.encoder == known.name and not named_files.changed([known])
    if not is_same and known.sha256 and found.exists():
        place = named_files.NamedFile("encoder", args.encoder).find()
        is_same = place is not None and fingerprint(place) == known.sha256
    if not is_same:
        raise ValueError(
            f"encoder is {args.encoder} but {args.extends} was made with {known.name}, or its files differ; give that "
            "encoder, or leave extends out to make new ids"
        )


def check_embeddings(
    args: SemanticIdsArguments, old: OldIds, item_ids: list[str], texts: list[str], embeddings: np.ndarray
) -> None:
    """Refuse embeddings (N, D) that differ from the old run's for items that both have, with one text.

    Args:
        args: Of the stage.
        old: The ids that are extended.
        item_ids, texts: (N,) of the items.
        embeddings: Theirs, of length one or not.
    """
    before = np.load(old.folder / "embeddings.npy", mmap_mode="r")
    cure = f"give those of the encoder that {args.extends} was made with, or leave extends out to make new ids"
    if embeddings.shape[1] != before.shape[1]:
        problem = f"has {embeddings.shape[1]} columns but {args.extends} {before.shape[1]}"
        raise ValueError(f"{args.source} {problem}; {cure}")
    here, there = old.rows(item_ids)
    same = [texts[one] == old.texts[other] for one, other in zip(here.tolist(), there.tolist(), strict=True)]
    chosen = np.flatnonzero(same)[:MOST_COMPARED]
    if not len(chosen):
        return
    now, then = np.asarray(embeddings[here[chosen]], dtype=float), np.asarray(before[there[chosen]], dtype=float)
    cosines = (now * then).sum(axis=1) / np.linalg.norm(now, axis=1) / np.linalg.norm(then, axis=1)
    if np.median(cosines) < LEAST_COSINE:
        raise ValueError(
            f"{args.source}: embeddings of {len(chosen)} items that {args.extends} has too are others there (median "
            f"cosine {np.median(cosines):.2f}); {cure}"
        )


@dataclass(frozen=True)
class ExtendedIds:
    """Ids of all items, (N, L), before and after collisions of the new ones were resolved, and what is to be told."""

    embeddings: np.ndarray  # (N, D + E) that they were made from
    before: np.ndarray
    after: np.ndarray
    words: str
    metrics: dict[str, object]


def extend(args: SemanticIdsArguments, old: OldIds, of_text: np.ndarray, out_dir: Path) -> ExtendedIds:
    """The old ids bit for bit, and ids for the new items that no item of either run has.

    Args:
        args: Of the stage.
        old: The ids that are extended.
        of_text: (N, D) embeddings of the items' texts.
        out_dir: Where embeddings with co-engagement are written; a new item has none.
    """
    item_ids, texts = sources.read_items(args.run_dir)
    check_embeddings(args, old, item_ids, texts, of_text)
    here, there = old.rows(item_ids)
    is_new = ~np.isin(np.arange(len(item_ids)), here)
    new = np.asarray(of_text[is_new])
    embeddings = _with_old_co_engagement(old, here, there, of_text, out_dir)
    before = np.empty((len(item_ids), old.tokenizer.levels), dtype=np.int64)
    after = before.copy()
    stored = assigned_codes(old.folder, old.tokenizer, sources.load_id_embeddings(old.folder))
    before[here], after[here] = stored[there], old.codes[there]
    if is_new.any():
        before[is_new] = assign_codes(old.tokenizer, np.asarray(embeddings[is_new]), len(old.codes))
        after[is_new] = assign(old.tokenizer, new, old.codes)
    shares = unseen_shares(after[is_new], old.codes)
    metrics: dict[str, object] = {"extends": args.extends, "num_new": int(is_new.sum())}
    metrics |= {"num_gone": len(old.item_ids) - len(here)}
    metrics |= {"new_under_an_unseen_prefix": shares[0], "new_with_an_unseen_code": shares[1]}
    return ExtendedIds(embeddings, before, after, unseen_words(after[is_new], old.codes), metrics)


def _with_old_co_engagement(
    old: OldIds, here: np.ndarray, there: np.ndarray, of_text: np.ndarray, out_dir: Path
) -> np.ndarray:
    """(N, D + E) embeddings with the old items' co-engagement beside the text's; zeros for new items."""
    columns = old.tokenizer.co_engagement_columns
    if not columns:
        return of_text
    vectors = np.zeros((len(of_text), columns), dtype=np.float32)
    vectors[here] = sources.load_id_embeddings(old.folder)[there, -columns:]
    return sources.save_with_co_engagement(of_text, vectors, 1.0, out_dir / sources.ID_EMBEDDINGS)


def unseen_shares(codes: np.ndarray, trained: np.ndarray) -> tuple[float, float]:
    """Shares of new ids (N, L) whose first code, and any code at its level, none of the trained ids (M, L) has."""
    if not len(codes):
        return 0.0, 0.0
    is_new = np.stack([~np.isin(of_new, seen) for of_new, seen in zip(codes.T, trained.T, strict=True)], axis=1)
    return float(is_new[:, 0].mean()), float(is_new.any(axis=1).mean())


def unseen_words(codes: np.ndarray, trained: np.ndarray) -> str:
    """The shares of `unseen_shares` in a sentence."""
    prefix, code = unseen_shares(codes, trained)
    return (
        f"ids of {len(codes)} new items: {prefix:.0%} under a first-level prefix that no item of training has, "
        f"{code:.0%} with a code that none has on its level"
    )
