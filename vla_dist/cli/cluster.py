"""``vla-dist cluster``: what cluster files and their operators call."""

import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

from vla_dist.core.errors import ConfigError
from vla_dist.replay.backup import back_up, restore
from vla_dist.run.head_store import HEAD_AWAY_S, STORE_FOLDER, HeadStoreConfig, ensure_store, keep_store
from vla_dist.run.machine import Machine
from vla_dist.run.node import (
    WATCH_FOLDER,
    address_towards,
    head_command,
    head_environment,
    node_environment,
    own_addresses,
    start_ray,
    worker_command,
    write_tokens,
)
from vla_dist.run.node_watch import start_watch, watch_node
from vla_dist.run.serve_settings import node_serve_settings
from vla_dist.serving.authorisation import date_of

_USAGE = """usage: vla-dist cluster VERB [options]

  check FILE      a cluster file before money is spent: schema, roles against a preset, tokens, ports
  tokens          make the tokens that cluster files ship, where there are none
  environment     what Ray must find in its environment on a node, as shell exports: for images
  backup FOLDER   the head's replay and registry as files, while they are in use
  restore FOLDER  put them back, before the head is started
  start-head      start Redis and Ray on this machine as a cluster's head
  start-worker    join this machine to a cluster
  store           the head's two Redis servers in the foreground; start-head starts it
  watch           ends what Ray leaves behind when it goes; start-worker starts it

'vla-dist cluster VERB --help' explains one. See docs/cluster.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """Validate a cluster file of `ray up`, or a RayCluster or RayService of KubeRay."""

    file: tyro.conf.Positional[Path]
    preset: str = "demo"
    """The preset that is to run on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOptions:
    """Ray's token and the fleet's, below the home of whoever runs `ray up`. What is there is kept."""

    renew: bool = False
    """Make both anew; `ray up` takes them to the nodes, and a cluster that runs has the old ones until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupOptions:
    """Copy replay and registry, from the head's store or a run's own. Everything that was acknowledged is in it."""

    to: tyro.conf.Positional[Path]
    """A new folder."""
    store: Path = Path.home() / STORE_FOLDER / "replay"
    """Folder of the server; of a run on one machine it is 'redis' in the run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """Put a backup back where no server runs and no data are."""

    folder: tyro.conf.Positional[Path]
    store: Path = Path.home() / STORE_FOLDER / "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentOptions:
    """Shell exports for images; start-head and start-worker set the same by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartHeadOptions:
    """Become a head node: Redis, then `ray start`."""

    node_ip: str = ""
    """Address of this machine in the cluster's network; empty: its only one."""
    cluster: str = "vla-dist"
    """Name under which Ray remembers its state."""
    port: int = 6379
    grace_s: float = HEAD_AWAY_S
    """How long Ray may be gone before Redis ends, too."""
    max_memory_gib: float = 0.0
    """Most that Redis may take; 0: half of the machine's memory."""
    ray: tuple[str, ...] = ()
    """More words for `ray start`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorkerOptions:
    """Join a cluster with `ray start`."""

    hosts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of an on-premises cluster, ADDRESS:ROLE=COUNT,... for each machine, cpu=N and gpu=N among the roles."""
    head: str
    """Address of the head."""
    port: int = 6379
    ray: tuple[str, ...] = ()
    """More words for `ray start`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Keep the head's Redis servers until Ray has been gone for a while."""

    folder: Path
    host: str
    replay_port: int = 6380
    ray_port: int = 6381
    gcs_port: int = 6379
    grace_s: float = HEAD_AWAY_S
    max_memory_gib: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """Wait until Ray has gone from this node, then end what it left behind."""

    folder: Path
    grace_s: float = 10.0


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    verb = words.pop(0)
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean 'vla-dist cluster {near[0]}'? " if near else ""
        raise ConfigError(f"no verb {verb!r} of a cluster; {hint}The verbs are {', '.join(_VERBS)}")
    options, act = _VERBS[verb]
    act(tyro.cli(options, args=words, prog=f"vla-dist cluster {verb}"))


def _check(options: CheckOptions) -> None:
    from vla_dist.run.cluster_check import check_cluster
    from vla_dist.run.cluster_file import read_cluster_file
    from vla_dist.run.presets import preset

    console, wrong = Console(), 0
    for finding in check_cluster(read_cluster_file(options.file), preset(options.preset), home=Path.home()):
        wrong += finding.level == "wrong"
        # Only the mark is markup: 'vla-dist[gcp]' must keep its brackets.
        console.print(f"{_MARKS[finding.level]} {escape(finding.text)}", highlight=False, soft_wrap=True)
    console.print("ready to launch" if not wrong else f"{wrong} must be put right first", highlight=False)
    if wrong:
        sys.exit(1)


_MARKS = {"ok": "[green]ok[/]   ", "note": "[yellow]note[/] ", "wrong": "[red]wrong[/]"}


def _tokens(options: TokensOptions) -> None:
    made = write_tokens(Path.home(), renew=options.renew)
    print("\n".join(f"made {path}" for path in made) or "both tokens are there already")


def _back_up(options: BackupOptions) -> None:
    backup = back_up(options.store, options.to)
    print(f"{backup.num_bytes / 2**20:,.1f} MiB of {backup.source} are in {options.to}")


def _restore(options: RestoreOptions) -> None:
    backup = restore(options.folder, options.store)
    print(f"{options.store} has what {backup.source} had on {date_of(backup.taken_at)}")


def _environment(options: EnvironmentOptions) -> None:
    for name, value in node_serve_settings().items():
        print(f"export {name}={shlex.quote(value)}")


def _start_head(options: StartHeadOptions) -> None:
    home = Path.home()
    host = options.node_ip or _only(own_addresses())
    config = HeadStoreConfig(
        folder=home / STORE_FOLDER,
        host=host,
        gcs_port=options.port,
        grace_s=options.grace_s,
        max_memory_gib=options.max_memory_gib,
    )
    node_environment(home)  # A missing token is said before anything starts.
    store = ensure_store(config)
    environment = head_environment(store, cluster=options.cluster, home=home)
    start_ray(head_command(config, store, home=home, more=options.ray), environment)


def _only(addresses: Sequence[str]) -> str:
    if len(addresses) > 1:
        raise ConfigError(f"this machine has the addresses {', '.join(addresses)}; name the cluster's with --node-ip")
    return addresses[0]


def _start_worker(options: StartWorkerOptions) -> None:
    hosts = [Machine.parse(text) for text in options.hosts]
    addresses = own_addresses() if hosts else [address_towards(options.head)]
    command = worker_command(options.head, hosts, addresses, gcs_port=options.port, more=options.ray)
    environment = node_environment(Path.home())
    start_watch(Path.home() / WATCH_FOLDER)
    start_ray(command, environment)


def _store(options: StoreOptions) -> None:
    keep_store(
        HeadStoreConfig(
            folder=options.folder.resolve(),
            host=options.host,
            replay_port=options.replay_port,
            ray_port=options.ray_port,
            gcs_port=options.gcs_port,
            grace_s=options.grace_s,
            max_memory_gib=options.max_memory_gib,
        )
    )


def _watch(options: WatchOptions) -> None:
    watch_node(options.folder, grace_s=options.grace_s)


_VERBS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "check": (CheckOptions, _check),
    "tokens": (TokensOptions, _tokens),
    "backup": (BackupOptions, _back_up),
    "restore": (RestoreOptions, _restore),
    "environment": (EnvironmentOptions, _environment),
    "start-head": (StartHeadOptions, _start_head),
    "start-worker": (StartWorkerOptions, _start_worker),
    "store": (StoreOptions, _store),
    "watch": (WatchOptions, _watch),
}
