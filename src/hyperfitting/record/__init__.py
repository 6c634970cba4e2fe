"""results.json, the record of a run: its typed classes, and the only reader and writer."""
