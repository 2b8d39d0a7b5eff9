import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_run import write_items, write_semantic_ids
from transformers import PreTrainedTokenizerFast

from rerank.catalogue import Catalogue, check_vocabulary


def write_run(folder, items=(0, 1)):
    write_items(folder / "data", 2, item=[1, 0], item_id=["b", "a"], title=["B", "A"], category=["", "c"])
    write_semantic_ids(folder / "semantic_ids", np.array(items)[:, None])


def test_a_catalogue_of_a_run_is_in_item_order_and_comes_back_as_saved(tmp_path):
    write_run(tmp_path)
    catalogue = Catalogue.load(tmp_path)
    assert catalogue == Catalogue(["a", "b"], ["<s_a_0>", "<s_a_1>"], ["A", "B"], ["c", ""])
    (tmp_path / "model").mkdir()
    catalogue.save(tmp_path / "model")
    assert Catalogue.load(tmp_path / "model") == catalogue
    assert len(catalogue) == 2


def test_a_catalogue_names_what_is_missing_or_does_not_belong_together(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"items.parquet is missing; give a model folder or a run"):
        Catalogue.load(tmp_path)
    write_run(tmp_path, items=(0, 1, 2))
    with pytest.raises(ValueError, match=r"has 3 items but .*items.parquet has 2.*run the semantic_ids stage again"):
        Catalogue.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("<s_a_1>", "lacks"), ("<s_a_2>", "splits"), ("<s_a_3>", "has as a special"), ("<s_a_4>", "has as a special")],
)
def test_a_tokenizer_that_does_not_know_an_id_token_as_an_ordinary_one_is_refused(name, problem):
    words = Tokenizer(models.WordLevel({"<": 0, "<s_a_0>": 1, "<s_a_2>": 2}, unk_token="<"))
    words.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.add_tokens(["<s_a_0>"])
    tokenizer.add_special_tokens({"eos_token": "<s_a_3>"})
    tokenizer.add_tokens(["<s_a_4>"], special_tokens=True)
    check_vocabulary(tokenizer, ["<s_a_0>"], "m")
    with pytest.raises(ValueError, match=f"of another catalogue than the model's: m {problem}.* {name}; run the"):
        check_vocabulary(tokenizer, ["<s_a_0>", f"<s_a_0>{name}"], "m")
