"""A graph whose last products are few, with and without sharing; for :mod:`tests.simulation.test_placement`."""

from __future__ import annotations

from unittest import mock

from benchmarks.simulation.cluster import Cluster, Spec, gpurt, run
from benchmarks.simulation.graphs import workload
from benchmarks.simulation.network import FABRICS
from dask_gpurt.plugins.sharing import Sharing


def end_of_front(name: str) -> float:
    """Return the makespan of a graph on two workers, as a part of the makespan where nothing is shared."""
    spec = Spec(nworkers=2, fabric=FABRICS["dgx"], validate=True)
    cluster = Cluster(spec, workload(name))
    with cluster.started(gpurt):
        report = cluster.compute()
        cluster.settle()
        cluster.validate()
    assert report.metrics["decisions"]["relieved"] > 0
    assert report.metrics["errors"] == report.metrics["planned"] == 0
    with mock.patch.object(Sharing, "is_due", return_value=False):
        alone = run(spec, workload(name), gpurt)
    assert "relieved" not in alone.metrics["decisions"]
    return report.makespan_s / alone.makespan_s
