"""The subcommands of `evalmode`, one per file.

audit, export, verify, predict, show and healthcheck declare their flags in the function of their
name. The flags of train and serve are generated: from the fields of `TrainConfig` in
model/config.py, and from those of `Settings` in service/settings.py. A subcommand imports what it
needs when it runs, since torch alone takes seconds.
"""
