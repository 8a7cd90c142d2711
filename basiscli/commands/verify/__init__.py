"""`basis verify`."""
