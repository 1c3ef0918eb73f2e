"""One campaign from start to end: serves the fleet, archives what it records, ends when the quotas are met.

| part | meets others in | when it dies |
|---|---|---|
| Redis | - | started again with all it had acknowledged |
| server | Redis | ``vla-dist collect`` goes on when it is started again; robots keep what they record and wait |
| archiver | Redis, the archive | goes on where it was, writes nothing twice |
| robots | the server | go on with their spools; what was cut off is a partial episode |
"""

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vla_dist.collection.campaign import Campaign
from vla_dist.collection.ledger import CampaignLedger, CampaignState, Entry
from vla_dist.core.errors import ConfigError, Unreachable, WaitTimeout
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Source
from vla_dist.replay.archive.archiver import Archiver
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.run.composition.campaigns import build_campaign_ingest, build_campaign_table
from vla_dist.run.files import AUDIT, QUARANTINE, REDIS, SPOOLS, write_atomically
from vla_dist.run.fleet_simulation import FleetSimulation, SimulatedFleet
from vla_dist.run.redis_keeper import RedisKeeper
from vla_dist.serving.authorisation import AccessConfig
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.server import SingleServer

_log = logging.getLogger(__name__)

CAMPAIGN, SELECTION = "campaign.json", "selection.json"
RECORDS = "episodes.jsonl"
"""In the archive: what is known of each episode beside its steps, one line each."""
_TICK_S = 0.5
_ARCHIVE_PATIENCE_S = 60.0
_DRAIN_S = 60.0
"""How long the end waits for robots to give back what they hold."""
_SILENT_S = 10.0
"""A robot that was not heard of for so long is not waited for."""
_RECORDS_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignStatus:
    """What people watch."""

    state: CampaignState
    address: str
    phase: str
    elapsed_s: float
    archived: int
    """Episodes."""
    quarantined: int
    """Segments kept aside."""
    redis_deaths: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignResult:
    """What a campaign came to."""

    state: CampaignState
    entries: list[Entry]
    """Every whole episode."""


class CampaignRun:
    """A campaign in a folder; the same folder again goes on with it.

    Raises:
        ConfigError: the folder holds another campaign.
        ResourceMissing: the port is taken, or the folder is in use.
    """

    def __init__(
        self,
        campaign: Campaign,
        spec: EnvSpec,
        folder: Path,
        *,
        on_status: Callable[[CampaignStatus], None],
        home: Path = Path(),
    ) -> None:
        """Args:
        home: folder that the campaign's own paths start from.
        """
        self.folder = folder
        self._campaign = campaign
        self._spec = spec
        self._on_status = on_status
        self._started_s = time.monotonic()
        self._phase = "starting"
        self._archived = 0
        folder.mkdir(parents=True, exist_ok=True)
        _require_same(campaign, folder / CAMPAIGN)
        self._access = AccessConfig(
            token=campaign.token or None,
            tokens_file=home / campaign.tokens if campaign.tokens else None,
            identity_from_front=campaign.identity_from_front,
            audit=folder / AUDIT,
        )
        told = {**dataclasses.asdict(campaign), "token": ""}  # a folder that is handed around must not hold it
        write_atomically(folder / CAMPAIGN, json.dumps(told, indent=2))

    @property
    def archive(self) -> str | Path:
        place = self._campaign.archive
        return place if "://" in place else self.folder / place

    def execute(self, *, stop: threading.Event | None = None) -> CampaignResult:
        """Serve until every quota is met or given up, or ``stop`` is set."""
        stop = stop or threading.Event()
        with contextlib.ExitStack() as stack:
            redis = stack.enter_context(contextlib.closing(RedisKeeper(self.folder / REDIS)))
            ledger = stack.enter_context(contextlib.closing(CampaignLedger(redis.url, self._campaign)))
            archiving = stack.enter_context(
                contextlib.closing(
                    Archiving(build_campaign_table(self._campaign, self._spec, redis.url, seed=1), self.archive)
                )
            )
            table = stack.enter_context(contextlib.closing(build_campaign_table(self._campaign, self._spec, redis.url)))
            ingest = build_campaign_ingest(self._campaign, table, ledger=ledger, quarantine=self.folder / QUARANTINE)
            server = stack.enter_context(
                SingleServer(
                    None,
                    ingest=ingest,
                    host=self._campaign.host,
                    port=self._campaign.port,
                    tokens=self._access.token_check(),
                    audit=EventLog(self._access.audit),
                )
            )
            self._stack, self._redis, self._ledger, self._server = stack, redis, ledger, server
            self._archiving = archiving
            if self._campaign.simulation.num_robots:
                stack.enter_context(contextlib.closing(self._simulate(server.address)))
            self._phase = "collecting"
            self._wait(stop, lambda state: state.is_over, timeout_s=float("inf"))
            if not stop.is_set():
                self._phase = "draining"
                self._wait(stop, _is_drained, timeout_s=_DRAIN_S)
            self._phase = "archiving"
            self._archiving.finish(timeout_s=_ARCHIVE_PATIENCE_S)
            self._write_records()
            state = ledger.state()
            self._tell(state)
            return CampaignResult(state=state, entries=ledger.entries())

    def _simulate(self, address: str) -> SimulatedFleet:
        campaign = self._campaign
        sources: tuple[Source, ...] = tuple(dict.fromkeys(quota.source for quota in campaign.quotas))
        fleet = FleetSimulation(
            server=address,
            driver=campaign.environment,
            tasks=campaign.tasks,
            cameras=campaign.cameras,
            max_episode_steps=campaign.max_episode_steps,
            num_robots=campaign.simulation.num_robots,
            robot_prefix=campaign.simulation.robot_prefix,
            control_hz=campaign.simulation.control_hz,
            policy_server=campaign.simulation.policy_server,
            segment_steps=campaign.segment_steps,
            jpeg_quality=campaign.jpeg_quality,
            token=campaign.token,
        )
        _log.info("simulating %d robots for %s", fleet.num_robots, ", ".join(sources))
        return SimulatedFleet(fleet, self.folder / SPOOLS)

    def _wait(self, stop: threading.Event, condition: Callable[[CampaignState], bool], *, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        written = time.monotonic()
        while not stop.is_set() and time.monotonic() < end:
            try:
                state = self._ledger.state()
                self._tell(state)
                if condition(state):
                    return
                if time.monotonic() - written > _RECORDS_EVERY_S:
                    self._write_records()
                    written = time.monotonic()
            except Unreachable as error:
                _log.warning("%s", error)
            stop.wait(_TICK_S)

    def _tell(self, state: CampaignState) -> None:
        quarantine = self.folder / QUARANTINE
        self._on_status(
            CampaignStatus(
                state=state,
                address=self._server.address,
                phase=self._phase,
                elapsed_s=time.monotonic() - self._started_s,
                archived=self._archiving.episodes,
                quarantined=sum(1 for _ in quarantine.glob("*.segment")) if quarantine.exists() else 0,
                redis_deaths=self._redis.deaths,
            )
        )

    def _write_records(self) -> None:
        entries = self._ledger.entries()
        lines = "".join(f"{entry.to_json()}\n" for entry in entries)
        folder = ArchiveFolder.at(self.archive)
        folder.put(RECORDS, lines.encode())
        chosen = [entry.record.episode_id for entry in entries if entry.verdict == "accepted"]
        write_atomically(self.folder / SELECTION, json.dumps(chosen, indent=1))


class Archiving:
    """The archiver of a table in a thread of its own."""

    def __init__(self, table, uri: str | Path) -> None:  # type: ignore[no-untyped-def]
        self._archiver = Archiver(table, uri, flush_after_s=10.0)
        self.episodes = self._archiver.count_episodes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="archiver", daemon=True)
        self._thread.start()

    def finish(self, *, timeout_s: float) -> None:
        """Archive all that is complete now. Raises ReplayWait, Unreachable."""
        self._stop.set()
        self._thread.join(timeout_s)
        end = time.monotonic() + timeout_s
        while True:
            try:
                self._archiver.flush(timeout_s=max(1.0, end - time.monotonic()))
                break
            except Unreachable:
                if time.monotonic() > end:
                    raise
                time.sleep(_TICK_S)
        self.episodes = self._archiver.count_episodes()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_ARCHIVE_PATIENCE_S)
        self._archiver.close()

    def _run(self) -> None:
        written = 0.0
        while not self._stop.is_set():
            try:
                metrics = self._archiver.step(timeout_s=_TICK_S)
                if metrics["episodes"] != written:
                    written = metrics["episodes"]
                    self.episodes = self._archiver.count_episodes()
            except (Unreachable, WaitTimeout) as error:
                _log.warning("archive: %s", error)
                self._stop.wait(_TICK_S)


def _is_drained(state: CampaignState) -> bool:
    """Whether every robot that was heard of lately knows of the end and holds nothing that the server lacks."""
    fresh = [one for one in state.robots if state.now_unix_s - one.seen_unix_s < _SILENT_S]
    return all(
        one.is_drained and not one.counters.get("closed_episodes") and not one.counters.get("open_episodes")
        for one in fresh
    )


def _require_same(campaign: Campaign, path: Path) -> None:
    if not path.exists():
        return
    before = json.loads(path.read_text())
    mine = json.loads(json.dumps(dataclasses.asdict(campaign)))
    fixed = ("name", "environment", "contract", "cameras", "segment_steps", "jpeg_quality")
    differing = [key for key in fixed if before.get(key) != mine[key]]
    for index, quota in enumerate(before.get("quotas", [])):
        now = mine["quotas"][index] if index < len(mine["quotas"]) else {}
        differing += [
            f"quotas[{index}].{key}" for key in ("task", "source", "success") if quota.get(key) != now.get(key)
        ]
    if differing:
        raise ConfigError(
            f"{path.parent} holds campaign {before.get('name')!r} with other {', '.join(differing)}; what it has "
            "collected would be counted wrongly. Put the settings back, add quotas at the end, or use another name"
        )
