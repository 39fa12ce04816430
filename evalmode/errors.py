"""The base of every error that a user of evalmode can mend."""

from __future__ import annotations


class EvalmodeError(Exception):
    """An error that the user can mend. Its message is one sentence, which names the remedy.

    The command line prints the sentence and exits with 2; the service answers with it.
    """
