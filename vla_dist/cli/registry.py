"""``vla-dist registry``: the versions of policies, what differs between them, and which may go."""

import contextlib
import dataclasses
import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.types import PolicyManifest
from vla_dist.registry.collection import CollectionConfig, collect, judge
from vla_dist.registry.comparison import compare, write_files
from vla_dist.registry.manifests import manifest_to_json
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.run.reach import reach_registry

_USAGE = """usage: vla-dist registry VERB [options]

  list                    every version, its size, its channels
  show REFERENCE          one version: contract, config, metrics, history of its name
  diff REFERENCE REFERENCE  what differs between two versions
  pull REFERENCE FOLDER   a version as manifest.json and model.safetensors
  gc                      tensors of versions that nobody needs; removed with --apply only

REFERENCE is name@channel or name@17. The registry is that of the newest run in runs/, live or ended; of another one
with --run FOLDER, of no run at all with --redis-url URL. 'vla-dist registry VERB --help' explains one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryPlace:
    """Which registry a verb is about."""

    run: Path | None = None
    """Folder of the run, live or ended; the newest in runs/ where left out."""
    redis_url: str = ""
    """A registry that belongs to no run: redis://user:password@host:6379, rediss://... or unix:///path."""
    blobs: str = ""
    """Where its tensors lie, if not in that Redis: a path, s3://bucket/folder, gs://..."""
    json: bool = False
    """For machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions(RegistryPlace):
    """Every version of every policy."""

    name: str = ""
    """Only this policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions(RegistryPlace):
    """One version."""

    reference: tyro.conf.Positional[str]
    """name@channel or name@17."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffOptions(RegistryPlace):
    """What differs between two versions: settings, contract, metrics, tensors."""

    left: tyro.conf.Positional[str]
    """name@channel or name@17."""
    right: tyro.conf.Positional[str]
    """name@channel or name@17."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions(RegistryPlace):
    """A version as files."""

    reference: tyro.conf.Positional[str]
    """name@channel or name@17."""
    folder: tyro.conf.Positional[Path]
    """New, or without a version in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GcOptions(RegistryPlace):
    """Remove tensors of versions that no channel points at, no follower uses, and that are neither new nor young."""

    keep_newest: int = 10
    """Versions of each policy."""
    min_age_hours: float = 24.0
    apply: bool = False
    """Remove; without it, only tell."""


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    verb = words.pop(0)
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean 'vla-dist registry {near[0]}'? " if near else ""
        raise ConfigError(f"no verb {verb!r} of a registry; {hint}The verbs are {', '.join(_VERBS)}")
    options, act = _VERBS[verb]
    chosen = tyro.cli(options, args=words, prog=f"vla-dist registry {verb}")
    with opened_registry(chosen) as registry:
        act(registry, chosen, Console())


@contextlib.contextmanager
def opened_registry(options: RegistryPlace) -> Iterator[RedisPolicyRegistry]:
    """The registry that the options name, for as long as the block runs."""
    if options.run is not None and options.redis_url:
        raise ConfigError("--run and --redis-url name two registries; give one of them")
    with reach_registry(options.run, redis_url=options.redis_url, blobs=options.blobs) as registry:
        yield registry


def _list(registry: RedisPolicyRegistry, options: ListOptions, console: Console) -> None:
    names = registry.names()
    if options.name:
        if options.name not in names:
            near = difflib.get_close_matches(options.name, names, n=3, cutoff=0.4) or names[:3]
            raise NotFound(f"no policy {options.name!r}; nearest: {', '.join(near) or 'none is published yet'}")
        names = [options.name]
    rows = [_row(registry, name, manifest) for name in names for manifest in registry.manifests(name)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table()
    for heading in ("reference", "architecture", "updates", "parent", "size", "published", "channels", "SHA-256"):
        table.add_column(heading, justify="right")
    for row in rows:
        size = "removed" if row["collected"] else _size(row["num_bytes"])
        updates = row["metrics"].get("updates")
        table.add_row(
            f"{row['name']}@{row['version']}",
            row["architecture"],
            "-" if updates is None else f"{updates:.0f}",
            str(row["parent"] or "-"),
            size,
            _date(row["created_unix_s"]),
            ", ".join(row["channels"]),
            row["tensors_sha256"][:12],
        )
    console.print(table if rows else "no version is published yet")


def _show(registry: RedisPolicyRegistry, options: ShowOptions, console: Console) -> None:
    name, version = _resolved(registry, options.reference)
    manifest = next(one for one in registry.manifests(name) if one.version == version)
    moves = [dataclasses.asdict(move) for move in registry.history(name)]
    if options.json:
        fields = json.loads(manifest_to_json(manifest))
        print(json.dumps({**fields, **_row(registry, name, manifest), "history": moves}, indent=2))
        return
    row = _row(registry, name, manifest)
    console.print(f"{name}@{version} ({', '.join(row['channels']) or 'no channel'})", style="bold", highlight=False)
    size = "tensors removed" if row["collected"] else _size(manifest.num_bytes)
    table = Table(show_header=False, box=None)
    for label, value in (
        ("architecture", manifest.architecture),
        ("published", _date(manifest.created_unix_s)),
        ("parent", str(manifest.parent or "-")),
        ("size", f"{size}, SHA-256 {manifest.tensors_sha256}"),
        ("git revision", manifest.git_revision or "-"),
        ("contract", f"{manifest.spec.digest}: P {manifest.spec.proprio_dim}, A {manifest.spec.action_dim}"),
        ("cameras", ", ".join(c.name for c in manifest.spec.cameras) or "-"),
        ("horizon", str(manifest.horizon)),
        ("metrics", ", ".join(f"{key} {value:g}" for key, value in manifest.metrics.items()) or "-"),
    ):
        table.add_row(label, value)
    console.print(table, highlight=False)
    console.print_json(json.dumps(manifest.config, default=str))
    for move in moves:
        text = f"{_date(move['unix_s'])}  {move['channel']}: {move['previous'] or '-'} -> {move['version']}"
        console.print(text, highlight=False)


def _diff(registry: RedisPolicyRegistry, options: DiffOptions, console: Console) -> None:
    left, right = (registry.fetch(*_resolved(registry, one)) for one in (options.left, options.right))
    found = compare(left, right)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2, default=str))
        return
    fields = Table(title="manifest")
    for heading in ("field", options.left, options.right):
        fields.add_column(heading, overflow="fold")
    for path, (ours, theirs) in found.fields.items():
        fields.add_row(path, _short(ours), _short(theirs))
    tensors = Table(title="tensors")
    for heading in ("tensor", "differs in", "relative change"):
        tensors.add_column(heading, justify="right")
    for change in found.tensors:
        tensors.add_row(change.name, change.what, f"{change.relative_change:.3g}" if change.what == "values" else "-")
    console.print(fields if found.fields else "the manifests are the same")
    console.print(tensors if found.tensors else "the tensors are the same")


def _pull(registry: RedisPolicyRegistry, options: PullOptions, console: Console) -> None:
    name, version = _resolved(registry, options.reference)
    artifact = registry.fetch(name, version)
    write_files(artifact, options.folder)
    if options.json:
        print(json.dumps({"name": name, "version": version, "folder": str(options.folder)}))
        return
    console.print(f"{name}@{version}, {_size(artifact.manifest.num_bytes)}, is in {options.folder}", highlight=False)


def _gc(registry: RedisPolicyRegistry, options: GcOptions, console: Console) -> None:
    config = CollectionConfig(keep_newest=options.keep_newest, min_age_s=3600 * options.min_age_hours)
    names = registry.names()
    verdicts = [verdict for name in names for verdict in judge(registry, name, config)]
    going = [verdict.manifest for verdict in verdicts if verdict.may_go]
    given_up, freed = collect(registry, names, config) if options.apply else ([], 0)
    if options.json:
        rows = [
            {"reference": f"{v.manifest.name}@{v.manifest.version}", "bytes": v.manifest.num_bytes, "kept": v.reason}
            for v in verdicts
        ]
        print(json.dumps({"versions": rows, "removed": given_up, "freed_bytes": freed}, indent=2))
        return
    table = Table()
    for heading in ("reference", "size", "verdict"):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        manifest = verdict.manifest
        word = f"kept: {verdict.reason}" if verdict.reason else "nobody needs it"
        table.add_row(f"{manifest.name}@{manifest.version}", _size(manifest.num_bytes), word)
    console.print(table)
    if options.apply:
        console.print(f"{len(given_up)} versions given up, {_size(freed)} freed", highlight=False)
    else:
        total = _size(sum(manifest.num_bytes for manifest in going))
        console.print(f"{len(going)} versions of {total} may go; --apply removes their tensors", highlight=False)


def _resolved(registry: RedisPolicyRegistry, reference: str) -> tuple[str, int]:
    return reference.partition("@")[0], registry.resolve(reference)


def _row(registry: RedisPolicyRegistry, name: str, manifest: PolicyManifest) -> dict[str, Any]:
    return {
        "name": name,
        "version": manifest.version,
        "architecture": manifest.architecture,
        "parent": manifest.parent,
        "metrics": dict(manifest.metrics),
        "num_bytes": manifest.num_bytes,
        "created_unix_s": manifest.created_unix_s,
        "channels": [c for c, version in registry.channels(name).items() if version == manifest.version],
        "tensors_sha256": manifest.tensors_sha256,
        "collected": manifest.version in registry.collected(name),
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MB"


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _short(value: Any) -> str:
    text = "-" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_Verb = tuple[type[Any], Callable[[RedisPolicyRegistry, Any, Console], None]]
_VERBS: dict[str, _Verb] = {
    "list": (ListOptions, _list),
    "show": (ShowOptions, _show),
    "diff": (DiffOptions, _diff),
    "pull": (PullOptions, _pull),
    "gc": (GcOptions, _gc),
}
