"""Processes that serve: their sockets and connections, their signals, their health, and who looks
after them.
"""
