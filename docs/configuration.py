"""The page of all configuration keys, made from ``gpurt.yaml``, ``gpurt-schema.yaml`` and the settings' dataclasses.

The YAML has the default and, in the comment above a key, the reason for it; the schema says what the key is; the code says
what it takes, in the words of its own error message. ``tests/unit/test_config.py`` checks that the three have the same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import yaml

from dask_gpurt.config import Settings

__all__ = ["page", "reasons"]

_HEAD = """\
# Configuration

<!-- Made by `python -m docs` from dask_gpurt/gpurt.yaml, dask_gpurt/gpurt-schema.yaml and dask_gpurt/config.py. -->

All keys stand under `gpurt` in [Dask's configuration](https://docs.dask.org/en/stable/configuration.html). They are read where
`install` is called (with a preload: by the scheduler), checked there, and sent to all servers, so that these agree. Any of these
will do, the first that is set wins:

```python
dask_gpurt.install(client, config={"memory.host-limit": "8 GiB"})
dask.config.set({"gpurt.memory.host-limit": "8 GiB"})
```

    export DASK_GPURT__MEMORY__HOST_LIMIT="8 GiB"

```yaml
# ~/.config/dask/gpurt.yaml
gpurt:
  memory:
    host-limit: 8 GiB
```

A key that does not exist, or a value that is not allowed, is a `ConfigError` at install, and leaves the cluster as it was.
A size is a number of bytes, or a text such as `8 GiB` or `500 MB`; a time is a number of seconds, or a text such as `60s`.
"""


def page(defaults: str, schema: str) -> str:
    """Return the page for the texts of the two YAML files."""
    values = yaml.safe_load(defaults)["gpurt"]
    sections = yaml.safe_load(schema)["properties"]["gpurt"]["properties"]
    why = dict(reasons(defaults))
    settings = Settings()
    parts = [_HEAD]
    for name, section in values.items():
        about = sections[name]["properties"]
        fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(getattr(settings, name))}
        parts += [f"## {name}\n", "| key | default | |", "|---|---|---|"]
        for key, default in section.items():
            anchor = f"gpurt{name}{key}"
            shown = f"[`{key}`](#{anchor})" if (name, key) in why else f"`{key}`"
            parts.append(f"| {shown} | `{_shown(default)}` | {about[key]['description']} |")
        parts.append("")
        for key in section:
            if (name, key) in why:
                allowed = fields[key].metadata["allowed"]
                parts += [f"### `gpurt.{name}.{key}`\n", f"Takes {allowed}.\n", f"{why[name, key]}\n"]
    return "\n".join(parts)


def reasons(defaults: str) -> Iterator[tuple[tuple[str, str], str]]:
    r"""Yield section and key with the comment that stands above it.

    Examples
    --------
    >>> dict(reasons("gpurt:\n  memory:\n    # As much\n    # as fits.\n    limit: 1\n    other: 2"))
    {('memory', 'limit'): 'As much as fits.'}
    """
    section, comment = "", list[str]()
    for line in defaults.splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.lstrip("# "))
            continue
        key, _, _ = text.partition(":")
        if line.startswith("    ") and key:
            if comment:
                yield (section, key), " ".join(comment)
        elif line.startswith("  "):
            section = key
        comment = []


def _shown(value: object) -> str:
    """Return the value as it stands in YAML."""
    return yaml.safe_dump(value).splitlines()[0]
