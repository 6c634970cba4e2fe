"""Pure functions on arrays: no model, no config, no files."""
