"""`basis expand`."""
