"""What the user of the command line can mend."""

__all__ = ["InputError"]


class InputError(Exception):
    """Bad usage or bad input; the message says what was expected and what came."""
