"""Files and bundles against the rules, one or many at a time."""
