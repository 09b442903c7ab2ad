"""``dask gpurt doctor``: what is found on a machine or a cluster, what is missing, and what its links carry.

:mod:`~dask_gpurt.doctor.facts` is what is known of a process, :mod:`~dask_gpurt.doctor.gather`,
:mod:`~dask_gpurt.doctor.devices` and :mod:`~dask_gpurt.doctor.links` find it out there, :mod:`~dask_gpurt.doctor.peers` and
:mod:`~dask_gpurt.doctor.cluster` on all of a cluster, :mod:`~dask_gpurt.doctor.checks` (pure) judges, :mod:`~dask_gpurt.doctor.app`
shows it.
"""
