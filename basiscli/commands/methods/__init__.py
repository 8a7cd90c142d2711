"""`basis methods`."""
