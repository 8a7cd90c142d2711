"""Calibration text: windows of tokens, and the built-in mix."""
