"""A run whose users' last two items are held out, and a model of next items that the sft stage trained on it."""

import shutil
from pathlib import Path

import numpy as np
from tiny_model import sft_config
from toy_run import CATALOGUE, NUM_ITEMS, toy_sequences, write_interactions, write_run
from trl import ModelConfig

from rerank import sft
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.models import base as base_model
from rerank.next_item.encoder import NextItemEncoder

LOSSES = [
    {"name": "bear"},
    {"name": "iirg", "kwargs": {"collaborative_weight": 0.5, "semantic_weight": 2.0}},
    {"name": "cllm4rec", "kwargs": {"regularisation": 3.0}},
]


def write_next_item_run(folder: Path) -> Path:
    """A run with finished data, ids and a mid-trained model; each user's last two items are held out."""
    run = write_run(folder)
    walks = {user: list(dict.fromkeys(walk.tolist())) for user, walk in toy_sequences().items()}
    splits = [split for walk in walks.values() for split in ["train"] * (len(walk) - 3) + ["rerank", "valid", "test"]]
    write_interactions(run / "data", walks, splits, items=NUM_ITEMS, users=30, interactions=len(splits))
    angles = 2 * np.pi * np.arange(NUM_ITEMS) / NUM_ITEMS  # items lie on a circle
    np.save(run / "semantic_ids/embeddings.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    return run


def load(run: Path):
    """The mid-trained model and its tokenizer."""
    return base_model.load_pretrained(str(run / "midtrain/model"))


def make_encoder(run: Path, **options) -> NextItemEncoder:
    """The encoder of the run's rows."""
    settings = {"catalogue": CATALOGUE, "item_text": "semantic_id", "max_items": 5, "run": str(run), **options}
    return NextItemEncoder(tokenizer=load(run)[1], **settings)


def train(run: Path) -> Path:
    """Let the sft stage train a model of next items in the run: bear, iirg and cllm4rec together."""
    folder = run_dir.partial_dir(run, "sft")
    args = sft.SftArguments(run_dir=str(run), task="next_item", losses=LOSSES, max_items=5)
    options = {"max_steps": 80, "learning_rate": 5e-3, "per_device_train_batch_size": 16, "logging_steps": 20}
    config = sft_config(folder / "checkpoints", max_length=64, **options)
    folder.mkdir(exist_ok=True)
    shutil.rmtree(run / "sft")
    metrics = sft.main(args, config, ModelConfig(), folder)
    folder.rename(run / "sft")
    write_json(run / "sft/metrics.json", metrics)
    return run
