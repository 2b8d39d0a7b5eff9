"""Recipes: flat YAML files, overridable on the command line, resolved into a stage's dataclasses and run."""

import contextlib
import dataclasses
import difflib
import logging
import os
import shlex
import sys
import traceback
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rerank.launch import files, named_files, shards, trackers
from rerank.launch import run_dir as runs
from rerank.launch.shards import Shard
from rerank.launch.signals import die_with_parent
from rerank.launch.stages import STAGES, Stage, load_stage
from rerank.launch.trainer_options import check_options, check_stage
from rerank.launch.values import default_of, type_hints, typed_value

logger = logging.getLogger(__name__)

Keys = dict[str, Any]  # of a recipe, with their values as YAML reads them
NOISY = ("httpx", "httpx2", "datasets", "filelock", "sentence_transformers", "accelerate", "DeepSpeed", "faiss.loader")

# Every stage process sets these unless the user did: quiet, private, and modest in memory on CPU.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes most of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with its stage
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_PROJECT": trackers.PROJECT,
    # TRL 1.16 warns at every vLLM but 0.22 to 0.31; all that is used of it works with the 0.32 that the CPU needs.
    "PYTHONWARNINGS": "ignore:TRL currently supports vLLM",
}


def set_environment() -> None:
    """Set ENVIRONMENT, where the user did not, for this process and those that it starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # too late for PYTHONWARNINGS here
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM does so only with its first engine


@dataclass(kw_only=True)
class StageArguments:
    """Options of every stage."""

    run_dir: str = field(metadata={"help": "Folder of the run; the stage writes RUN_DIR/<stage>."})

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ValueError("run_dir is empty; name the folder of the run, such as runs/ml100k")


def load(path: str | Path) -> Keys:
    """The keys of a recipe file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a recipe file")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise ValueError(
            f"{path} holds {type(keys).__name__}, not `key: value` lines; see recipes/ml100k for examples"
        )
    return keys


def read_value(text: str) -> Any:
    """A value of the command line, parsed as YAML; text that is not YAML stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def read_overrides(words: Sequence[str]) -> Keys:
    """`--key value` and `--key=value` words as a mapping."""
    overrides: Keys = {}
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key or (not equals and not words):
            raise ValueError(f"{word!r} is not an override; write --key value or --key=value")
        overrides[key] = read_value(value if equals else words.pop(0))
    return overrides


def refuse_renamed(keys: Mapping[str, object], renamed: Mapping[str, str], source: str) -> None:
    """Refuse a key of an earlier version, with its spelling now."""
    for key in renamed:
        if key in keys:
            raise ValueError(f"{source}: the key {key!r} is gone; {renamed[key]}")


def check_keys(keys: Keys, names: Sequence[str], renamed: Mapping[str, str], source: str) -> None:
    """Refuse keys that the stage lacks, naming the nearest known ones, and `renamed` ones with their new spelling."""
    refuse_renamed(keys, renamed, source)
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`--help` of the stage lists its keys"
            raise ValueError(f"{source}: unknown key {key!r}; {hint}")


def resolve(stage: str, keys: Keys, source: str) -> tuple[Any, ...]:
    """A recipe's keys as the stage's dataclasses, each key known and each value of its type.

    Raises:
        ValueError: One line that names the recipe, the key, the value and the cure.
    """
    import torch
    from transformers import TrainingArguments
    from trl import TrlParser

    from rerank.models.engine import is_slow_in_bfloat16

    declared = load_stage(stage)
    hints = type_hints(declared.arguments)
    check_keys(keys, list(hints), declared.renamed_keys, source)
    for option in dataclasses.fields(declared.arguments[0]):
        if option.name not in keys and default_of(option) is dataclasses.MISSING:
            raise ValueError(f"{source}: {option.name} is missing; add it to the recipe or give --{option.name}")
    typed = {key: typed_value(key, value, hints[key], source) for key, value in keys.items()}
    if "output_dir" in hints:
        typed["output_dir"] = str(runs.partial_dir(str(typed["run_dir"]), stage) / "checkpoints")
        in_trackers = {
            "run_name": trackers.default_run_name(str(typed["run_dir"]), stage),
            "project": trackers.PROJECT,
        }
        typed = {**in_trackers, **typed}
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # by the accelerate file
    if "use_cpu" in hints and "use_cpu" not in typed and (asked_for_cpu or not torch.accelerator.is_available()):
        logger.info("%s: %s, so the CPU trains", source, "asked for" if asked_for_cpu else "there is no GPU here")
        typed["use_cpu"] = True  # else a recipe with bf16, which a CPU has too, could not even be checked
    try:
        parsed: tuple[Any, ...] = TrlParser(declared.arguments).parse_dict(typed)
        for options in parsed:
            if isinstance(options, TrainingArguments):
                assert isinstance(options.report_to, list)  # once transformers has read it
                trackers.check_trackers(options.report_to)
            check_options(options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {one_line(error)}") from error
    if typed.get("bf16") and is_slow_in_bfloat16():
        logger.warning("%s: bf16 is true, which this CPU is many times slower in; set bf16: false", source)
    return parsed


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def resolved_recipe(arguments: Sequence[Any], keys: Keys) -> Keys:
    """All options of the stage's own, and the trainer's options that were given."""
    return {**keys, **dataclasses.asdict(arguments[0])}


def check_inputs(
    stage: str, arguments: Sequence[Any], made: Sequence[str] = (), accelerate: str | None = None
) -> list[str]:
    """The stages whose folders a stage reads with these arguments, and those that it would read if the run had them.

    Args:
        stage: Its name.
        arguments: Its dataclasses, its own first.
        made: The earlier stages of the same command that will be made before it.
        accelerate: The accelerate file of the command.

    Raises:
        FileNotFoundError: When one that it needs is neither finished nor in `made`.
        ValueError: When one was made from other files or inputs than the run's.
    """
    declared, run_dir = load_stage(stage), arguments[0].run_dir
    needed = declared.inputs_of(*arguments)
    inputs = list(dict.fromkeys([*needed, *declared.inputs_if_made]))
    for name in inputs:
        if name in made:
            continue
        if runs.is_finished(run_dir, name):
            runs.check_origin(run_dir, name, made, accelerate)
        elif name in needed:
            without = f"; or {declared.do_without[name]}" if name in declared.do_without else ""
            raise FileNotFoundError(
                f"{stage} needs {runs.stage_dir(run_dir, name)}, which is not there; "
                f"run the stage {name} first (`rerank run RECIPE_DIR --out {run_dir} --to {stage}`){without}"
            )
    return inputs


def _command_line(argv: Sequence[str]) -> tuple[Keys, str, Shard | None]:
    """The merged keys of `--config FILE` and its overrides, the file's name, and the shard that is asked for."""
    words = list(argv)
    if "--config" not in words or words.index("--config") + 1 == len(words):
        raise ValueError("--config RECIPE.yaml is missing")
    place = words.index("--config")
    path = words[place + 1]
    overrides = read_overrides(words[:place] + words[place + 2 :])
    shard = Shard.parse(str(overrides.pop("shard"))) if "shard" in overrides else None
    return {**load(path), **overrides}, path, shard


def launch(stage: str) -> None:
    """Run one stage from the command line; exit code 2 and one line on bad input, 130 when stopped by a signal."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    set_environment()
    die_with_parent()
    if os.environ.get("RANK", "0") != "0" and not load_stage(stage).trains:
        return  # the other processes of a multi-process launch have nothing to do here
    if {"-h", "--help"} & set(sys.argv[1:]):
        from trl import TrlParser

        TrlParser(load_stage(stage).arguments).print_help()
        return
    try:
        _run(stage, sys.argv[1:])
    except KeyboardInterrupt:
        _fail(f"{stage} was stopped; launched again, it continues from its last checkpoint", 130)


def _fail(message: str, code: int) -> typing.NoReturn:
    sys.stderr.write(f"rerank: {message}\n")
    sys.stderr.flush()
    if code == 130:
        os._exit(code)  # a stopped engine must not delay the exit
    sys.exit(code)


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package raised it, as it does on bad input, and not a library that it calls."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    if str(error).startswith("Caught "):  # in a worker of a loader, whose traceback is the text
        return "/rerank/" in str(error).rpartition('File "')[2].partition('"')[0]
    return str(last.f_globals.get("__name__")).partition(".")[0] == "rerank"


def _run(stage: str, argv: Sequence[str]) -> None:
    """Parse, lock, check, run and finish one stage."""
    is_main, accelerate = os.environ.get("RANK", "0") == "0", os.environ.get(named_files.ACCELERATE_VARIABLE)
    with contextlib.ExitStack() as held:
        try:
            keys, source, shard = _command_line(argv)
            shards.check_stage_takes(stage, shard)
            arguments = resolve(stage, keys, source)
            run_dir, declared = arguments[0].run_dir, load_stage(stage)
            name = shards.folder_name(run_dir, stage, shard)
            if runs.is_finished(run_dir, name):
                runs.check_finished(run_dir, name, keys, accelerate=accelerate)
                logger.info("%s is finished already", runs.stage_dir(run_dir, name))
                return
            inputs = check_inputs(stage, arguments, accelerate=accelerate)
            command = shlex.join(["python", "-m", STAGES[stage], *argv])
            shards.check(run_dir, stage, keys, arguments, shard, command, accelerate=accelerate)
            folder = runs.partial_dir(run_dir, name)
            if is_main:
                held.enter_context(runs.lock(folder))
                runs.refuse_partial_of_another_recipe(run_dir, name, keys, accelerate)
                check_stage(stage, arguments, accelerate, is_launched=True)
                runs.begin(run_dir, name, keys, inputs, named_files.named_files(declared, keys, accelerate))
        except (ValueError, FileNotFoundError) as error:
            _fail(one_line(error), 2)
        metrics = _main(declared, arguments, folder, shard)
        if is_main:
            runs.finish(run_dir, name, keys, resolved_recipe(arguments, keys), inputs, metrics)


def _main(declared: Stage, arguments: Sequence[Any], folder: Path, shard: Shard | None) -> dict[str, Any]:
    """The stage's metrics, once every process has them; a shard has none."""
    try:
        metrics = declared.make(arguments, folder, shard)
    except (ValueError, FileNotFoundError) as error:
        if not _is_ours(error):
            raise
        if declared.quick_check:  # its input is refused, so that nothing is begun that another recipe must resume
            files.clear(folder, ("lock", "holder.pid"))
        _fail(one_line(error), 2)
    if declared.trains and os.environ.get("WORLD_SIZE", "1") != "1":
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # they may still read or write the folder, which is renamed now
    return metrics
