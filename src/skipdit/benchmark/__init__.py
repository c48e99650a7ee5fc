"""Benchmarks: the costs of full and reuse steps beside a baseline of the same run, and the effects of a conversion.

`skipdit.commands.benches` has the list of benchmarks.
"""
