"""What full and reuse steps cost, as rows beside a baseline of the same run; what a conversion does to a model.

`skipdit.commands.benches` has the list of benchmarks.
"""
