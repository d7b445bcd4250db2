"""`python -m regraft.cli`, for launchers that start several processes."""

from regraft.cli import main

if __name__ == "__main__":
    main()
