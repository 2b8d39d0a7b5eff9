"""Commands on semantic ids, losses and trained models. They import nothing heavy before they run."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

Command = Callable[[argparse.Namespace], int | None]  # returns its exit code; None: 0
# Adds a command to the parser: the function that runs it, its name and its help.
Add = Callable[[Command, str, str], argparse.ArgumentParser]


def add_models(add: Add) -> None:
    """Commands on semantic ids, losses and trained models."""
    ids = add(_ids, "ids", "print the quality of a run's semantic ids and write a page of it")
    ids.add_argument("run_dir", metavar="RUN_DIR")
    ids.add_argument(
        "--min-uniqueness", type=float, metavar="SHARE",
        help="exit code 1 when a smaller share of items, such as 0.99, has a unique id before collisions are resolved",
    )  # fmt: skip
    add(_losses, "losses", "list the losses of the sft stage, their needs and costs")

    rank = _add_ranking(add)
    add_items = add(_add_items, "add-items", "append new items to a trained model: catalogue, ids, counts of zero")
    add_items.add_argument("--items", required=True, metavar="FILE", help="items that the model has not seen")
    refresh = add(_refresh, "refresh", "renew the counts of a trained model; the bucket edges of its prompts stay")
    refresh.add_argument(
        "--interactions", required=True, metavar="FILE", help="all that the counts may know, the old ones too"
    )
    refresh.add_argument(
        "--columns",
        metavar="MAP",
        help="names of its columns, in place of the run's, such as '{user: user_id, item: item_id, time: ts}'",
    )
    for command in (add_items, refresh):
        command.add_argument("model_dir", metavar="MODEL_DIR", help="such as RUN_DIR/dapo/model")
        command.add_argument(
            "--out", metavar="DIR", help="folder to write; without it MODEL_DIR is replaced, and MODEL_DIR.old is as "
            "it was: rename it back to undo"
        )  # fmt: skip
    for command in (rank, add_items):
        command.add_argument(
            "--embeddings", metavar="FILE", help="of the new items, where the run's were given: a .parquet with "
            "item_id and embedding, or a .npy with a row per item"
        )  # fmt: skip


def _add_ranking(add: Add) -> argparse.ArgumentParser:
    """The commands `serve` and `rank`; returns the latter."""
    rank = add(
        _rank, "rank", "re-rank new rows with a trained model; exit code 3 if a row has no ranking but its reason in "
        "the column failure"
    )  # fmt: skip
    rank.add_argument("model_dir", metavar="MODEL_DIR", help="such as RUN_DIR/dapo/model")
    rank.add_argument(
        "--rows", required=True, metavar="FILE", help="Parquet, JSONL or CSV with history and candidates"
    )
    rank.add_argument("--out", required=True, metavar="FILE", help="Parquet, JSONL or CSV to write")
    rank.add_argument("--items", metavar="FILE", help="items that the model has not seen, to be ranked too")

    serve = add(
        _serve, "serve", "serve a trained model: the rerank API of Cohere, LiteLLM and vLLM clients; options of `vllm "
        "serve` may follow"
    )  # fmt: skip
    serve.add_argument("model_dir", metavar="MODEL_DIR", help="such as RUN_DIR/dapo/model")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to bind (%(default)s)")
    serve.add_argument(
        "--api-key", metavar="KEY", help="that every route but /health asks for; better in the variable RERANK_API_KEY"
    )
    serve.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="requests at a time; more get 429 (%(default)s)"
    )
    serve.add_argument(
        "--max-body", type=float, default=4.0, metavar="MB", help="megabytes of a request at most (%(default)s)"
    )
    serve.add_argument("--dry-run", action="store_true", help="check everything and print the line that starts vLLM")
    for command in (rank, serve):
        command.add_argument(
            "--unknown", choices=("last", "drop", "refuse"), default="last", help="place candidates that the model "
            "does not know last (%(default)s), leave them out, or do not rank their row; histories go without them"
        )  # fmt: skip
        command.add_argument(
            "--one-token", action="store_true", help="rank by the first label's probabilities, without a trace"
        )
    return rank


def _ids(args: argparse.Namespace) -> int:
    from rerank.report import semantic_ids as id_report

    found, path = id_report.read_quality(args.run_dir), Path(args.run_dir) / "ids.html"
    print("\n".join(id_report.lines(found)))
    id_report.write_page(found, Path(args.run_dir).resolve().name, path)
    print(f"page: {path}")
    if args.min_uniqueness is not None and found.uniqueness < args.min_uniqueness:
        print(f"rerank: uniqueness {found.uniqueness:.4f} is below {args.min_uniqueness}", file=sys.stderr)
        return 1
    return 0


def _losses(args: argparse.Namespace) -> None:
    from rerank.losses import list_losses

    for name, kind, info in list_losses():
        print(f"{name}: {kind}, for {' and '.join(info.tasks)}")
        print(f"    needs {info.needs}\n    costs {info.costs}")


def _rank(args: argparse.Namespace) -> int:
    from rerank import rank
    from rerank.launch import recipe

    recipe.set_environment()
    if args.embeddings and not args.items:
        raise ValueError("--embeddings is given without --items, whose embeddings it holds; give both")
    failures = rank.rank_rows(
        args.model_dir, args.rows, args.out, args.unknown, args.items, args.embeddings, args.one_token
    )
    if failures:
        print(f"rerank: {failures} rows have no ranking; see the column failure of {args.out}", file=sys.stderr)
    return 3 if failures else 0


def _serve(args: argparse.Namespace) -> None:
    import os

    from rerank.launch import recipe
    from rerank.rank import serve
    from rerank.rank.serve.settings import VLLM_KEY

    environment = dict(os.environ)
    recipe.set_environment()  # for the checks alone: those of training are none of a server's
    of_vllm = environment.pop(VLLM_KEY, None)  # which would leave routes open
    key = args.api_key or environment.get(serve.KEY) or of_vllm
    settings = serve.ServeSettings(args.unknown, args.one_token, args.max_queue, args.max_body, key)
    added, words = serve.launch_line(args.model_dir, args.host, args.port, args.rest, environment)
    serve.check(args.model_dir, settings, args.rest)
    added |= settings.as_environment()
    if args.dry_run:
        print(serve.shown(added, words))
        return
    serve.check_port(args.host, args.port)
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"rerank: whoever reaches {args.host} can use the server; set RERANK_API_KEY", file=sys.stderr)
    serve.start({**environment, **added}, words)


def _add_items(args: argparse.Namespace) -> None:
    from rerank.launch import recipe
    from rerank.rank import model_folder

    recipe.set_environment()
    folder, number, added = model_folder.add_items(args.model_dir, args.items, args.embeddings, args.out)
    print(f"{folder}: {number} items, {added} of them new")


def _refresh(args: argparse.Namespace) -> None:
    from rerank.launch import recipe
    from rerank.rank import model_folder

    recipe.set_environment()
    columns = recipe.read_value(args.columns) if args.columns else None
    if columns is not None and not isinstance(columns, dict):
        raise ValueError(f"--columns is {args.columns}; write a map, such as '{{user: user_id, item: item_id}}'")
    folder, counts = model_folder.refresh(args.model_dir, args.interactions, columns, args.out)
    print(f"{folder}: counts of {counts.popularity.sum()} interactions, the latest of {counts.latest}")
