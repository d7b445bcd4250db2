"""Reports: results as one self-contained HTML page, Markdown and JSON."""
