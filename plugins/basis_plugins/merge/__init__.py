"""Merge methods."""
