"""`skipdit sample`: a comparison of runs, or a set of samples for evaluation."""
