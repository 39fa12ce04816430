"""evalmode: train with dropout, serve without it, prove it.

The four rooms are `evalmode.bundle`, `evalmode.model`, `evalmode.export` and `evalmode.service`.
Importing this package loads none of them.
"""

__version__ = "0.1.0"

# The default data set and the timings of bundles are stored here.
CACHE = "~/.cache/evalmode"

# How many labels a prediction lists, the best first, if the caller does not say.
DEFAULT_TOP_K = 3
