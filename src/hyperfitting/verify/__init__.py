"""`hyperfit-verify`: checks a result without trusting it, and reruns it."""
