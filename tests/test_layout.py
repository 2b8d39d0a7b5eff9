"""The package as a whole: its files, its words, its stages, its command and its wheel."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from rerank.launch import recipe
from rerank.launch.stages import STAGES, load_stage

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for name in ("rerank", "rewards") for path in (ROOT / name).rglob("*.py"))
DATA = [path for kind in ("*.jinja", "*.j2", "*.js") for path in (ROOT / "rerank").rglob(kind)]
RECIPES = [path for kind in ("*.yaml", "*.md", "*.json") for path in (ROOT / "recipes").rglob(kind)]
TEXTS = [*SOURCES, *DATA, *RECIPES, *(ROOT / name for name in ("README.md", "Makefile", "pyproject.toml"))]
HEAVY = {"torch", "transformers", "trl", "vllm", "datasets", "ibis", "sentence_transformers", "lightgbm", "numpy"}
COMMANDS = (
    "run",
    "compare",
    "inspect",
    "report",
    "replay",
    "export",
    "ids",
    "probe",
    "losses",
    "rank",
    "serve",
    "add-items",
    "refresh",
)
HELP = """
import contextlib, io, sys
from rerank import cli
for words in [[], *([command] for command in sys.argv[1:])]:
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        cli.main([*words, "--help"])
    line = printed.getvalue().splitlines()[0]
    print(line[: line.find("[-h]") + 4] if words else line)
print(*{name.split(".")[0] for name in sys.modules})
"""
IMPORT_ALL = """
import importlib, sys
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    module = importlib.import_module(name)
    assert module.__file__.startswith(folder), f"{name} comes from {module.__file__}"
"""
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
    r'("""|\.md:\d+: #+ )(What|Of each)\b': "a statement, in docstrings and headings",
    r"(?<![\w.])/(work|root|tmp|home|Users|mnt|opt)/": "a path that is there on every machine",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_has_a_vague_name_or_one_of_pythons_own():
    names = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & ({"utils", "helpers", "common", "misc"} | sys.stdlib_module_names)


def test_no_module_or_function_outgrows_a_reader():
    assert not [str(path) for path in SOURCES if len(path.read_text().splitlines()) > 300]
    functions = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name != "main"
    ]
    assert not [f"{path}: {node.name}" for path, node in functions if node.end_lineno - node.lineno >= 60]


def test_the_package_has_room_for_few_entries():
    """Three tiers: commands, the eight stages, and shared packages; import-linter holds them apart."""
    entries = {path.name for path in (ROOT / "rerank").iterdir() if path.name != "__pycache__"}
    assert set(STAGES) < entries and len(entries) <= 28


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_word_or_a_path_of_some_machine_is_not_used(pattern):
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    found = [line for line in lines if re.search(pattern, line)]
    assert not found, "\n".join([f"write {RETIRED[pattern]}:", *found])


def test_every_public_function_and_class_has_a_docstring():
    found = [
        f"{path}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_four_parts(stage):
    module, declared = importlib.import_module(f"rerank.{stage}"), load_stage(stage)
    place = list(STAGES).index(stage)
    assert declared.name == stage
    assert set(declared.inputs) <= set(list(STAGES)[:place])
    assert all(is_dataclass(cls) for cls in declared.arguments)
    assert issubclass(declared.arguments[0], recipe.StageArguments)
    line = f"-m rerank.{stage} --config recipes/ml100k/{place + 1}_{stage}.yaml"
    assert line in " ".join(module.__doc__.replace("\\\n", " ").split())


def test_help_comes_without_a_heavy_import():
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, check=True)
    *usages, modules = done.stdout.splitlines()
    assert usages == ["usage: rerank [-h] COMMAND ...", *(f"usage: rerank {command} [-h]" for command in COMMANDS)]
    assert not HEAVY & set(modules.split())


def test_every_name_that_a_benchmark_imports_from_here_exists(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    texts = [path.read_text() for path in (ROOT / "tests/benchmarks").glob("*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    named = {(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    named |= {(alias.name, "__name__") for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = [(module, name) for module, name in sorted(named) if module.split(".")[0] in ("rerank", "tests")]
    assert len(ours) > 30
    for module, name in ours:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's content, built from a copy so that nothing is left beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("rerank", "rewards"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "source")
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*line, str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def test_the_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    packed = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    assert {path.name for path in DATA} >= {"chat_template.jinja", "report.html.j2", "ids.html.j2", "rollouts.js"}
    assert {path.relative_to(ROOT) for path in [*SOURCES, *DATA]} <= packed
    assert not {path.parts[0] for path in packed} & {"tests", "recipes"}
    assert any(path.name == "LICENSE" for path in packed)


def test_every_module_of_the_wheel_imports(wheel, tmp_path):
    names = [module_name(path) for path in SOURCES]
    line = [sys.executable, "-I", "-c", IMPORT_ALL, str(wheel), *names]
    environment = {**os.environ, **recipe.ENVIRONMENT}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_readme_says_nothing_twice_and_is_brief_on_your_own_data():
    text = Path("README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    assert len(headings) > 10 and len(set(headings)) == len(headings)
    own = text.partition("\n## Your own data\n")[2].partition("\n## ")[0]
    assert 10 < len(own.strip().splitlines()) <= 45
