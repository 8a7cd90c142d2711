"""`basis evaluate`."""
