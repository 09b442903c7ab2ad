"""What the subject ``spill`` is made of: traces of real jobs, their replay, the bound, and runs on real clusters.

Covers: recording (:mod:`~benchmarks.spilling.recorder`) the jobs of :mod:`~benchmarks.spilling.workloads`; replaying them
through the spiller and through stock's store (:mod:`~benchmarks.spilling.replay`); the least that any store can move
(:mod:`~benchmarks.spilling.bound`); what is measured with a clock: :mod:`~benchmarks.spilling.clusters`,
:mod:`~benchmarks.spilling.disk`, :mod:`~benchmarks.spilling.device`.
Does not cover: the lines; see :mod:`benchmarks.spill`.
"""
