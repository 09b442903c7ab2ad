"""The pure parts of the shuffle benchmarks: data, truth, judgement, order, lines."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from benchmarks import contest, gpu, merge, rechunk, shuffle, tables
from benchmarks.__main__ import main, subjects
from benchmarks.contest import OURS, P2P, P2P_MEMORY, TASKS, Case, Run
from benchmarks.frame import BrokenRunError, Subject, WrongAnswerError, line_of_pairs, rounds
from dask_gpurt.demo.data import TABLES
from dask_gpurt.memory.cuda import Device

PARTS, ROWS = 4, 500


def whole(*, hot: bool = False) -> list[pd.DataFrame]:
    return [tables.numeric(part, rows=ROWS, parts=PARTS, hot=hot) for part in range(PARTS)]


def lazy(frames: list[pd.DataFrame]) -> Any:
    return dd.from_map(lambda part: frames[part], range(len(frames)), meta=frames[0].iloc[:0])


def shuffled_by_dask(frames: list[pd.DataFrame], key: str = "key") -> list[pd.DataFrame]:
    frame = lazy(frames)
    with dask.config.set({"dataframe.shuffle.method": "tasks", "scheduler": "synchronous"}):
        shuffled = frame.shuffle(key, npartitions=len(frames))
        return [shuffled.partitions[part].compute() for part in range(len(frames))]


def truth_of(frames: list[pd.DataFrame]) -> list[tables.Fingerprint]:
    return tables.add_fingerprints([tables.fingerprints_by_output(frame, "key", PARTS) for frame in frames])


def test_the_numeric_table_is_what_it_says() -> None:
    frames = whole()
    assert [str(dtype) for dtype in frames[0].dtypes] == ["int64"] * 4 + ["float64"] * 4
    assert tables.frame_nbytes(frames[0]) == ROWS * 64
    together = pd.concat(frames)
    assert sorted(together["key"]) == list(range(PARTS * ROWS))
    assert all(together[column].is_unique for column in together.columns)
    assert all(together[column].between(0, 1, inclusive="left").all() for column in together.filter(like="float"))


@pytest.mark.parametrize("parts", [16, 40, 128, 150, 500])
def test_every_key_is_there_once_in_the_sizes_that_are_run(parts: int) -> None:
    rows = 1_000 * parts
    for stride in {tables.STRIDE, *merge.STRIDES.values()}:
        assert np.bincount(tables.key_of_row(np.arange(rows, dtype="uint64"), rows, stride)).tolist() == [1] * rows


def test_half_of_the_rows_have_the_hot_key() -> None:
    together = pd.concat(whole(hot=True))
    assert (together["key"] == 0).mean() == pytest.approx(0.5, abs=0.001)
    assert together["int_0"].is_unique


@pytest.mark.parametrize("hot", [False, True])
def test_the_truth_is_what_dask_makes_of_it(hot: bool) -> None:
    frames = whole(hot=hot)
    outputs = shuffled_by_dask(frames)
    assert [tables.fingerprint(output) for output in outputs] == truth_of(frames)
    for part, output in enumerate(outputs):
        assert (tables.output_of(output, "key", PARTS) == part).all()


def test_fingerprints_see_what_is_wrong() -> None:
    frame = whole()[0]
    changed = frame.copy()
    changed.loc[7, "float_3"] += 1e-12
    swapped = frame.copy()
    swapped["int_0"], swapped["int_1"] = frame["int_1"], frame["int_0"]
    crossed = frame.copy()
    crossed.loc[[1, 2], "int_2"] = frame["int_2"].iloc[[2, 1]].to_numpy()
    doubled = pd.concat([frame.iloc[1:], frame.iloc[[1]]])
    right = tables.fingerprint(frame)
    assert tables.fingerprint(frame.sample(frac=1, random_state=0)) == right
    for wrong in (changed, swapped, crossed, doubled, frame.iloc[1:], frame.reset_index(drop=True).set_index("key")):
        assert tables.fingerprint(wrong) != right


def test_sums_by_output_are_the_sums_of_the_outputs() -> None:
    frames = whole()
    added: Any = sum(tables.sums_by_output(frame, "key", PARTS) for frame in frames)
    found = pd.concat([tables.sums(output) for output in shuffled_by_dask(frames)], ignore_index=True)
    tables.compare_frames(found, added.reset_index(drop=True), rtol=1e-9)
    for column, change in (("int_1", 1), ("float_1", 1e-6)):
        wrong = found.copy()
        wrong.loc[2, column] += change
        with pytest.raises(WrongAnswerError, match=column):
            tables.compare_frames(wrong, added.reset_index(drop=True), rtol=1e-9)


def test_a_difference_that_pandas_would_forgive_is_found() -> None:
    frame = whole()[0]
    changed = frame.copy()
    changed.loc[7, "float_3"] += 1e-12
    with pytest.raises(WrongAnswerError, match="float_3"):
        tables.compare_frames(frame, changed)
    with pytest.raises(WrongAnswerError):
        tables.compare_frames(frame, frame[frame.columns[::-1]])


def test_an_output_without_rows_has_sums_too() -> None:
    frame = pd.DataFrame({"key": [5, 5], "x": [0.5, 1.0]})
    summed = tables.sums_by_output(frame, "key", 3)
    assert sorted(summed["rows"]) == [0, 0, 2]
    assert summed["x"].sum() == 1.5


def test_lineitem_is_cut_into_equal_parts(tmp_path: Path) -> None:
    for file in range(2):
        count = 10
        keys = range(file * count, (file + 1) * count)
        frame = pd.DataFrame({"l_orderkey": keys, "l_tax": [key / 100 for key in keys]})
        frame.to_parquet(tmp_path / f"{file}.parquet")
    files = sorted(tmp_path.iterdir())
    parts = [tables.lineitem(part, files=files, parts=6) for part in range(6)]
    assert [row for part in parts for row in part["l_orderkey"]] == list(range(20))
    assert {len(part) for part in parts} == {3, 4}
    assert [tax for part in parts for tax in part["l_tax"]] == [key / 100 for key in range(20)]
    assert parts[4].index.tolist() == [0, 1, 2][: len(parts[4])]


def test_a_merge_is_judged_row_by_row() -> None:
    left, right = (
        pd.concat([merge.table(part, which=which, rows=ROWS, parts=PARTS) for part in range(PARTS)])
        for which in ("left", "right")
    )
    assert left["key"].to_list() != right["key"].to_list()
    merged = left.merge(right, on="key")
    output = tables.output_of(merged, "key", PARTS)
    rows = 0
    for part in range(PARTS):
        frame = merged[output == part].reset_index(drop=True)
        rows += merge.judge(frame, part, rows=ROWS * PARTS, parts=PARTS)
        changed = frame.copy()
        changed.loc[3, "right_float_0"] += 1e-12
        other = merged[output == (part + 1) % PARTS].reset_index(drop=True)
        for wrong in (changed, other, pd.concat([frame, frame.iloc[:1]], ignore_index=True)):
            with pytest.raises(WrongAnswerError):
                merge.judge(wrong, part, rows=ROWS * PARTS, parts=PARTS)
    assert rows == ROWS * PARTS


def test_a_rechunk_is_judged_element_by_element() -> None:
    case = rechunk.RowsToColumns(bands=3, thin=5)
    array = np.concatenate([case.make(part) for part in range(3)])
    assert array.shape == (15, 15)
    assert case.right(array[:, 5:10], 1)
    changed = array.copy()
    changed[2, 7] = np.nextafter(changed[2, 7], 2)
    for wrong in (array[:, :5], changed[:, 5:10], array[:, 5:10].astype("float32"), array[:, 5:9]):
        assert not case.right(wrong, 1)


def test_the_methods_are_those_that_they_say() -> None:
    frame = lazy(whole())
    array = da.ones((40, 40), chunks=(10, 40))
    client: Any = SimpleNamespace(as_current=lambda: dask.config.set({}))
    for contender, barriers in ((OURS, 1), (P2P, 1), (TASKS, 0)):
        with contender.chosen(client):
            for collection in (
                tables.Shuffle.of_numeric(parts=PARTS, rows=ROWS).build(frame),
                merge.Merge(rows=ROWS, parts=PARTS).build((frame, frame)),
                rechunk.RowsToColumns(bands=4, thin=10).build(array),
            ):
                graph = collection.optimize().__dask_graph__() if hasattr(collection, "optimize") else collection.dask
                found = [task for task in dict(graph).values() if hasattr(task, "spec")]
                assert bool(found) == bool(barriers)
                assert all(task.spec.disk for task in found)


def test_stock_is_made_to_keep_shards_in_memory() -> None:
    frame = lazy(whole())
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        graph = dict(frame.shuffle("key", npartitions=PARTS).optimize().__dask_graph__())
    states = {key: SimpleNamespace(run_spec=task) for key, task in graph.items()}
    states["released"] = SimpleNamespace(run_spec=None)
    (barrier,) = (task for task in graph.values() if hasattr(task, "spec"))
    npartitions = barrier.spec.npartitions
    scheduler: Any = SimpleNamespace(tasks=states)
    contest.ShardsInMemory().update_graph(scheduler, tasks=list(states))
    assert not barrier.spec.disk
    assert barrier.spec.npartitions == npartitions


def test_the_order_of_many_turns_round() -> None:
    sides = [side for _, side in rounds("abc", 4)]
    assert "".join(sides) == "abccbaabccba"


def test_the_lines_of_a_case() -> None:
    def runs(walls_s: list[float], peak_nbytes: int) -> list[Run]:
        return [Run(wall_s, (peak_nbytes, peak_nbytes // 2)) for wall_s in walls_s]

    nothing: Any = None
    case = Case("c", nothing, nothing, (P2P, TASKS), 2, 1000, peaks_against=(P2P,), against_limit=True)
    found = {OURS: runs([1.0, 2.0], 800), P2P: runs([3.0, 8.0], 1600), TASKS: runs([2.0, 4.0], 10)}
    lines = {(line.metric, line.peer_name): line.ratio for line in contest._lines(case, found, [0.5, 0.5])}
    assert lines == {
        ("wall_s", "p2p"): 3.5,
        ("wall_s", "tasks"): 2.0,
        ("wall_s", "memcpy"): 0.375,
        ("peak_rss_nbytes", "p2p"): 2.0,
        ("peak_rss_nbytes", "limit"): 1.25,
    }
    found[TASKS] = [Run(2.0, ()), Run(4.0, ())]
    assert {line.metric for line in contest._lines(case, found, [0.5, 0.5])} == {"wall_s"}


def test_the_peak_of_a_process_is_read() -> None:
    # Another process, in which nothing else goes on: it takes memory when it is told to, and gives it back.
    code = "input(); block = bytearray(b'x') * 64_000_000; del block; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        permitted = contest._reset_peak(process.pid)
        before = contest._peak_nbytes(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = contest._peak_nbytes(process.pid)
        process.communicate(b"\n")
    if not permitted:
        pytest.skip("this system does not let the high-water mark be set back")
    assert 32_000_000 < after - before < 128_000_000


def test_no_process_no_peak() -> None:
    assert not contest._reset_peak(2**22 + 1)


@pytest.mark.parametrize("quick", [True, False])
def test_the_cases_are_those_of_the_table(quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for scale in ("1", "0.1", "0.01"):
        for name in TABLES:
            (tmp_path / "dask-gpurt" / f"tpch-{scale}-v1" / name).mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = {name: make(quick=quick) for name, make in shuffle.CASES.items()}
    peers = {name: [peer.name for peer in case.peers] for name, case in cases.items()}
    assert peers == {
        "numeric-16": ["p2p", "tasks", "p2p-memory"],
        "lineitem-16": ["p2p"],
        "many-500": ["p2p", "tasks"],
        "beyond-memory": ["p2p"],
        "hot-key": ["p2p"],
        "kept-16": ["keeping"],
    }
    assert quick or all(case.name == name for name, case in cases.items())
    assert all(case.rounds in ((1, 3) if quick else (3, 5, 7)) for case in cases.values())
    assert cases["beyond-memory"].memory_limit_nbytes == 10**9
    assert P2P_MEMORY.shards_in_memory
    assert {name: list(subject.cases) for name, subject in subjects().items() if name in ("merge", "rechunk")} == {
        "merge": ["merge"],
        "rechunk": ["rows-to-columns", "gpu-rechunk"],
    }
    assert [name for name in subjects()["shuffle"].cases if name not in cases] == ["gpu-shuffle", "gpu-pack"]
    on_gpu = [rechunk.gpu_rechunk(quick=quick), shuffle.gpu_shuffle(quick=quick)]
    assert [(case.name, [peer.name for peer in case.peers]) for case in on_gpu] == [
        ("gpu-rechunk", ["tasks"]),
        ("gpu-shuffle", ["p2p", "tasks"]),
    ]
    assert quick or rechunk.gpu_rechunk(quick=False).workload.side ** 2 * 8 > 8e9  # type: ignore[attr-defined]


def test_a_case_without_its_gpu_is_skipped_and_says_why(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def make(quick: bool) -> Any:
        return [line_of_pairs("c", "wall_s", [1.0], [2.0], "stock")]

    monkeypatch.setattr(Device, "find", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cudf" else name)
    assert list(gpu.where_there_is_a_gpu("c", make)(True)) == []
    monkeypatch.setattr(Device, "find", lambda: 1)
    assert list(gpu.where_there_is_a_gpu("c", make, "cudf")(True)) == []
    assert capsys.readouterr().out.splitlines() == [
        "c is skipped: there is no CUDA device",
        "c is skipped: cudf not installed",
    ]
    assert list(gpu.where_there_is_a_gpu("c", make)(True)) == make(True)


def test_frames_of_a_gpu_are_judged_as_a_whole_and_by_partition() -> None:
    frames = whole()
    assert gpu._sum([tables.fingerprint(frame) for frame in frames]) == tables.fingerprint(pd.concat(frames))


def parted() -> dict[str, Subject]:
    def make(case: str) -> Any:
        return lambda quick: [line_of_pairs(case, "wall_s", [1.0], [2.0 if quick else 3.0], "stock")]

    return {
        "parted": Subject.of_cases("parted", "cases", {case: make(case) for case in "abc"}),
        "whole": Subject("whole", "one", make("d"), scaled=lambda scale: Subject("whole", "one", make(f"d-{scale:g}"))),
    }


def test_one_case_alone(capsys: Any) -> None:
    assert main(["parted"], parted()) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "c"]
    assert main(["parted", "--quick", "--case", "c", "--case", "a"], parted()) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["c", "a"]
    assert all("ratio=2.000" in line for line in said)


@pytest.mark.parametrize(("name", "hint"), [("parted", "a, b, c"), ("whole", "as a whole")])
def test_a_case_that_is_not_there(name: str, hint: str, capsys: Any) -> None:
    assert main([name, "--case", "z"], parted()) == 2
    said = capsys.readouterr().err
    assert "'z'" in said
    assert hint in said


def test_another_scale(capsys: Any) -> None:
    assert main(["whole", "--scale", "10"], parted()) == 0
    assert capsys.readouterr().out.split()[1] == "d-10"
    assert main(["whole", "--scale", "0"], parted()) == 2
    assert main(["parted", "--scale", "10"], parted()) == 2
    assert "parted can't be run at scale 10" in capsys.readouterr().err


def test_a_broken_run_is_no_result(capsys: Any, tmp_path: Path) -> None:
    def run(quick: bool) -> Any:
        raise BrokenRunError("a worker was lost")

    path = tmp_path / "out.json"
    assert main(["broken", "--json", str(path)], {"broken": Subject("broken", "breaks", run)}) == 1
    assert "a worker was lost" in capsys.readouterr().err
    assert not path.exists()
