"""How continuations are made."""
