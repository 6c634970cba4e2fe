"""How fast it is, always as a ratio against a named peer in the same run."""
