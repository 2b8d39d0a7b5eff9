"""Rows of the task rerank: a list, a trace and a ranking as token ids; and what a re-ranker needs beside its model."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from rerank import model_card, run_dir
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings, candidate_labels, completion, render, rerank_prompt


def training_rows(run: str, used_for: str) -> list[dict[str, Any]]:
    """The hit rows of the training list that the traces stage assigned to `sft` or `dapo`."""
    folder = run_dir.stage_dir(run, "candidates")
    split = pq.read_table(run_dir.stage_dir(run, "traces") / "row_split.parquet").to_pydict()
    chosen = {row for row, use in zip(split["row_id"], split["used_for"], strict=True) if use == used_for}
    rows = pq.read_table(folder / "train.parquet", filters=[("hit", "==", True)]).to_pylist()
    return [row for row in rows if row["row_id"] in chosen]


class RowEncoder:
    """Rows to prompts and token ids, by the settings that the traces stage fixed for all later stages."""

    def __init__(self, run: str, tokenizer: Any) -> None:
        self.tokenizer, self.catalogue = tokenizer, Catalogue.load(run)
        self.settings = PromptSettings.load(run_dir.stage_dir(run, "traces"))
        features = json.loads((run_dir.stage_dir(run, "candidates") / "features.json").read_text())
        self.names, self.edges = features["names"], features["edges"]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The rendered prompt of a row."""
        content = rerank_prompt(row, self.catalogue, self.settings, self.edges, self.names)
        return render(self.tokenizer, content)

    def labels(self, row: Mapping[str, Any]) -> list[str]:
        """What a completion must write for each candidate."""
        return candidate_labels(row, self.catalogue, self.settings)

    def example(self, row: Mapping[str, Any], trace: str | None, order: Sequence[int]) -> dict[str, list[int]]:
        """Token ids and labels of prompt and completion; the two are tokenized apart, as rollouts are."""
        prompt = self.tokenizer(self.prompt(row)).input_ids
        answer = self.tokenizer(completion(trace, order, self.labels(row)), add_special_tokens=False).input_ids
        answer = [*answer, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def examples(encoder: RowEncoder, run: str, with_trace: bool) -> list[dict[str, list[int]]]:
    """The accepted attempts of the sft rows, encoded."""
    accepted = pq.read_table(run_dir.stage_dir(run, "traces") / "accepted.parquet").to_pylist()
    rows = {row["row_id"]: row for row in training_rows(run, "sft")}
    return [
        encoder.example(rows[a["row_id"]], a["trace"] if with_trace else None, a["order"])
        for a in accepted
        if a["row_id"] in rows
    ]


def save_ranker(run: str, encoder: RowEncoder, folder: Path, trace: bool, max_completion_tokens: int) -> None:
    """Beside a trained model, all that ranking new rows needs: prompt settings, catalogue, evidence, lengths."""
    encoder.settings.save(folder)
    encoder.catalogue.save(folder)
    for name in ("features.json", "evidence.npz"):
        shutil.copy2(run_dir.stage_dir(run, "candidates") / name, folder / name)
    num_candidates = run_dir.read_metrics(run, "candidates")["num_candidates"]
    generation = {"max_completion_tokens": max_completion_tokens, "trace": trace, "num_candidates": num_candidates}
    run_dir.write_json(folder / "generation.json", generation)
    stage = folder.parent.name.removesuffix(".partial")
    midtrain = yaml.safe_load((run_dir.stage_dir(run, "midtrain") / "recipe.yaml").read_text())
    what = model_card.ranker(num_candidates, trace)
    model_card.write(folder, run, stage, what, midtrain.get("model_name_or_path"))
