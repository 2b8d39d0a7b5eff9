"""Fixtures that several test modules share."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock
from toy_recipe import TOY, environment, run_command

from rerank.launch import recipe

LONGEST = "test_distributed.py"
NEXT_LONGEST = ("test_distributed_dapo.py", "test_resume.py")  # all need the toy run


def pytest_addoption(parser):
    """Rewards and conditions of a user's own that test_rewards.py holds to the contract too."""
    for name in ("reward", "condition"):
        parser.addoption(
            f"--{name}", action="append", default=[], metavar="FILE.py:FUNCTION", help=f"also check this {name}"
        )


def pytest_collection_modifyitems(items):
    """The longest file first, which makes the toy run; others need it when it is there: no worker waits."""
    need_it = {item.path for item in items if "toy_run" in item.fixturenames}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path in need_it, item.path.name not in NEXT_LONGEST))


@pytest.fixture
def quiet_engine():
    """TRL and vLLM write into the environment; leave it as it was."""
    with patch.dict(os.environ, {**recipe.ENVIRONMENT, "OMP_NUM_THREADS": "1"}):
        yield


@dataclass(frozen=True)
class ToyRun:
    """A finished run of the toy recipe: its folder, and what the command printed."""

    run: Path
    printed: str


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A folder that the worker processes of one call of pytest share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def toy_run(shared_dir):
    """`rerank run tests/toy`, once for all tests: every stage in a process of its own, as users run it."""
    run, output = shared_dir / "toy_run", shared_dir / "toy_run.txt"
    with FileLock(shared_dir / "toy_run.lock"):
        if not output.exists():
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment().items():
                    if os.environ.get(name) != value:
                        patch.setenv(name, value)
                printed = run_command("run", TOY, "--out", run)
            output.write_text(printed)
    return ToyRun(run, output.read_text())
