"""`rerank run`: the numbered recipes of a folder, checked together, then launched one after another."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rerank.launch import recipe, shards
from rerank.launch import run_dir as runs
from rerank.launch.across import check_across
from rerank.launch.files import write_whole
from rerank.launch.gpus import free_gpu, gpu_words, has_gpu
from rerank.launch.named_files import ACCELERATE_VARIABLE
from rerank.launch.shards import Shard
from rerank.launch.signals import die_with_parent, wait
from rerank.launch.stages import STAGES, load_stage
from rerank.launch.trainer_options import check_stage
from rerank.plugins import did_you_mean

LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")
RECIPE_NAME = re.compile(r"(\d+)_(\w+)\.ya?ml")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline: its recipe file, its keys merged with the overrides, these, and the shard to make."""

    stage: str
    path: Path
    keys: recipe.Keys
    overrides: dict[str, str]
    shard: Shard | None = None

    @property
    def folder_name(self) -> str:
        """Of the folder that it makes."""
        return shards.folder_name(self.run_dir, self.stage, self.shard)

    @property
    def run_dir(self) -> str:
        """The folder of the run."""
        return str(self.keys["run_dir"])


def read_steps(recipe_dir: str | Path, out: str | None, overrides: Sequence[str]) -> list[Step]:
    """The stages of a recipe folder in order, `STAGE.key=value` overrides applied."""
    found = _find_recipes(Path(recipe_dir))
    stages = [stage for stage in STAGES if stage in found]
    given = _split_overrides(overrides, stages)
    steps = []
    for stage in stages:
        changed = {**given.get(stage, {}), **({"run_dir": out} if out else {})}
        keys = {**recipe.load(found[stage]), **{key: recipe.read_value(value) for key, value in changed.items()}}
        if not keys.get("run_dir"):
            raise ValueError(f"{found[stage]}: run_dir is missing; add it, or give --out")
        steps.append(Step(stage, found[stage], {**keys, "run_dir": str(keys["run_dir"])}, changed))
    for step in steps[1:]:
        if step.run_dir != steps[0].run_dir:
            raise ValueError(
                f"{step.path}: run_dir is {step.run_dir} but {steps[0].run_dir} in {steps[0].path.name}; give --out, "
                "which holds for all stages"
            )
    return steps


def _find_recipes(folder: Path) -> dict[str, Path]:
    """Stage -> its file `<number>_<stage>.yaml`; a variant beside it (`7_dapo_naive.yaml`) is ignored."""
    if not folder.is_dir():
        raise FileNotFoundError(f"recipe folder {folder} is not there; recipes/ml100k is one")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = RECIPE_NAME.fullmatch(path.name)
        if match and match[2] in STAGES:
            if match[2] in found:
                raise ValueError(f"{found[match[2]]} and {path.name} are both recipes of {match[2]}; keep one")
            found[match[2]] = path
    if not found:
        raise FileNotFoundError(f"{folder} holds no recipe such as 1_data.yaml; stages are {', '.join(STAGES)}")
    return found


def _split_overrides(words: Sequence[str], stages: Sequence[str]) -> dict[str, dict[str, str]]:
    given: dict[str, dict[str, str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        stage, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise ValueError(f"{word!r} is not an override; write STAGE.key=value, such as dapo.max_steps=10")
        if stage not in stages:
            raise ValueError(f"{word!r}: {_no_stage(stage, stages)}")
        given.setdefault(stage, {})[key] = value
    return given


def select(
    steps: Sequence[Step], first: str | None, last: str | None, only: str | None, shard: str | None = None
) -> list[Step]:
    """The steps from `first` to `last`, or `only` one, or a shard of it."""
    names = [step.stage for step in steps]
    for name in (first, last, only):
        if name is not None and name not in names:
            raise ValueError(_no_stage(name, names))
    if shard and not only:
        raise ValueError(f"--shard {shard} is a part of one stage; name it by --only STAGE")
    if only:
        part = Shard.parse(shard) if shard else None
        shards.check_stage_takes(only, part)
        return [replace(step, shard=part) for step in steps if step.stage == only]
    start, end = names.index(first) if first else 0, names.index(last) if last else len(names) - 1
    if end < start:
        raise ValueError(f"--from {first} comes after --to {last}; swap them")
    return list(steps[start : end + 1])


def _no_stage(name: str, known: Sequence[str]) -> str:
    return f"there is no stage {name!r}{did_you_mean(name, known)}; stages of this recipe are {', '.join(known)}"


def forced(steps: Sequence[Step], selected: Sequence[Step], stage: str | None) -> list[str]:
    """The selected stages that `--force STAGE` makes again: it and those after it."""
    if stage is None:
        return []
    if selected[0].shard is not None:
        raise ValueError(f"--force {stage} deletes all shards of a stage; run it without --shard, or leave it out")
    known, names = ([step.stage for step in some] for some in (steps, selected))
    if stage not in known:
        raise ValueError(f"--force {stage}: {_no_stage(stage, known)}")
    if stage not in names:
        raise ValueError(f"--force {stage}: only {', '.join(names)} are selected; change --from, --to or --only")
    return names[names.index(stage) :]


def check_steps(
    steps: Sequence[Step], accelerate: str | None = None, remake: Sequence[str] = (), launches: bool = False
) -> dict[str, tuple[Any, ...]]:
    """Check every step before anything is launched; returns the stages that are to be launched, with their arguments.

    The recipe and the files of a finished step are only compared with those that made it, which needs no heavy import.

    Args:
        steps: Of the command.
        accelerate: The accelerate file of the command.
        remake: Stages to make again, finished or not; their input is checked whole before they are set aside.
        launches: Whether the first of them is launched at once.
    """
    with runs.as_unfinished(steps[0].run_dir, remake):
        waiting = [step for step in steps if not runs.is_finished(step.run_dir, step.folder_name)]
        remade, made = [step.stage for step in waiting], list[str]()
        for step in steps:
            if step not in waiting:
                _check_finished(step, remade, accelerate)
        # a misspelt key of a late stage is named before anything is read for an early one
        resolved = {step.stage: recipe.resolve(step.stage, step.keys, str(step.path)) for step in waiting}
        for step, arguments in zip(waiting, resolved.values(), strict=True):
            recipe.check_inputs(step.stage, arguments, made, accelerate)
            runs.refuse_held(step.run_dir, step.folder_name)
            for one in shards.begun(step.run_dir, step.stage) if step.stage in remake else ():
                runs.refuse_held(step.run_dir, one.name(step.stage))
            if step.stage not in remake:
                runs.refuse_partial_of_another_recipe(step.run_dir, step.folder_name, step.keys, accelerate)
                command = shlex.join(["python", *_module_words(step)])
                shards.check(step.run_dir, step.stage, step.keys, arguments, step.shard, command, made, accelerate)
            is_launched = launches and not made and step.stage not in remake
            check_stage(step.stage, arguments, accelerate, is_launched)
            made.append(step.stage)
        check_across(resolved, {step.stage: step.path for step in steps})
    return resolved


def _check_finished(step: Step, remade: Sequence[str], accelerate: str | None) -> None:
    if runs.difference(step.stage, runs.read_record(step.run_dir, step.folder_name).given, step.keys):
        recipe.resolve(step.stage, step.keys, str(step.path))  # a misspelt key is what should be named
    runs.check_finished(step.run_dir, step.folder_name, step.keys, remade, accelerate)


def launch_words(step: Step, accelerate: str) -> list[str]:
    """The words after `accelerate launch` that launch a step."""
    return ["--config_file", accelerate, *_module_words(step)]


def _module_words(step: Step) -> list[str]:
    """The words after `python` that run a step."""
    words = ["-m", STAGES[step.stage], "--config", str(step.path)]
    words += [f"--{key}={value}" for key, value in step.overrides.items()]
    return words + ([f"--shard={step.shard}"] if step.shard else [])


def run_step(step: Step, accelerate: str) -> int:
    """The exit code of a launch, 130 when it was interrupted.

    A first Ctrl-C asks the stage to stop with a checkpoint, a second kills it.
    """
    where = recipe.load(accelerate)
    threads = max(1, (os.cpu_count() or 1) // (where.get("num_processes") or 1))
    environment = {"OMP_NUM_THREADS": str(threads), **recipe.ENVIRONMENT, **os.environ, "PYTHONPATH": _python_path()}
    environment[ACCELERATE_VARIABLE] = accelerate
    environment["ACCELERATE_USE_CPU"] = str(where.get("use_cpu", False))  # its launcher forgets it for two processes
    child = subprocess.Popen(
        [*LAUNCHER, *gpu_words(where), *launch_words(step, accelerate)],
        env=environment,
        start_new_session=True,  # Ctrl-C reaches only this process, which signals the stage, not accelerate
        preexec_fn=die_with_parent,  # also after kill -9 of this process
    )
    return wait(child, step.stage)


def _python_path() -> str:
    """The working folder first, as with `python -m`, so that plugins beside the recipes are found."""
    return os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))


def run(steps: Sequence[Step], accelerate: str, say: Callable[[str], None], remake: Sequence[str] = ()) -> int:
    """Check and launch the steps that are not finished; returns the exit code of the first that fails, or 0.

    Args:
        steps: Of the command.
        accelerate: The accelerate file.
        say: Takes a line.
        remake: Stages to make again, finished or not.
    """
    waiting = check_steps(steps, accelerate, remake, launches=True)
    if not Path(accelerate).is_file():
        raise FileNotFoundError(f"accelerate file {accelerate} is not there; recipes/accelerate holds some")
    for stage in remake:
        if runs.is_finished(steps[0].run_dir, stage):
            say(f"{stage} is kept as {stage}.replaced until the new one is finished")
        runs.set_aside(steps[0].run_dir, stage)
    for number, step in enumerate(steps, start=1):
        name = f"[{number}/{len(steps)}] {step.stage}" + (f", shard {step.shard}" if step.shard else "")
        if step.stage not in waiting:
            say(f"{name}: finished already")
        elif code := _launch_step(step, name, accelerate, say, "the same command" + " without --force" * bool(remake)):
            return code
        else:
            for later in steps[number + 1 :]:  # refused now, not after those between; the next one checks itself
                if later.stage in waiting:
                    check_stage(later.stage, waiting[later.stage], accelerate)
        if step.shard is None:
            _write_missing_report(step)
    return 0


def _launch_step(step: Step, name: str, accelerate: str, say: Callable[[str], None], again: str) -> int:
    """Launch a step, unless its rewards fail the probe; returns its exit code. `again` is the command to resume by."""
    if step.stage == "dapo":
        from rerank import probe

        if problem := probe.problem(step.keys):
            say(f"{name}: {problem}; `rerank probe {step.path} --run-dir {step.run_dir}` shows more, and "
                "`probe: false` in the recipe trains all the same")  # fmt: skip
            return 1
    say(f"{name} ...")
    begin = time.monotonic()
    if code := run_step(step, accelerate):
        folder = runs.partial_dir(step.run_dir, step.folder_name)
        is_refused = folder.is_dir() and not (folder / "begun.json").is_file()
        if code == 1 and load_stage(step.stage).quick_check and is_refused:  # it has refused its input, and said why
            return 2
        happened = "was stopped" if code == 130 else f"failed with exit code {code}"
        say(f"{name} {happened}; {again} continues from here")
        return code
    if not runs.is_finished(step.run_dir, step.folder_name):
        say(f"{name} ended without a result; {again} tries it again")
        return 1
    say(f"{name}: {time.monotonic() - begin:.0f} s")
    return 0


def _write_missing_report(step: Step) -> None:
    """Write the page of an evaluated run; the tasks that rank the whole catalogue have none."""
    path = runs.stage_dir(step.run_dir, step.stage) / "report.html"
    if step.stage == "evaluate" and step.keys.get("task", "rerank") == "rerank" and not path.is_file():
        from rerank import report

        write_whole(path, lambda temporary: report.write_report(step.run_dir, path.parent, temporary))


def describe(steps: Sequence[Step], accelerate: str, remake: Sequence[str] = ()) -> list[str]:
    """The lines of `--dry-run`: a launch line per step, and that of the server where rollouts come from one."""
    lines, where = [], recipe.load(accelerate) if Path(accelerate).is_file() else {}
    for step in steps:
        if step.stage == "dapo" and step.keys.get("vllm_mode") == "server":
            from rerank.models import server

            model, url = runs.stage_dir(step.run_dir, "sft") / "model", server.base_url(step.keys)
            device = free_gpu(where) if server.is_local(url) and not where.get("use_cpu") else None
            if device is not None and not has_gpu(device):
                lines.append(f"# this machine has no GPU {device}, which training leaves to the server: lower "
                             f"num_processes in {accelerate}, or set vllm_server_base_url")  # fmt: skip
            lines.append(server.launch_line(model, url, step.keys.get("vllm_max_model_length"), device) + " &")
        done = step.stage not in remake and runs.is_finished(step.run_dir, step.folder_name)
        words = ["accelerate", "launch", *gpu_words(where), *launch_words(step, accelerate)]
        lines.append("# finished: " * done + shlex.join(words))
    return lines
