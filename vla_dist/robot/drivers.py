"""A site's own robots by name: whatever installed packages offer in the entry point group ``vla_dist.drivers``.

A driver is a function that builds a ``RobotEnv`` from options given as text, as in a package's ``pyproject.toml``::

    [project.entry-points."vla_dist.drivers"]
    our-arm = "our_robots.arm:build"

    def build(*, port: str = "/dev/ttyUSB0") -> RobotEnv: ...
"""

import difflib
import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.protocols import RobotEnv

GROUP = "vla_dist.drivers"


def installed_drivers() -> dict[str, EntryPoint]:
    """Name to entry point; of two packages that offer one name, neither can be used until one goes."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found and found[point.name].value != point.value:
            raise ConfigError(
                f"two packages offer driver {point.name!r}: {found[point.name].value} and {point.value}; remove one"
            )
        found[point.name] = point
    return found


def build_installed(name: str, options: Mapping[str, str]) -> RobotEnv:
    """The robot of an installed driver.

    Raises:
        ConfigError: no such driver, with the nearest one, or options that it does not take.
        ResourceMissing: its package cannot be imported.
    """
    drivers = installed_drivers()
    if name not in drivers:
        near = difflib.get_close_matches(name, drivers, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"no driver {name!r}; {hint}Installed in group {GROUP!r}: {', '.join(sorted(drivers)) or 'none'}"
        )
    try:
        build: Any = drivers[name].load()
    except (ImportError, AttributeError) as error:
        raise ResourceMissing(f"driver {name!r} ({drivers[name].value}) cannot be imported: {error}") from error
    return call_driver(build, name, options)


def call_driver(build: Any, name: str, options: Mapping[str, str]) -> RobotEnv:
    """Build with options as text. Raises ConfigError naming those it takes."""
    parameters = inspect.signature(build).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    unknown = sorted(set(options) - set(parameters))
    if unknown and not takes_all:
        raise ConfigError(f"driver {name!r} takes no {', '.join(unknown)}; it takes {', '.join(parameters) or 'none'}")
    missing = sorted(
        one.name
        for one in parameters.values()
        if one.default is one.empty
        and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        and one.name not in options
    )
    if missing:
        raise ConfigError(f"driver {name!r} needs {', '.join(missing)}; give them as NAME=VALUE")
    return build(**options)
