"""The rules: the registry lists them, a subject is what they judge, and each rule is a file."""
