"""The `rerank` command. Nothing heavy is imported before a command needs it."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerank", description="Train language models to re-rank recommendations by reasoning."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_rollouts(commands)
    _add_models(commands)
    return parser


def _add_runs(commands: Any) -> None:
    """Commands that train."""
    run = commands.add_parser("run", help="run the numbered recipes of a folder, skipping what is finished")
    run.add_argument("recipe_dir", metavar="RECIPE_DIR", help="folder with 1_data.yaml, 2_semantic_ids.yaml, ...")
    run.add_argument("--out", metavar="RUN_DIR", help="folder of the run, in place of the recipes' run_dir")
    run.add_argument("--from", dest="first", metavar="STAGE", help="first stage to run")
    run.add_argument("--to", dest="last", metavar="STAGE", help="last stage to run")
    run.add_argument("--only", metavar="STAGE", help="the one stage to run")
    run.add_argument(
        "--accelerate", metavar="FILE", default="recipes/accelerate/cpu.yaml", help="where it runs (%(default)s)"
    )
    run.add_argument("--dry-run", action="store_true", help="check everything and print the launch lines")
    run.add_argument("overrides", nargs="*", metavar="STAGE.key=value", help="override a key of a stage's recipe")
    run.set_defaults(function=_run)

    compare = commands.add_parser("compare", help="train and evaluate variants on one split, into one table")
    compare.add_argument("recipe_dirs", nargs="+", metavar="RECIPE_DIR", help="variants, the first is the reference")
    compare.add_argument(
        "--variant", nargs="+", action="append", metavar=("NAME", "STAGE.key=value"), dest="variants",
        help="a variant of one RECIPE_DIR by overrides; give it once for each, the first is the reference",
    )  # fmt: skip
    compare.add_argument("--seeds", type=int, default=3, help="seeds per variant (%(default)s)")
    compare.add_argument("--minutes_per_run", type=float, metavar="M", help="training minutes of one run")
    compare.add_argument("--out", metavar="DIR", default="runs/compare", help="folder of the runs (%(default)s)")
    compare.add_argument("--results", metavar="FILE", help="Markdown file, such as recipes/NAME/RESULTS-dapo.md")
    compare.add_argument(
        "--accelerate", metavar="FILE", default="recipes/accelerate/cpu.yaml", help="where it runs (%(default)s)"
    )
    compare.set_defaults(function=_compare)


def _add_rollouts(commands: Any) -> None:
    """Commands that look at rollouts and at what pays them."""
    inspect = commands.add_parser("inspect", help="browse the rollouts of a run, or print them without a terminal")
    inspect.add_argument("run_dir", metavar="RUN_DIR")
    inspect.add_argument(
        "--where", metavar="SQL", default="", help="only groups with a rollout that meets a DuckDB condition on its "
        'columns, such as "kept = false and target_rank_after > target_rank_before"'
    )  # fmt: skip
    inspect.add_argument("--against", metavar="OTHER_RUN", help="show the same rows of another run beside it")
    inspect.add_argument(
        "--against_step", type=int, metavar="STEP", help="the last step of that run that counts; with "
        "--against RUN_DIR, an earlier policy stands beside a later one"
    )  # fmt: skip
    inspect.add_argument("--limit", type=int, default=5, help="how many groups to print (%(default)s)")
    inspect.add_argument("--step", type=int, help="only groups of this step")
    inspect.add_argument("--row", type=int, help="only groups of this row_id")
    inspect.set_defaults(function=_inspect)

    report = commands.add_parser("report", help="write one HTML page of a run that opens from disk")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.add_argument("--out", metavar="FILE", help="the page to write; RUN_DIR/report.html by default")
    report.set_defaults(function=_report)

    replay = commands.add_parser("replay", help="score the stored rollouts of a run with other rewards")
    replay.add_argument("run_dir", metavar="RUN_DIR")
    replay.add_argument(
        "--rewards", required=True, metavar="FILE", help="a dapo recipe, or a YAML file with `rewards:` as it has them"
    )
    replay.add_argument("--top", type=int, default=10, help="how many that change sign are printed (%(default)s)")
    replay.add_argument("--out", metavar="FILE", help="Parquet file to write, one row a rollout")
    replay.set_defaults(function=_replay)

    probe = commands.add_parser("probe", help="would a lazy policy out-earn an honest one? exit code 1 if so")
    probe.add_argument("recipe", metavar="RECIPE.yaml", help="of the dapo stage, such as recipes/ml100k/7_dapo.yaml")
    probe.add_argument("--rows", type=int, default=500, help="training rows, drawn at random; 0 for all (%(default)s)")
    probe.add_argument(
        "--max-share", type=float, default=0.25, metavar="SHARE",
        help="of the oracle's reward that a policy without rank gain may earn (%(default)s)",
    )  # fmt: skip
    probe.add_argument("--run-dir", metavar="RUN_DIR", help="folder of the run, in place of the recipe's run_dir")
    probe.set_defaults(function=_probe)


def _add_models(commands: Any) -> None:
    """Commands that look at ids, losses and trained models, or use them."""
    ids = commands.add_parser("ids", help="look at the quality of a run's semantic ids")
    ids.add_argument("run_dir", metavar="RUN_DIR")
    ids.add_argument(
        "--min-uniqueness", type=float, metavar="SHARE", help="exit code 1 when fewer items have an id of their own "
        "before collisions are resolved, such as 0.99"
    )  # fmt: skip
    ids.set_defaults(function=_ids)

    recall = commands.add_parser("recall", help="how often a mid-trained model finds the next item among all items")
    recall.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="runs of one data folder: seeds to average")
    recall.add_argument("--split", default="valid", help="valid, to choose by, or test, to report (%(default)s)")
    recall.add_argument(
        "--lists", nargs="*", default=[], metavar="NAME=FILE",
        help="other rankers: Parquet files of row_id and candidates, ten item ids a row, best first",
    )  # fmt: skip
    recall.add_argument("--num_beams", type=int, default=20, help="beams of the models' search (%(default)s)")
    recall.add_argument("--out", metavar="FILE", help="Markdown file to write, such as RESULTS-midtrain.md")
    recall.set_defaults(function=_recall)

    losses = commands.add_parser("losses", help="list the losses of the sft stage: what each needs and costs")
    losses.set_defaults(function=_losses)

    rank = commands.add_parser("rank", help="re-rank new rows with a trained model")
    rank.add_argument("model_dir", metavar="MODEL_DIR", help="such as RUN_DIR/dapo/model")
    rank.add_argument(
        "--rows", required=True, metavar="FILE", help="Parquet, JSONL or CSV with history and candidates"
    )
    rank.add_argument("--out", required=True, metavar="FILE", help="Parquet, JSONL or CSV to write")
    rank.set_defaults(function=_rank)


def _run(args: argparse.Namespace) -> int:
    from rerank import pipeline, recipe

    recipe.set_environment()
    steps = pipeline.read_steps(args.recipe_dir, args.out, args.overrides)
    steps = pipeline.select(steps, args.first, args.last, args.only)
    if args.dry_run:
        pipeline.check_steps(steps)
        print("\n".join(pipeline.describe(steps, args.accelerate)))
        return 0
    code = pipeline.run(steps, args.accelerate, lambda line: print(line, flush=True))
    if code == 0 and steps[-1].stage == "evaluate":
        _print_results(steps[-1].run_dir)
    return code


def _print_results(run_dir: str) -> None:
    import json

    from rich.console import Console

    from rerank.evaluate.tables import results_table
    from rerank.run_dir import stage_dir

    folder = stage_dir(run_dir, "evaluate")
    results = json.loads((folder / "results.json").read_text())
    if results.get("task") in ("next_item", "held_out_sets"):
        print((folder / "results.md").read_text())
        return
    Console().print(results_table(results))
    print(f"report: {folder / 'report.html'}")


def _compare(args: argparse.Namespace) -> int:
    from rerank import compare, recipe

    recipe.set_environment()
    return compare.compare(
        compare.read_variants(args.recipe_dirs, args.variants),
        args.seeds, args.minutes_per_run, args.out, args.results, args.accelerate,
        lambda line: print(line, flush=True),
    )  # fmt: skip


def _inspect(args: argparse.Namespace) -> int:
    from rerank import rollout_browser

    rollout_browser.inspect(args.run_dir, args.limit, args.step, args.row, args.where, args.against, args.against_step)
    return 0


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from rerank import report

    path = Path(args.out or Path(args.run_dir) / "report.html")
    if args.out and not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: {path.parent} is not a folder; make it first")
    report.write_report(args.run_dir, Path(args.run_dir) / "evaluate", path)
    print(f"page: {path}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from rerank import replay

    if args.out and not Path(args.out).parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: {Path(args.out).parent} is not a folder; make it first")
    frame = replay.replay(args.run_dir, replay.read_scoring(args.rewards, args.run_dir))
    replay.print_summary(frame, args.top, Console())
    if args.out:
        frame.to_parquet(args.out, index=False)
    return 0


def _ids(args: argparse.Namespace) -> int:
    from pathlib import Path

    from rerank.semantic_ids import id_report

    found, path = id_report.read_quality(args.run_dir), Path(args.run_dir) / "ids.html"
    print("\n".join(id_report.lines(found)))
    id_report.write_page(found, Path(args.run_dir).resolve().name, path)
    print(f"page: {path}")
    if args.min_uniqueness is not None and found.uniqueness < args.min_uniqueness:
        print(f"rerank: uniqueness {found.uniqueness:.4f} is below {args.min_uniqueness}", file=sys.stderr)
        return 1
    return 0


def _recall(args: argparse.Namespace) -> int:
    from pathlib import Path

    from rerank import recipe
    from rerank.evaluate.full_catalogue import evaluate_full_catalogue, markdown

    recipe.set_environment()
    lists = {}
    for word in args.lists:
        name, equals, path = word.partition("=")
        if not equals or not Path(path).is_file():
            raise FileNotFoundError(f"--lists {word}: write NAME=FILE, with a Parquet file that is there")
        lists[name] = Path(path)
    run_dirs = [Path(run) for run in args.run_dirs]
    text = markdown(evaluate_full_catalogue(run_dirs, args.split, lists, num_beams=args.num_beams))
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    print(text)
    return 0


def _probe(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rerank import probe, recipe
    from rerank.probe.table import table

    keys = recipe.load(args.recipe) | ({"run_dir": args.run_dir} if args.run_dir else {})
    if not keys.get("run_dir"):
        raise ValueError(f"{args.recipe}: run_dir is missing; add it, or give --run-dir")
    found = probe.probe(keys, args.rows, args.max_share)
    Console().print(table(found))
    if not found.passed:
        print(f"rerank: {found.sentence}", file=sys.stderr)
        return 1
    print(found.sentence)
    return 0


def _losses(args: argparse.Namespace) -> int:
    from rerank.losses import list_losses

    for entry in list_losses():
        print(f"{entry.name}: {entry.kind}, for {' and '.join(entry.tasks)}")
        print(f"    needs {entry.needs}\n    costs {entry.costs}")
    return 0


def _rank(args: argparse.Namespace) -> int:
    from rerank import rank, recipe

    recipe.set_environment()
    rank.rank_rows(args.model_dir, args.rows, args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one line and exit code 2."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # argparse wants all positionals together; overrides may come last
    if rest and (args.command != "run" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "run":
        args.overrides += rest
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.path.insert(0, "")  # plugins beside the recipes, as `python -m` has it
    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except (ValueError, FileNotFoundError) as error:
        print(f"rerank: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `rerank ids RUN_DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        return 141


if __name__ == "__main__":
    sys.exit(main())
