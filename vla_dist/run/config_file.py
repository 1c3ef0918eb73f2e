"""A run's config as JSON and back, and one setting of it by its path."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vla_dist.core.errors import ConfigError
from vla_dist.run.config import RunConfig


def require_setting(config: RunConfig, path: str) -> None:
    """Raises ConfigError with the nearest ones where no field has that path, such as ``learner.learning_rate``."""
    known = list(_paths("", json.loads(config.to_json())))
    if path not in known:
        near = difflib.get_close_matches(path, known, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"no setting {path!r}; {hint}'vla-dist run PRESET --help' lists them")


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with some fields changed at once, for example ``{"learner.learning_rate": 1e-4}``.

    Raises:
        ConfigError: no such field, with the nearest one; or values that cannot work together.
    """
    fields = json.loads(config.to_json())
    for path, value in values.items():
        require_setting(config, path)
        branch, (*parents, name) = fields, path.split(".")
        for parent in parents:
            branch = branch[parent]
        branch[name] = value
    return _build(RunConfig, fields)


def _paths(prefix: str, value: Any) -> Iterator[str]:
    for name, one in value.items():
        if isinstance(one, dict):
            yield from _paths(f"{prefix}{name}.", one)
        else:
            yield f"{prefix}{name}"


def load_config(path: Path) -> RunConfig:
    """Inverse of ``RunConfig.to_json``. Raises ConfigError naming the file."""
    try:
        return _build(RunConfig, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} does not hold the config of a run of this version: {error}") from error


def _build(kind: Any, value: Any) -> Any:
    """A dataclass tree from plain JSON: nested dataclasses and tuples are what JSON cannot say by itself."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ConfigError(f"unknown settings {unknown} for {kind!r}; known are {', '.join(hints)}")
        return typing.cast(Any, kind)(**{name: _build(hints[name], value[name]) for name in value})
    origin = typing.get_origin(kind)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_build(item, one) for one in value)
    if origin in (typing.Union, types.UnionType):
        return value
    return value
