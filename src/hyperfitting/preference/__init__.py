"""Human preference: tasks from a sweep, judgments of people and models, agreement and intervals."""
