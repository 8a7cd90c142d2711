"""Recipes: whole pipelines in YAML, and mergekit's files as they are."""
