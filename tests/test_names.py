"""Names of models and files: folders, hub names and what installed packages bring."""

import pytest
from huggingface_hub import constants

from rerank.models import names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package `brought` with a model two folders down and a data file."""
    for path in ("brought/__init__.py", "brought/a/model/config.json", "brought/a/model/part/config.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "brought"


def test_a_file_is_located_by_variables_and_by_package(package, monkeypatch):
    monkeypatch.setenv("PLACE", "there")
    assert names.locate("${PLACE}/x.csv", "items") == names.locate("$PLACE/x.csv", "items") == "there/x.csv"
    assert names.locate("package:brought/data/x.csv", "items") == str(package / "data/x.csv")
    with pytest.raises(ValueError, match=r"items is \$NOWHERE/x but NOWHERE is not set; `export NOWHERE=...` first"):
        names.locate("$NOWHERE/x", "items")


@pytest.mark.parametrize("name", ["no_such_package", "no.such.package", "no-such-package"])
@pytest.mark.parametrize("find", [names.locate, names.resolve])
def test_a_package_that_is_not_installed_is_refused(find, name):
    with pytest.raises(FileNotFoundError, match=f"model is package:{name} but the package {name} is not installed"):
        find(f"package:{name}", "model")


def test_a_model_is_a_folder_a_hub_name_or_the_one_inside_a_package(package, monkeypatch):
    assert names.resolve("package:brought", "model") == str(package / "a/model")
    assert names.resolve(str(package / "a/model"), "model") == str(package / "a/model")
    (package / "modules.json").touch()
    assert names.resolve("package:brought", "encoder", ("modules.json", "config.json")) == str(package)
    (package / "x.gguf").touch()
    assert names.resolve(str(package), "model") == str(package)
    for name in ("Qwen/Qwen3-8B", "gpt2"):
        assert names.resolve(name, "model") == name


def test_a_hub_name_is_found_in_the_cache_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert names.local("org/model", "model") is None
    repository = tmp_path / "models--org--model"
    for path, text in (("refs/main", "abc"), ("refs/other", "def"), ("snapshots/abc/config.json", "{}")):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text)
    assert names.local("org/model", "model") == repository / "snapshots/abc"
    assert names.local("org/model", "model", "other") is None
    assert names.local(str(tmp_path), "model", files=("models--*",)) == tmp_path


def test_a_model_that_is_not_there_is_refused(package, monkeypatch):
    monkeypatch.chdir(package)
    for name in ("a/nowhere", "./nowhere", "/no/where", "x/y/z", "", "two words"):  # a/ is a folder here
        with pytest.raises(FileNotFoundError, match=f"model {name} is not there; give a model's folder, its hub name"):
            names.resolve(name, "model")
    with pytest.raises(FileNotFoundError, match=r"model a holds no config.json or \*.gguf; give the folder that save"):
        names.resolve("a", "model")
    with pytest.raises(FileNotFoundError, match="model is package:bare but .*/bare holds no modules.json, so no mod"):
        names.resolve("package:bare", "model", ("modules.json",))
