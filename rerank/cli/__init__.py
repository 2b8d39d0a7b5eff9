"""The `rerank` command. It imports nothing heavy before a command needs it."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rerank.cli.models import Add, Command, add_models


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerank", description="Train language models to re-rank recommendations by reasoning."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(function: Command, name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        return command

    for add_commands in (_add_runs, _add_rollouts, add_models):
        add_commands(add)
    return parser


def _add_runs(add: Add) -> None:
    """Commands that train."""
    run = add(_run, "run", "run the numbered recipes of a folder, except finished stages")
    run.add_argument("recipe_dir", metavar="RECIPE_DIR", help="folder with 1_data.yaml, 2_semantic_ids.yaml, ...")
    run.add_argument("--out", metavar="RUN_DIR", help="folder of the run, instead of the recipes' run_dir")
    run.add_argument("--from", dest="first", metavar="STAGE", help="first stage to run")
    run.add_argument("--to", dest="last", metavar="STAGE", help="last stage to run")
    run.add_argument("--only", metavar="STAGE", help="the one stage to run")
    run.add_argument(
        "--shard", metavar="I/N", help="with --only: part I of N of the rows that a model runs over, for job arrays; "
        "once all N are made, the same command without it merges them"
    )  # fmt: skip
    run.add_argument("--force", metavar="STAGE", help="make a stage and those after it again, finished or not")
    run.add_argument("--dry-run", action="store_true", help="check everything and print the launch lines")
    run.add_argument("overrides", nargs="*", metavar="STAGE.key=value", help="override a key of a stage's recipe")

    compare = add(_compare, "compare", "train and evaluate variants, with seeds, into one table")
    compare.add_argument("recipe_dirs", nargs="+", metavar="RECIPE_DIR", help="variants; the first is the reference")
    compare.add_argument(
        "--variant", nargs="+", action="append", metavar=("NAME", "STAGE.key=value"), dest="variants",
        help="a variant of one RECIPE_DIR by overrides; repeat it per variant, the first is the reference",
    )  # fmt: skip
    compare.add_argument("--seeds", type=int, default=3, help="seeds per variant (%(default)s)")
    compare.add_argument(
        "--seed-from", metavar="STAGE", default="midtrain", help="first stage that each seed makes anew: midtrain, "
        "semantic_ids (ids and what is made from them) or data (a random split); the default is %(default)s"
    )  # fmt: skip
    compare.add_argument("--minutes_per_run", type=float, metavar="M", help="training minutes per run")
    compare.add_argument("--out", metavar="DIR", default="runs/compare", help="folder of the runs (%(default)s)")
    compare.add_argument("--results", metavar="FILE", help="Markdown file, such as recipes/NAME/RESULTS-dapo.md")
    for command in (run, compare):
        command.add_argument(
            "--accelerate", metavar="FILE", default="recipes/accelerate/cpu.yaml", help="accelerate file (%(default)s)"
        )


def _add_rollouts(add: Add) -> None:
    """Commands that inspect rollouts and rewards."""
    inspect = add(_inspect, "inspect", "browse the rollouts of a run, or print them where there is no terminal")
    inspect.add_argument("run_dir", metavar="RUN_DIR")
    inspect.add_argument(
        "--where", metavar="SQL", default="", help="only groups with a rollout for which this DuckDB condition on its "
        'columns holds, such as "kept = false and target_rank_after > target_rank"'
    )  # fmt: skip
    inspect.add_argument("--against", metavar="OTHER_RUN", help="show the same rows of another run beside this one")
    inspect.add_argument(
        "--against_step", type=int, metavar="STEP", help="last step of that run to show; with --against RUN_DIR this "
        "compares an early policy with a late one"
    )  # fmt: skip
    inspect.add_argument("--limit", type=int, default=5, help="groups to print (%(default)s)")
    inspect.add_argument("--step", type=int, help="only groups of this step")
    inspect.add_argument("--row", type=int, help="only groups of this row_id")

    report = add(_report, "report", "write one self-contained HTML page of a run")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.add_argument("--out", metavar="FILE", help="the page to write; RUN_DIR/report.html by default")

    rescore = add(_replay, "replay", "score the stored rollouts of a run with other rewards")
    rescore.add_argument("run_dir", metavar="RUN_DIR")
    rescore.add_argument(
        "--rewards", required=True, metavar="FILE", help="a dapo recipe, or a YAML file with its `rewards:`"
    )
    rescore.add_argument(
        "--top", type=int, default=10, help="rollouts to print whose advantage changes sign (%(default)s)"
    )
    rescore.add_argument("--out", metavar="FILE", help="Parquet file to write, one row per rollout")

    export = add(_export, "export", "write the rollouts of a run in the files of another tool")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument(
        "--format", required=True, choices=("trl",), help="trl: the Parquet files of TRL's log_completions, one a step"
    )
    export.add_argument("--out", metavar="DIR", help="where the folder `completions` is written; RUN_DIR by default")

    probe = add(
        _probe, "probe", "check rewards against trivial policies; exit code 1 if one pays too well, 3 for no verdict"
    )
    probe.add_argument(
        "recipe", metavar="RECIPE.yaml", help="recipe of the dapo stage, such as recipes/ml100k/7_dapo.yaml"
    )
    probe.add_argument("--rows", type=int, default=0, help="random training rows; 0, the default, for all")
    probe.add_argument(
        "--max-share", type=float, default=0.25, metavar="SHARE",
        help="share of the oracle's lead that an order may earn beyond its rank gain (%(default)s)",
    )  # fmt: skip
    probe.add_argument("--run-dir", metavar="RUN_DIR", help="folder of the run, instead of the recipe's run_dir")


def _run(args: argparse.Namespace) -> int:
    from rerank.launch import pipeline, recipe

    recipe.set_environment()
    every_step = pipeline.read_steps(args.recipe_dir, args.out, args.overrides)
    steps = pipeline.select(every_step, args.first, args.last, args.only, args.shard)
    remake = pipeline.forced(every_step, steps, args.force)
    if args.dry_run:
        from rerank.models import memory

        waiting = pipeline.check_steps(steps, args.accelerate, remake)
        print("\n".join(pipeline.describe(steps, args.accelerate, remake)))
        print("".join(f"# {line}\n" for line in memory.estimates(waiting, args.accelerate)), end="")
        return 0
    code = pipeline.run(steps, args.accelerate, lambda line: print(line, flush=True), remake)
    if code == 0 and steps[-1].folder_name == "evaluate":
        _print_results(steps[-1].run_dir)
    return code


def _print_results(run_dir: str) -> None:
    import json

    from rich.console import Console

    from rerank.launch.run_dir import stage_dir
    from rerank.results.overview import results_table

    folder = stage_dir(run_dir, "evaluate")
    results = json.loads((folder / "results.json").read_text())
    if results.get("task") in ("next_item", "held_out_sets"):
        print((folder / "results.md").read_text())
        return
    Console().print(results_table(results))
    print(f"report: {folder / 'report.html'}")


def _compare(args: argparse.Namespace) -> int:
    from rerank import compare
    from rerank.launch import recipe

    recipe.set_environment()
    return compare.compare(
        compare.read_variants(args.recipe_dirs, args.variants),
        args.seeds, args.seed_from, args.minutes_per_run, args.out, args.results, args.accelerate,
        lambda line: print(line, flush=True),
    )  # fmt: skip


def _inspect(args: argparse.Namespace) -> None:
    from rerank.rollouts import browser

    browser.inspect(args.run_dir, args.limit, args.step, args.row, args.where, args.against, args.against_step)


def _report(args: argparse.Namespace) -> None:
    from rerank import report

    path = Path(args.out or Path(args.run_dir) / "report.html")
    if args.out and not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: {path.parent} is not a folder; make it first")
    report.write_report(args.run_dir, Path(args.run_dir) / "evaluate", path)
    print(f"page: {path}")


def _replay(args: argparse.Namespace) -> None:
    from rich.console import Console

    from rerank.rollouts import rescore

    if args.out and not Path(args.out).parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: {Path(args.out).parent} is not a folder; make it first")
    frame = rescore.rescore(args.run_dir, rescore.read_scoring(args.rewards, args.run_dir))
    rescore.print_summary(frame, args.top, Console())
    if args.out:
        frame.to_parquet(args.out, index=False)


def _export(args: argparse.Namespace) -> None:
    from rerank.rollouts import export

    paths = export.export_trl(args.run_dir, args.out or args.run_dir)
    print(f"files: {len(paths)} in {paths[0].parent}")


def _probe(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rerank import probe

    found = probe.probe(probe.read_keys(args.recipe, args.run_dir), args.rows, args.max_share)
    Console().print(probe.table(found))
    if found.passed is False:
        print(f"rerank: {found.sentence}", file=sys.stderr)
        return 1
    print(found.sentence)
    return 0 if found.passed else 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one line and exit code 2."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # argparse wants positionals together, but overrides may come last
    if rest and args.command != "serve" and (args.command != "run" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "run":
        args.overrides += rest
    args.rest = rest  # vLLM's options, of `serve`
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.path.insert(0, "")  # for plugins beside the recipes, as with `python -m`
    try:
        code: int = args.function(args) or 0
        sys.stdout.flush()
        return code
    except (ValueError, FileNotFoundError) as error:
        print(f"rerank: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `rerank ids RUN_DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the buffered rest
        return 141
