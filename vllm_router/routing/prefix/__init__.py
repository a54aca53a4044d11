"""Which server has which prompt prefixes cached."""
