"""Processes that serve: their sockets and connections, their signals, and their supervisor."""
