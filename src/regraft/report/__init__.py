"""Results to one page that reads itself: JSON, Markdown and HTML."""
