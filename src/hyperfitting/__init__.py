"""Hyperfitting: train a language model far past its validation loss, and measure what it gains."""

__version__ = "0.1.0"
