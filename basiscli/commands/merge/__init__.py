"""`basis merge`."""
