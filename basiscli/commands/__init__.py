"""What `basis` does, a folder a command."""
