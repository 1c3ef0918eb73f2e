"""How a machine becomes a node of a cluster: what `ray start` is given, and what its processes inherit."""

import json
import os
import re
import resource
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing
from vla_dist.run.cluster_file import read_cluster_file
from vla_dist.run.gateways import end_gateways
from vla_dist.run.head_store import HEAD_AWAY_S, HeadStoreConfig, StoreAddresses
from vla_dist.run.machine import Machine
from vla_dist.run.placement import LIMITS_VARIABLE
from vla_dist.run.roles import GATEWAY
from vla_dist.run.serve_settings import NODE_FOLDER, TOKEN_VARIABLE, node_serve_settings
from vla_dist.run.store import STORE_VARIABLE

RAY_TOKEN = Path(".ray/auth_token")
FLEET_TOKEN = Path(".vla-dist/fleet_token")
"""Below the home of whoever launches a cluster, and of each of its nodes."""
WATCH_FOLDER = Path(".vla-dist")
_AUTOSCALER_CONFIG = Path("ray_bootstrap_config.yaml")
"""Where `ray up` leaves the cluster file for the head's autoscaler."""
_OPEN_FILES = 65_536
_ATTEMPTS = 3
_START_TIMEOUT_S = 300.0
_MISMATCH = re.compile(
    r"cluster was started with:\s+Ray: (?P<ray>\S+)\s+Python: (?P<python>\S+)\s+This process on .+ was started with:"
    r"\s+Ray: (?P<own_ray>\S+)\s+Python: (?P<own_python>\S+)"
)
"""How `ray start` refuses a node (`check_version_info` of Ray's utils), at the end of a traceback."""


def write_tokens(home: Path, *, renew: bool = False) -> list[Path]:
    """Make what is missing of the tokens that cluster files ship; returns what was made.

    Args:
        renew: make both anew. A cluster that runs keeps the old ones until it is launched again.
    """
    made = []
    for name in (RAY_TOKEN, FLEET_TOKEN):
        path = home / name
        if not renew and path.exists() and path.read_text().strip():
            continue
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        made.append(path)
    return made


def read_token(home: Path, name: Path) -> str:
    """Raises NotFound where it was not shipped."""
    path = home / name
    token = path.read_text().strip() if path.exists() else ""
    if not token:
        raise NotFound(
            f"{path} is missing or empty, and without it strangers could use the cluster; run 'vla-dist cluster "
            "tokens' on the machine that launches, and ship the file with file_mounts"
        )
    return token


def head_environment(store: StoreAddresses, *, cluster: str, home: Path) -> dict[str, str]:
    """Of everything that Ray starts on the head, drivers of runs included.

    Args:
        cluster: name under which Ray remembers itself.
    """
    path = home / _AUTOSCALER_CONFIG
    file = read_cluster_file(path) if path.exists() else None
    return node_environment(home) | {
        STORE_VARIABLE: store.replay_url,
        TOKEN_VARIABLE: read_token(home, FLEET_TOKEN),
        "RAY_REDIS_ADDRESS": store.ray_address,
        "RAY_external_storage_namespace": cluster,
        # Version 2 joins a single worker of a local cluster (https://github.com/ray-project/ray/issues/57153).
        **({"RAY_enable_autoscaler_v2": "0"} if file is not None and file.kind == "local" else {}),
        **({LIMITS_VARIABLE: json.dumps(file.limits())} if file is not None else {}),
    }


def node_environment(home: Path) -> dict[str, str]:
    """Of everything that Ray starts on any node. Raises NotFound without Ray's token."""
    read_token(home, RAY_TOKEN)
    Path(node_serve_settings()["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]).mkdir(mode=0o700, exist_ok=True)
    return node_serve_settings() | {
        "RAY_AUTH_MODE": "token",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_gcs_rpc_server_reconnect_timeout_s": f"{HEAD_AWAY_S:.0f}",
    }


def head_command(config: HeadStoreConfig, store: StoreAddresses, *, home: Path, more: Sequence[str] = ()) -> list[str]:
    """`ray start` of the head. Its dashboard and jobs API listen on loopback, reached through SSH."""
    words = ["ray", "start", "--head", "--disable-usage-stats", f"--port={config.gcs_port}"]
    words += [f"--node-ip-address={config.host}", "--dashboard-host=127.0.0.1", "--metrics-export-port=8080"]
    words += ["--redis-username=client", f"--redis-password={store.ray_password}"]
    if (home / _AUTOSCALER_CONFIG).exists():
        words.append(f"--autoscaling-config={home / _AUTOSCALER_CONFIG}")
    # A cloud's cluster file says what the head offers, through the environment.
    if "RAY_OVERRIDE_RESOURCES" not in os.environ:
        words += ["--num-cpus=0", f"--resources={json.dumps({GATEWAY: 1})}"]
    return [*words, *more]


def worker_command(
    head: str, hosts: Sequence[Machine], addresses: Sequence[str], *, gcs_port: int = 6379, more: Sequence[str] = ()
) -> list[str]:
    """`ray start` of another node.

    Args:
        head: address of the head.
        hosts: table of an on-premises cluster; empty where the cloud's cluster file says what a node offers.
        addresses: of this machine.

    Raises:
        ConfigError: the table does not have this machine.
    """
    words = ["ray", "start", "--disable-usage-stats", f"--address={head}:{gcs_port}", "--metrics-export-port=8080"]
    if not hosts:
        return [*words, f"--node-ip-address={address_towards(head)}", *more]
    host = next((host for host in hosts if host.address in addresses), None)
    if host is None:
        table = ", ".join(host.address for host in hosts)
        raise ConfigError(f"this machine has the addresses {', '.join(addresses)}, none of them in the table ({table})")
    words.append(f"--node-ip-address={host.address}")
    words += [f"--num-cpus={host.cpus}"] if host.cpus is not None else []
    words += [f"--num-gpus={host.gpus}"] if host.gpus is not None else []
    return [*words, f"--resources={json.dumps(dict(host.resources))}", *more]


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine, loopback left out."""
    found = [
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not found:
        raise ConfigError("this machine has no address but loopback; give --node-ip")
    return found


def address_towards(peer: str) -> str:
    """The address of this machine that ``peer`` sees. Nothing is sent. Raises ConfigError where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 1))
        except OSError as error:
            raise ConfigError(f"no way from this machine to the head {peer!r} ({error})") from error
        return probe.getsockname()[0]


def start_ray(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `ray start`, again where it gave up: it waits for its own raylet for 30 s, which busy cores can miss.

    Raises:
        ConfigError: the head has another Ray or Python.
        ResourceMissing: it gave up three times; what it said stands above.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    inherited = {**os.environ, **environment}
    for attempt in range(_ATTEMPTS):
        # Of an earlier Ray that was killed: `ray stop` passes over them.
        end_gateways(Path(NODE_FOLDER), only_orphans=True)
        # A file and not a pipe, which what Ray starts would keep open.
        with tempfile.TemporaryFile("w+") as file:
            done = subprocess.run(
                list(command), env=inherited, stdout=file, stderr=file, timeout=_START_TIMEOUT_S, check=False
            )
            file.seek(0)
            said = file.read()
        if (found := _MISMATCH.search(said)) is not None:
            raise ConfigError(
                f"this machine has Python {found['own_python']} and Ray {found['own_ray']}, the head has Python "
                f"{found['python']} and Ray {found['ray']}; install the same on all nodes (cluster/setup.sh)"
            )
        print(said, end="", flush=True)
        if done.returncode == 0:
            return
        if attempt + 1 < _ATTEMPTS:
            subprocess.run(["ray", "stop", "--force"], env=inherited, timeout=_START_TIMEOUT_S, check=False)
    raise ResourceMissing(f"Ray did not start on this machine in {_ATTEMPTS} attempts; its own words stand above")
