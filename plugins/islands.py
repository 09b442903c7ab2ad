"""Islands: which GPUs of a machine are nearer to each other than to its others, by what NVML says.

Covers: :func:`island_of` (pure), :func:`look`, which asks NVML.
Does not cover: what moves within an island and between two cost: that is measured, see :mod:`dask_gpurt.plugins.prices`.

Theory of operation
-------------------
Two GPUs of a machine are joined by NVLink, by switches of PCIe alone, by way of one processor (NUMA), or by way of two. The *island* of
a GPU are those that it reaches by the quickest of these ways by which it reaches any at all, directly or by others of them. Where that
is the whole machine (NVSwitch), or nobody is nearer than others, there are no islands, and all workers of the host are near to each other.

A worker's GPU is the first that ``CUDA_VISIBLE_DEVICES`` names, as dask-cuda sets it for each worker. Without it, nothing is asked.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from itertools import combinations
from typing import Any

__all__ = ["WAYS", "island_of", "look"]

logger = logging.getLogger(__name__)

#: How two GPUs are joined, the quickest first. What is further apart has no name.
WAYS = ("nvlink", "pcie", "numa")


def island_of(own: int, count: int, joined: Mapping[tuple[int, int], str]) -> str | None:
    """Name the island of a GPU; None: it has none.

    Parameters
    ----------
    own
        Number of the GPU.
    count
        GPUs of the machine.
    joined
        Two GPUs, the smaller number first, to how they are joined; one of :data:`WAYS`.

    Examples
    --------
    >>> island_of(2, 4, {(0, 1): "nvlink", (2, 3): "nvlink", (0, 2): "numa", (0, 3): "numa", (1, 2): "numa", (1, 3): "numa"})
    'nvlink-2'
    >>> island_of(0, 2, {(0, 1): "nvlink"})
    """
    for way in WAYS:
        pairs = [pair for pair, by in joined.items() if by == way]
        found = {own}
        grown = True
        while grown:
            reached = {gpu for pair in pairs if not found.isdisjoint(pair) for gpu in pair}
            grown = not reached <= found
            found |= reached
        if len(found) > 1:
            return None if len(found) == count else f"{way}-{min(found)}"
    return None


def look(visible: str) -> str | None:
    """Ask NVML for the island of the first of the GPUs that ``visible`` lists; None if it has none, or nobody knows.

    Parameters
    ----------
    visible
        ``CUDA_VISIBLE_DEVICES``: numbers or UUIDs.
    """
    first = visible.split(",", maxsplit=1)[0].strip()
    if not first:
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        try:
            return _island(nvml, first)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        # No driver, no such GPU, or a part of one (MIG).
        logger.debug("NVML does not tell how GPU %s is joined to others: %s", first, error)
        return None


def _island(nvml: Any, first: str) -> str | None:
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    own = int(first) if first.isdigit() else int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(first)))
    ways = {
        (one, other): way
        for one, other in combinations(range(len(handles)), 2)
        if (way := _way(nvml, handles[one], handles[other])) is not None
    }
    return island_of(own, len(handles), ways)


def _way(nvml: Any, one: Any, other: Any) -> str | None:
    try:
        if nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            return "nvlink"
    except nvml.NVMLError_NotSupported:
        logger.debug("this NVML tells nothing of NVLink")
    level = nvml.nvmlDeviceGetTopologyCommonAncestor(one, other)
    if level <= nvml.NVML_TOPOLOGY_MULTIPLE:
        return "pcie"
    return "numa" if level <= nvml.NVML_TOPOLOGY_NODE else None
