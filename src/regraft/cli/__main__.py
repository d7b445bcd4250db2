"""`python -m regraft.cli`, as launchers of several processes start it."""

from regraft.cli import main

if __name__ == "__main__":
    main()
