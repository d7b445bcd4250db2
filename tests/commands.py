"""The command line, run in the test's own process."""

from __future__ import annotations

import pytest

from regraft.cli import main


def exit_code(*words: object) -> int:
    """Run `regraft` with these words; return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)
