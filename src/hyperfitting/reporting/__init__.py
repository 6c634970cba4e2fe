"""Records made readable: tables, colours."""
