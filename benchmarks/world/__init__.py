"""A world in one process: Dask's own scheduler, workers and client, with dask-gpurt on them, on a clock that jumps, while things go wrong.

Covers: machines, time and threads (:mod:`~benchmarks.world.machine`), connections (:mod:`~benchmarks.world.network`), disks
(:mod:`~benchmarks.world.disk`); the cluster (:mod:`~benchmarks.world.cluster`), its jobs (:mod:`~benchmarks.world.jobs`) and faults
(:mod:`~benchmarks.world.faults`); what must hold (:mod:`~benchmarks.world.checks`); a seed (:mod:`~benchmarks.world.run`) and many
(``python -m benchmarks.world --seeds N``); bugs to be found (:mod:`~benchmarks.world.planted`).
Does not cover: how long things take, which :mod:`benchmarks.simulation` is for; UCX and devices; races between single instructions of
threads. See docs/reliability.md.

What runs is the code of Dask and of dask-gpurt, unchanged: event loops, state machines, protocols, serialization, files. What is a model
are time, threads' turns, the network, what a disk answers, and who dies. A run is a function of its seed.
"""
