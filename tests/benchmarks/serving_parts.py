"""Figures of a benchmark by part, kept as JSON lines as they come, so that a second run takes up the first."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.busy import wait_until_quiet
from tests.benchmarks.serving_load import NotMeasured


class Parts:
    """Parts that are measured, or taken from a file where they were measured with the same settings.

    Attributes:
        found: Figures by part.
        missing: Why other parts have none.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the file; None for a run that is not kept."""
        self.path, self.found, self.missing = path, dict[str, Any](), dict[str, str]()
        lines = path.read_text().splitlines() if path is not None and path.is_file() else []
        self.stored = [line for line in map(_read, lines) if line is not None]

    def measure(self, part: str, settings: Mapping[str, Any], work: Callable[[], Any]) -> None:
        """A part's figures, measured on a quiet machine where the file has none of the same settings."""
        key = {"part": part, "settings": json.loads(json.dumps(settings))}
        stored = [line["found"] for line in self.stored if {name: line[name] for name in key} == key]
        if stored:
            self.found[part] = stored[-1]
            return
        wait_until_quiet()
        try:
            self.found[part] = work()
        except NotMeasured as error:
            self.missing[part] = str(error)
            print(f"{part}: {error}", file=sys.stderr)
            return
        if self.path is not None:
            self._append({**key, "found": self.found[part]})

    def _append(self, line: Mapping[str, Any]) -> None:
        """Add a line, behind one that was cut off too."""
        assert self.path is not None
        is_cut = self.path.is_file() and not self.path.read_text().endswith("\n") and self.path.stat().st_size > 0
        with self.path.open("a") as file:
            file.write("\n" * is_cut + json.dumps(line) + "\n")


def _read(text: str) -> dict[str, Any] | None:
    """A line; None for one that was cut off."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return found
