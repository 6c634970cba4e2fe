"""Generating continuations: a function per decoding strategy, over interchangeable backends."""
