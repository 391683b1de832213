"""The one exception that stands for a mistake in the user's input."""


class BadInput(Exception):
    """The user's input is wrong. The message is one line: `where: what is wrong; how to fix it`. Exit status 2."""
