"""Methods that initialise adapters, one per file."""
