"""Random jobs on workers with a quarter of the memory that they need, for as long as one likes.

:mod:`~benchmarks.soak.jobs` makes random programs of ``dask.array`` and ``dask.dataframe``, and knows what they give;
:mod:`~benchmarks.soak.growth` says what has grown that should not; :mod:`~benchmarks.soak.rounds` runs them. The command is
``python -m benchmarks soak --minutes N``; see :mod:`~benchmarks.soak.__main__`.
"""
