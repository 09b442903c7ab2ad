"""TPC-H queries 3, 5, 9 and 18: with dask.dataframe, as its users write them, and in SQL for the truth.

Covers: the four queries with the specification's validation parameters, and DuckDB's answers on the same files.
Does not cover: the files; see :mod:`dask_gpurt.demo.data`. What equal means; see :mod:`dask_gpurt.demo.compare`.

The Dask form follows the SQL from top to bottom: read the columns, filter, merge, group. Nothing is tuned: no
partition counts, no hints, no index. The last
step, ordering some rows that are left, is done in pandas: dask.dataframe does not order by several columns in different
directions.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dask_gpurt.demo.compare import frame_differences
from dask_gpurt.demo.data import TABLES

__all__ = ["QUERIES", "Query", "Reader", "truth"]

#: Opens columns of a table: ``read("orders", "o_orderkey", "o_custkey")``.
Reader = Callable[..., Any]

#: Columns that are decimals with two places in the specification. The files hold floats.
MONEY = {
    "customer": ("c_acctbal",),
    "lineitem": ("l_quantity", "l_extendedprice", "l_discount", "l_tax"),
    "orders": ("o_totalprice",),
    "part": ("p_retailprice",),
    "partsupp": ("ps_supplycost",),
    "supplier": ("s_acctbal",),
}


def reader(folder: Path) -> Reader:
    """Return what opens the tables in ``folder`` with dask.dataframe."""
    import dask.dataframe as dd

    def read(table: str, *columns: str) -> Any:
        return dd.read_parquet(str(folder / table), columns=list(columns))

    return read


@dataclass(frozen=True)
class Query:
    """A query in both forms.

    Parameters
    ----------
    name
        As in ``q3``.
    title
        What it asks, in a few words.
    build
        Makes the lazy Dask collection of the answer's rows, not yet ordered.
    sql
        The same in SQL, ordered, without the limit.
    key
        Columns that identify a row of the answer.
    order
        Columns that the answer is ordered by, each with whether it descends.
    limit
        Rows that are returned at most.
    """

    name: str
    title: str
    build: Callable[[Reader], Any]
    sql: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    order: tuple[tuple[str, bool], ...]
    limit: int | None = None

    def run(self, folder: Path) -> pd.DataFrame:
        """Compute the answer with dask.dataframe on the current client."""
        rows = self.build(reader(folder)).compute()
        if hasattr(rows, "to_pandas"):
            rows = rows.to_pandas()
        ascending = [not descends for _, descends in self.order]
        rows = rows.sort_values([name for name, _ in self.order], ascending=ascending)
        if self.limit is not None:
            rows = rows.head(self.limit)
        answer: pd.DataFrame = rows[list(self.columns)].reset_index(drop=True)
        return answer

    def differences(self, answer: pd.DataFrame, expected: pd.DataFrame) -> list[str]:
        """Say how ``answer`` differs from what :func:`truth` returned."""
        return frame_differences(answer, expected, key=self.key, order=self.order, limit=self.limit)


def truth(query: Query, folder: Path) -> pd.DataFrame:
    """Answer ``query`` with DuckDB on the same files: all rows in order, before the limit.

    DuckDB gets its decimals back, so that the truth has no rounding errors: query 15 compares sums with each other.
    """
    import duckdb

    with duckdb.connect() as connection:
        # Beside a cluster that was told how much memory it may use, the reference must not take what it likes.
        connection.execute("SET memory_limit = '2GB'")
        for table in TABLES:
            path = str(folder / table / "*.parquet").replace("'", "''")
            money = ", ".join(f"CAST({column} AS DECIMAL(15, 2)) AS {column}" for column in MONEY.get(table, ()))
            columns = f"* REPLACE ({money})" if money else "*"
            connection.execute(f"CREATE VIEW {table} AS SELECT {columns} FROM read_parquet('{path}')")
        frame: pd.DataFrame = connection.execute(query.sql).df()
    return frame


def _q3(read: Reader) -> Any:
    date = dt.date(1995, 3, 15)
    customer = read("customer", "c_custkey", "c_mktsegment")
    orders = read("orders", "o_orderkey", "o_custkey", "o_orderdate", "o_shippriority")
    lineitem = read("lineitem", "l_orderkey", "l_extendedprice", "l_discount", "l_shipdate")

    customer = customer[customer.c_mktsegment == "BUILDING"]
    orders = orders[orders.o_orderdate < date]
    lineitem = lineitem[lineitem.l_shipdate > date]

    rows = customer.merge(orders, left_on="c_custkey", right_on="o_custkey")
    rows = rows.merge(lineitem, left_on="o_orderkey", right_on="l_orderkey")
    rows["revenue"] = rows.l_extendedprice * (1 - rows.l_discount)
    return rows.groupby(["l_orderkey", "o_orderdate", "o_shippriority"]).revenue.sum().reset_index()


Q3 = Query(
    name="q3",
    title="Unshipped orders with the highest value",
    build=_q3,
    sql="""
        SELECT l_orderkey, sum(l_extendedprice * (1 - l_discount)) AS revenue, o_orderdate, o_shippriority
        FROM customer, orders, lineitem
        WHERE c_mktsegment = 'BUILDING' AND c_custkey = o_custkey AND l_orderkey = o_orderkey
          AND o_orderdate < DATE '1995-03-15' AND l_shipdate > DATE '1995-03-15'
        GROUP BY l_orderkey, o_orderdate, o_shippriority
        ORDER BY revenue DESC, o_orderdate
    """,
    columns=("l_orderkey", "revenue", "o_orderdate", "o_shippriority"),
    key=("l_orderkey",),
    order=(("revenue", True), ("o_orderdate", False)),
    limit=10,
)


def _q5(read: Reader) -> Any:
    start, end = dt.date(1994, 1, 1), dt.date(1995, 1, 1)
    region = read("region", "r_regionkey", "r_name")
    nation = read("nation", "n_nationkey", "n_name", "n_regionkey")
    customer = read("customer", "c_custkey", "c_nationkey")
    orders = read("orders", "o_orderkey", "o_custkey", "o_orderdate")
    lineitem = read("lineitem", "l_orderkey", "l_suppkey", "l_extendedprice", "l_discount")
    supplier = read("supplier", "s_suppkey", "s_nationkey")

    region = region[region.r_name == "ASIA"]
    orders = orders[(orders.o_orderdate >= start) & (orders.o_orderdate < end)]

    rows = region.merge(nation, left_on="r_regionkey", right_on="n_regionkey")
    rows = rows.merge(customer, left_on="n_nationkey", right_on="c_nationkey")
    rows = rows.merge(orders, left_on="c_custkey", right_on="o_custkey")
    rows = rows.merge(lineitem, left_on="o_orderkey", right_on="l_orderkey")
    rows = rows.merge(supplier, left_on=["l_suppkey", "c_nationkey"], right_on=["s_suppkey", "s_nationkey"])
    rows["revenue"] = rows.l_extendedprice * (1 - rows.l_discount)
    return rows.groupby("n_name").revenue.sum().reset_index()


Q5 = Query(
    name="q5",
    title="Revenue through local suppliers",
    build=_q5,
    sql="""
        SELECT n_name, sum(l_extendedprice * (1 - l_discount)) AS revenue
        FROM customer, orders, lineitem, supplier, nation, region
        WHERE c_custkey = o_custkey AND l_orderkey = o_orderkey AND l_suppkey = s_suppkey
          AND c_nationkey = s_nationkey AND s_nationkey = n_nationkey AND n_regionkey = r_regionkey
          AND r_name = 'ASIA' AND o_orderdate >= DATE '1994-01-01' AND o_orderdate < DATE '1995-01-01'
        GROUP BY n_name
        ORDER BY revenue DESC
    """,
    columns=("n_name", "revenue"),
    key=("n_name",),
    order=(("revenue", True),),
)


def _q9(read: Reader) -> Any:
    part = read("part", "p_partkey", "p_name")
    supplier = read("supplier", "s_suppkey", "s_nationkey")
    lineitem = read("lineitem", "l_orderkey", "l_partkey", "l_suppkey", "l_quantity", "l_extendedprice", "l_discount")
    partsupp = read("partsupp", "ps_partkey", "ps_suppkey", "ps_supplycost")
    orders = read("orders", "o_orderkey", "o_orderdate")
    nation = read("nation", "n_nationkey", "n_name")

    part = part[part.p_name.str.contains("green")]

    rows = part.merge(lineitem, left_on="p_partkey", right_on="l_partkey")
    rows = rows.merge(supplier, left_on="l_suppkey", right_on="s_suppkey")
    rows = rows.merge(partsupp, left_on=["l_suppkey", "l_partkey"], right_on=["ps_suppkey", "ps_partkey"])
    rows = rows.merge(orders, left_on="l_orderkey", right_on="o_orderkey")
    rows = rows.merge(nation, left_on="s_nationkey", right_on="n_nationkey")
    rows["o_year"] = rows.o_orderdate.dt.year
    rows["amount"] = rows.l_extendedprice * (1 - rows.l_discount) - rows.ps_supplycost * rows.l_quantity
    rows = rows.rename(columns={"n_name": "nation"})
    profit = rows.groupby(["nation", "o_year"]).amount.sum().reset_index()
    return profit.rename(columns={"amount": "sum_profit"})


Q9 = Query(
    name="q9",
    title="Profit on a line of parts, by nation and year",
    build=_q9,
    sql="""
        SELECT nation, o_year, sum(amount) AS sum_profit
        FROM (
            SELECT n_name AS nation, year(o_orderdate) AS o_year,
                   l_extendedprice * (1 - l_discount) - ps_supplycost * l_quantity AS amount
            FROM part, supplier, lineitem, partsupp, orders, nation
            WHERE s_suppkey = l_suppkey AND ps_suppkey = l_suppkey AND ps_partkey = l_partkey
              AND p_partkey = l_partkey AND o_orderkey = l_orderkey AND s_nationkey = n_nationkey
              AND p_name LIKE '%green%'
        )
        GROUP BY nation, o_year
        ORDER BY nation, o_year DESC
    """,
    columns=("nation", "o_year", "sum_profit"),
    key=("nation", "o_year"),
    order=(("nation", False), ("o_year", True)),
)


def _q18(read: Reader) -> Any:
    customer = read("customer", "c_custkey", "c_name")
    orders = read("orders", "o_orderkey", "o_custkey", "o_orderdate", "o_totalprice")
    lineitem = read("lineitem", "l_orderkey", "l_quantity")

    quantities = lineitem.groupby("l_orderkey").l_quantity.sum(split_out=True).reset_index()
    large = quantities[quantities.l_quantity > 300][["l_orderkey"]]

    rows = orders.merge(large, left_on="o_orderkey", right_on="l_orderkey").drop(columns="l_orderkey")
    rows = rows.merge(customer, left_on="o_custkey", right_on="c_custkey")
    rows = rows.merge(lineitem, left_on="o_orderkey", right_on="l_orderkey")
    by = ["c_name", "c_custkey", "o_orderkey", "o_orderdate", "o_totalprice"]
    rows = rows.groupby(by).l_quantity.sum().reset_index()
    return rows.rename(columns={"l_quantity": "sum_quantity"})


Q18 = Query(
    name="q18",
    title="Customers with large orders",
    build=_q18,
    sql="""
        SELECT c_name, c_custkey, o_orderkey, o_orderdate, o_totalprice, sum(l_quantity) AS sum_quantity
        FROM customer, orders, lineitem
        WHERE o_orderkey IN (SELECT l_orderkey FROM lineitem GROUP BY l_orderkey HAVING sum(l_quantity) > 300)
          AND c_custkey = o_custkey AND o_orderkey = l_orderkey
        GROUP BY c_name, c_custkey, o_orderkey, o_orderdate, o_totalprice
        ORDER BY o_totalprice DESC, o_orderdate
    """,
    columns=("c_name", "c_custkey", "o_orderkey", "o_orderdate", "o_totalprice", "sum_quantity"),
    key=("o_orderkey",),
    order=(("o_totalprice", True), ("o_orderdate", False)),
    limit=100,
)

#: All queries by name.
QUERIES = {query.name: query for query in (Q3, Q5, Q9, Q18)}
