"""`basis report`."""
