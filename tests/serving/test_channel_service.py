"""Channels moved over the wire: by whom, on what evidence, and what the audit log keeps of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from vla_dist.cli.main import main
from vla_dist.core.errors import DataError, Forbidden, MoveRefused, NotFound, Unauthorised
from vla_dist.protocol.v1 import channels_pb2, channels_pb2_grpc, fleet_pb2
from vla_dist.registry.blobs import RedisBlobs
from vla_dist.registry.canaries import RedisCanaries
from vla_dist.registry.promotion import Promotion
from vla_dist.registry.sequential import CanaryRule
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.serving.authorisation import ROLES, AccessConfig, create_token
from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
from vla_dist.serving.channel_client import ChannelClient
from vla_dist.serving.event_log import EventLog, read_events
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.server import SingleServer
from vla_dist.serving.service import PolicyService
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.serving.versions import PolicyVersions
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.registry import fake_artifact, load_fake
from vla_dist.testing.serving import BUCKETS, VERSIONS, ListTable

SPEC = make_spec()
RULE = CanaryRule(min_episodes=20)


@dataclass
class Site:
    """A service whose tokens have roles, and its registry."""

    server: SingleServer
    promotion: Promotion
    canaries: RedisCanaries
    tokens: dict[str, str]
    audit: Path

    def channels(self, role: str) -> "ChannelsOf":
        return ChannelsOf(self.server.address, self.tokens.get(role))


class ChannelsOf:
    """A ChannelClient with a connection of its own."""

    def __init__(self, address: str, token: str | None) -> None:
        self._connection = PolicyClient(address, token=token)

    def __enter__(self) -> ChannelClient:
        connection = self._connection.__enter__()
        return ChannelClient(connection.channel, address=connection.address, metadata=connection.call_metadata)

    def __exit__(self, *error: object) -> None:
        self._connection.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with EmbeddedServer(tmp_path / "redis") as store:
        registry, canaries = RedisPolicyRegistry(store.url, RedisBlobs(store.url)), RedisCanaries(store.url)
        for bias in (0.1, 0.2):
            registry.publish(fake_artifact(SPEC, bias=bias))
        registry.publish(fake_artifact(replace(SPEC, control_hz=33.0)))
        registry.set_channel("demo", "stable", 1)
        versions = PolicyVersions(registry, load_fake, VERSIONS)
        versions.start()
        promotion = Promotion(registry, canaries)
        batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=BUCKETS))
        service = PolicyService(versions, batcher, ServiceConfig(), moves=promotion)
        ingest = FleetIngest(ListTable(), SPEC, IngestConfig(num_steps=8))
        file = tmp_path / "tokens.json"
        tokens = {role: create_token(file, name=f"the {role}", role=role, robot_id="arm") for role in ROLES[:1]}
        tokens |= {role: create_token(file, name=f"the {role}", role=role) for role in ROLES[1:]}
        check = AccessConfig(tokens_file=file).token_check()
        audit = tmp_path / "audit.jsonl"
        with SingleServer(service, ingest=ingest, tokens=check, audit=EventLog(audit)) as server:
            yield Site(server, promotion, canaries, tokens, audit)
        registry.close()
        canaries.close()


def prove(site: Site) -> None:
    for index in range(60):
        for version in (1, 2):
            site.canaries.record("demo", version, f"e{index}", success=version == 2 or index % 2 == 0)


def test_a_version_goes_from_canary_to_stable_and_back_by_an_admins_calls(site: Site) -> None:
    with site.channels("admin") as admin:
        with pytest.raises(MoveRefused, match="no canary of it runs"):
            admin.promote("demo@2", who="anna")
        plan = admin.begin_canary("demo@2", share=0.25, rule=RULE, who="anna")
        assert (plan.version, plan.incumbent, plan.share, plan.rule) == (2, 1, 0.25, RULE)
        with pytest.raises(MoveRefused, match="0 of 20 episodes"):
            admin.promote("demo@2", who="anna")
        prove(site)
        assert admin.reports() == site.promotion.reports() == admin.reports("demo")
        version, reason = admin.promote("demo@2", who="anna")
        assert version == 2
        assert "no worse by more than" in reason
        assert admin.set_shadow("demo@1", who="anna") == 1
        assert "from 2 back to 1" in admin.roll_back("demo", reason="it stutters", who="anna")
        (report,) = admin.reports()
        assert report.channels == {"stable": 1, "canary": 2, "shadow": 1}
        entries = admin.audit(100)
    assert [entry["event"] for entry in entries] == [
        "refused",
        "canary",
        "refused",
        "promoted",
        "stable",
        "shadow",
        "stable",
    ]
    assert {entry["who"] for entry in entries} == {"the admin (anna)"}
    assert entries[-1]["reason"] == "it stutters"
    assert len(site.promotion.audit(2)) == 2


@pytest.mark.parametrize(
    ("role", "error"), [("robot", Forbidden), ("operator", Forbidden), ("nobody", Unauthorised)], ids=str
)
def test_who_has_not_the_role_moves_nothing_and_is_in_the_audit_log(
    site: Site, role: str, error: type[Exception]
) -> None:
    with site.channels(role) as channels:
        for move in (
            lambda: channels.begin_canary("demo@2", share=0.5, rule=RULE, who="eve"),
            lambda: channels.promote("demo@2", force="I say so", who="eve"),
            lambda: channels.set_shadow("demo@2", who="eve"),
            lambda: channels.roll_back("demo", reason="", who="eve"),
        ):
            with pytest.raises(error):
                move()
        if role == "operator":
            assert channels.reports()[0].channels == {"stable": 1}
        else:
            with pytest.raises(error):
                channels.reports()
    assert site.promotion.reports()[0].channels == {"stable": 1}
    assert site.promotion.audit(10) == []
    assert [entry["error"] for entry in read_events(site.audit)] == [error.__name__] * (4 if role == "operator" else 5)


def test_moves_that_cannot_be_are_refused_with_their_reason(site: Site) -> None:
    with site.channels("admin") as admin:
        for move, error, reason in (
            (lambda: admin.begin_canary("demo@3", share=0.5, rule=RULE, who=""), MoveRefused, "control_hz"),
            (lambda: admin.begin_canary("demo@1", share=0.5, rule=RULE, who=""), MoveRefused, "incumbent itself"),
            (lambda: admin.begin_canary("demo@2", share=1.5, rule=RULE, who=""), MoveRefused, "share 1.5"),
            (lambda: admin.promote("demo@9", who=""), NotFound, "demo"),
            (lambda: admin.promote("demo", who=""), DataError, "name@"),
            (lambda: admin.promote("demo@2", force="x" * 2000, who=""), DataError, "2000 characters"),
            (lambda: admin.roll_back("demo", reason="", who=""), NotFound, "no canary that runs"),
            (lambda: admin.reports("dream"), NotFound, "no policy 'dream'"),
        ):
            with pytest.raises(error, match=reason):
                move()
    stub = channels_pb2_grpc.ChannelServiceStub
    nonsense = channels_pb2.CanaryRule(margin=float("nan"), confidence=0.9, min_episodes=3)
    with grpc.insecure_channel(site.server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        stub(channel).BeginCanary(
            channels_pb2.BeginCanaryRequest(reference="demo@2", share=0.1, rule=nonsense),
            metadata=(("authorization", f"Bearer {site.tokens['admin']}"),),
            timeout=10,
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert site.promotion.reports()[0].channels == {"stable": 1}


def test_a_service_without_its_registry_says_where_channels_are_moved(site: Site) -> None:
    assert site.server.service is not None
    ingest = FleetIngest(ListTable(), SPEC, IngestConfig(num_steps=8))
    versions = PolicyVersions(site.server.service.versions.registry, load_fake, VERSIONS)
    versions.start()
    plain = PolicyService(versions, DeadlineBatcher(BatcherConfig(bucket_sizes=BUCKETS)), ServiceConfig())
    with (
        SingleServer(plain, ingest=ingest) as server,
        ChannelsOf(server.address, None) as channels,
        pytest.raises(NotFound, match="moved where its registry is"),
    ):
        channels.reports()


def test_the_verbs_of_the_command_line_work_from_afar(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLA_DIST_FLEET_TOKEN", site.tokens["admin"])
    there = ["--server", site.server.address]
    with pytest.raises(SystemExit):
        main(["promote", "demo@2", "--force", "now", *there, "--token", site.tokens["operator"]])
    assert "needs 'admin'" in capsys.readouterr().err
    main(["promote", "demo@2", "--to", "canary", "--share", "0.5", "--min-episodes", "20", *there])
    assert "50% of the robots beside demo@1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["promote", "demo@2", *there])
    assert "0 of 20 episodes" in capsys.readouterr().err
    prove(site)
    main(["promote", "demo@2", *there])
    assert "demo@stable is version 2 now" in capsys.readouterr().out
    main(["channels", "--json", *there])
    found = json.loads(capsys.readouterr().out)
    assert found["policies"][0]["channels"] == {"canary": 2, "stable": 2}
    assert [entry["event"] for entry in found["audit"]] == ["canary", "refused", "promoted", "stable"]
    main(["rollback", "demo", *there])
    assert "from 2 back to 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["channels", "--redis-url", "redis://x", *there])
    assert "name two places" in capsys.readouterr().err


def test_a_robot_that_speaks_for_another_to_the_fleet_is_in_the_audit_log(site: Site) -> None:
    with PolicyClient(site.server.address, token=site.tokens["robot"]) as client:
        fleet = FleetClient(client, robot_id="other", spool_id="s")
        for call in (fleet.next_task, lambda: fleet.heartbeat({})):
            with pytest.raises(Forbidden, match="may speak for robot 'arm' only"):
                call()
        with pytest.raises(grpc.RpcError):
            list(fleet.upload(iter([_upload_of("other")])))
    entries = read_events(site.audit)
    assert [entry["error"] for entry in entries] == ["Forbidden"] * 3
    assert all("not for 'other'" in entry["reason"] and entry["peer"] for entry in entries)


def _upload_of(robot_id: str) -> bytes:
    claim = fleet_pb2.RobotClaim(robot_id=robot_id, spool_id="s", host="h")
    return fleet_pb2.UploadRequest(claim=claim).SerializeToString()
