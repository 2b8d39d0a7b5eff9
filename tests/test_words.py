"""One word per idea: no retired words, and docstrings that begin with a statement."""

import ast
import re
from pathlib import Path

import pytest

PACKAGES = ("rerank", "rewards")
SOURCES = sorted(path for folder in PACKAGES for path in Path(folder).rglob("*.py"))
TEXTS = [
    *SOURCES,
    *(path for kind in ("*.j*2", "*.js") for path in Path("rerank").rglob(kind)),
    *(path for kind in ("*.yaml", "*.md") for path in Path("recipes").rglob(kind)),
    Path("README.md"),
]
RETIRED = {  # regular expression -> the word to use
    r"(?<!\")\bmasks?_first\b|drops_forced|\blegal(_\w+)?\b": "constrained",
    r"\bclass Extra\b|\bExtras?\(": "AuxiliaryLoss",
    r"\bItemRows\b|\bmaker\b": "NextItemEncoder, encoder",
    r"\bwhole\(": "gathered_parameters",
    r"\bBarred\b|\bbarred\b": "ExcludedItems, excluded",
    r"why_copied": "shared_cache_obstacle",
    r"\bgates?\b|\bgated\b|`when`|\bwhen: [\w{]+_": "condition",
    r"_mask_fill|\bfills? up\b": "padding groups",
    r"make_patient|\bpatient\b": "add_retries",
    r"\bOwnCounts\b": "UserContributions",
    r"\bdraws? of (a|the|each) prompt|\bdraw(: int\b|=)": "epoch",
    r"(?<!rerank )(?<!\")\breplay(s|ed|ing)?\b(?!\.parquet)": "rescore (the command is `rerank replay`)",
    r"\bexchang(e|es|ed|ing) (\w+ )?groups?\b": "dynamic sampling: drop groups, sample new prompts",
    r"\b(so|as) many\b": "N, the number of",
    r"\b(goes|go|went|going) on\b": "continues, resumes",
    r"How often the item a user takes next": "full-catalogue Recall@K and NDCG@K of the next item",
    r"a policy that cheats": "reward-hacking metrics",
    r"parameters of their own": "trains only the added tokens' rows",
}


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_word_is_not_used(pattern):
    found = []
    for path in TEXTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(pattern, line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert not found, "\n".join([f"write {RETIRED[pattern]}:", *found])


def first_words(path: Path) -> list[str]:
    """PLACE: first line, of every docstring of a Python file and every heading of a Markdown one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [f"{path}: {line.lstrip('# ')}" for line in text.splitlines() if line.startswith("#")]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)] if path.suffix == ".py" else []
    return [f"{path}: {doc.splitlines()[0]}" for node in nodes if (doc := ast.get_docstring(node))]


def test_no_docstring_or_heading_begins_with_what_or_of_each():
    found = [line for path in TEXTS for line in first_words(path) if re.search(r"^[^:]+: (What|Of each)\b", line)]
    assert not found, "\n".join(found)


def test_every_public_function_and_class_has_a_docstring():
    found = [
        f"{path}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not found, "\n".join(found)
