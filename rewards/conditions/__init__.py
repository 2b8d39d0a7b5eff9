"""Conditions of rewards, one a file: `def name(completions, **columns) -> list[bool]`.

They keep the contract of `rewards/__init__.py`: row-local, pure, one bool per completion, False for bad model output.
"""
