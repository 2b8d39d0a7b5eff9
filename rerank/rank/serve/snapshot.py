"""All that a server reads of a model folder beside the weights, as it is at one time."""

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from rerank.models.one_token import MOST_LABELS
from rerank.models.ranker import RankingModel
from rerank.models.saving import SOURCES_FILE, ItemSources
from rerank.next_item.encoder import SETTINGS
from rerank.prompts import word_labels
from rerank.prompts.fields import SEMANTIC_ID
from rerank.rank.encoder import RowEncoder
from rerank.rank.model_folder import find, old_folder
from rerank.rows import PromptedRow, RankingRow

logger = logging.getLogger(__name__)

MOST_DOCUMENTS = 1000
TRIES, PAUSE = 5, 0.1  # at a folder that is swapped meanwhile, and seconds between them
WEIGHTS = ("*.safetensors", "config.json", "generation.json", "prompt.json", "tokenizer.json")

Fingerprint = dict[str, tuple[int, int]]  # sizes and times of change of files by name


@dataclass(frozen=True)
class Snapshot:
    """A model folder, read.

    Attributes:
        path: As it was named, which may be a link that is given another target.
        folder: Where it is.
        encoder: Makes requests ready for the model.
        sources: How it came to know its items; None where it cannot take new ones.
        most_documents: Of a request.
        loaded_at: Seconds since 1970.
        changed_at: When the catalogue was written, likewise.
        fingerprint: Of the weights, the tokenizer and the settings, which a reload must find as they were.
    """

    path: Path
    folder: Path
    encoder: RowEncoder
    sources: ItemSources | None
    most_documents: int
    loaded_at: int
    changed_at: float
    fingerprint: Fingerprint

    @classmethod
    def load(cls, model_dir: str | Path, unknown: str, one_token: bool, context: int | None = None) -> "Snapshot":
        """Read a folder; one that is swapped for a newer one meanwhile is read again.

        Args:
            model_dir: Of the sft or dapo stage.
            unknown, one_token, context: As of RowEncoder.

        Raises:
            FileNotFoundError, ValueError: In one line, for a folder that is not there, is not a re-ranker's, is of
                another version, or whose answers cannot be made rankings.
        """
        for _ in range(TRIES):
            began = _inode(model_dir)
            try:
                found = cls._read(Path(model_dir).absolute(), unknown, one_token, context)
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"{model_dir} is of another version of rerank ({error}); serve it with that version, or train it "
                    "anew"
                ) from None
            except JSONDecodeError as error:
                raise ValueError(f"a file of {model_dir} is not whole ({error}); copy it again") from None
            except FileNotFoundError:
                old = old_folder(Path(model_dir).resolve())
                if began is not None and began == _inode(model_dir) or not old.is_dir():
                    raise
                time.sleep(PAUSE)  # between the two renames of an update
                continue
            if began == _inode(model_dir):
                return found
        raise ValueError(f"{model_dir} is being replaced again and again; try again when nothing updates it")

    @classmethod
    def _read(cls, path: Path, unknown: str, one_token: bool, context: int | None) -> "Snapshot":
        folder = find(path)
        check_folder(folder)
        model = RankingModel.load(folder)
        encoder = RowEncoder(model, model.load_counts(), unknown, one_token, context)
        encoder.tokenizer  # noqa: B018  # read now, not with the first request
        sources = ItemSources.load(folder) if (folder / SOURCES_FILE).is_file() else None
        most, changed_at = most_documents(encoder), (folder / "catalogue.parquet").stat().st_mtime
        return cls(path, folder, encoder, sources, most, int(time.time()), changed_at, fingerprint(folder))

    def renewed(self) -> "Snapshot":
        """The folder as it is now.

        Raises:
            ValueError: When it has other weights, tokenizer or prompt settings than the engine serves.
        """
        encoder = self.encoder
        found = Snapshot.load(self.path, encoder.unknown, encoder.one_token, encoder.context)
        changed = [name for name in self.fingerprint if found.fingerprint.get(name) != self.fingerprint[name]]
        if changed:
            raise ValueError(
                f"{found.folder} has another {changed[0]} than the one that is served; start the server anew for it"
            )
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """The model's labels, its catalogue and its limits."""
        model, counts = self.encoder.model, self.encoder.counts
        return {
            "labels": model.prompter.settings.ranking,
            "max_documents": self.most_documents,
            "max_model_len": self.encoder.context,
            "items": len(model.prompter.catalogue),
            "catalogue_date": f"{datetime.fromtimestamp(self.changed_at, UTC):%Y-%m-%d}",
            "counts_until": None if counts is None or counts.until is None else counts.latest,
        }


def _inode(model_dir: str | Path) -> int | None:
    """Number of a folder, which another one in its place does not have; None where there is none."""
    return Path(model_dir).stat().st_ino if Path(model_dir).exists() else None


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a re-ranker's."""
    if (folder / SETTINGS).is_file():
        raise ValueError(f"{folder} is a model of next items, which ranks no lists; serve a model of task: rerank")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give a model folder such as RUN_DIR/dapo/model")


def fingerprint(folder: Path) -> Fingerprint:
    """Size and time of change of the files that an engine was started with."""
    paths = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def most_documents(encoder: RowEncoder) -> int:
    """Candidates of the longest list that the model can rank, whatever their texts.

    Raises:
        ValueError: When it cannot rank two.
    """
    settings, catalogue = encoder.model.prompter.settings, encoder.model.prompter.catalogue
    most = encoder.most_labels or MOST_DOCUMENTS
    most = min(most, MOST_LABELS) if encoder.one_token else most
    distinct = list(dict.fromkeys(catalogue.semantic_ids)) if settings.ranking == SEMANTIC_ID else None

    def problem(number: int) -> str:
        labels = word_labels(settings.ranking, number) if distinct is None else distinct[:number]
        row = RankingRow(0, (), tuple(range(len(labels))))
        limit = encoder.model.max_completion_tokens
        rules = encoder.rules(PromptedRow(row, "", labels, limit, settings.top_k))
        return rules if isinstance(rules, str) else ""

    if reason := problem(2):
        raise ValueError(f"{encoder.model.folder} cannot be served: {reason}")
    low, high = 2, most + 1  # the first is ranked, the second is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if problem(middle) else (middle, high)
    return low
