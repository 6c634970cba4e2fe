"""Content-addressed artifacts on disk, with the manifest of each."""
