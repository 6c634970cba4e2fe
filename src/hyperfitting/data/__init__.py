"""Texts and how they become sequences of tokens."""
