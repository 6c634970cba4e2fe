"""Downstream tasks: benchmarks of base and tuned model, by lm-evaluation-harness."""
