"""Finds the best cache schedules for one model.

- `trials` measures the effect of each reuse on a run (and, for SmoothCache, the changes of branches)
- `plan` finds the schedules with the least error for each cost, `search` improves them, and `find` tries them in runs
- `calibrate` is `skipdit calibrate`: all of it, tested on held-out seeds, with a report
"""
