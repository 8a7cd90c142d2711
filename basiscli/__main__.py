"""`python -m basiscli`."""

from basiscli.cli import main

if __name__ == "__main__":
    main()
