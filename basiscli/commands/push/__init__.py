"""`basis push`."""
