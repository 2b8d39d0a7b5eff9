"""A run of eight groups of items, each user in one group, and a model trained on its first day to find that group.

The last two items of each group come on the second day: the run knows nothing of them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from toy_run import finish, write_traces

from rerank import candidates, data, semantic_ids
from rerank.baselines import Counts, list_features
from rerank.catalogue import id_tokens
from rerank.launch import run_dir
from rerank.models import base as base_model
from rerank.models.ranker import Answer, Batch, RankingModel, ask
from rerank.models.saving import save_ranker
from rerank.prompts import THINK, THINK_END, PromptSettings, completion, prompt_ids
from rerank.rows import Prompter, RankingRow
from rerank.semantic_ids.arguments import SemanticIdsArguments

GROUPS, OLD, NEW, USERS, DAY = 8, 4, 2, 48, 86_400
SETTINGS = PromptSettings(task="short", evidence="codes", evidence_names=["popularity"], max_history=3,
                          item_fields=["semantic_id"])  # fmt: skip
SHAPE = base_model.SmallModelArguments(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, context_length=256)
OPTIONS = {"levels": 2, "codebook_size": GROUPS, "method": "residual_k_means"}


def items_of(group: int, new: bool) -> list[str]:
    """Ids of a group's items of the first day, or of those of the second."""
    return [f"g{group}_{place}" for place in (range(OLD, OLD + NEW) if new else range(OLD))]


def write_items(folder: Path, name: str, new: bool, both: bool = False) -> Path:
    """An items file, and NAME.parquet of embeddings, in which the items of a group are close to each other."""
    ids = [one for group in range(GROUPS) for one in (items_of(group, False) if both else []) + items_of(group, new)]
    rows = [{"item": item_id, "title": f"Film {item_id}", "category": "drama"} for item_id in ids]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    vectors = []
    for item_id in ids:
        group, place = map(int, item_id.removeprefix("g").split("_"))
        vectors.append(np.eye(GROUPS)[group].tolist() + (0.3 * np.eye(OLD + NEW)[place]).tolist())
    pq.write_table(pa.table({"item_id": ids, "embedding": vectors}), folder / f"{name}.parquet")
    return folder / f"{name}.jsonl"


def make_stage(run: Path, name: str, module, args, given: dict) -> None:
    """Run a stage in this process and finish its folder."""
    folder = run_dir.stage_dir(run, name)
    folder.mkdir(parents=True)
    metrics = module.main(args, folder)
    finish(folder, metrics, given)


def draw_rows(catalogue, rng, number: int, new: bool = False) -> list[RankingRow]:
    """Lists of a target of the user's group, of the first or the second day, among three items of other groups."""
    place = {item_id: item for item, item_id in enumerate(catalogue.item_ids)}
    rows = []
    for row_id in range(number):
        own, *others = rng.permutation(GROUPS)[:4]
        history = [place[one] for one in rng.permutation(items_of(own, False))[:3]]
        target = place[rng.choice(items_of(own, new) if new else items_of(own, False))]
        shown = [target, *(place[rng.choice(items_of(group, False))] for group in others)]
        row = RankingRow(row_id, tuple(history), tuple(shown), (1.0, 0.0, 0.0, 0.0), user=row_id)
        rows.append(replace(row.shuffled(rng.permutation(4).tolist()), ranks=(1, 2, 3, 4)))
    return rows


def with_features(rows: list[RankingRow], names, counts: Counts) -> list[RankingRow]:
    """The rows with facts about their candidates."""
    lists = [np.array(row.candidates) for row in rows]
    histories, zeros = [np.array(row.history) for row in rows], [np.zeros(4)] * len(rows)
    facts = list_features(names, counts, histories, lists, zeros, None, {})
    return [replace(row, features=of_row) for row, of_row in zip(rows, facts, strict=True)]


def write_day_one(folder: Path) -> Path:
    """The stages data, semantic_ids, candidates and traces of what is known on the first day."""
    run, rng = folder / "run", np.random.default_rng(0)
    items = write_items(folder, "items", new=False)
    lines = ["user,item,time"]
    for user in range(USERS):
        walk = rng.choice(items_of(user % GROUPS, False), 9)
        lines += [f"u{user},{item},{DAY * place + user}" for place, item in enumerate(walk)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    given = {"interactions": str(folder / "interactions.csv"), "items": str(items)}
    make_stage(run, "data", data, data.DataArguments(run_dir=str(run), **given), given)
    given = {**OPTIONS, "embeddings": str(folder / "items.parquet")}
    make_stage(run, "semantic_ids", semantic_ids, SemanticIdsArguments(run_dir=str(run), **given), given)
    args = candidates.CandidatesArguments(run_dir=str(run), num_candidates=2)
    make_stage(run, "candidates", candidates, args, {"num_candidates": 2})
    write_traces(run / "traces", {0: "sft"}, SETTINGS)
    finish(run / "traces")
    return run


def train(run: Path, folder: Path, steps: int = 60, batch_size: int = 32) -> None:
    """A model that ranks the item of the user's group first, as `rerank rank` takes it."""
    plain = Prompter.of_run(run)
    rng, counts = np.random.default_rng(1), Counts.load(run / "candidates/evidence.npz")
    rows = with_features(draw_rows(plain.catalogue, rng, 10 * batch_size), plain.names, counts)
    tokenizer = base_model.train_tokenizer([plain.message(row) for row in rows], 400, list("ABCD"))  # also by letters
    model = base_model.make_small_model(SHAPE, tokenizer, seed=0)
    base_model.add_tokens(model, tokenizer, [*id_tokens(2, GROUPS), THINK, THINK_END], seed=0)
    prompter = replace(plain, tokenizer=tokenizer)
    prompts = [prompter.prompt(row) + completion("", [0], ["X"], 1).removesuffix("X") for row in rows]
    ids = prompt_ids(tokenizer, prompts)
    firsts = [tokenizer(prompter.labels(row)[row.target], add_special_tokens=False).input_ids[0] for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):  # the first token of the answer is its group
        batch = rng.choice(len(rows), batch_size)
        padded = tokenizer.pad([{"input_ids": ids[k]} for k in batch], padding_side="left", return_tensors="pt")
        logits = model(**padded).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor([firsts[k] for k in batch])).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_ranker(run, prompter, folder, trace=False, max_completion_tokens=24)


def first_logps(model: RankingModel, rows: list[RankingRow]) -> np.ndarray:
    """(R, N) log-probability that the model names each candidate first."""
    from transformers import AutoModelForCausalLM

    tokenizer = model.load_tokenizer()
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype="float32").eval()
    asked = ask(model, Batch(rows), tokenizer)
    before = completion("", [0], ["X"], 1).removesuffix("X")
    prompts = prompt_ids(tokenizer, [one.prompt + before for one in asked])
    found = []
    with torch.no_grad():
        for one, prompt in zip(asked, prompts, strict=True):
            labels = [tokenizer(label, add_special_tokens=False).input_ids for label in one.labels]
            logps = network(torch.tensor([prompt + label for label in labels])).logits.log_softmax(dim=2)
            ids, places = torch.tensor(labels), slice(len(prompt) - 1, -1)
            found.append(logps[:, places].gather(2, ids[:, :, None]).sum(dim=(1, 2)).numpy())
    return np.array(found)


def answers(
    model: RankingModel, rows: list[RankingRow], constrained: bool, one_token: bool
) -> tuple[list[Answer], float]:
    """In place of the engine: candidates by the probability with which the model names them first."""
    orders = [np.argsort(-logps, kind="stable").tolist() for logps in first_logps(model, rows)]
    return [Answer(order, None, "", "", 1, False) for order in orders], 0.0


@dataclass(frozen=True)
class DailyRun:
    """The run of the first day, its trained folder, and the files of the second."""

    run: Path
    model: Path
    new_items: Path
    embeddings: Path


def make_daily_run(folder: Path) -> DailyRun:
    """All of it."""
    run = write_day_one(folder)
    train(run, run / "sft/model")
    finish(run / "sft")
    new = write_items(folder, "new_items", new=True)
    return DailyRun(run, run / "sft/model", new, folder / "new_items.parquet")
