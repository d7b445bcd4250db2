"""The one error a user is meant to read; and others that have to be told apart."""


class RegraftError(Exception):
    """Bad input or an impossible request, told in the user's words.

    The message names the file, field or tensor, what was found, what was expected and the fix.
    The command line prints it and exits with code 2; nothing has been written.
    """


class PassingError(RegraftError):
    """Bad luck or an output in the way, not bad input: finished work stays.

    The same command goes on from it, once there is room or the way is free.
    """


def is_host_memory(error: BaseException) -> bool:
    """Whether host memory was too small; torch has no class of its own for it."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def is_device_memory(error: BaseException) -> bool:
    """Whether an accelerator's memory was too small; by its name, so that torch is not needed."""
    return type(error).__name__ == "OutOfMemoryError"


def is_fault(error: BaseException) -> bool:
    """Whether an error says that something is wrong: a panic of tokenizers is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
