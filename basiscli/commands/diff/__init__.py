"""`basis diff`."""
