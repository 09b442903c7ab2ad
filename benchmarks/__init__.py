"""Benchmarks of dask-gpurt: ``python -m benchmarks NAME [--quick] [--json FILE]``.

Covers: one module a subject, the frame that runs them (:mod:`benchmarks.frame`) and the command.
Does not cover: correctness beyond equal answers; see ``tests/``. Not part of the installed package.
"""
