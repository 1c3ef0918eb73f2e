"""The least that a user of an external server needs: it suffices, and nothing of it is spare."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import redis

from vla_dist.cli.main import main
from vla_dist.core.errors import ConfigError, NotFound, Unauthorised
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import PolicyArtifact, PolicyManifest
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.archive.archiver import Archiver
from vla_dist.replay.config import BufferConfig, Fifo, Prioritised, TableConfig
from vla_dist.replay.external import ACL_RULES, require_server
from vla_dist.replay.queue import EpisodeQueue
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.sweeping import sweep_images
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(max_episode_steps=20, cameras=(CameraSpec(name="c", height=3, width=2),))
DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture
def running(tmp_path):
    with EmbeddedServer(tmp_path / "server") as server:
        yield server


@pytest.fixture
def admin(running):
    path = str(running.directory / "server.sock")
    with redis.Redis(unix_socket_path=path, username="admin", password=running._admin_password) as client:
        yield client


@pytest.fixture
def make_user(running, admin):
    """URL of a user with these rules."""

    def make(rules):
        admin.execute_command("ACL", "SETUSER", "replay", "reset", "on", ">narrow", *rules.split())
        return f"unix://replay:narrow@{running.directory}/server.sock?db=0"

    return make


def commands_used(admin):
    """Names of all commands that were called since the statistics were reset, by scripts as well."""
    names = {name.removeprefix("cmdstat_").lower() for name in admin.info("commandstats")}
    return names - {"auth", "hello", "acl|setuser", "config|resetstat", "client|setinfo", "ping", "function|list"}


def allowed(rules):
    return {word[1:] for word in rules.split() if word.startswith("+")}


def test_these_rules_suffice_for_everything_and_nothing_of_them_is_spare(
    running, admin, make_user, make_episode, tmp_path, capsys
):
    for library in admin.function_list():
        admin.function_delete(dict(zip(library[::2], library[1::2], strict=True))[b"library_name"].decode())
    url = make_user(ACL_RULES)
    admin.config_resetstat()
    tables = (
        TableConfig(name="main", sampler=Prioritised(), max_draws=50),
        TableConfig(name="queue", sampler=Fifo()),
    )
    names = ("one", "apart")
    for name in names:
        config = BufferConfig(name=name, num_steps=4, context_steps=6, capacity_steps=60, tables=tables)
        images_url = url if name == "apart" else None
        table = RedisReplayTable(url, SPEC, config, images_url=images_url)
        with_queue = EpisodeQueue(RedisReplayTable(url, SPEC, config, table="queue", images_url=images_url), "me")
        archiver = Archiver(table, tmp_path / f"archive-{name}")
        for number in range(8):
            if number == 3:
                _lose_images_once(table)
            table.append_all(make_episode(f"{name}{number}", 10, spec=SPEC, seed=number), timeout_s=5.0)
            archiver.flush(timeout_s=20.0)
        batch = table.sample(8, timeout_s=5.0)
        table.update_priorities(batch.items, np.full(8, 2.0))
        with_queue.acknowledge(with_queue.take(2, timeout_s=5.0))
        while len(list(table.episodes())) == 6:
            table.sample(16, timeout_s=5.0)
        RedisReplayTable.open(url, name, images_url=images_url).close()
        assert table.has_episode(f"{name}3")
        table.stats()
        table.override_limiter(table.table.limiter)
        sweep_images(table)
        where = ["--redis-url", url, "--buffer", name, *(["--images-redis-url", url] if images_url else [])]
        for verb in (["stats"], ["top", "--once"], ["verify"], ["export", "--to", str(tmp_path / f"out-{name}")]):
            main(("replay", *verb, *where))
        archiver.release()
        table.close()
        with_queue._table.close()
    _damage(admin, "one")
    for name in names:
        images = ["--images-redis-url", url] if name == "apart" else []
        main(("replay", "verify", "--repair", "--redis-url", url, "--buffer", name, *images))
    capsys.readouterr()
    by_work = commands_used(admin)
    assert by_work <= allowed(ACL_RULES), "these are used, and not among the rules"
    assert allowed(ACL_RULES) <= by_work, "these are among the rules, and nothing uses them"


def _lose_images_once(table):
    """The next append finds its row and not its images, as after an hour's pause between the two."""
    original = table.link.exchange

    def lossy(commands, **options):
        table.link.exchange = original
        return original([command for command in commands if ":image:" not in str(command[1])], **options)

    table.link.exchange = lossy


def _damage(admin, name):
    """What a repair must put right."""
    prefix = "{buffer:" + name + "}:"
    admin.set(prefix + "row:AAAAAAAAAAAAAAAA:0", b"nobody's")
    admin.hset(prefix + "by", "task:ghost", 3)


@pytest.mark.parametrize("missing", ["+xadd", "+persist", "+info", "~{buffer:*", "+xgroup|create", "+fcall"])
def test_what_is_missing_is_named(make_user, missing):
    rules = " ".join(word for word in ACL_RULES.split() if word != missing)
    with pytest.raises(Unauthorised) as error:
        require_server(make_user(rules))
    word = missing.lstrip("+").partition("|")[0]
    assert word in str(error.value)
    assert "narrow" not in str(error.value)


def test_loading_the_functions_needs_its_own_permission_once(make_user, admin):
    url = make_user(ACL_RULES.replace(" +function|load", ""))
    require_server(url)
    for library in admin.function_list():
        admin.function_delete(dict(zip(library[::2], library[1::2], strict=True))[b"library_name"].decode())
    with pytest.raises(ConfigError, match=r"needs \+function\|load once"):
        require_server(url)


def test_the_probe_leaves_nothing_behind(make_user, admin):
    require_server(make_user(ACL_RULES))
    assert admin.dbsize() == 0


def lines_of_document():
    """The two commands, each in one line."""
    blocks = re.findall(r"(?m)^    ACL SETUSER vla .*\n(?:    .*\n)*", DOCUMENT.read_text())
    return [" ".join(block.split()) for block in blocks]


def test_the_document_has_these_rules():
    replay, registry = lines_of_document()
    assert replay == f"ACL SETUSER vla reset on >PASSWORD {ACL_RULES}"
    assert registry.startswith("ACL SETUSER vla ~{registry}:*")


def test_a_run_s_registry_needs_what_the_document_adds(make_user):
    added = lines_of_document()[1].removeprefix("ACL SETUSER vla ")
    url = make_user(f"{ACL_RULES} {added}")
    with contextlib.closing(RedisPolicyRegistry(url, RedisBlobs(url))) as registry:
        manifest = PolicyManifest(name="p", architecture="fake", config={}, spec=make_spec(), horizon=4)
        artifact = PolicyArtifact(manifest=manifest, tensors={"bias": np.zeros(1, np.float32)})
        assert registry.publish(artifact, channel="stable") == 1
        registry.set_channel("p", "canary", 1)
        assert registry.resolve("p@stable") == registry.follow("p@stable", after=0, timeout_s=5.0) == 1
        assert registry.follow("p@stable", after=1, timeout_s=0.2) == 1
        assert registry.fetch("p", 1).manifest.version == 1
        assert len(registry.manifests("p")) == 1
        assert registry.history("p")
        with pytest.raises(NotFound):
            registry.resolve("q@stable")
