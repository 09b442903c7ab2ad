"""What carries shards between workers where there is something faster than Dask's own comms: UCX.

Control stays with Dask: a delivery is announced by an RPC, and the answer to that RPC says whether it arrived. The
transport moves the bytes in between. See :class:`dask_gpurt.shuffle.transport.ucx.UCXTransport`.
"""

from __future__ import annotations

if __name__ != "dask_gpurt.shuffle.transport":
    raise ImportError(f"import dask_gpurt.shuffle.transport, not {__name__}: a second copy would keep a second state")
