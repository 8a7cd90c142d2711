"""Calibration: text to token batches, and what is measured on them."""
