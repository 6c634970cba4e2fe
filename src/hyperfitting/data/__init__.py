"""Documents, and the token sequences that are trained, validated and evaluated on."""
