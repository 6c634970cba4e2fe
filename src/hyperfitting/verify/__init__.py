"""`hyperfit-verify`: checks a result without trusting it, and makes it anew."""
