"""Train language models to re-rank recommendations by reasoning.

The stages in order, one module each: `data`, `semantic_ids`, `midtrain`, `candidates`, `traces`, `sft`, `dapo`,
`evaluate`. Each runs alone (`accelerate launch -m rerank.<stage> --config RECIPE.yaml`) or through `rerank run`.
"""
