"""The errors that a user of a bundle can meet.

EvalmodeError                 every error that the user can fix: one sentence, exit code 2
├── BundleError               a bundle that must not be used
│   ├── BundleCorrupt         a file is missing, changed or unreadable; the message names it
│   │   └── FileUnreadable    the file cannot be read at all
│   ├── BundleNotCertified    its certificate is missing, did not pass, or is of another bundle
│   └── KnownAnswersDiffer    the model gives other answers here than when it was certified
├── ModelRunFailed            the runtime failed on these inputs
│   └── InputsRefused         because of the inputs: an index out of range, shapes that clash
└── ProviderUnavailable       the execution provider is not there; the message lists those that are
"""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class BundleError(EvalmodeError):
    """A bundle that must not be used."""


class BundleCorrupt(BundleError):  # noqa: N818 - read as a sentence: "raise BundleCorrupt"
    """A file of the bundle is missing, changed or unreadable; the message names it."""


class FileUnreadable(BundleCorrupt):
    """A file cannot be read.

    `reason` is the message without the remedy, for callers that need another remedy.
    """

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason if remedy is None else f"{reason}: {remedy}")
        self.reason = reason


class BundleNotCertified(BundleError):  # noqa: N818
    """The certificate is missing, did not pass, or is of another bundle."""


class KnownAnswersDiffer(BundleError):  # noqa: N818
    """A known answer is not reproduced here; the message names the first, and its difference."""


class ModelRunFailed(EvalmodeError):  # noqa: N818
    """The runtime failed on the inputs of a run; the message is the runtime's reason."""


class InputsRefused(ModelRunFailed):
    """A run failed because of its inputs; the model may answer others."""


class ProviderUnavailable(EvalmodeError):  # noqa: N818
    """An execution provider is not available here; the message lists those that are."""
