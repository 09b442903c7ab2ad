"""The panels: each takes whatever is on the board, and what comes from users is text and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from bokeh.document import Document
from bokeh.models.widgets import Div

from dask_gpurt.observe.board import TIERS, Board, ClusterReport, Placing, WorkerState
from dask_gpurt.observe.drawing import Panel
from dask_gpurt.observe.flow import FlowPanel, MatrixPanel
from dask_gpurt.observe.history import TiersPanel, WorkersPanel
from dask_gpurt.observe.journal import ShuffleRun
from dask_gpurt.observe.matrix import Matrix
from dask_gpurt.observe.pages import PANELS
from dask_gpurt.observe.reports import RunReport, TierReport, WorkerReport
from dask_gpurt.observe.tables import ENDED, DecisionsPanel, PlacementPanel, ShufflesPanel

EVIL = "<img src=x onerror=alert(1)>"


def board(nworkers: int, tiers: tuple[str, ...] = ("host", "disk"), name: str = "w") -> Board:
    """A busy cluster, looked at three times."""
    found = Board()
    for at_s in range(3):
        run = RunReport(f"{name}-run", 1, "transfer", name == EVIL, 4, 1, 2, 100, 50, 70, 1, 0.5, 3)
        report = WorkerReport(
            tiers={tier: TierReport(at_s * 2**30, 0, 2**32 if tier == "host" else None) for tier in tiers},
            moves={("host", "disk"): at_s * 2**20},
            sent={"ucx": at_s * 2**10, "comm": 0, "inputs": 0, "local": 0},
            runs=(run,),
        )
        workers = [WorkerState(f"tcp://{i}", f"{name}{i}", at_s, 0.02, report) for i in range(nworkers)]
        latest = [Placing(name, "planned", name, f'planned {name}: it was "planned" there')]
        found.observe(at_s, ClusterReport(workers, 0.02, {"planned": 7, "urgent": 2}, 0, 5, 3, latest))
    names = {worker.address: worker.name for worker in workers}
    found.matrix = Matrix.of(names, {a: {(b, "ucx"): 2**20 for b in names if a != b} for a in names})
    return found


@pytest.mark.parametrize("kind", PANELS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("nworkers", [0, 2, 200])
def test_every_panel_shows_any_cluster(kind: type[Panel], nworkers: int) -> None:
    panel = kind()
    document = Document()
    document.add_root(panel.root)
    for step in (Board(), board(nworkers, TIERS), board(nworkers), Board()):
        panel.update(step)
        document.validate()
        # What is sent to a browser.
        assert document.to_json()


@pytest.mark.parametrize("kind", PANELS, ids=lambda kind: kind.name)
def test_names_and_keys_are_no_html(kind: type[Panel]) -> None:
    panel = kind()
    panel.update(board(2, name=EVIL))
    assert EVIL not in (panel.root.text if isinstance(panel.root, Div) else "")


def test_the_latest_decisions_say_what_was_compared() -> None:
    panel = DecisionsPanel()
    panel.update(board(2))
    assert '<span title="planned w: it was &quot;planned&quot; there">planned</span>' in panel.root.text


def test_tiers_that_nobody_has_are_not_drawn() -> None:
    panel = TiersPanel()
    panel.update(board(2))
    assert panel.root.title.text == "HOST 4.00 GiB of 8.00 GiB \N{MIDDLE DOT} DISK 4.00 GiB"
    drawn = {renderer.glyph.y for renderer in panel.root.renderers if renderer.visible and hasattr(renderer.glyph, "y")}
    assert drawn == {"host", "host_limit", "disk", "disk_limit"}


def test_few_workers_are_named_and_many_are_numbered() -> None:
    panel = WorkersPanel()
    host: Any = panel.root.children[TIERS.index("host")]
    panel.update(board(3))
    assert host.yaxis[0].major_label_overrides == {0.5: "w0", 1.5: "w1", 2.5: "w2"}
    assert host.y_range.start == 3
    panel.update(board(200))
    assert host.yaxis[0].major_label_overrides == {}
    assert host.renderers[0].data_source.data["image"][0].shape[0] == 200


def test_the_flow_says_the_rate_and_at_rest_what_has_moved() -> None:
    panel = FlowPanel()
    panel.update(board(2))
    texts = panel.labels.data["text"]
    assert "2.00 MiB/s" in texts
    assert "shuffle, UCX: 2.00 kiB/s" in texts
    assert "inputs: 0 B" in texts
    assert "MiB" in panel.root.title.text
    widths = dict(zip(panel.arrows.data["what"], panel.arrows.data["width"], strict=True))
    assert widths["host to disk"] > widths["shuffle, UCX"] > widths["inputs"] == 1.0
    assert not any(math.isnan(x) for x in panel.arrows.data["x0"])


def test_a_stuck_shuffle_is_said_to_be() -> None:
    panel = ShufflesPanel()
    panel.update(board(2, name=EVIL))
    assert "stuck: &lt;img" in panel.root.text
    shown = board(2)
    run = ShuffleRun(EVIL, 7, {"closed": 2}, (), 1.0, 2.5, 4.0, 8, 8, 8, {"ucx": 2**20}, 2**20, 0, 0.5)
    shown.ended = [run] * 9
    panel.update(shown)
    assert panel.root.text.count("&lt;img src #7") == ENDED
    assert "1.50 s" in panel.root.text
    panel.update(board(2))
    assert "#7" not in panel.root.text
    assert "stuck" not in panel.root.text
    assert "2 transfer" in panel.root.text
    assert "2 of 4" in panel.root.text


def test_the_most_frequent_reason_is_on_top() -> None:
    panel = PlacementPanel()
    panel.update(board(2))
    assert panel.root.y_range.factors == ["urgent", "planned"]
    assert panel.root.title.text == "Placement: 9 decisions\n5 planned ahead, 3 wait"
    panel.summarize(board(2))
    assert "\n" not in panel.root.title.text
    panel.update(Board())
    assert "stock Dask" in panel.root.title.text


def test_the_matrix_shows_who_sent_what_to_whom() -> None:
    panel = MatrixPanel()
    panel.update(Board())
    assert "are being asked" in panel.root.title.text
    panel.update(board(2))
    data = panel.source.data
    assert data["image"][0][0, 1] == data["ucx"][0][0, 1] == 2**20
    # What has not moved has no colour, and is nothing by any path.
    assert math.isnan(data["image"][0][1, 1])
    assert data["inputs"][0].sum() == 0
    assert panel.root.title.text == "Worker to worker: 2.00 MiB"
    assert panel.root.yaxis[0].major_label_overrides == {0.5: "w0", 1.5: "w1"}
    panel.update(board(200))
    assert data["image"][0].shape == (2, 2)
    assert panel.source.data["image"][0].shape == (200, 200)
    assert panel.root.xaxis[0].major_label_overrides == {}
    assert panel.mapper.high == 2**20


def test_a_matrix_that_is_shown_is_not_sent_again() -> None:
    panel, shown = MatrixPanel(), board(2)
    panel.update(shown)
    data = panel.source.data
    panel.update(shown)
    assert panel.source.data is data
