"""Weights & Biases: tracking of runs and sweeps, and the project's dashboard."""
