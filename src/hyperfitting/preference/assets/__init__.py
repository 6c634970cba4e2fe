"""Templates, style and script of the annotation page."""
