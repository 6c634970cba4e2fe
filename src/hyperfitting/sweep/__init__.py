"""Sweeps: expanding axes to runs, planning, launching, and watching them."""
