"""Linear algebra on torch tensors: pure functions, without files, devices or models."""
