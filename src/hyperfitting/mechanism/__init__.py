"""Why hyperfitting works: both models compared, controls, and causal interventions."""
