"""`basis inspect`."""
