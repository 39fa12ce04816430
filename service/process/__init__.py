"""Server processes: their sockets and connections, their signals, and their supervisor."""
