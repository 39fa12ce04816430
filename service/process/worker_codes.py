"""The exit codes of a worker, beside 0 and those of the system."""

REFUSED = 2  # it cannot start, and has sent the reason
STUCK = 70  # a batch is stuck for good
