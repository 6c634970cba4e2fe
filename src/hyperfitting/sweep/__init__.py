"""Sweeps: which members there are, who runs them, how far they are, what is still to do."""
