"""Why hyperfitting works: measures inside the models, controls, and causal interventions."""
