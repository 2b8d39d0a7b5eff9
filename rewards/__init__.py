"""Rewards, one a file: `rewards/<name>.py` holds the function `<name>`, and a recipe names it.

    rewards:
      - {name: ndcg, weight: 1.0, kwargs: {k: 10}}
      - {name: well_formed, weight: 0.2, condition: promoted_or_kept_first}
      - {name: "my_rewards:novelty", weight: 0.0}        # an outcome: logged, not trained on

The folder is the registry: drop a file in, or write `module.path:function` or `path/to/file.py:function`.

    def shortness(completions, max_words=50, **columns):
        \"\"\"1 for an empty completion, falling to 0 at `max_words`. Range: 0 to 1; punishes only.\"\"\"
        return [max(0.0, 1 - len(text.split()) / max_words) for text in completions]

The contract, each sentence a test in tests/test_rewards.py, which also checks your own:
`pytest tests/test_rewards.py --reward my_rewards.py:novelty` (`--condition` for a condition).

1. A reward takes `completions` (texts), the dataset columns it wants by name, its own parameters with defaults, and
   `**columns`; it returns `list[float | None]`.
2. It returns one value for each completion, in their order.
3. It is row-local: a value depends on its own completion and row, never on its index, its neighbours or the size of
   the group.
4. It is pure: no global state, no randomness, no model loaded at import, a module-level function. It leaves its
   columns as they are.
5. Bad model output is a low score. A bad row is an exception. None means "does not apply here".
6. The docstring gives the range, as `Range: 0 to 1`, and every value keeps it; no completion of a row scores above its
   gold answer (a reward that only punishes says so: `punishes only`).

Columns of every row: `row_id`, `user`, `history` (items, oldest first), `candidates` (items, in the order shown),
`relevance` (grade of each candidate: 0 shown, 1 clicked, 2 bought ...; NaN: not seen, never a negative),
`candidate_labels` (how a completion names each candidate), `first_stage_ranks` (1-based rank of each candidate in the
first stage's list), `target_rank` (first-stage rank of the target: the most relevant candidate, of equals the one that
the first stage ranks best), `fields` (further columns of the row, as a JSON object), `max_completion_tokens` (token
limit of the completion) and `top_k` (how many candidates a completion names, the best; 0: all).
`rerank.rows.REWARD_COLUMNS` defines them. The trainer adds `prompts` (rendered texts) and `completion_ids` (tokens).
`rerank.prompts.parse_completion(completion, candidate_labels, top_k)` reads a ranking, which has all candidates;
`rerank.metrics.judged_order(order, relevance)` leaves out those that were not seen.

A reward with a `condition` counts 0 where the condition is False. `conditions/` holds them, by the same contract, one
bool per completion.

Several recipes share a list of rewards as a file with `rewards:`, such as recipes/rewards/naive.yaml; the option
`rewards` of the dapo stage takes its path.
"""
