"""Pure functions on tensors: no files, no devices chosen, no console."""
