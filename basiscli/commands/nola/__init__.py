"""`basis nola`."""
