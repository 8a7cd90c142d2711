"""What commands share at the terminal."""
