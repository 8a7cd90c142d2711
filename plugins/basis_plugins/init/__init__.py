"""Methods that initialise adapters, one a file."""
