"""What models predict and generate on the evaluation texts, and the scores of that."""
