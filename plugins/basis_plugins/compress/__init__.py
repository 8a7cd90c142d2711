"""KV compression methods, one per file."""
