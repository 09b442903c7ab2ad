"""The documentation: links lead somewhere, generated pages are up to date, quoted messages exist, files for deployments are sound."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import dask.config
import distributed
import kubernetes_schemas
import pytest
import yaml
from distributed.scheduler import SchedulerState

import dask_gpurt.errors
from dask_gpurt.cli import gpurt
from dask_gpurt.memory.spiller import State
from dask_gpurt.plugins import placement
from dask_gpurt.shuffle import run
from docs import configuration, figures, plots, states
from docs.generated import DIAGRAMS, pages

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


def _text(page: pathlib.Path) -> str:
    """Return the page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def _anchors(page: pathlib.Path) -> set[str]:
    """Return what code hosts, and MyST after them, make of headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", _text(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(page: pathlib.Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", _text(page))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page: pathlib.Path) -> None:
    assert not list(_broken_links(page))


def test_a_broken_link_is_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](#one-thing) [b](#other) [c](none.md) [d](page.md#one-thing) `[e](code.md)`\n")
    assert list(_broken_links(page)) == ["#other", "none.md"]


#: Hosts of what the pages lead to elsewhere. A new one is added here by somebody who has seen that it is meant.
HOSTS = {
    *("dask.org", "docs.dask.org", "distributed.dask.org", "jobqueue.dask.org", "kubernetes.dask.org"),
    *("filesystem-spec.readthedocs.io", "github.com", "keepachangelog.com", "peps.python.org", "prometheus.github.io"),
    "semver.org",
}
REPOSITORIES = {"dask/dask", "dask/distributed", "dask/dask-labextension", "rapidsai/dask-cuda"}


def _wrong_addresses(page: pathlib.Path) -> Iterator[str]:
    """What can be told of an address without a network, for which ``make docs-links`` is there."""
    for text, address in re.findall(r"\[([^\]]*)\]\((https?://[^)\s]+)\)", _text(page)):
        parts = urlsplit(address)
        if parts.scheme != "https" or parts.netloc not in HOSTS:
            yield address
        elif parts.netloc == "github.com":
            repository, _, number = parts.path.strip("/").partition("/issues/")
            said = re.fullmatch(r"(?:(\S+) )?#(\d+)", text)
            named = said is None or not said[1] or repository.endswith(f"/{said[1]}")
            if repository not in REPOSITORIES or not named or (said[2] if said else "") != number:
                yield address


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_addresses_elsewhere_are_sound_as_far_as_can_be_told(page: pathlib.Path) -> None:
    assert not list(_wrong_addresses(page))


def test_a_wrong_address_is_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    issues = "https://github.com/dask/distributed/issues"
    good = f"[#1]({issues}/1) [distributed #2]({issues}/2) [Dask](https://dask.org)"
    wrong = [f"[#3]({issues}/4)", f"[dask-cuda #5]({issues}/5)", "[a](http://dask.org)", "[b](https://dask.example)"]
    page.write_text(f"{good} {' '.join(wrong)}\n")
    assert list(_wrong_addresses(page)) == [link.partition("(")[2][:-1] for link in wrong]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: pathlib.Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], "run: python -m docs"


@pytest.mark.parametrize("module", [configuration, figures, plots, states], ids=lambda module: module.__name__)
def test_the_examples_in_the_generator(module: types.ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed


def test_the_phases_of_a_run_are_those_in_the_code() -> None:
    ways = states.moves(run.__doc__ or "")
    assert {move.source for move in ways} == {move.target for move in ways} == {phase.name for phase in run.Phase}


def test_the_states_of_a_block_are_those_in_the_code() -> None:
    """That the ways between them are, too, is tested in ``tests/property/test_memory_spiller.py``."""
    ways = states.moves(DIAGRAMS["states-of-a-block"][1].__doc__ or "")
    assert {move.source for move in ways} == {state.name for state in State}


def test_a_planned_task_goes_ways_that_dask_has() -> None:
    dask = set(SchedulerState._TRANSITIONS_TABLE)
    ways = {(move.source.lower(), move.target.lower()) for move in states.moves(placement.__doc__ or "")}
    assert {"waiting", "queued", "processing"} == {source for source, _ in ways}
    assert ways <= dask


def test_the_arrows_of_a_diagram_are_those_of_its_table() -> None:
    table = (
        "=====  ====  =====\nHERE   x     go -> THERE\nTHERE  y     back -> HERE; lost -> gone\n=====  ====  =====\n"
    )
    prose = "=====  ====\nlow    z\n=====  ====\n\nNo state at all, though it begins with a capital.\n\n"
    drawn = states.diagram("Places", prose + table)
    assert re.findall(r">([^<>]+)</text>", drawn) == ["go", "back", "lost", "HERE", "THERE", "gone"]


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text()
    documented = re.findall(r"(?m)^\.\. auto(?:function|class|exception):: (?:dask_gpurt\.)?(?:errors\.)?(\w+)", page)
    errors = set(vars(dask_gpurt.errors)) if ".. automodule:: dask_gpurt.errors" in page else set()
    assert set(dask_gpurt.__all__) - {"__version__"} <= {*documented, *errors}


def test_every_subcommand_is_on_the_page_of_the_command_line() -> None:
    page = (DOCS / "commands.md").read_text()
    assert re.findall(r"(?m)^## dask gpurt (\w+)$", page) == sorted(gpurt.commands)
    options = {
        option for command in gpurt.commands.values() for of in command.params for option in of.opts if option[0] == "-"
    }
    assert len(options) > 10
    assert not [option for option in options if option not in page]


def _constants() -> Iterator[str]:
    """All texts in the package, with those that stand side by side put together as Python does."""
    for folder in ("dask_gpurt", "plugins", "shuffle"):
        for source in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_message_that_is_quoted_exists() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = "".join(re.findall(r"(?ms)^```text\n(.*?)^```", page)).splitlines()
    quoted += re.findall(r"(?m)^\| `(.+?)` \|", page)
    assert len(quoted) > 20
    said = "\0".join(_constants())
    parts = [part for message in quoted for part in message.split("…") if len(part) > 3]
    assert not [part for part in parts if part not in said and part.strip(" .:;,") not in said]


def test_the_clusters_on_the_page_of_deployments_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples are run, but for the clusters: these want a GPU, three machines, or Slurm."""
    page = (DOCS / "deployment.md").read_text()
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    made: list[str] = []

    class Recorded:
        def __init__(self, kind: Any, known: Any) -> None:
            self.kind, self.known = kind, known

        def __call__(self, *args: Any, **options: Any) -> Any:
            inspect.signature(self.kind).bind(*args, **options)
            known = {name for of in (self.kind, *self.known) for name in inspect.signature(of).parameters}
            assert set(options) <= known
            assert set(options.get("worker_options", {})) <= set(inspect.signature(distributed.Nanny).parameters)
            made.append(self.kind.__name__)
            return self

        def adapt(self, **options: Any) -> None:
            inspect.signature(self.kind.adapt).bind(self, **options)
            assert set(options) <= set(inspect.signature(self.kind.adapt).parameters)
            made.append("adapt")

    names = {
        "LocalCluster": "distributed",
        "LocalCUDACluster": "dask_cuda",
        "SSHCluster": "distributed",
        "SLURMCluster": "dask_jobqueue",
    }
    kinds = {name: getattr(importlib.import_module(module), name) for name, module in names.items()}
    for name, kind in kinds.items():
        # What a local cluster does not know itself it hands to its workers.
        known = [distributed.Nanny] if name == "LocalCluster" else []
        monkeypatch.setattr(sys.modules[names[name]], name, Recorded(kind, known))
    monkeypatch.setattr(distributed, "Client", lambda cluster: cluster)

    def install(client: Recorded) -> Any:
        made.append("install")
        return client.kind

    shared: dict[str, Any] = {"dask_gpurt": types.SimpleNamespace(install=install)}
    for block in blocks:
        exec(compile(block, "deployment.md", "exec"), shared)
    assert made == ["LocalCluster", "LocalCUDACluster", "SSHCluster", "install", "SLURMCluster", "adapt"]


def _manifests() -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load_all((DOCS / "deployment" / "kubernetes.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in loaded}


def test_the_kubernetes_operator_takes_the_manifest() -> None:
    manifests = _manifests()
    assert set(manifests) == set(kubernetes_schemas.KINDS)
    assert {kind: kubernetes_schemas.problems(manifest) for kind, manifest in manifests.items()} == {
        kind: [] for kind in manifests
    }


def test_the_kubernetes_operator_takes_nothing_else() -> None:
    manifest = _manifests()["DaskCluster"]
    del manifest["spec"]["scheduler"]["service"]
    manifest["spec"]["worker"]["replicas"] = "two"
    [container] = manifest["spec"]["worker"]["spec"]["containers"]
    container["volumeMount"] = container.pop("volumeMounts")
    assert kubernetes_schemas.problems(manifest) == [
        "spec.scheduler: 'service' is a required property",
        "spec.worker.replicas: 'two' is not of type 'integer'",
        "spec.worker.spec.containers.0: Additional properties are not allowed ('volumeMount' was unexpected)",
    ]
    assert kubernetes_schemas.problems({"kind": "DaskCluster", "apiVersion": "v1"})
    assert kubernetes_schemas.problems({"kind": "Pod", "apiVersion": "v1"})


def test_the_parts_of_the_kubernetes_manifest_agree() -> None:
    """What no schema says: names, ports, and how dask-gpurt comes there."""
    manifests = _manifests()
    cluster, scaler = manifests["DaskCluster"], manifests["DaskAutoscaler"]
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    assert scaler["spec"]["cluster"] == name
    assert scaler["spec"]["minimum"] <= spec["worker"]["replicas"] <= scaler["spec"]["maximum"]
    service = spec["scheduler"]["service"]
    assert service["selector"] == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    [scheduler] = spec["scheduler"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in scheduler["ports"]}
    assert (
        {port["targetPort"]: port["port"] for port in service["ports"]}
        == ports
        == {"tcp-comm": 8786, "http-dashboard": 8787}
    )
    assert scheduler["args"] == ["dask", "scheduler", "--preload", "dask_gpurt"]


def test_the_kubernetes_worker_finds_its_volumes_and_its_settings() -> None:
    spec = _manifests()["DaskCluster"]["spec"]
    [worker], [scheduler] = (spec[role]["spec"]["containers"] for role in ("worker", "scheduler"))
    assert worker["args"][:4] == ["dask", "worker", "--name", "$(DASK_WORKER_NAME)"]
    assert worker["image"] == scheduler["image"]
    volumes = {volume["name"] for volume in spec["worker"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    assert set(mounts.values()) == volumes
    [variable] = scheduler["env"]
    assert dask.config.collect_env({variable["name"]: variable["value"]}) == {
        "gpurt": {"memory": {"directory": "/spill"}}
    }
    assert variable["value"] in mounts


def test_the_slurm_file_says_what_a_job_is() -> None:
    jobqueue = pytest.importorskip("dask_jobqueue.slurm", reason="dask-jobqueue makes the job")
    file = yaml.safe_load((DOCS / "deployment" / "slurm.yaml").read_text())
    known = dask.config.get("jobqueue.slurm")
    assert set(file["jobqueue"]["slurm"]) <= set(known)
    with dask.config.set({"jobqueue.slurm": dask.config.merge(known, file["jobqueue"]["slurm"])}):
        script = jobqueue.SLURMJob(scheduler="tcp://10.0.0.1:8786", name="worker").job_script().splitlines()
    assert {"#SBATCH --cpus-per-task=16", "#SBATCH --mem=128G", "ulimit -l unlimited"} <= set(script)
    assert "--nthreads 4 --memory-limit 32.00GiB --nworkers 4" in script[-1]
    assert "--local-directory /tmp --lifetime 110m" in script[-1]


def test_the_slurm_file_loads_dask_gpurt_with_the_scheduler() -> None:
    file = yaml.safe_load((DOCS / "deployment" / "slurm.yaml").read_text())
    assert file["distributed"] == {"scheduler": {"preload": ["dask_gpurt"]}}
    assert dask.config.get("distributed.scheduler.preload") == []  # that is where Dask looks
