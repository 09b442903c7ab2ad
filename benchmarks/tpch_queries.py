"""All 22 TPC-H queries: with dask.dataframe, as its users write them, and in SQL for the truth.

Covers: the queries with the specification's validation parameters, what becomes of what a query computes
(:func:`finish`), and how it is compared with what DuckDB says (:func:`differences`).
Does not cover: queries 3, 5, 9 and 18, which are those of :mod:`dask_gpurt.demo.tpch`, as are the tables; the measuring, see
:mod:`benchmarks.tpch`.

The Dask form keeps to what the Dask documentation advises and to nothing more. Columns are named where a table is
opened; filters stand before the merges; EXISTS and IN are merges of the kind ``leftsemi``; NOT EXISTS is a left merge
of which the unmatched rows are kept; a subquery on the same rows is a groupby whose result is merged back. A groupby
whose groups grow with the scale factor to a good part of its rows says ``split_out=True``, because one partition would
have to hold them otherwise. No partition counts, no hints, no persisting. The last step, ordering some rows
that are left, is done in pandas, as in the demonstration.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import pandas as pd

from dask_gpurt.demo.compare import frame_differences
from dask_gpurt.demo.tpch import Q3, Q5, Q9, Q18, Query, Reader

__all__ = ["NAMES", "differences", "finish", "queries"]

NAMES = tuple(f"q{number}" for number in range(1, 23))


def queries(scale: float) -> dict[str, Query]:
    """Return the queries by name, ``q1`` to ``q22``.

    Parameters
    ----------
    scale
        Scale factor of the tables: query 11 has a parameter that follows it.
    """
    made = (
        *(Q1, Q2, Q3, Q4, Q5, Q6, Q7, Q8, Q9, Q10, _make_q11(scale)),
        *(Q12, Q13, Q14, Q15, Q16, Q17, Q18, Q19, Q20, Q21, Q22),
    )
    return dict(zip(NAMES, made, strict=True))


def finish(query: Query, computed: Any) -> pd.DataFrame:
    """Bring what a query computes into the form of its answer: ordered rows, or one row if it is a number."""
    if not isinstance(computed, pd.DataFrame):
        return pd.DataFrame({query.columns[0]: [float(computed)]})
    rows = computed
    if query.order:
        ascending = [not descends for _, descends in query.order]
        rows = rows.sort_values([name for name, _ in query.order], ascending=ascending)
    if query.limit is not None:
        rows = rows.head(query.limit)
    answer: pd.DataFrame = rows[list(query.columns)].reset_index(drop=True)
    return answer


def differences(query: Query, answer: pd.DataFrame, expected: pd.DataFrame) -> list[str]:
    """Say how a finished answer differs from the truth; nothing is what agreement looks like."""
    if query.key:
        return query.differences(answer, expected)
    # An answer of one row has no key but its number.
    answer, expected = (frame.assign(row=range(len(frame))) for frame in (answer, expected))
    return frame_differences(answer, expected, key=["row"])


def _q1(read: Reader) -> Any:
    lineitem = read(
        "lineitem",
        *("l_quantity", "l_extendedprice", "l_discount", "l_tax", "l_returnflag", "l_linestatus", "l_shipdate"),
    )
    rows = lineitem[lineitem.l_shipdate <= dt.date(1998, 12, 1) - dt.timedelta(days=90)]
    rows["disc_price"] = rows.l_extendedprice * (1 - rows.l_discount)
    rows["charge"] = rows.disc_price * (1 + rows.l_tax)
    summary = rows.groupby(["l_returnflag", "l_linestatus"]).agg(
        sum_qty=("l_quantity", "sum"),
        sum_base_price=("l_extendedprice", "sum"),
        sum_disc_price=("disc_price", "sum"),
        sum_charge=("charge", "sum"),
        avg_qty=("l_quantity", "mean"),
        avg_price=("l_extendedprice", "mean"),
        avg_disc=("l_discount", "mean"),
        count_order=("l_quantity", "count"),
    )
    return summary.reset_index()


Q1 = Query(
    name="q1",
    title="Summary of what was shipped",
    build=_q1,
    sql="""
        SELECT l_returnflag, l_linestatus, sum(l_quantity) AS sum_qty, sum(l_extendedprice) AS sum_base_price,
               sum(l_extendedprice * (1 - l_discount)) AS sum_disc_price,
               sum(l_extendedprice * (1 - l_discount) * (1 + l_tax)) AS sum_charge,
               avg(l_quantity) AS avg_qty, avg(l_extendedprice) AS avg_price, avg(l_discount) AS avg_disc,
               count(*) AS count_order
        FROM lineitem
        WHERE l_shipdate <= DATE '1998-12-01' - INTERVAL 90 DAY
        GROUP BY l_returnflag, l_linestatus
        ORDER BY l_returnflag, l_linestatus
    """,
    columns=(
        *("l_returnflag", "l_linestatus", "sum_qty", "sum_base_price", "sum_disc_price"),
        *("sum_charge", "avg_qty", "avg_price", "avg_disc", "count_order"),
    ),
    key=("l_returnflag", "l_linestatus"),
    order=(("l_returnflag", False), ("l_linestatus", False)),
)


def _q2(read: Reader) -> Any:
    part = read("part", "p_partkey", "p_mfgr", "p_size", "p_type")
    supplier = read("supplier", "s_suppkey", "s_name", "s_address", "s_nationkey", "s_phone", "s_acctbal", "s_comment")
    partsupp = read("partsupp", "ps_partkey", "ps_suppkey", "ps_supplycost")
    nation = read("nation", "n_nationkey", "n_name", "n_regionkey")
    region = read("region", "r_regionkey", "r_name")

    region = region[region.r_name == "EUROPE"]
    part = part[(part.p_size == 15) & part.p_type.str.endswith("BRASS")][["p_partkey", "p_mfgr"]]

    local = region.merge(nation, left_on="r_regionkey", right_on="n_regionkey")
    local = local.merge(supplier, left_on="n_nationkey", right_on="s_nationkey")
    rows = part.merge(partsupp, left_on="p_partkey", right_on="ps_partkey")
    rows = rows.merge(local, left_on="ps_suppkey", right_on="s_suppkey")
    cheapest = rows.groupby("p_partkey").ps_supplycost.min().reset_index()
    return rows.merge(cheapest, on=["p_partkey", "ps_supplycost"])


Q2 = Query(
    name="q2",
    title="Cheapest supplier of a part in a region",
    build=_q2,
    sql="""
        SELECT s_acctbal, s_name, n_name, p_partkey, p_mfgr, s_address, s_phone, s_comment
        FROM part, supplier, partsupp, nation, region
        WHERE p_partkey = ps_partkey AND s_suppkey = ps_suppkey AND p_size = 15 AND p_type LIKE '%BRASS'
          AND s_nationkey = n_nationkey AND n_regionkey = r_regionkey AND r_name = 'EUROPE'
          AND ps_supplycost = (
              SELECT min(ps_supplycost)
              FROM partsupp, supplier, nation, region
              WHERE p_partkey = ps_partkey AND s_suppkey = ps_suppkey
                AND s_nationkey = n_nationkey AND n_regionkey = r_regionkey AND r_name = 'EUROPE'
          )
        ORDER BY s_acctbal DESC, n_name, s_name, p_partkey
    """,
    columns=("s_acctbal", "s_name", "n_name", "p_partkey", "p_mfgr", "s_address", "s_phone", "s_comment"),
    key=("s_name", "p_partkey"),
    order=(("s_acctbal", True), ("n_name", False), ("s_name", False), ("p_partkey", False)),
    limit=100,
)


def _q4(read: Reader) -> Any:
    start, end = dt.date(1993, 7, 1), dt.date(1993, 10, 1)
    orders = read("orders", "o_orderkey", "o_orderdate", "o_orderpriority")
    lineitem = read("lineitem", "l_orderkey", "l_commitdate", "l_receiptdate")

    orders = orders[(orders.o_orderdate >= start) & (orders.o_orderdate < end)]
    late = lineitem[lineitem.l_commitdate < lineitem.l_receiptdate][["l_orderkey"]]

    rows = orders.merge(late, left_on="o_orderkey", right_on="l_orderkey", how="leftsemi")
    return rows.groupby("o_orderpriority").size().rename("order_count").reset_index()


Q4 = Query(
    name="q4",
    title="Late orders by priority",
    build=_q4,
    sql="""
        SELECT o_orderpriority, count(*) AS order_count
        FROM orders
        WHERE o_orderdate >= DATE '1993-07-01' AND o_orderdate < DATE '1993-10-01'
          AND EXISTS (
              SELECT * FROM lineitem WHERE l_orderkey = o_orderkey AND l_commitdate < l_receiptdate
          )
        GROUP BY o_orderpriority
        ORDER BY o_orderpriority
    """,
    columns=("o_orderpriority", "order_count"),
    key=("o_orderpriority",),
    order=(("o_orderpriority", False),),
)


def _q6(read: Reader) -> Any:
    rows = read("lineitem", "l_quantity", "l_extendedprice", "l_discount", "l_shipdate")
    rows = rows[(rows.l_shipdate >= dt.date(1994, 1, 1)) & (rows.l_shipdate < dt.date(1995, 1, 1))]
    rows = rows[rows.l_discount.between(0.05, 0.07) & (rows.l_quantity < 24)]
    return (rows.l_extendedprice * rows.l_discount).sum()


Q6 = Query(
    name="q6",
    title="Revenue without small discounts",
    build=_q6,
    sql="""
        SELECT sum(l_extendedprice * l_discount) AS revenue
        FROM lineitem
        WHERE l_shipdate >= DATE '1994-01-01' AND l_shipdate < DATE '1995-01-01'
          AND l_discount BETWEEN 0.05 AND 0.07 AND l_quantity < 24
    """,
    columns=("revenue",),
    key=(),
    order=(),
)


def _q7(read: Reader) -> Any:
    first, second = "FRANCE", "GERMANY"
    supplier = read("supplier", "s_suppkey", "s_nationkey")
    lineitem = read("lineitem", "l_orderkey", "l_suppkey", "l_shipdate", "l_extendedprice", "l_discount")
    orders = read("orders", "o_orderkey", "o_custkey")
    customer = read("customer", "c_custkey", "c_nationkey")
    nation = read("nation", "n_nationkey", "n_name")

    nation = nation[nation.n_name.isin([first, second])]
    lineitem = lineitem[(lineitem.l_shipdate >= dt.date(1995, 1, 1)) & (lineitem.l_shipdate <= dt.date(1996, 12, 31))]
    suppliers = supplier.merge(
        nation.rename(columns={"n_name": "supp_nation"}), left_on="s_nationkey", right_on="n_nationkey"
    )
    customers = customer.merge(
        nation.rename(columns={"n_name": "cust_nation"}), left_on="c_nationkey", right_on="n_nationkey"
    )

    ordered = orders.merge(customers[["c_custkey", "cust_nation"]], left_on="o_custkey", right_on="c_custkey")
    rows = lineitem.merge(suppliers[["s_suppkey", "supp_nation"]], left_on="l_suppkey", right_on="s_suppkey")
    rows = rows.merge(ordered, left_on="l_orderkey", right_on="o_orderkey")
    rows = rows[rows.supp_nation != rows.cust_nation]
    rows["l_year"] = rows.l_shipdate.dt.year
    rows["revenue"] = rows.l_extendedprice * (1 - rows.l_discount)
    return rows.groupby(["supp_nation", "cust_nation", "l_year"]).revenue.sum().reset_index()


Q7 = Query(
    name="q7",
    title="Trade between two nations, by year",
    build=_q7,
    sql="""
        SELECT supp_nation, cust_nation, l_year, sum(volume) AS revenue
        FROM (
            SELECT n1.n_name AS supp_nation, n2.n_name AS cust_nation, year(l_shipdate) AS l_year,
                   l_extendedprice * (1 - l_discount) AS volume
            FROM supplier, lineitem, orders, customer, nation n1, nation n2
            WHERE s_suppkey = l_suppkey AND o_orderkey = l_orderkey AND c_custkey = o_custkey
              AND s_nationkey = n1.n_nationkey AND c_nationkey = n2.n_nationkey
              AND ((n1.n_name = 'FRANCE' AND n2.n_name = 'GERMANY') OR (n1.n_name = 'GERMANY' AND n2.n_name = 'FRANCE'))
              AND l_shipdate BETWEEN DATE '1995-01-01' AND DATE '1996-12-31'
        )
        GROUP BY supp_nation, cust_nation, l_year
        ORDER BY supp_nation, cust_nation, l_year
    """,
    columns=("supp_nation", "cust_nation", "l_year", "revenue"),
    key=("supp_nation", "cust_nation", "l_year"),
    order=(("supp_nation", False), ("cust_nation", False), ("l_year", False)),
)


def _q8(read: Reader) -> Any:
    part = read("part", "p_partkey", "p_type")
    supplier = read("supplier", "s_suppkey", "s_nationkey")
    lineitem = read("lineitem", "l_orderkey", "l_partkey", "l_suppkey", "l_extendedprice", "l_discount")
    orders = read("orders", "o_orderkey", "o_custkey", "o_orderdate")
    customer = read("customer", "c_custkey", "c_nationkey")
    nation = read("nation", "n_nationkey", "n_name", "n_regionkey")
    region = read("region", "r_regionkey", "r_name")

    region = region[region.r_name == "AMERICA"]
    part = part[part.p_type == "ECONOMY ANODIZED STEEL"][["p_partkey"]]
    orders = orders[(orders.o_orderdate >= dt.date(1995, 1, 1)) & (orders.o_orderdate <= dt.date(1996, 12, 31))]

    local = nation[["n_nationkey", "n_regionkey"]].merge(region, left_on="n_regionkey", right_on="r_regionkey")
    customer = customer.merge(local, left_on="c_nationkey", right_on="n_nationkey")[["c_custkey"]]
    supplier = supplier.merge(nation, left_on="s_nationkey", right_on="n_nationkey")[["s_suppkey", "n_name"]]

    rows = lineitem.merge(part, left_on="l_partkey", right_on="p_partkey")
    rows = rows.merge(orders, left_on="l_orderkey", right_on="o_orderkey")
    rows = rows.merge(customer, left_on="o_custkey", right_on="c_custkey")
    rows = rows.merge(supplier, left_on="l_suppkey", right_on="s_suppkey")
    rows["o_year"] = rows.o_orderdate.dt.year
    rows["volume"] = rows.l_extendedprice * (1 - rows.l_discount)
    rows["of_nation"] = rows.volume.where(rows.n_name == "BRAZIL", 0.0)
    years = rows.groupby("o_year")[["of_nation", "volume"]].sum().reset_index()
    years["mkt_share"] = years.of_nation / years.volume
    return years[["o_year", "mkt_share"]]


Q8 = Query(
    name="q8",
    title="A nation's share of a market, by year",
    build=_q8,
    sql="""
        SELECT o_year, sum(CASE WHEN nation = 'BRAZIL' THEN volume ELSE 0 END) / sum(volume) AS mkt_share
        FROM (
            SELECT year(o_orderdate) AS o_year, l_extendedprice * (1 - l_discount) AS volume, n2.n_name AS nation
            FROM part, supplier, lineitem, orders, customer, nation n1, nation n2, region
            WHERE p_partkey = l_partkey AND s_suppkey = l_suppkey AND l_orderkey = o_orderkey
              AND o_custkey = c_custkey AND c_nationkey = n1.n_nationkey AND n1.n_regionkey = r_regionkey
              AND r_name = 'AMERICA' AND s_nationkey = n2.n_nationkey
              AND o_orderdate BETWEEN DATE '1995-01-01' AND DATE '1996-12-31'
              AND p_type = 'ECONOMY ANODIZED STEEL'
        )
        GROUP BY o_year
        ORDER BY o_year
    """,
    columns=("o_year", "mkt_share"),
    key=("o_year",),
    order=(("o_year", False),),
)


def _q10(read: Reader) -> Any:
    start, end = dt.date(1993, 10, 1), dt.date(1994, 1, 1)
    customer = read("customer", "c_custkey", "c_name", "c_address", "c_nationkey", "c_phone", "c_acctbal", "c_comment")
    orders = read("orders", "o_orderkey", "o_custkey", "o_orderdate")
    lineitem = read("lineitem", "l_orderkey", "l_extendedprice", "l_discount", "l_returnflag")
    nation = read("nation", "n_nationkey", "n_name")

    orders = orders[(orders.o_orderdate >= start) & (orders.o_orderdate < end)]
    lineitem = lineitem[lineitem.l_returnflag == "R"]

    rows = orders.merge(lineitem, left_on="o_orderkey", right_on="l_orderkey")
    rows = rows.merge(customer, left_on="o_custkey", right_on="c_custkey")
    rows = rows.merge(nation, left_on="c_nationkey", right_on="n_nationkey")
    rows["revenue"] = rows.l_extendedprice * (1 - rows.l_discount)
    by = ["c_custkey", "c_name", "c_acctbal", "c_phone", "n_name", "c_address", "c_comment"]
    return rows.groupby(by).revenue.sum(split_out=True).reset_index()


Q10 = Query(
    name="q10",
    title="Customers who sent goods back",
    build=_q10,
    sql="""
        SELECT c_custkey, c_name, sum(l_extendedprice * (1 - l_discount)) AS revenue, c_acctbal, n_name, c_address,
               c_phone, c_comment
        FROM customer, orders, lineitem, nation
        WHERE c_custkey = o_custkey AND l_orderkey = o_orderkey AND l_returnflag = 'R' AND c_nationkey = n_nationkey
          AND o_orderdate >= DATE '1993-10-01' AND o_orderdate < DATE '1994-01-01'
        GROUP BY c_custkey, c_name, c_acctbal, c_phone, n_name, c_address, c_comment
        ORDER BY revenue DESC
    """,
    columns=("c_custkey", "c_name", "revenue", "c_acctbal", "n_name", "c_address", "c_phone", "c_comment"),
    key=("c_custkey",),
    order=(("revenue", True),),
    limit=20,
)


def _make_q11(scale: float) -> Query:
    # The specification's way to get about as many rows at every scale factor.
    fraction = 0.0001 / scale

    def build(read: Reader) -> Any:
        partsupp = read("partsupp", "ps_partkey", "ps_suppkey", "ps_availqty", "ps_supplycost")
        supplier = read("supplier", "s_suppkey", "s_nationkey")
        nation = read("nation", "n_nationkey", "n_name")

        nation = nation[nation.n_name == "GERMANY"]
        supplier = supplier.merge(nation, left_on="s_nationkey", right_on="n_nationkey")[["s_suppkey"]]

        rows = partsupp.merge(supplier, left_on="ps_suppkey", right_on="s_suppkey")
        rows["value"] = rows.ps_supplycost * rows.ps_availqty
        values = rows.groupby("ps_partkey").value.sum(split_out=True).reset_index()
        return values[values.value > rows.value.sum() * fraction]

    return Query(
        name="q11",
        title="Parts that are much of a nation's stock",
        build=build,
        sql=f"""
            SELECT ps_partkey, sum(ps_supplycost * ps_availqty) AS value
            FROM partsupp, supplier, nation
            WHERE ps_suppkey = s_suppkey AND s_nationkey = n_nationkey AND n_name = 'GERMANY'
            GROUP BY ps_partkey
            HAVING sum(ps_supplycost * ps_availqty) > (
                SELECT sum(ps_supplycost * ps_availqty) * CAST({fraction!r} AS DOUBLE)
                FROM partsupp, supplier, nation
                WHERE ps_suppkey = s_suppkey AND s_nationkey = n_nationkey AND n_name = 'GERMANY'
            )
            ORDER BY value DESC
        """,  # noqa: S608 - the number is our own
        columns=("ps_partkey", "value"),
        key=("ps_partkey",),
        order=(("value", True),),
    )


def _q12(read: Reader) -> Any:
    start, end = dt.date(1994, 1, 1), dt.date(1995, 1, 1)
    orders = read("orders", "o_orderkey", "o_orderpriority")
    lineitem = read("lineitem", "l_orderkey", "l_shipmode", "l_shipdate", "l_commitdate", "l_receiptdate")

    lineitem = lineitem[
        lineitem.l_shipmode.isin(["MAIL", "SHIP"])
        & (lineitem.l_receiptdate >= start)
        & (lineitem.l_receiptdate < end)
        & (lineitem.l_shipdate < lineitem.l_commitdate)
        & (lineitem.l_commitdate < lineitem.l_receiptdate)
    ]
    rows = orders.merge(lineitem[["l_orderkey", "l_shipmode"]], left_on="o_orderkey", right_on="l_orderkey")
    urgent = rows.o_orderpriority.isin(["1-URGENT", "2-HIGH"])
    rows["high_line_count"] = urgent.astype("int64")
    rows["low_line_count"] = (~urgent).astype("int64")
    return rows.groupby("l_shipmode")[["high_line_count", "low_line_count"]].sum().reset_index()


Q12 = Query(
    name="q12",
    title="Late lines by ship mode and priority",
    build=_q12,
    sql="""
        SELECT l_shipmode,
               count(*) FILTER (o_orderpriority IN ('1-URGENT', '2-HIGH')) AS high_line_count,
               count(*) FILTER (o_orderpriority NOT IN ('1-URGENT', '2-HIGH')) AS low_line_count
        FROM orders, lineitem
        WHERE o_orderkey = l_orderkey AND l_shipmode IN ('MAIL', 'SHIP')
          AND l_shipdate < l_commitdate AND l_commitdate < l_receiptdate
          AND l_receiptdate >= DATE '1994-01-01' AND l_receiptdate < DATE '1995-01-01'
        GROUP BY l_shipmode
        ORDER BY l_shipmode
    """,
    columns=("l_shipmode", "high_line_count", "low_line_count"),
    key=("l_shipmode",),
    order=(("l_shipmode", False),),
)


def _q13(read: Reader) -> Any:
    customer = read("customer", "c_custkey")
    orders = read("orders", "o_orderkey", "o_custkey", "o_comment")

    orders = orders[~orders.o_comment.str.contains("special.*requests")][["o_orderkey", "o_custkey"]]

    rows = customer.merge(orders, left_on="c_custkey", right_on="o_custkey", how="left")
    counts = rows.groupby("c_custkey").o_orderkey.count(split_out=True).rename("c_count").reset_index()
    return counts.groupby("c_count").size().rename("custdist").reset_index()


Q13 = Query(
    name="q13",
    title="Customers by number of orders",
    build=_q13,
    sql="""
        SELECT c_count, count(*) AS custdist
        FROM (
            SELECT c_custkey, count(o_orderkey) AS c_count
            FROM customer LEFT JOIN orders ON c_custkey = o_custkey AND o_comment NOT LIKE '%special%requests%'
            GROUP BY c_custkey
        )
        GROUP BY c_count
        ORDER BY custdist DESC, c_count DESC
    """,
    columns=("c_count", "custdist"),
    key=("c_count",),
    order=(("custdist", True), ("c_count", True)),
)


def _q14(read: Reader) -> Any:
    start, end = dt.date(1995, 9, 1), dt.date(1995, 10, 1)
    lineitem = read("lineitem", "l_partkey", "l_extendedprice", "l_discount", "l_shipdate")
    part = read("part", "p_partkey", "p_type")

    lineitem = lineitem[(lineitem.l_shipdate >= start) & (lineitem.l_shipdate < end)]

    rows = lineitem.merge(part, left_on="l_partkey", right_on="p_partkey")
    revenue = rows.l_extendedprice * (1 - rows.l_discount)
    promoted = revenue.where(rows.p_type.str.startswith("PROMO"), 0.0)
    return 100.0 * promoted.sum() / revenue.sum()


Q14 = Query(
    name="q14",
    title="Share of promoted parts in a month's revenue",
    build=_q14,
    sql="""
        SELECT 100.0 * sum(CASE WHEN p_type LIKE 'PROMO%' THEN l_extendedprice * (1 - l_discount) ELSE 0 END)
               / sum(l_extendedprice * (1 - l_discount)) AS promo_revenue
        FROM lineitem, part
        WHERE l_partkey = p_partkey AND l_shipdate >= DATE '1995-09-01' AND l_shipdate < DATE '1995-10-01'
    """,
    columns=("promo_revenue",),
    key=(),
    order=(),
)


def _q15(read: Reader) -> Any:
    start, end = dt.date(1996, 1, 1), dt.date(1996, 4, 1)
    lineitem = read("lineitem", "l_suppkey", "l_extendedprice", "l_discount", "l_shipdate")
    supplier = read("supplier", "s_suppkey", "s_name", "s_address", "s_phone")

    lineitem = lineitem[(lineitem.l_shipdate >= start) & (lineitem.l_shipdate < end)]
    lineitem["total_revenue"] = lineitem.l_extendedprice * (1 - lineitem.l_discount)

    revenue = lineitem.groupby("l_suppkey").total_revenue.sum().reset_index()
    best = revenue[revenue.total_revenue == revenue.total_revenue.max()]
    return supplier.merge(best, left_on="s_suppkey", right_on="l_suppkey")


Q15 = Query(
    name="q15",
    title="The supplier with the highest revenue",
    build=_q15,
    sql="""
        WITH revenue AS (
            SELECT l_suppkey AS supplier_no, sum(l_extendedprice * (1 - l_discount)) AS total_revenue
            FROM lineitem
            WHERE l_shipdate >= DATE '1996-01-01' AND l_shipdate < DATE '1996-04-01'
            GROUP BY l_suppkey
        )
        SELECT s_suppkey, s_name, s_address, s_phone, total_revenue
        FROM supplier, revenue
        WHERE s_suppkey = supplier_no AND total_revenue = (SELECT max(total_revenue) FROM revenue)
        ORDER BY s_suppkey
    """,
    columns=("s_suppkey", "s_name", "s_address", "s_phone", "total_revenue"),
    key=("s_suppkey",),
    order=(("s_suppkey", False),),
)


def _q16(read: Reader) -> Any:
    partsupp = read("partsupp", "ps_partkey", "ps_suppkey")
    part = read("part", "p_partkey", "p_brand", "p_type", "p_size")
    supplier = read("supplier", "s_suppkey", "s_comment")

    part = part[
        (part.p_brand != "Brand#45")
        & ~part.p_type.str.startswith("MEDIUM POLISHED")
        & part.p_size.isin([49, 14, 23, 45, 19, 3, 36, 9])
    ]
    complaints = supplier[supplier.s_comment.str.contains("Customer.*Complaints")][["s_suppkey"]]

    rows = partsupp.merge(part, left_on="ps_partkey", right_on="p_partkey")
    rows = rows.merge(complaints, left_on="ps_suppkey", right_on="s_suppkey", how="left")
    rows = rows[rows.s_suppkey.isna()]
    counts = rows.groupby(["p_brand", "p_type", "p_size"]).ps_suppkey.nunique(split_out=True)
    return counts.rename("supplier_cnt").reset_index()


Q16 = Query(
    name="q16",
    title="Suppliers by kind of part",
    build=_q16,
    sql="""
        SELECT p_brand, p_type, p_size, count(DISTINCT ps_suppkey) AS supplier_cnt
        FROM partsupp, part
        WHERE p_partkey = ps_partkey AND p_brand <> 'Brand#45' AND p_type NOT LIKE 'MEDIUM POLISHED%'
          AND p_size IN (49, 14, 23, 45, 19, 3, 36, 9)
          AND ps_suppkey NOT IN (SELECT s_suppkey FROM supplier WHERE s_comment LIKE '%Customer%Complaints%')
        GROUP BY p_brand, p_type, p_size
        ORDER BY supplier_cnt DESC, p_brand, p_type, p_size
    """,
    columns=("p_brand", "p_type", "p_size", "supplier_cnt"),
    key=("p_brand", "p_type", "p_size"),
    order=(("supplier_cnt", True), ("p_brand", False), ("p_type", False), ("p_size", False)),
)


def _q17(read: Reader) -> Any:
    lineitem = read("lineitem", "l_partkey", "l_quantity", "l_extendedprice")
    part = read("part", "p_partkey", "p_brand", "p_container")

    part = part[(part.p_brand == "Brand#23") & (part.p_container == "MED BOX")][["p_partkey"]]
    average = lineitem.groupby("l_partkey").l_quantity.mean(split_out=True).rename("average").reset_index()

    rows = lineitem.merge(part, left_on="l_partkey", right_on="p_partkey")
    rows = rows.merge(average, on="l_partkey")
    return rows[rows.l_quantity < 0.2 * rows.average].l_extendedprice.sum() / 7.0


Q17 = Query(
    name="q17",
    title="Revenue lost without small orders",
    build=_q17,
    sql="""
        SELECT sum(l_extendedprice) / 7.0 AS avg_yearly
        FROM lineitem, part
        WHERE p_partkey = l_partkey AND p_brand = 'Brand#23' AND p_container = 'MED BOX'
          AND l_quantity < (SELECT 0.2 * avg(l_quantity) FROM lineitem WHERE l_partkey = p_partkey)
    """,
    columns=("avg_yearly",),
    key=(),
    order=(),
)


def _q19(read: Reader) -> Any:
    lineitem = read(
        "lineitem", "l_partkey", "l_quantity", "l_extendedprice", "l_discount", "l_shipmode", "l_shipinstruct"
    )
    part = read("part", "p_partkey", "p_brand", "p_size", "p_container")

    lineitem = lineitem[lineitem.l_shipmode.isin(["AIR", "AIR REG"]) & (lineitem.l_shipinstruct == "DELIVER IN PERSON")]
    rows = lineitem.merge(part, left_on="l_partkey", right_on="p_partkey")
    kinds = (
        (rows.p_brand == "Brand#12")
        & rows.p_container.isin(["SM CASE", "SM BOX", "SM PACK", "SM PKG"])
        & rows.l_quantity.between(1, 11)
        & rows.p_size.between(1, 5),
        (rows.p_brand == "Brand#23")
        & rows.p_container.isin(["MED BAG", "MED BOX", "MED PKG", "MED PACK"])
        & rows.l_quantity.between(10, 20)
        & rows.p_size.between(1, 10),
        (rows.p_brand == "Brand#34")
        & rows.p_container.isin(["LG CASE", "LG BOX", "LG PACK", "LG PKG"])
        & rows.l_quantity.between(20, 30)
        & rows.p_size.between(1, 15),
    )
    rows = rows[kinds[0] | kinds[1] | kinds[2]]
    return (rows.l_extendedprice * (1 - rows.l_discount)).sum()


Q19 = Query(
    name="q19",
    title="Revenue of parts that were handed over in person",
    build=_q19,
    sql="""
        SELECT sum(l_extendedprice * (1 - l_discount)) AS revenue
        FROM lineitem, part
        WHERE p_partkey = l_partkey AND l_shipmode IN ('AIR', 'AIR REG') AND l_shipinstruct = 'DELIVER IN PERSON'
          AND ((p_brand = 'Brand#12' AND p_container IN ('SM CASE', 'SM BOX', 'SM PACK', 'SM PKG')
                AND l_quantity BETWEEN 1 AND 11 AND p_size BETWEEN 1 AND 5)
            OR (p_brand = 'Brand#23' AND p_container IN ('MED BAG', 'MED BOX', 'MED PKG', 'MED PACK')
                AND l_quantity BETWEEN 10 AND 20 AND p_size BETWEEN 1 AND 10)
            OR (p_brand = 'Brand#34' AND p_container IN ('LG CASE', 'LG BOX', 'LG PACK', 'LG PKG')
                AND l_quantity BETWEEN 20 AND 30 AND p_size BETWEEN 1 AND 15))
    """,
    columns=("revenue",),
    key=(),
    order=(),
)


def _q20(read: Reader) -> Any:
    start, end = dt.date(1994, 1, 1), dt.date(1995, 1, 1)
    supplier = read("supplier", "s_suppkey", "s_name", "s_address", "s_nationkey")
    nation = read("nation", "n_nationkey", "n_name")
    partsupp = read("partsupp", "ps_partkey", "ps_suppkey", "ps_availqty")
    part = read("part", "p_partkey", "p_name")
    lineitem = read("lineitem", "l_partkey", "l_suppkey", "l_quantity", "l_shipdate")

    nation = nation[nation.n_name == "CANADA"]
    part = part[part.p_name.str.startswith("forest")][["p_partkey"]]
    lineitem = lineitem[(lineitem.l_shipdate >= start) & (lineitem.l_shipdate < end)]

    sold = lineitem.groupby(["l_partkey", "l_suppkey"]).l_quantity.sum(split_out=True).reset_index()
    stock = partsupp.merge(part, left_on="ps_partkey", right_on="p_partkey", how="leftsemi")
    stock = stock.merge(sold, left_on=["ps_partkey", "ps_suppkey"], right_on=["l_partkey", "l_suppkey"])
    excess = stock[stock.ps_availqty > 0.5 * stock.l_quantity][["ps_suppkey"]]

    rows = supplier.merge(nation, left_on="s_nationkey", right_on="n_nationkey")
    return rows.merge(excess, left_on="s_suppkey", right_on="ps_suppkey", how="leftsemi")[["s_name", "s_address"]]


Q20 = Query(
    name="q20",
    title="Suppliers with more than they sell",
    build=_q20,
    sql="""
        SELECT s_name, s_address
        FROM supplier, nation
        WHERE s_suppkey IN (
              SELECT ps_suppkey
              FROM partsupp
              WHERE ps_partkey IN (SELECT p_partkey FROM part WHERE p_name LIKE 'forest%')
                AND ps_availqty > (
                    SELECT 0.5 * sum(l_quantity)
                    FROM lineitem
                    WHERE l_partkey = ps_partkey AND l_suppkey = ps_suppkey
                      AND l_shipdate >= DATE '1994-01-01' AND l_shipdate < DATE '1995-01-01'
                )
          )
          AND s_nationkey = n_nationkey AND n_name = 'CANADA'
        ORDER BY s_name
    """,
    columns=("s_name", "s_address"),
    key=("s_name",),
    order=(("s_name", False),),
)


def _q21(read: Reader) -> Any:
    supplier = read("supplier", "s_suppkey", "s_name", "s_nationkey")
    lineitem = read("lineitem", "l_orderkey", "l_suppkey", "l_commitdate", "l_receiptdate")
    orders = read("orders", "o_orderkey", "o_orderstatus")
    nation = read("nation", "n_nationkey", "n_name")

    nation = nation[nation.n_name == "SAUDI ARABIA"]
    supplier = supplier.merge(nation, left_on="s_nationkey", right_on="n_nationkey")[["s_suppkey", "s_name"]]
    orders = orders[orders.o_orderstatus == "F"][["o_orderkey"]]
    late = lineitem[lineitem.l_receiptdate > lineitem.l_commitdate][["l_orderkey", "l_suppkey"]]

    # The order has another supplier, and none that was late too: several suppliers, of whom one was late.
    involved = lineitem.groupby("l_orderkey").l_suppkey.nunique(split_out=True).rename("involved").reset_index()
    failing = late.groupby("l_orderkey").l_suppkey.nunique(split_out=True).rename("failing").reset_index()
    several = involved[involved.involved > 1]
    alone = failing[failing.failing == 1]

    rows = late.merge(supplier, left_on="l_suppkey", right_on="s_suppkey")
    rows = rows.merge(orders, left_on="l_orderkey", right_on="o_orderkey")
    rows = rows.merge(several, on="l_orderkey").merge(alone, on="l_orderkey")
    return rows.groupby("s_name").size().rename("numwait").reset_index()


Q21 = Query(
    name="q21",
    title="Suppliers who kept orders waiting",
    build=_q21,
    sql="""
        SELECT s_name, count(*) AS numwait
        FROM supplier, lineitem l1, orders, nation
        WHERE s_suppkey = l1.l_suppkey AND o_orderkey = l1.l_orderkey AND o_orderstatus = 'F'
          AND l1.l_receiptdate > l1.l_commitdate
          AND EXISTS (
              SELECT * FROM lineitem l2 WHERE l2.l_orderkey = l1.l_orderkey AND l2.l_suppkey <> l1.l_suppkey
          )
          AND NOT EXISTS (
              SELECT *
              FROM lineitem l3
              WHERE l3.l_orderkey = l1.l_orderkey AND l3.l_suppkey <> l1.l_suppkey
                AND l3.l_receiptdate > l3.l_commitdate
          )
          AND s_nationkey = n_nationkey AND n_name = 'SAUDI ARABIA'
        GROUP BY s_name
        ORDER BY numwait DESC, s_name
    """,
    columns=("s_name", "numwait"),
    key=("s_name",),
    order=(("numwait", True), ("s_name", False)),
    limit=100,
)


def _q22(read: Reader) -> Any:
    customer = read("customer", "c_custkey", "c_phone", "c_acctbal")
    orders = read("orders", "o_custkey")

    customer["cntrycode"] = customer.c_phone.str.slice(0, 2)
    customer = customer[customer.cntrycode.isin(["13", "31", "23", "29", "30", "18", "17"])]
    wealthy = customer[customer.c_acctbal > customer[customer.c_acctbal > 0.0].c_acctbal.mean()]

    rows = wealthy.merge(orders, left_on="c_custkey", right_on="o_custkey", how="left")
    rows = rows[rows.o_custkey.isna()]
    codes = rows.groupby("cntrycode").agg(numcust=("c_acctbal", "count"), totacctbal=("c_acctbal", "sum"))
    return codes.reset_index()


Q22 = Query(
    name="q22",
    title="Wealthy customers without orders",
    build=_q22,
    sql="""
        SELECT cntrycode, count(*) AS numcust, sum(c_acctbal) AS totacctbal
        FROM (
            SELECT substring(c_phone, 1, 2) AS cntrycode, c_acctbal
            FROM customer
            WHERE substring(c_phone, 1, 2) IN ('13', '31', '23', '29', '30', '18', '17')
              AND c_acctbal > (
                  SELECT avg(c_acctbal)
                  FROM customer
                  WHERE c_acctbal > 0.00 AND substring(c_phone, 1, 2) IN ('13', '31', '23', '29', '30', '18', '17')
              )
              AND NOT EXISTS (SELECT * FROM orders WHERE o_custkey = c_custkey)
        )
        GROUP BY cntrycode
        ORDER BY cntrycode
    """,
    columns=("cntrycode", "numcust", "totacctbal"),
    key=("cntrycode",),
    order=(("cntrycode", False),),
)
