"""`basis kv`."""
