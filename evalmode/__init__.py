"""evalmode: train with dropout, serve without it, prove it.

The doors to the four rooms: `evalmode.bundle`, `evalmode.model`, `evalmode.export`,
`evalmode.service`. Importing this package loads none of them.
"""

__version__ = "0.1.0"
