"""What must hold when a storm is over, or at any moment of it."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.ground_truth import SPEC, require_true_episode, true_episode
from chaos.stage import PATIENCE_S, TABLES, Journal, T

from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.state import BufferState
from vla_dist.replay.table import RedisReplayTable

if TYPE_CHECKING:
    from chaos.storm import Totals

_MOST_WINDOWS = 48


def check_balances(state: BufferState) -> None:
    """No side got further ahead than the limiters allow: by their buffer and one call."""
    for table in state.tables:
        limiter, balance = table.limiter.config, table.limiter.balance
        if limiter.samples_per_insert is not None:
            most = limiter.error_buffer_steps + T * limiter.samples_per_insert
            least = -limiter.error_buffer_steps - _MOST_WINDOWS
            assert least <= balance <= most, f"balance {balance} must be within {least}..{most}"


def audit(folder: Path, table: RedisReplayTable, totals: "Totals") -> None:
    """Compare what is stored with what was acknowledged; fills ``totals``."""
    acknowledged = acknowledged_episodes(folder)
    true_steps = {episode_id: true_episode(episode_id).length for episode_id in acknowledged}
    state, stats = table.state(), table.stats()
    check_balances(state)

    # Nothing lost: the server took every acknowledged episode whole.
    ids = list(acknowledged)
    has = table.link.call([table.function("has", episode_id) for episode_id in ids], timeout_s=PATIENCE_S)
    assert [name for name, known in zip(ids, has, strict=True) if not known] == []
    assert state.completions + state.broken == len(acknowledged), state
    # Nothing twice: not a step more than the episodes have.
    assert state.inserted == sum(true_steps.values()), f"of {sum(true_steps.values())} steps: {state}"
    assert state.steps == state.inserted - state.evicted_steps <= table.config.capacity_steps, state

    # Nothing torn: what is stored is what was appended.
    entries = list(table.reader.entries(timeout_s=PATIENCE_S))
    completions = [entry["completion"] for entry in entries]
    stored = [entry["episode_id"] for entry in entries]
    assert completions == sorted(set(completions))
    assert len(stored) == len(set(stored)) == state.complete == stats.num_episodes
    assert set(stored) <= set(acknowledged)
    assert state.steps == sum(true_steps[name] for name in stored)
    for entry in entries:
        segments = table.reader.read(entry, timeout_s=PATIENCE_S)
        require_true_episode(segments, true_episode(entry["episode_id"]), num_steps=T)
    assert permanent_payloads(table) == payload_names(table, stored), "no payload is missing and none was left behind"
    assert stats.episodes_by_task == Counter(true_episode(name).task for name in stored)
    if not state.evicted_steps:
        assert set(stored) == set(acknowledged)

    archived = audit_archive(folder, acknowledged, state)
    taken = audit_queue(folder, state)
    sampled = sum(num for name in ("uniform", "scored") for (num,) in notes(folder, name))
    counted = sum(t.sampled for t, config in zip(state.tables, TABLES, strict=True) if config.name != "queue")
    assert sampled <= counted, "every window that came back was charged"
    totals.acknowledged, totals.stored, totals.archived = len(acknowledged), len(stored), archived
    totals.evicted, totals.broken = len(acknowledged) - len(stored), state.broken
    totals.duplicates, totals.windows, totals.taken = state.duplicates, sampled, taken


def acknowledged_episodes(folder: Path) -> list[str]:
    """Ids of the episodes that writers were told are stored, every segment of each."""
    found: dict[str, set[int]] = defaultdict(set)
    for path in folder.glob("writer-*.journal"):
        for number, index in Journal.read(path):
            found[f"{path.stem}-{number}"].add(index)
    for name, indices in found.items():
        assert len(indices) == true_episode(name).num_segments(T), f"{name} was not finished"
    return sorted(found)


def audit_archive(folder: Path, acknowledged: list[str], state: BufferState) -> int:
    """Every episode that was ever whole is archived, once; returns how many."""
    if not state.archiving:
        return 0
    archived = []
    for segments in read_archive(folder / "archive"):
        archived.append(segments[0].episode_id)
        require_true_episode(segments, true_episode(archived[-1]), num_steps=T)
    assert len(archived) == len(set(archived)) == state.completions
    assert set(archived) <= set(acknowledged)
    return len(archived)


def audit_queue(folder: Path, state: BufferState) -> int:
    """No episode was acknowledged twice, and without eviction none was passed over; returns how many were."""
    taken = notes(folder, "consumer")
    assert len({completion for completion, _ in taken}) == len(taken)
    queue = next(t for t, config in zip(state.tables, TABLES, strict=True) if config.name == "queue")
    # A consumer that dies between acknowledging and noting leaves no note; one that acknowledges what was evicted while
    # it held it does, and the server counts such an episode as lost, not as taken.
    assert sum(steps for _, steps in taken) <= queue.sampled + state.evicted_steps
    if not state.evicted_steps:
        assert queue.sampled == state.inserted
    return len(taken)


def notes(folder: Path, kind: str) -> list[tuple[int, ...]]:
    return [line for path in folder.glob(f"{kind}-*.journal") for line in Journal.read(path)]


def payload_names(table: RedisReplayTable, episode_ids: list[str]) -> set[str]:
    """Keys that hold these episodes."""
    names = set()
    for episode_id in episode_ids:
        digest = episode_digest(episode_id)
        for index in range(true_episode(episode_id).num_segments(T)):
            names.add(table.keys.row(digest, index))
            names.update(table.keys.image(digest, index, camera) for camera in range(len(SPEC.cameras)))
    return names


def permanent_payloads(table: RedisReplayTable) -> set[str]:
    """Keys of payloads that never expire."""
    names: list[bytes] = []
    cursor = None
    while cursor != b"0":
        scan = ("SCAN", cursor or 0, "MATCH", f"{table.keys.prefix}*:*", "COUNT", 1000)
        ((cursor, some),) = table.link.call([scan], timeout_s=PATIENCE_S)
        names += [name for name in some if b":row:" in name or b":image:" in name]
    lives = table.link.call([("PTTL", name) for name in names], timeout_s=PATIENCE_S)
    return {name.decode() for name, life in zip(names, lives, strict=True) if life == -1}
