"""Fixtures that several test modules share."""

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_recipe import TOY, environment, write_toy_data


def pytest_addoption(parser):
    """Rewards and conditions of a user's own that test_rewards.py holds to the contract too."""
    for name in ("reward", "condition"):
        parser.addoption(
            f"--{name}", action="append", default=[], metavar="FILE.py:FUNCTION", help=f"also check this {name}"
        )


@dataclass(frozen=True)
class ToyRun:
    """A finished run of the toy recipe: its folder, that of its data, and what the command printed."""

    run: Path
    data: Path
    printed: str


def run_command(*words: str) -> str:
    """What `rerank WORDS` prints; it must end well."""
    from rerank import cli

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(list(words))
    assert code == 0, printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """The folder of the toy's data."""
    return write_toy_data(tmp_path_factory.mktemp("toy_data"))


@pytest.fixture(scope="session")
def toy_run(toy_data, tmp_path_factory):
    """`rerank run tests/toy`, once for all tests: every stage in a process of its own, as users run it."""
    run = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(toy_data).items():
            if os.environ.get(name) != value:
                patch.setenv(name, value)
        printed = run_command("run", str(TOY), "--out", str(run))
    return ToyRun(run, toy_data, printed)
