"""The error for what a user can mend."""


class UserError(ValueError):
    """A mistake in the input: its message is one line that says what is wrong and what to do.

    The command-line scripts print it without a traceback and exit with status 2.
    """
