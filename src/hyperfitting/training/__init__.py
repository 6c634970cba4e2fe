"""Training: the loop, its step, loss, checkpoints, activation cache, and what it costs."""
