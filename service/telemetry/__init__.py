"""What a server reports about itself: metrics, statistics, logs and traces."""

import os

from evalmode.service.lean_imports import left_out

# With this variable prometheus_client would count in files. Here the supervisor adds up the figures
# of the workers. A variable that is meant for another server on this machine must not change that.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

# structlog would use Rich for tracebacks with local variables, which hold the texts of requests and
# are switched off here. Rich takes 4 MB, and a third of the time of this import.
with left_out("rich"):
    import structlog

__all__ = ["structlog"]
