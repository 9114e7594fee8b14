"""The error for what a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: its message is one line that says what is wrong and what to do.

    The command-line scripts print it without a traceback and exit with status 2.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for an error message: the nearest of `choices`, or all of them."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(choices)}"
