"""What `skipdit sample` does: a comparison of runs, or a set of samples for evaluation."""
