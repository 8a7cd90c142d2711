"""`basis init`."""
