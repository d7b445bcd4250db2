"""Files: checked readers, atomic writers."""
