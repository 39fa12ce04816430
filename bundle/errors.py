"""The errors a user of a bundle can meet.

EvalmodeError                 every error that is the user's to mend: one sentence, exit code 2
├── BundleError               a bundle that must not be used
│   ├── BundleCorrupt         a file is missing, changed or unreadable; the sentence names it
│   │   └── FileUnreadable    it cannot be read at all; knows the reason apart from the way out
│   ├── BundleNotCertified    its certificate is absent, fails, or certifies other content
│   └── KnownAnswersDiffer    it does not answer here as it was certified to
├── ModelRunFailed            the runtime failed on these inputs
│   └── InputsRefused         because of the inputs: an index out of range, shapes that clash
└── ProviderUnavailable       an execution provider that was asked for is not there; says which are
"""

from __future__ import annotations

from evalmode.errors import EvalmodeError


class BundleError(EvalmodeError):
    """A bundle that must not be used."""


class BundleCorrupt(BundleError):  # noqa: N818 - read as a sentence: "raise BundleCorrupt"
    """A file of the bundle is missing, changed or unreadable; the message names it."""


class FileUnreadable(BundleCorrupt):
    """A file cannot be read. `reason` names it, without the way out that a bundle has."""

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason if remedy is None else f"{reason}: {remedy}")
        self.reason = reason


class BundleNotCertified(BundleError):  # noqa: N818
    """The certificate is absent, holds a failed rule, or certifies other content."""


class KnownAnswersDiffer(BundleError):  # noqa: N818
    """A known answer does not come out here; the message names the first that does not, and by how
    much.
    """


class ModelRunFailed(EvalmodeError):  # noqa: N818
    """The runtime failed on the inputs of a run; the message is the runtime's reason."""


class InputsRefused(ModelRunFailed):
    """The inputs of a run are not what the model can compute with; other inputs would have been
    answered.
    """


class ProviderUnavailable(EvalmodeError):  # noqa: N818
    """An execution provider that was asked for is not available here; the message lists those that
    are.
    """
