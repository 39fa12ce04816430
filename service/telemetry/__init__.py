"""What a server reports about itself: metrics, statistics, logs and traces."""

from evalmode.service.lean_imports import left_out

# structlog would use Rich for tracebacks with local variables, which hold the texts of requests and
# are switched off here. Rich takes 4 MB, and a third of the time of this import.
with left_out("rich"):
    import structlog

__all__ = ["structlog"]
