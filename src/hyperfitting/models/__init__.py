"""Pre-trained models: where they come from, how they load, and which parameters are trained."""
