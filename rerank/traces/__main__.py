"""Run the stage: `python -m rerank.traces --config recipes/ml100k/5_traces.yaml`."""

from rerank.launch import recipe

if __name__ == "__main__":
    recipe.launch("traces")
