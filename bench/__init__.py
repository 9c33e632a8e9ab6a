"""Benchmarks of fastbert: ops, models and training steps against what one would use otherwise, and against the machine.

Installed as ``fastbert.bench``; ``fastbert bench --help`` and bench/README.md say how to run it and how it measures.
"""
