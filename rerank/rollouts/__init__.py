"""Rollouts: their schema and store, lists of groups, metrics, browser, and rescoring."""
