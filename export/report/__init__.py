"""One report, several spellings: each format is a file with `render(report) -> str`."""
