"""Why hyperfitting works: the base and the tuned model compared layer by layer, token by token."""
