"""`python -m rerank.semantic_ids --config recipes/ml100k/2_semantic_ids.yaml`."""

from rerank.launch import recipe

if __name__ == "__main__":
    recipe.launch("semantic_ids")
