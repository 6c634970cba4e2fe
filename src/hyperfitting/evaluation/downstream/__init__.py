"""What hyperfitting costs: benchmarks of base and tuned model by lm-evaluation-harness."""
