"""The card of a trained model."""

from rerank.launch import model_card
from rerank.launch.files import write_json


def test_a_card_says_so_when_the_terms_are_not_stated(tmp_path):
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data/metrics.json", {"items": 3, "users": 2, "interactions": 9, "terms": ""})
    what = model_card.ranker(num_candidates=10, trace=True)
    model_card.write(tmp_path, tmp_path, "dapo", what, base="Qwen/Qwen3-8B")
    card = (tmp_path / "README.md").read_text()
    assert "Base model: Qwen/Qwen3-8B\n- Stages of training: midtrain, sft, dapo\n" in card
    assert "The recipe states none" in card and "10 candidates" in card
