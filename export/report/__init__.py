"""One report in several formats: each format is a file with `render(report) -> str`."""
