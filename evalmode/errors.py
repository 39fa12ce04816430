"""The base of every error that a user of evalmode can mend."""

from __future__ import annotations


class EvalmodeError(Exception):
    """Something the user can mend; its message is one clear sentence that names the way out.

    The command line prints the sentence and exits with 2; the service answers with it.
    """
