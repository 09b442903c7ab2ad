"""The configuration: defaults agree everywhere, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from typing import Any

import dask
import jsonschema
import pytest
import yaml

import dask_gpurt
from dask_gpurt.config import PARTS, Settings
from dask_gpurt.errors import ConfigError

HERE = pathlib.Path(dask_gpurt.__file__).parent


def _yaml(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((HERE / name).read_text())
    return loaded


def test_the_defaults_of_the_yaml_file_are_those_of_the_code() -> None:
    assert Settings.load() == Settings()


def test_the_schema_accepts_the_defaults_and_knows_the_same_keys() -> None:
    defaults, schema = _yaml("gpurt.yaml"), _yaml("gpurt-schema.yaml")
    jsonschema.validate(defaults, schema)
    for part in PARTS:
        in_code = {f.name.replace("_", "-") for f in dataclasses.fields(getattr(Settings(), part))}
        assert set(defaults["gpurt"][part]) == in_code
        assert set(schema["properties"]["gpurt"]["properties"][part]["properties"]) == in_code


def test_every_key_of_the_schema_is_described() -> None:
    sections = _yaml("gpurt-schema.yaml")["properties"]["gpurt"]["properties"]
    assert all(key.get("description") for section in sections.values() for key in section["properties"].values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory.host-limt", "1 GiB"),
        ("memory.host-limit", "plenty"),
        ("memory.host-limit", 0),
        ("memory.host-limit", -1),
        ("memory.host-limit", 0.0),
        ("memory.host-limit", True),
        ("memory.host-limit", [1]),
        ("memory.disk-limit", 0.5),
        ("memory.directory", ""),
        ("memory.object-url", "bucket"),
        ("memory.object-url", "s3://"),
        ("memory.object-limit", 0.5),
        ("memory.directory", 3),
        ("memory.enabled", "yes"),
        ("shuffle.send-limit", None),
        ("shuffle.watchdog", 0),
        ("shuffle.watchdog", "-1s"),
        ("shuffle.watchdog", "three hours"),
        ("shuffle.watchdog", True),
        ("placement.racks", ["10.0.1.*"]),
        ("placement.racks", {"10.0.1.*": 1}),
        ("placement.racks", {"": "rack-1"}),
        ("placemnt.enabled", True),
        ("nonsense", 1),
    ],
)
def test_a_bad_setting_is_refused_with_key_value_and_what_is_allowed(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({key: value})
    message = str(caught.value)
    assert key in message
    assert repr(value) in message
    assert "expected" in message
    # It crosses processes.
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_racks_keep_their_order() -> None:
    racks = {"10.0.1.*": "rack-1", "10.*": "others"}
    with dask.config.set({"gpurt.placement.racks": racks}):
        assert Settings.load().placement.racks == (("10.0.1.*", "rack-1"), ("10.*", "others"))


def test_a_bad_setting_in_dask_s_configuration_is_refused_too() -> None:
    with dask.config.set({"gpurt.memory.hots-limit": "1 GiB"}), pytest.raises(ConfigError, match="hots-limit"):
        Settings.load()
    with dask.config.set({"gpurt": "on"}), pytest.raises(ConfigError, match="a mapping"):
        Settings.load()


@pytest.mark.parametrize(
    ("given", "parsed"),
    [("auto", None), ("1 GiB", 2**30), (0.5, 0.5), (1.0, 1.0), (2**20, 2**20), ("1MB", 10**6)],
)
def test_limits_are_sizes_fractions_or_auto(given: object, parsed: object) -> None:
    assert Settings.load({"gpurt.memory.host-limit": given}).memory.host_limit == parsed


def test_the_defaults_outlive_a_context_in_which_they_were_loaded() -> None:
    with dask.config.set({"gpurt.shuffle.enabled": False}):
        assert not Settings.load().enabled("shuffle")
    with dask.config.set(gpurt={}):
        assert Settings.load() == Settings()


def test_overrides_win_over_the_configuration() -> None:
    with dask.config.set({"gpurt.shuffle.enabled": False, "gpurt.memory.host_limit": "1 GiB"}):
        settings = Settings.load({"shuffle.enabled": True})
    assert settings.enabled("shuffle")
    assert settings.memory.host_limit == 2**30
