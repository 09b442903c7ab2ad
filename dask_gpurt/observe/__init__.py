"""What people see of dask-gpurt: pages of Dask's dashboard, metrics for Prometheus, and what both are made of."""
