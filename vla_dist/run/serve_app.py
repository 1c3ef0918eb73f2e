"""The policy service for a fleet: Ray Serve's gRPC ingress in front of replicas that all follow the registry.

Serve places, watches and restarts replicas. HAProxy, which Ray brings along, carries each robot's stream straight to
one replica; no Python proxy is on the way. Weights do not go through Serve's configuration: that replaces replicas.

    ports = apply_serving_environment()      # before ray.init: raylets hand their environment on to what they start
    ray.init(...)
    with start_serving(build, port=9000, num_replicas=2, num_cpus=1, token=None) as serving:
        PolicyClient(serving.address)
"""

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import ray
from ray import serve

from vla_dist.core.errors import ConfigError, ResourceMissing, WaitTimeout, WorkerFailed
from vla_dist.protocol.v1 import channels_pb2, fleet_pb2, policy_pb2
from vla_dist.run.gateways import end_gateways, gateways
from vla_dist.run.priority import answer_promptly
from vla_dist.run.serve_settings import FOLDER_VARIABLE, PORTS_CLAIMED, is_node_folder, serve_settings
from vla_dist.serving.authorisation import AccessConfig
from vla_dist.serving.channel_servicer import ChannelServicer
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.fleet_servicer import FleetServicer
from vla_dist.serving.ingest import FleetIngest
from vla_dist.serving.policy_servicer import PolicyServicer
from vla_dist.serving.service import PolicyService
from vla_dist.serving.undecoded import decodes_after_the_token

_log = logging.getLogger(__name__)

BuildServices = Callable[[], tuple[PolicyService, FleetIngest]]
"""Builds what one replica serves, in the replica; the service's versions come started."""

APP_NAME = "vla-dist"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FOLDER_PARENT = Path("/tmp")
"""Not TMPDIR: Ray appends 56 characters and a name, and a socket's path ends at 97."""
_FOLDER_PREFIX = "vds-"
_CONTROLLER_TIMEOUT_S = 30.0
_OWNER_FILE = "owner.json"
_PORTS = range(20_000, 32_000)
"""Below the ports that Linux hands out for outgoing connections."""
_SERVICERS = [
    "vla_dist.serving.undecoded.add_policies",
    "vla_dist.serving.undecoded.add_fleet",
    "vla_dist.serving.undecoded.add_channels",
]


def has_serving_environment() -> bool:
    """Whether this process has it already, as what runs on a cluster's node has it from there."""
    return FOLDER_VARIABLE in os.environ


def apply_serving_environment(*, drain_s: float = 2.0) -> Path:
    """Set what Serve reads when its processes start. Call it before ``ray.init``, or before ``ray start`` on a node.

    Args:
        drain_s: a replica that is stopped works on for this long. Robots reconnect, so little is needed.

    Returns:
        The folder of HAProxy's configuration and sockets; its name is how an orphan is found after a hard kill.
    """
    if ray.is_initialized():
        raise ConfigError("Ray runs already without Serve's fast path; call apply_serving_environment before ray.init")
    remove_orphans()
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=_FOLDER_PARENT))
    first_port = _claim_ports(folder)
    os.environ |= serve_settings(folder, first_port, free_ports(4), drain_s=drain_s)
    return folder


@decodes_after_the_token(policy_pb2.DESCRIPTOR, fleet_pb2.DESCRIPTOR, channels_pb2.DESCRIPTOR)
class FleetReplica(PolicyServicer, FleetServicer, ChannelServicer):
    """What Serve runs in each replica: all services, and a health check that has a broken one replaced."""

    def __init__(self, build: BuildServices, access: AccessConfig) -> None:
        service, ingest = build()
        tokens, audit = access.token_check(), EventLog(access.audit)
        self.door, self.door_audit = tokens, audit
        PolicyServicer.__init__(self, service, tokens, audit=audit)
        FleetServicer.__init__(self, ingest, tokens, audit=audit)
        ChannelServicer.__init__(self, service.moves, tokens, audit=audit)
        self._served = service
        answer_promptly()

    def check_health(self) -> None:
        """Called by Serve every few seconds; raising has the replica replaced."""
        if not self._served.batcher.is_alive:
            raise WorkerFailed("the compute thread has ended; the replica must be replaced")


class ServingHandle:
    """The running application; ``close`` ends it and whatever HAProxy it left behind."""

    def __init__(self, *, host: str, port: int, folder: Path, deploy: Callable[[int], None]) -> None:
        """Args:
        host: that robots reach it by.
        folder: of this machine's HAProxy.
        deploy: asks Serve for so many replicas; returns at once.
        """
        self._deploy = deploy
        self.host = host
        self.port = port
        self._folder = folder
        self._closed = False

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def haproxy_pids(self) -> list[int]:
        return [process.pid for process in gateways(self._folder)]

    def scale(self, num_replicas: int, *, timeout_s: float = 120.0) -> None:
        """Serve with so many replicas from now on, new ones all of them; robots move by themselves.

        Raises:
            WorkerFailed, WaitTimeout: as ``start_serving``; what served before goes on.
        """
        self._deploy(num_replicas)
        _wait_until_running(timeout_s, lambda: False)

    def close(self) -> None:
        """A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if ray.is_initialized():
            # The controller ends itself, and Ray tells the terminal of that death as if it were an error.
            with contextlib.redirect_stdout(io.StringIO()):
                serve.shutdown()
        if not is_node_folder(self._folder):
            _remove_folder(self._folder)

    def __enter__(self) -> "ServingHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def start_serving(
    build: BuildServices,
    *,
    port: int,
    num_replicas: int,
    num_cpus: float,
    token: str | None = None,
    access: AccessConfig | None = None,
    num_gpus: float = 0.0,
    resources: Mapping[str, float] | None = None,
    host: str = "127.0.0.1",
    public_host: str = "",
    timeout_s: float = 120.0,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> ServingHandle:
    """Serve all services on ``host:port`` and return when every replica answers.

    Where the application serves on that port already, as after its driver died with the head of a cluster, its replicas
    are replaced one by one and robots stay connected or come back.

    Args:
        build: runs in each replica; must be picklable by Ray.
        port: of the gRPC ingress, on every node that has a proxy; 0 picks a free one.
        num_replicas: processes that each hold every loaded version.
        num_cpus: that Ray reserves for one replica.
        token: bearer token that every call must bring; None lets everybody in.
        access: who may call, in place of ``token``.
        num_gpus: that Ray reserves for one replica.
        resources: custom ones that Ray reserves for one replica.
        host: address the ingress binds; loopback unless robots are on other machines.
        public_host: address that robots reach it by; empty: ``host``.
        timeout_s: for all replicas to be ready.
        is_cancelled: asked while it waits; True ends what was begun and raises WaitTimeout.

    Raises:
        ConfigError: the environment was not applied before ``ray.init``.
        ResourceMissing: the port is taken, or another application serves in this cluster.
        WorkerFailed: a replica could not be built.
        WaitTimeout: not ready in time.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or not ray.is_initialized():
        raise ConfigError("call apply_serving_environment(), then ray.init(), then start_serving()")
    if token == "":
        raise ConfigError("the token is empty; give one, or None to let everybody in")
    if not _serves_already(port):
        port = port or free_ports(1)[0]
        require_free_port(host, port)
        serve.start(
            proxy_location="HeadOnly" if host in LOOPBACK else "EveryNode",
            http_options={"host": host, "port": free_ports(1)[0]},
            grpc_options={"port": port, "grpc_servicer_functions": _SERVICERS, "enable_reflection": False},
        )
    deployment = serve.deployment(FleetReplica).options(
        name="FleetReplica",
        # A stream is one request for its whole life; admission is the service's own max_sessions.
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(resources or {})},
    )

    def deploy(num_replicas: int) -> None:
        application = deployment.options(num_replicas=num_replicas).bind(build, access or AccessConfig(token=token))
        serve.run_many(
            [serve.RunTarget(application, name=APP_NAME, route_prefix=f"/{APP_NAME}")],
            wait_for_ingress_deployment_creation=True,
            wait_for_applications_running=False,
        )

    handle = ServingHandle(host=public_host or host, port=port, folder=Path(folder), deploy=deploy)
    try:
        deploy(num_replicas)
        _wait_until_running(timeout_s, is_cancelled)
    except BaseException:
        handle.close()
        raise
    return handle


def require_free_port(host: str, port: int) -> None:
    """Raise ResourceMissing where somebody listens: HAProxy would share the port in silence (SO_REUSEPORT)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceMissing(
                f"port {port} on {host} is taken ({error.strerror}); stop the program that listens there or choose "
                "another port (--serving.port)"
            ) from error


def free_ports(count: int) -> Sequence[int]:
    """Distinct ports on which nobody listens now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def remove_orphans() -> list[int]:
    """End the HAProxy processes of drivers that were killed before they could; returns their pids."""
    ended: list[int] = []
    for folder in _folders():
        if not _owner_lives(folder):
            ended += _remove_folder(folder)
    return ended


def _claim_ports(folder: Path) -> int:
    """Write who owns ``folder``, and with it a block of ports that no other living application claims."""
    claimed = {_read_owner(other).get("first_port") for other in _folders() if _owner_lives(other)}
    blocks = list(_PORTS[::PORTS_CLAIMED])
    mine = os.getpid() % len(blocks)  # two that start at once look in different places first
    free = [block for block in blocks[mine:] + blocks[:mine] if block not in claimed]
    if not free:
        raise ResourceMissing(f"{len(blocks)} applications serve on this machine, the most possible; end one of them")
    me = psutil.Process()
    owner = {"pid": me.pid, "create_time": me.create_time(), "first_port": free[0]}
    (folder / _OWNER_FILE).write_text(json.dumps(owner))
    return free[0]


def _folders() -> list[Path]:
    folders = [f for f in _FOLDER_PARENT.glob(f"{_FOLDER_PREFIX}*") if f.is_dir()]
    return [folder for folder in folders if folder.stat().st_uid == os.getuid()]


def _read_owner(folder: Path) -> dict[str, float]:
    """Empty while another process is just making it."""
    try:
        return json.loads((folder / _OWNER_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _owner_lives(folder: Path) -> bool:
    owner = _read_owner(folder)
    try:
        return not owner or psutil.Process(int(owner["pid"])).create_time() == owner["create_time"]
    except psutil.NoSuchProcess:
        return False


def _remove_folder(folder: Path) -> list[int]:
    ended = end_gateways(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return ended


def _serves_already(port: int) -> bool:
    """Whether this application does, on this port. Raises ResourceMissing where another one has taken Serve."""
    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    is_ours = set(serve.status().applications) <= {APP_NAME}
    options: Any = ray.get(controller.get_grpc_config.remote(), timeout=_CONTROLLER_TIMEOUT_S)
    if is_ours and port and options.port == port:
        return True
    raise ResourceMissing(
        "Serve runs in this Ray cluster already, and its ports cannot be changed; close the other application first"
    )


def _wait_until_running(timeout_s: float, is_cancelled: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        application = serve.status().applications.get(APP_NAME)
        status = application.status.value if application else "unknown"
        message = application.message if application else ""
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [one.message for one in application.deployments.values() if one.message] if application else []
            raise WorkerFailed(f"the policy service could not be built ({status}): {' '.join([message, *reasons])}")
        if is_cancelled():
            raise WaitTimeout("the start of the policy service was cancelled")
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"the policy service is {status} after {timeout_s} s: {message or 'no reason given'}; "
                "check that the cluster has the CPUs and GPUs that its replicas ask for"
            )
        time.sleep(0.1)
