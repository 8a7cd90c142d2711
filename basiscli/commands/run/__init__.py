"""`basis run`."""
