"""The one exception for a user's mistake: the command line prints its text and exits with status 2."""

import os
import sys


class UserError(Exception):
    """What was found, where, and what to write instead, in one line. Never shown with a traceback."""


class Ended(RuntimeError):
    """A run ended for a reason that is no bug of ours: said in one line, with an exit status that says which."""

    status = 1


def note(text: str) -> None:
    """Say something that is no error but may not be meant, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)
