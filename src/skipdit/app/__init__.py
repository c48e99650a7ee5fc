"""The page of `skipdit app`: a model sampled in full and cached side by side, what a speedup costs, how stable it is.

- `jobs`: one job at a time, all others wait in line; progress and cancelling
- `models`: what may be chosen
- `generate`, `quality`, `stability`: what the three tabs do, without a page
- `drawing`, `chart`: results as HTML
- `page`: the components and what they call; `server`: the only way in, and what it refuses

Gradio is imported by `page` and `server` alone.
"""
