"""Metrics as pure functions on arrays, and their registry: no model, no config, no files."""
