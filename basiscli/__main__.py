"""`python -m basiscli`."""

from basiscli.app import main

if __name__ == "__main__":
    main()
