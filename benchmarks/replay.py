"""The replay table beside the bare protocol, dm-reverb, torchrl and RLlib, in one run: steps a second.

    vla-dist bench replay [--json FILE] [--plot FILE] [--quick] [--only low_dim,image,capacity,size,sampler]

Workloads: segments of T = 32 steps, windows of K = 20; ``low_dim`` has 39 + 4 floats a step, ``image`` an 84x84x3
frame more. A sample of B windows counts B x K steps. Rows go to a server with an append-only file, images to one
without, as in a run. Systems are named system/transport/processes and take turns; the median of the turns counts.

``ratio_vs_PEER`` divides our best by the peer's best, ``like_for_like`` one process over TCP by Reverb's one process.
``ratio_vs_raw`` is the median over the turns of one process over a Unix socket against the bare protocol in the same
turn. ``capacity_flatness`` is the rate with the fewest stored steps over the rate with the most, from readers whose
``cache_bytes`` suffice for all rows; ``capacity_flatness_without_cache`` from readers that keep none.
``vla_dist_without_cache`` fetches every window from the server, as ``raw`` does; the bare protocol keeps nothing.

Takes about 25 minutes, 4 GB of memory and 6 GB of disk; peers are installed into venvs of their own on the first run.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from replay_parts.clients import Clients, Task, raw_key
from replay_parts.figures import draw
from replay_parts.peers import PEERS, measure_peer
from replay_parts.workload import EPISODE_SEGMENTS, IMAGE, LOW_DIM, T, Workload

from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.link import RedisLink
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable

Rates = dict[str, dict[str, list[float]]]
"""action -> system -> steps a second of each turn."""
_ACTIONS = ("insert", "sample")
_WARM_UP_S = 1.5
"""Time in which a reader meets nearly every row."""
_FULL_CACHE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Store:
    """The servers of one system."""

    unix: str
    tcp: str
    images_unix: str | None
    images_tcp: str | None

    def urls(self, transport: str) -> tuple[str, str | None]:
        return (self.unix, self.images_unix) if transport == "unix" else (self.tcp, self.images_tcp)


@contextlib.contextmanager
def open_stores(workload: Workload, *, append_only: bool = True, names: tuple[str, ...]) -> Iterator[list[Store]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def server(name: str, *, log: bool) -> EmbeddedServer:
            return stack.enter_context(EmbeddedServer(folder / name, port=0, append_only=log, max_memory_bytes=8 << 30))

        stores = []
        for name in names:
            rows = server(name, log=append_only)
            images = server(f"{name}-images", log=False) if workload.camera_side else None
            stores.append(Store(rows.url, rows.tcp_url or "", images and images.url, images and images.tcp_url))
        yield stores


def fill_table(store: Store, workload: Workload, steps: int) -> None:
    table = RedisReplayTable(store.unix, workload.spec, workload.buffer, images_url=store.images_unix)
    appends = workload.appends("fill")
    shown = time.monotonic()
    # One episode more would make room by evicting one.
    while table.stats().steps_inserted < steps - EPISODE_SEGMENTS * T:
        for _ in range(64 if steps > 100_000 else 1):
            table.append_all(next(appends), timeout_s=60.0)
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            note(f"  stored {table.stats().steps_inserted:,} of {steps:,} steps")
    table.close()


def fill_raw(store: Store, workload: Workload, steps: int) -> None:
    codec = SegmentCodec(workload.spec, T)
    encoded = codec.encode_all(next(workload.episodes("fill")))
    rows, images = RedisLink(store.unix), RedisLink(store.images_unix or store.unix)
    for episode in range(max(1, steps // (T * EPISODE_SEGMENTS))):
        rows.call([("SET", raw_key("row", episode, i), e.row) for i, e in enumerate(encoded)], timeout_s=30.0)
        frames = [("SET", raw_key("image", episode, i), x) for i, e in enumerate(encoded) for x in e.images.values()]
        if frames:
            images.call(frames, timeout_s=30.0)


def measure_ours(
    workload: Workload, *, turns: int, peer_turns: int, seconds: float, between: Callable[[Rates], None]
) -> Rates:
    """The table and the bare protocol over both transports, with one and with two processes.

    Args:
        between: called in each of the first ``peer_turns`` turns, to measure the peers in it.
    """
    rates: Rates = {action: {} for action in _ACTIONS}
    stored = workload.capacity_steps
    with open_stores(workload, names=("table", "raw")) as (table, raw):
        fill_table(table, workload, stored)
        fill_raw(raw, workload, stored)
        for turn in range(turns):
            for action in _ACTIONS:
                systems = {
                    "vla_dist": ("table", table, workload),
                    "vla_dist_without_cache": ("table", table, replace(workload, cache_bytes=0)),
                    "raw": ("raw", raw, workload),
                }
                if action == "insert":
                    del systems["vla_dist_without_cache"]
                for transport in ("unix", "tcp"):
                    for processes in (1, 2):
                        clients = {
                            name: Clients(
                                Task(
                                    system=system,
                                    action=action,
                                    url=store.urls(transport)[0],
                                    images_url=store.urls(transport)[1],
                                    workload=theirs,
                                    stored_steps=stored,
                                    warm_up_s=_WARM_UP_S,
                                ),
                                processes,
                            )
                            for name, (system, store, theirs) in systems.items()
                        }
                        # Short slices by turns: both meet the same noise.
                        slices = {name: [] for name in clients}
                        for _ in range(4):
                            for name, client in clients.items():
                                slices[name].append(client.measure(seconds / 4))
                        for name, client in clients.items():
                            client.close()
                            system = f"{name}/{transport}/{processes}"
                            rates[action].setdefault(system, []).append(statistics.median(slices[name]))
            note(f"  turn {turn + 1} of {turns} done")
            if turn < peer_turns:
                between(rates)
    return rates


def summarise(rates: Rates) -> dict[str, object]:
    medians = {action: {s: statistics.median(r) for s, r in systems.items()} for action, systems in rates.items()}

    def best(action: str, name: str) -> float | None:
        return max((rate for s, rate in medians[action].items() if s.split("/")[0] == name), default=None)

    def ratio(name: str) -> dict[str, float | None]:
        ours = {action: best(action, "vla_dist") for action in _ACTIONS}
        theirs = {action: best(action, name) for action in _ACTIONS}
        return {action: ours[action] / theirs[action] if theirs[action] else None for action in _ACTIONS}  # type: ignore[operator]

    def paired(one: str, other: str) -> dict[str, float | None]:
        answer: dict[str, float | None] = {}
        for action in _ACTIONS:
            pairs = zip(rates[action].get(one, []), rates[action].get(other, []), strict=False)
            ratios = [a / b for a, b in pairs]
            answer[action] = statistics.median(ratios) if ratios else None
        return answer

    return {
        **{f"{action}_steps_per_s": medians[action] for action in _ACTIONS},
        "ratio_vs_reverb": ratio("reverb"),
        "ratio_vs_torchrl": ratio("torchrl"),
        "ratio_vs_rllib": ratio("rllib"),
        "ratio_vs_raw": paired("vla_dist/unix/1", "raw/unix/1"),
        "like_for_like_vs_reverb": paired("vla_dist/tcp/1", "reverb/tcp/1"),
    }


def measure_variants(variants: Mapping[str, tuple[Workload, int]], *, turns: int, seconds: float) -> dict[str, float]:
    """Sampling rates of several tables, each on a server of its own, by turns.

    Args:
        variants: name -> workload and steps to store.
        turns: measurements of each.
        seconds: of each measurement.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    with contextlib.ExitStack() as stack:
        clients = {}
        for name, (workload, steps) in variants.items():
            workload = replace(workload, capacity_steps=steps)
            (store,) = stack.enter_context(open_stores(workload, append_only=False, names=("table",)))
            fill_table(store, workload, steps)
            task = Task(
                system="table",
                action="sample",
                url=store.unix,
                images_url=store.images_unix,
                workload=workload,
                # Rows are met at random: several times as many draws as rows until nearly all were met.
                warm_up_s=_WARM_UP_S + (steps / 200_000 if workload.cache_bytes else 0.0),
            )
            clients[name] = Clients(task, 1)
        for _ in range(turns):
            for name, client in clients.items():
                rates[name].append(client.measure(seconds))
        for client in clients.values():
            client.close()
    return {name: statistics.median(found) for name, found in rates.items()}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the answer here")
    parser.add_argument("--plot", type=Path, help="write the plot here (PNG)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer-turns", type=int, default=1, help="turns in which the peers take part")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time and of the data; claims nothing")
    parser.add_argument("--only", default="low_dim,image,capacity,size,sampler", help="parts to run")
    parser.add_argument("--no-peers", action="store_true", help="without Reverb, torchrl and RLlib")
    options = parser.parse_args()
    turns, seconds = (1, 0.4) if options.quick else (options.turns, options.seconds)
    parts = set(options.only.split(","))
    answer: dict[str, object] = {"quick": options.quick}
    for name, workload in (("low_dim", LOW_DIM), ("image", IMAGE)):
        if name not in parts:
            continue
        note(f"{name}:")
        clients: dict[str, object] = {}

        def peers(rates: Rates, name: str = name, workload: Workload = workload, seen: dict = clients) -> None:
            for peer in () if options.no_peers else PEERS:
                for system, found in measure_peer(peer, name, workload, seconds=seconds).items():
                    note(f"  {system}: {found}")
                    seen[system] = found.get("unavailable") or found["client"]
                    for action in _ACTIONS if "unavailable" not in found else ():
                        rates[action].setdefault(system, []).append(float(found[f"{action}_steps_per_s"]))

        rates = measure_ours(workload, turns=turns, peer_turns=options.peer_turns, seconds=seconds, between=peers)
        answer[name] = {**summarise(rates), "clients": clients}
        note(json.dumps(answer[name], indent=2))
    if "capacity" in parts:
        sizes = (10_000, 100_000, 1_000_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000)
        note("capacity:")
        for key, cache_bytes in (("", _FULL_CACHE_BYTES), ("_without_cache", 0)):
            kept = replace(LOW_DIM, cache_bytes=cache_bytes)
            found = measure_variants(
                {str(steps): (kept, steps) for steps in sizes}, turns=3 * turns, seconds=seconds / 2
            )
            answer[f"capacity{key}"] = found
            answer[f"capacity_flatness{key}"] = found[str(sizes[0])] / found[str(sizes[-1])]
            note(f"  {found}")
    if "size" in parts:
        note("value size:")
        variants = {f"{dim + 4} floats": (replace(LOW_DIM, proprio_dim=dim), 50_000) for dim in (4, 39, 252, 1020)}
        variants |= {f"{side}x{side}x3": (replace(IMAGE, camera_side=side), 5_000) for side in (32, 64, 84, 128)}
        answer["value_size"] = measure_variants(variants, turns=turns, seconds=seconds / 2)
        note(f"  {answer['value_size']}")
    if "sampler" in parts:
        note("samplers:")
        both = {
            "uniform": (LOW_DIM, 1_000_000),
            "prioritised": (replace(LOW_DIM, prioritised=True), 1_000_000),
        }
        found = measure_variants(both, turns=2 * turns, seconds=seconds / 2)
        answer["samplers"] = found
        answer["uniform_over_prioritised"] = found["uniform"] / found["prioritised"]
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))
    if options.plot:
        draw(answer, options.plot)


if __name__ == "__main__":
    main()
