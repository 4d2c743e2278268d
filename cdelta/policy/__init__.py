"""Prompts: records, sources, users' files, pairs, splits, leakage."""
