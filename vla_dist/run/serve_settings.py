"""What Serve and its HAProxy read from the environment when they start."""

import os
from collections.abc import Sequence
from pathlib import Path

FOLDER_VARIABLE = "VLA_DIST_SERVE_FOLDER"
TOKEN_VARIABLE = "VLA_DIST_FLEET_TOKEN"
"""Environment of a cluster's head, and of a robot: the bearer token of the fleet, used where none is given."""
PORTS_CLAIMED = 400
"""For each application: half for HTTP, half for gRPC; a dead replica's port is not used again for minutes."""
NODE_FOLDER = "/tmp/vla-dist-serve"
_NODE_FIRST_PORT = 32_000
"""Above those that embedded Rays of one machine share out, below those that Linux hands out."""


def serve_settings(
    folder: Path, first_port: int, other_ports: Sequence[int], *, drain_s: float = 2.0
) -> dict[str, str]:
    """Args:
    folder: of HAProxy's configuration and sockets.
    first_port: of ``PORTS_CLAIMED`` on which replicas listen.
    other_ports: four of HAProxy's and Serve's own.
    drain_s: a replica that is stopped works on for this long. Robots reconnect, so little is needed.
    """
    metrics_port, stats_port, http_port, grpc_port = other_ports
    return {
        FOLDER_VARIABLE: str(folder),
        # Robots' streams go from HAProxy to the replica: 5-10x the calls of the default Python proxy.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # One connection carries 100 streams by default, and the next one hangs in silence.
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "1000",
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": "1000",
        # 2 GiB by default: one caller could fill a replica's memory.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(64 * 2**20),
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 2**20),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # Fixed by default, so that a second cluster on the host would fail or, worse, share them.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_port),
        # Where replicas listen. By default every cluster begins at 40000, and when a replica dies while another cluster
        # of the host starts one, HAProxy sends this fleet's robots to the other cluster's policy.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + PORTS_CLAIMED // 2 - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_port + PORTS_CLAIMED // 2),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_port + PORTS_CLAIMED - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(drain_s),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": str(drain_s),
        # 5 and 10 s by default: on a machine whose cores are busy a healthy proxy is then killed while it starts.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
        # 10 s by default, and a proxy is replaced after three: half a minute without an ingress is longer than a robot
        # keeps an episode.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # 15 by default: then a replica computes only when nothing else on its machine wants to. See ``priority``.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A late call, after this process has shut Ray down, must fail: it would start another Ray.
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }


def node_serve_settings() -> dict[str, str]:
    """Of a node that ``ray start`` joins to a cluster: the same on every node, so that each knows the others' ports."""
    folder, ports = Path(NODE_FOLDER), range(_NODE_FIRST_PORT + PORTS_CLAIMED, _NODE_FIRST_PORT + PORTS_CLAIMED + 4)
    return serve_settings(folder, _NODE_FIRST_PORT, ports)


def is_node_folder(folder: Path) -> bool:
    """Whether it belongs to a node, whose Serve outlives its drivers, rather than to a driver."""
    return str(folder) == NODE_FOLDER
