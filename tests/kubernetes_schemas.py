"""The schemas of Dask's Kubernetes operator: ``python tests/kubernetes_schemas.py dask_kubernetes-….whl`` takes them over from a wheel.

Covers: :func:`problems`, what the API server of a cluster with the operator would refuse of a manifest; taking schemas over.
Does not cover: what a schema cannot say, such as names that have to agree; see ``tests/unit/test_docs.py``.

The package itself brings twenty others, and asks a cluster for whatever it does. Its custom resource definitions are data, and all that is
wanted here; without their descriptions, and with the one of a pod, which is in them twice, said once.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

__all__ = ["KEPT", "KINDS", "problems", "strict", "taken_over"]

KEPT = Path(__file__).parent / "schemas" / "dask-kubernetes.json"
KINDS = ("DaskCluster", "DaskAutoscaler")
_FOLDER = "dask_kubernetes/operator/deployment/helm/dask-kubernetes-operator/crds/"
#: What the API server knows of any object, and no definition says.
_ANY = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


def strict(schema: Any) -> Any:
    """Return a schema that takes no field that it does not name, as ``kubectl apply`` does."""
    if not isinstance(schema, dict):
        return schema
    found = {key: value for key, value in schema.items() if key not in ("description", "default")}
    if "properties" in found:
        found["properties"] = {name: strict(of) for name, of in found["properties"].items()}
        if not found.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if key in found:
            found[key] = strict(found[key])
    return found


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """Say what the API server would refuse of a manifest, and why."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    kind = manifest["kind"]
    if kind not in kept["kinds"]:
        return [f"kind: there is no {kind}"]
    if manifest["apiVersion"] not in kept["kinds"][kind]["versions"]:
        return [f"apiVersion: {kind} has no {manifest['apiVersion']}"]
    schema = strict({"type": "object", **kept["kinds"][kind]["schema"]})
    schema["properties"] |= _ANY
    schema["$defs"] = {name: strict(of) for name, of in kept["$defs"].items()}
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found)


def taken_over(wheel: Path) -> dict[str, Any]:
    """Return what is kept of a wheel of dask-kubernetes."""
    kinds: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        for kind in KINDS:
            spec = yaml.safe_load(archive.read(f"{_FOLDER}{kind.lower()}.yaml"))["spec"]
            [version] = spec["versions"]
            assert spec["names"]["kind"] == kind
            schema = _without_descriptions(version["schema"]["openAPIV3Schema"])
            kinds[kind] = {"versions": [f"{spec['group']}/{version['name']}"], "schema": schema}
    roles = kinds["DaskCluster"]["schema"]["properties"]["spec"]["properties"]
    pod = roles["worker"]["properties"]["spec"]
    for role in ("scheduler", "worker"):
        assert roles[role]["properties"]["spec"] == pod
        roles[role]["properties"]["spec"] = {"$ref": "#/$defs/pod"}
    about = f"Made by tests/kubernetes_schemas.py from {wheel.name} (BSD 3-Clause, Dask Developers, Yuvi Panda, Anaconda Inc, NVIDIA)"
    return {"$comment": about, "kinds": kinds, "$defs": {"pod": pod}}


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "description" and isinstance(value, str))}
    return {key: _without_descriptions(value) for key, value in kept.items()}


if __name__ == "__main__":
    KEPT.write_text(json.dumps(taken_over(Path(sys.argv[1])), separators=(",", ":")) + "\n", encoding="utf-8")
