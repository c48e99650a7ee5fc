"""Finds the schedule of a cache that costs one model least.

- `trials` measures what each reuse does to a run (and, for SmoothCache, how branches change)
- `plan` searches: the cheapest schedule for an error, the least error for a cost
- `calibrate` is `skipdit calibrate`: both, tried on held-out seeds, with a report
"""
