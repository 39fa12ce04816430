"""The client side of `evalmode predict`: lines of a file, answered by a server or in this
process.
"""
