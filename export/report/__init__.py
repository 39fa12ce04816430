"""One report in several formats. The file of each format has a function `render(report) -> str`."""
