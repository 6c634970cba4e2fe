"""Commands for the models of finished runs: try them on a prompt, take them elsewhere."""
