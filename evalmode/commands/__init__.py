"""The subcommands of `evalmode`, one a file. What a subcommand needs is imported when it runs."""
