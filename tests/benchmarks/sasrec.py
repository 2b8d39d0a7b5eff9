"""SASRec, trained with cross-entropy over all items by RecTools, as a row beside the mid-trained model.

Reads the split of a run and writes lists for the evaluate stage, which computes every metric. The number of epochs is
chosen on validation rows. In an environment of its own, which the first line makes:

    python -m tests.benchmarks.baselines
    .venv-baselines/bin/python -m tests.benchmarks.sasrec runs/beauty_next --out runs/sasrec
    rerank run recipes/beauty_next --only evaluate evaluate.split=test \
        'evaluate.lists={sasrec: runs/sasrec/test.parquet}'
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.lightning import TransformerLightningModule

LIST_LENGTH = 10
PARTS = {"valid": ("train", "rerank"), "test": ("train", "rerank", "valid")}  # what a row's history consists of


class LabelledPositions(TransformerLightningModule):
    """RecTools' softmax loss, with logits only where there is a next item: most of a batch is padding."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        has_next = batch["y"] != 0
        items = self.torch_model.item_model.get_all_embeddings()
        sessions = self.torch_model.encode_sessions(batch, items)[has_next]
        return torch.nn.functional.cross_entropy(sessions @ items.T, batch["y"][has_next])


def interactions(run: Path, parts: tuple[str, ...]) -> Dataset:
    """The interactions of some splits; a position becomes a day, as RecTools orders by time."""
    table = pq.read_table(run / "data/interactions.parquet", filters=[("split", "in", parts)]).to_pandas()
    days = pd.Timestamp("2000-01-01") + pd.to_timedelta(table["position"], unit="D")
    frame = {Columns.User: table["user"], Columns.Item: table["item"], Columns.Weight: 1.0, Columns.Datetime: days}
    return Dataset.construct(pd.DataFrame(frame))


def last_rows(run: Path, split: str) -> pd.DataFrame:
    """A split's rows; each must be the only one of its user, since RecTools ranks for users."""
    rows = pq.read_table(run / "data/rows.parquet", filters=[("split", "=", split)]).to_pandas()
    if rows["user"].duplicated().any():
        raise SystemExit(f"{run}: a user has several {split} rows; use a leave-one-out split")
    return rows


def lists(model: SASRecModel, data: Dataset, rows: pd.DataFrame) -> pd.Series:
    """User to items, best first, items of the history left out."""
    found = model.recommend(users=rows["user"].to_numpy(), dataset=data, k=LIST_LENGTH, filter_viewed=True)
    return found.sort_values([Columns.User, Columns.Rank]).groupby(Columns.User)[Columns.Item].apply(list)


def recall(ranked: pd.Series, rows: pd.DataFrame) -> float:
    """Share of the rows whose target is in its list: to choose the epoch by."""
    return sum(t in ranked[u] for u, t in zip(rows["user"], rows["target"], strict=True)) / len(rows)


def write(ranked: pd.Series, rows: pd.DataFrame, run: Path, path: Path) -> None:
    items = pq.read_table(run / "data/items.parquet").sort_by("item")["item_id"].to_pylist()
    candidates = [[items[item] for item in ranked[user]] for user in rows["user"]]
    pq.write_table(pa.table({"row_id": rows["row_id"].to_numpy(), "candidates": candidates}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run with a finished data stage")
    parser.add_argument("--out", type=Path, required=True, help="folder for valid.parquet and test.parquet")
    parser.add_argument("--epochs", type=int, default=100, help="at most (%(default)s)")
    parser.add_argument("--every", type=int, default=5, help="epochs between validations (%(default)s)")
    parser.add_argument("--patience", type=int, default=3, help="validations without a gain (%(default)s)")
    parser.add_argument("--factors", type=int, default=128, help="width (%(default)s)")
    parser.add_argument("--max_items", type=int, default=20, help="read of a history, as in the recipe (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.5, help="(%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = SASRecModel(
        loss="softmax",
        n_blocks=2,
        n_heads=2,
        n_factors=args.factors,
        dropout_rate=args.dropout,
        session_max_len=args.max_items,
        lr=0.001,
        batch_size=128,
        item_net_block_types=(IdEmbeddingsItemNet,),
        lightning_module_type=LabelledPositions,
        deterministic=True,
        recommend_torch_device="cpu",
    )
    data = {split: interactions(args.run, parts) for split, parts in PARTS.items()}
    rows = {split: last_rows(args.run, split) for split in PARTS}
    best, best_epoch, began = -1.0, 0, time.perf_counter()
    for epoch in range(args.every, args.epochs + 1, args.every):
        model.fit_partial(data["valid"], min_epochs=args.every, max_epochs=args.every)
        ranked = lists(model, data["valid"], rows["valid"])
        value = recall(ranked, rows["valid"])
        print(f"epoch {epoch}: validation recall@10 {value:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
        if value > best:
            best, best_epoch = value, epoch
            write(ranked, rows["valid"], args.run, args.out / "valid.parquet")
            write(lists(model, data["test"], rows["test"]), rows["test"], args.run, args.out / "test.parquet")
        elif epoch - best_epoch >= args.patience * args.every:
            break
    seconds = time.perf_counter() - began
    print(json.dumps({"best_epoch": best_epoch, "validation_recall@10": best, "seconds": seconds}))


if __name__ == "__main__":
    main()
