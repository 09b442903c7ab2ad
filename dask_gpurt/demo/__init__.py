"""The demonstration: one real workload on stock Dask and on dask-gpurt, side by side, answers compared.

Covers: the jobs (:mod:`~dask_gpurt.demo.tpch`, :mod:`~dask_gpurt.demo.arrays`, :mod:`~dask_gpurt.demo.frames`), what is measured
(:mod:`~dask_gpurt.demo.measure`), how the two sides take turns (:mod:`~dask_gpurt.demo.runner`) and what people see
(:mod:`~dask_gpurt.demo.show`, :mod:`~dask_gpurt.demo.report`); the same on a cluster of the user's (:mod:`~dask_gpurt.demo.bench`).
Does not cover: the command line; see :mod:`dask_gpurt.cli`.
See also: the ``benchmarks`` folder, which uses the same jobs and the same instrument.
"""
