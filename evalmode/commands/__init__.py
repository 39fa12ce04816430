"""The subcommands that are too long for cli.py, one a file."""
