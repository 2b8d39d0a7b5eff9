"""The toy recipe in tests/toy, and the ways tests run it and the `rerank` command."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rerank.launch import recipe
from rerank.launch.stages import STAGES

TOY = Path("tests/toy")


def run_command(*words: object) -> str:
    """Run `rerank WORDS`, which must end well, and return what it prints."""
    from rerank import cli

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main([str(word) for word in words])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


def refusal(captured, *words: object) -> str:
    """The one line with which `rerank WORDS` refuses; `captured` is the fixture capsys or capfd."""
    from rerank import cli

    captured.readouterr()  # what making the input wrote
    assert cli.main([str(word) for word in words]) == 2
    out, error = captured.readouterr()
    assert out == "" and error.startswith("rerank: ") and error.count("\n") == 1, error
    return error


def environment() -> dict[str, str]:
    """What a launched process needs to know; one thread, so that two processes do not fight for the cores."""
    return {**os.environ, **recipe.ENVIRONMENT, "OMP_NUM_THREADS": "1"}


def run_words(out: Path, *words: str) -> list[str]:
    """The words of a `rerank run` of the toy."""
    return [sys.executable, "-m", "rerank.cli", "run", str(TOY), "--out", str(out), *words]


def launch(accelerate: str, module: str, stage: str, out: Path, *words: str) -> None:
    """A bare `accelerate launch` of one stage; its last lines are the message when it fails."""
    file = next(TOY.glob(f"*_{stage}.yaml"))
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate, "-m", module]
    line += ["--config", str(file), f"--run_dir={out}", *words]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def copy_stages(run: Path, out: Path, last: str) -> Path:
    """A run that is finished up to and with the stage `last`."""
    for stage in list(STAGES)[: list(STAGES).index(last) + 1]:
        shutil.copytree(run / stage, out / stage)
    return out
