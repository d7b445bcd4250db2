"""The error that users are meant to read, and functions that classify other errors."""


class RegraftError(Exception):
    """Bad input or an impossible request, explained in the user's terms.

    The message names the file, field or tensor, what was found, what was expected and the fix.
    The command line prints it and exits with code 2; nothing half-written is left behind.
    """


class PassingError(RegraftError):
    """A temporary obstacle, such as a full disk or a file in the way; the input is fine.

    Finished work stays, and the same command continues once the obstacle is gone.
    """


def is_host_memory(error: BaseException) -> bool:
    """Whether host memory ran out; torch has no exception class for it."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def is_device_memory(error: BaseException) -> bool:
    """Whether an accelerator's memory ran out; compares names, so that torch is not imported."""
    return type(error).__name__ == "OutOfMemoryError"


def is_fault(error: BaseException) -> bool:
    """Whether this is a failure, not an interruption; a tokenizers panic is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
