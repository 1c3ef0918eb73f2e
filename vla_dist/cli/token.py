"""``vla-dist token``: bearer tokens with roles, in a file that holds their digests only."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.core.errors import ConfigError
from vla_dist.serving.authorisation import Role, create_token, date_of, list_tokens, revoke_token

_USAGE = """usage: vla-dist token VERB FILE [options]

  create FILE --name NAME --role robot --robot-id ID   a new token, printed once; --days 90 lets it expire
  revoke FILE --name NAME                              out within a second, without a restart
  list FILE                                            names, roles, robots

Roles: robot (drives and uploads, as itself only), operator (also sees what is served), admin (may do everything).
'vla-dist serve --tokens FILE' asks every caller for one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """A new token; it replaces the one of that name."""

    file: tyro.conf.Positional[Path]
    name: str
    """Of the holder, for the audit log."""
    role: Role = "robot"
    robot_id: str = ""
    """The only robot that a robot's token may speak for."""
    days: float = 0.0
    """That it is valid for; 0: for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeOptions:
    """Take a token back."""

    file: tyro.conf.Positional[Path]
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions:
    """What tokens there are."""

    file: tyro.conf.Positional[Path]


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    verb = words.pop(0)
    if verb == "create":
        options = tyro.cli(CreateOptions, args=words, prog="vla-dist token create")
        token = create_token(
            options.file, name=options.name, role=options.role, robot_id=options.robot_id, days=options.days
        )
        print(token)
    elif verb == "revoke":
        options = tyro.cli(RevokeOptions, args=words, prog="vla-dist token revoke")
        revoke_token(options.file, options.name)
        print(f"the token of {options.name} is revoked")
    elif verb == "list":
        options = tyro.cli(ListOptions, args=words, prog="vla-dist token list")
        table = Table()
        for heading in ("name", "role", "robot", "expires", "SHA-256"):
            table.add_column(heading)
        for entry in list_tokens(options.file):
            expires = date_of(entry.expires_at) if entry.expires_at else "-"
            table.add_row(entry.name, entry.role, entry.robot_id or "-", expires, entry.sha256[:12])
        Console().print(table)
    else:
        near = difflib.get_close_matches(verb, ("create", "revoke", "list"), n=1)
        hint = f"did you mean 'vla-dist token {near[0]}'? " if near else ""
        raise ConfigError(f"no verb {verb!r} of tokens; {hint}The verbs are create, revoke, list")
