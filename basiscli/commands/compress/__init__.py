"""`basis compress`."""
