"""Defines `ViCAError`, a mistake that the user can fix, told in one line."""


class ViCAError(ValueError):
    """A mistake in what the user gave. The message is one line that names the value and what would be right;
    the command line prints it without a traceback."""
