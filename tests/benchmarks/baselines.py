"""The virtual environment of requirements-baselines.txt, which the package itself needs nothing of."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-baselines"
REQUIREMENTS = Path(__file__).with_name("requirements-baselines.txt")


def baselines_python() -> Path:
    """Its interpreter; the environment is made when it is not there, which takes some minutes."""
    python = FOLDER / "bin/python"
    if not (FOLDER / "installed").exists():
        print(f"installing {REQUIREMENTS.name} into {FOLDER}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "-r", REQUIREMENTS], check=True)
        (FOLDER / "installed").touch()
    return python


if __name__ == "__main__":
    print(baselines_python())
