"""`python -m rerank.data` runs the stage."""

from rerank.launch import recipe

if __name__ == "__main__":
    recipe.launch("data")
