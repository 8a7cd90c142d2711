"""One module a command: what the command line does, Python can do, with the same names."""
