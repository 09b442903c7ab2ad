"""A whole cluster in one thread, on a clock that jumps: where a placement is tried before a cluster sees it.

Covers: the real ``Scheduler``, work stealing, active memory manager and ``worker_state_machine.WorkerState`` of distributed, driven
by events on a virtual clock (:mod:`~benchmarks.simulation.cluster`, :mod:`~benchmarks.simulation.worker`); links
(:mod:`~benchmarks.simulation.network`), memory and disk (:mod:`~benchmarks.simulation.store`), faults
(:mod:`~benchmarks.simulation.faults`); real Dask graphs with sizes and durations (:mod:`~benchmarks.simulation.workload`,
:mod:`~benchmarks.simulation.graphs`); the same graphs on a real cluster (:mod:`~benchmarks.simulation.replay`).
Does not cover: the processor time of the scheduler, which is measured elsewhere (``scheduler_cost``) and counts for nothing here; the
event loops of workers; serialization; a client's ``gather``.

What is a model, and not Dask's own: how long a task or transfer takes, and when a worker writes to its disk. All choices
are Dask's, or those of what is tried.

A run is a function of its seed, and of ``PYTHONHASHSEED`` as far as Dask itself goes through sets in the order of
hashes: within one process, the same seed gives the same trace.
"""
