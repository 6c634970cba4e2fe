"""Hyperfitting: fine-tune on a tiny dataset to near-zero loss, and study the generation."""

__version__ = "0.1.0"
