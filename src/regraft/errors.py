"""The one error a user is meant to read."""


class RegraftError(Exception):
    """Bad input or an impossible request, told in the user's words.

    The message names the file, field or tensor, what was found, what was expected and the fix.
    The command line prints it and exits with code 2; nothing has been written.
    """


class PassingError(RegraftError):
    """Bad luck or an output in the way, not bad input: finished work stays.

    The same command goes on from it, once there is room or the way is free.
    """
