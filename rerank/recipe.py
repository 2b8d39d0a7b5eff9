"""Recipes: flat YAML files, overridable on the command line, resolved into a stage's dataclasses and run.

A stage module declares `INPUTS` (stages whose folders it reads), `ARGUMENTS` (its dataclasses: its own, then TRL's),
`check(*arguments)` for all that can be known before it starts, and `main(*arguments, out_dir)`, which returns metrics.
`launch` turns a command line into one run of such a module.
"""

import dataclasses
import difflib
import importlib
import logging
import os
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rerank import run_dir as runs
from rerank import stopping

logger = logging.getLogger(__name__)

# What every stage process sets unless the user did: quiet, private, and modest in memory on CPU.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes most of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with its stage
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # TRL 1.16 warns at every vLLM but 0.22 to 0.31; all that is used of it works with the 0.32 that the CPU needs.
    "PYTHONWARNINGS": "ignore:TRL currently supports vLLM",
}


def set_environment() -> None:
    """Set ENVIRONMENT for this process and those that it starts, where the user did not."""
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


def load(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe file.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is not a YAML mapping.
    """
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
    """A value from the command line, read as YAML reads it; what is no YAML stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` words as a mapping.

    Raises:
        ValueError: On a word that is neither.
    """
    overrides, words = {}, list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key or (not equals and not words):
            raise ValueError(f"{word!r} is not an override; write --key value or --key=value")
        overrides[key] = read_value(value if equals else words.pop(0))
    return overrides


def _fields(arguments: Sequence[type]) -> dict[str, Any]:
    """Name to type hint of every option of the dataclasses."""
    found = {}
    for cls in arguments:
        hints = typing.get_type_hints(cls)
        found |= {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of an annotated type; hints beyond plain ones are left to the dataclass."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin in (list, dict, tuple):
        hint = list if origin is tuple else origin
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, list, dict, type(None)):
        return isinstance(value, hint)
    return True


def _typed(key: str, value: Any, hint: Any, source: str) -> Any:
    """The value as its option wants it: `2e-5`, which YAML reads as text, becomes a number.

    Raises:
        ValueError: Naming the key, the value and the type it should have.
    """
    if _fits(value, hint):
        return value
    if isinstance(value, str) and _fits(0.5, hint):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, (int, float)) and _fits("", hint) and not isinstance(value, bool):
        return str(value)
    wanted = getattr(hint, "__name__", None) if typing.get_origin(hint) is None else None
    raise ValueError(f"{source}: {key} is {value!r} but must be {wanted or str(hint).replace('typing.', '')}")


def check_keys(keys: dict[str, Any], names: Sequence[str], source: str) -> None:
    """Refuse keys that the stage lacks.

    Raises:
        ValueError: Naming the key and the nearest known ones.
    """
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`--help` of the stage lists its keys"
            raise ValueError(f"{source}: unknown key {key!r}; {hint}")


def resolve(stage: str, keys: dict[str, Any], source: str) -> tuple[Any, ...]:
    """A recipe's keys as the stage's dataclasses, each key known and each value of its type.

    Raises:
        ValueError: One line naming the recipe, the key, the value and the cure.
    """
    import torch
    from trl import TrlParser

    from rerank.vllm_cpu import is_slow_in_bfloat16

    arguments = importlib.import_module(f"rerank.{stage}").ARGUMENTS
    hints = _fields(arguments)
    check_keys(keys, list(hints), source)
    missing = [
        f.name
        for f in dataclasses.fields(arguments[0])
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in keys
    ]
    if missing:
        raise ValueError(f"{source}: {missing[0]} is missing; add it to the recipe or give --{missing[0]}")
    typed = {key: _typed(key, value, hints[key], source) for key, value in keys.items()}
    if "output_dir" in hints:
        typed["output_dir"] = str(runs.partial_dir(typed["run_dir"], stage) / "checkpoints")
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # by the accelerate file
    if "use_cpu" in hints and "use_cpu" not in typed and (asked_for_cpu or not torch.accelerator.is_available()):
        logger.info("%s: %s, so the CPU trains", source, "asked for" if asked_for_cpu else "there is no GPU here")
        typed["use_cpu"] = True  # else a recipe with bf16, which a CPU has too, could not even be looked at
    try:
        parsed = TrlParser(arguments).parse_dict(typed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {one_line(error)}") from error
    if typed.get("bf16") and is_slow_in_bfloat16():
        logger.warning("%s: bf16 is true, which this CPU is many times slower in; set bf16: false", source)
    return parsed


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def resolved_recipe(arguments: Sequence[Any], keys: dict[str, Any]) -> dict[str, Any]:
    """What the stage ran with: all of its own options, and the trainer's options that were given."""
    return {
        **{key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(arguments[0]).items()},
        **keys,
    }


def check_inputs(stage: str, args: Any, made: Sequence[str] = ()) -> list[str]:
    """The stages whose folders a stage reads: its module's `INPUTS`, and what `extra_inputs(args)` of it adds.

    Raises:
        FileNotFoundError: When one is neither there nor in `made` (by earlier stages of the same command), naming the
            folder and the command that makes it.
    """
    module = importlib.import_module(f"rerank.{stage}")
    inputs = [*module.INPUTS, *(module.extra_inputs(args) if hasattr(module, "extra_inputs") else ())]
    for name in inputs:
        if name not in made and not runs.is_finished(args.run_dir, name):
            raise FileNotFoundError(
                f"{stage} needs {runs.stage_dir(args.run_dir, name)}, which is not there; "
                f"run the stage {name} first (`rerank run RECIPE_DIR --out {args.run_dir} --to {stage}`)"
            )
    return inputs


def _command_line(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The merged keys of `--config FILE` and its overrides, and what to call them in messages."""
    words = list(argv)
    if "--config" not in words or words.index("--config") + 1 == len(words):
        raise ValueError("--config RECIPE.yaml is missing")
    place = words.index("--config")
    path = words[place + 1]
    return {**load(path), **read_overrides(words[:place] + words[place + 2 :])}, path


def launch(stage: str) -> None:
    """Run one stage from the command line; exit code 2 and one line for bad input, 130 when stopped by a signal."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for noisy in ("httpx", "datasets", "filelock", "sentence_transformers", "accelerate", "DeepSpeed", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    set_environment()
    stopping.die_with_parent()
    if os.environ.get("RANK", "0") != "0" and stage not in runs.TRAINING_STAGES:
        return  # the other processes of a multi-process launch have nothing to do here
    if {"-h", "--help"} & set(sys.argv[1:]):
        from trl import TrlParser

        TrlParser(importlib.import_module(f"rerank.{stage}").ARGUMENTS).print_help()
        return
    try:
        _run(stage, sys.argv[1:])
    except KeyboardInterrupt:
        _fail(f"{stage} was stopped; the same command goes on from its last checkpoint", 130)


def _fail(message: str, code: int) -> typing.NoReturn:
    sys.stderr.write(f"rerank: {message}\n")
    sys.stderr.flush()
    os._exit(code) if code == 130 else sys.exit(code)  # a stopped engine must not hold up the exit


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package raised it, as it does for bad input, and no library that it calls."""
    frames = traceback.walk_tb(error.__traceback__)
    *_, (last, _) = frames
    return str(last.f_globals.get("__name__")).partition(".")[0] == "rerank"


def _run(stage: str, argv: Sequence[str]) -> None:
    """Parse, lock, check, run and finish one stage."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        keys, source = _command_line(argv)
        arguments = resolve(stage, keys, source)
        run_dir, module = arguments[0].run_dir, importlib.import_module(f"rerank.{stage}")
        if runs.is_finished(run_dir, stage):
            runs.check_finished(run_dir, stage, keys)
            logger.info("%s is finished already", runs.stage_dir(run_dir, stage))
            return
        inputs = check_inputs(stage, arguments[0])
        folder = runs.partial_dir(run_dir, stage)
        if is_main:
            held = runs.lock(folder)
            held.__enter__()
            runs.refuse_partial_of_another_recipe(run_dir, stage, keys)
            module.check(*arguments)
            runs.begin(run_dir, stage, keys, inputs)
    except (ValueError, FileNotFoundError) as error:
        _fail(one_line(error), 2)
    try:
        metrics = module.main(*arguments, folder)
    except (ValueError, FileNotFoundError) as error:
        if not _is_ours(error):
            raise
        _fail(one_line(error), 2)
    if stage in runs.TRAINING_STAGES and os.environ.get("WORLD_SIZE", "1") != "1":
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # they may still read or write the folder, which is renamed now
    if is_main:
        runs.finish(run_dir, stage, keys, resolved_recipe(arguments, keys), inputs, metrics)
        held.__exit__(None, None, None)
