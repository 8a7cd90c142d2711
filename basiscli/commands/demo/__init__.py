"""`basis demo`."""
