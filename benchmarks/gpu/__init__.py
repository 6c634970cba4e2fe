"""`make gpu-check`: what can only be known on a GPU, in two parts of at most nine minutes each."""
