import json

import numpy as np
import pytest

from vla_dist.cli.main import main
from vla_dist.core.types import PolicyArtifact, PolicyManifest
from vla_dist.registry.blobs import open_blobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.server import EmbeddedServer
from vla_dist.testing.fakes import make_spec


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A registry with four versions, of which the first is served and the second no longer needed."""
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as server:
        registry = RedisPolicyRegistry(server.url, open_blobs(server.url))
        for value in range(1, 5):
            manifest = PolicyManifest(
                name="picker",
                architecture="fake",
                config={"model": {"width": value}},
                spec=make_spec(),
                horizon=1,
                metrics={"updates": 100.0 * value},
                created_unix_s=1.6e9,
            )
            registry.publish(PolicyArtifact(manifest=manifest, tensors={"bias": np.full(3, value, np.float32)}))
        registry.set_channel("picker", "stable", 1)
        yield server.url
        registry.close()


@pytest.fixture
def call(url, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, status=0):
        if status:
            with pytest.raises(SystemExit) as end:
                main(["registry", *words, "--redis-url", url])
            assert end.value.code == status
        else:
            main(["registry", *words, "--redis-url", url])
        out, err = capsys.readouterr()
        return err if status else out

    return call


def test_list_shows_versions_and_channels(call):
    text = call("list")
    assert "picker@1" in text
    assert "stable" in text
    rows = json.loads(call("list", "--json"))
    assert [(row["version"], row["channels"]) for row in rows] == [(1, ["stable"]), (2, []), (3, []), (4, [])]
    assert "nearest: picker" in call("list", "--name", "piker", status=1)


def test_show_takes_channels_and_versions(call):
    shown = json.loads(call("show", "picker@stable", "--json"))
    assert (shown["version"], shown["config"], shown["metrics"]) == (1, {"model": {"width": 1}}, {"updates": 100.0})
    assert [(move["channel"], move["version"]) for move in shown["history"]] == [("stable", 1)]
    text = call("show", "picker@3")
    assert "no channel" in text
    assert '"width": 3' in text
    assert "picker@stable" in call("show", "picker@stabel", status=1)
    assert "must be written name@channel" in call("show", "picker", status=1)


def test_diff_names_what_changed(call):
    found = json.loads(call("diff", "picker@1", "picker@3", "--json"))
    assert found["fields"]["config.model.width"] == [1, 3]
    assert found["tensors"] == [{"name": "bias", "what": "values", "relative_change": pytest.approx(2.0)}]
    assert "relative change" in call("diff", "picker@1", "picker@3")
    assert "the same" in call("diff", "picker@2", "picker@2")


def test_pull_writes_files(call, tmp_path):
    assert "picker@1" in call("pull", "picker@stable", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["version"] == 1
    assert "another folder" in call("pull", "picker@2", str(tmp_path / "out"), status=1)


def test_gc_tells_before_it_removes(call):
    dry = call("gc", "--keep-newest", "1")
    assert "kept: channel stable" in dry
    assert "--apply removes" in dry
    assert len(json.loads(call("list", "--json"))) == 4
    # Versions 2 and 3 were fetched by the tests above, if those ran: a lease of theirs may hold them.
    done = json.loads(call("gc", "--keep-newest", "1", "--apply", "--json"))
    assert set(done["removed"]) <= {"picker@2", "picker@3"}
    kept = {row["reference"]: row["kept"] for row in done["versions"]}
    assert kept["picker@1"] == "channel stable"
    assert kept["picker@4"] == "among the newest 1"
    assert "at least 1" in call("gc", "--keep-newest", "0", status=1)


def test_an_unknown_verb_and_two_places_are_refused(call, tmp_path):
    assert "did you mean 'vla-dist registry list'" in call("lst", status=1)
    assert "two registries" in call("list", "--run", str(tmp_path), status=1)
