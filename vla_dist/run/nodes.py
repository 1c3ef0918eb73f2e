"""What each node of a cluster has, asked of it before a run depends on it."""

import hashlib
import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vla_dist.core.errors import ConfigError, Unreachable, VlaDistError
from vla_dist.run.roles import LEARNER

_log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0
_VANISH_S = 15.0
_PACKAGES = ("ray", "torch", "numpy", "pyarrow", "protobuf", "grpcio")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What one node says of itself."""

    address: str
    versions: dict[str, str]
    """Name of a package, or Python -> version; vla-dist -> hash of its files."""
    store_trouble: str = ""
    """Why it does not reach the Redis of the run; empty: it does."""
    sees_folder: bool = True


def require_fit_nodes(redis_urls: Sequence[str], folder: Path, *, folder_is_shared: bool) -> None:
    """Ask every node that is there now.

    Args:
        redis_urls: that all of them must reach.
        folder: of the run.
        folder_is_shared: whether nodes with learner ranks must see it, because checkpoints lie in it.

    Raises:
        ConfigError: a node has other versions than this process, or does not see the folder.
        Unreachable: it does not answer, or does not reach the store.
    """
    here = versions()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(_report)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        address = node["NodeManagerAddress"]
        asking = ask.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        reference = asking.remote(address, list(redis_urls), str(folder))
        asked[reference] = node
    for reference, node in asked.items():
        learns = bool(node["Resources"].get(LEARNER))
        report = _answer(reference, node)
        if report is not None:
            _require_fit(here, report, needs_folder=folder_is_shared and learns, folder=folder)


def versions() -> dict[str, str]:
    """Of this process."""
    # A GPU machine has another build of the same torch: what follows a plus does not count.
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in _PACKAGES}
    return {"Python": platform.python_version(), **found, "vla-dist": package_digest()}


def package_digest() -> str:
    """The same wherever the same files of vla-dist are installed."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.lua")]):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _answer(reference: Any, node: dict[str, Any]) -> NodeReport | None:
    """None of a node that vanished meanwhile, as one on the spot market may."""
    address = node["NodeManagerAddress"]
    try:
        return ray.get(reference, timeout=_TIMEOUT_S)
    except GetTimeoutError as error:
        raise Unreachable(
            f"node {address} did not answer within {_TIMEOUT_S:.0f} s; look at its raylet's log"
        ) from error
    except RayError as error:
        if not isinstance(error, RayTaskError) and _has_vanished(node["NodeID"]):
            _log.warning("node %s vanished while it was asked; the run starts without it", address)
            return None
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"node {address} cannot run vla-dist ({reason}); install the same version there (cluster/setup.sh)"
        ) from error


def _has_vanished(node_id: str) -> bool:
    """Waits for Ray to notice: what ran on a node fails before the node is known to be gone."""
    end = time.monotonic() + _VANISH_S
    while any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes()):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _require_fit(here: dict[str, str], node: NodeReport, *, needs_folder: bool, folder: Path) -> None:
    differences = [
        f"{name} {node.versions.get(name)} (here {here[name]})"
        for name in here
        if node.versions.get(name) != here[name]
    ]
    if differences:
        raise ConfigError(
            f"node {node.address} has {', '.join(differences)}; install the same on all nodes (cluster/setup.sh)"
        )
    if node.store_trouble:
        raise Unreachable(f"node {node.address} does not reach the replay: {node.store_trouble}")
    if needs_folder and not node.sees_folder:
        raise ConfigError(
            f"node {node.address} is to train and does not see {folder}, where checkpoints go; give --runs-dir on a "
            "file system that all nodes share, or --learner.checkpoints s3://BUCKET/FOLDER"
        )


def _report(address: str, redis_urls: list[str], folder: str) -> NodeReport:
    from vla_dist.replay.external import require_server

    trouble = ""
    try:
        for url in redis_urls:
            require_server(url)
    except VlaDistError as error:
        trouble = str(error)
    return NodeReport(address=address, versions=versions(), store_trouble=trouble, sees_folder=Path(folder).is_dir())
