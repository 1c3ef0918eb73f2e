"""One machine of an on-premises cluster, as its cluster file names it."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError
from vla_dist.run.roles import ROLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``ADDRESS:ROLE=COUNT,...``, with ``cpu`` and ``gpu`` among the roles."""

    address: str
    resources: Mapping[str, int]
    """Slots by role."""
    cpus: int | None = None
    """None: as many as the machine has."""
    gpus: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Machine":
        """Raises ConfigError."""
        address, _, rest = text.partition(":")
        try:
            ipaddress.ip_address(address)
            given = {name: int(count) for name, _, count in (word.partition("=") for word in rest.split(",") if word)}
        except ValueError as error:
            raise ConfigError(f"host {text!r} is not ADDRESS:ROLE=COUNT,..., as in 10.0.0.5:rollout=4,cpu=8") from error
        known = (*ROLES, "cpu", "gpu")
        strangers = sorted(set(given) - set(known))
        if strangers or any(count < 0 for count in given.values()):
            raise ConfigError(f"host {text!r}: {strangers or given} must be counts of {', '.join(known)}")
        cpus, gpus = given.pop("cpu", None), given.pop("gpu", None)
        return cls(address=address, resources=given, cpus=cpus, gpus=gpus)
