"""What a user's own process imports to use an output: the small KV cache."""
