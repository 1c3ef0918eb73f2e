"""Servers behind TLS: it works with everything the wire client does, and each mistake has a name."""

import logging
import time

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, Unauthorised, Unreachable
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.external import require_server
from vla_dist.replay.link import RedisLink
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_spec

from .tls_proxy import Authority, TlsProxy

SPEC = make_spec(cameras=(CameraSpec(name="front", height=84, width=84),), max_episode_steps=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder):
    return Authority(folder, "ours")


@pytest.fixture(scope="module")
def plain(folder):
    with EmbeddedServer(folder / "server", port=0) as running:
        yield running


@pytest.fixture
def make_proxy(plain, authority):
    running = []

    def make(host="127.0.0.1", *, days=2.0, by=None, **options):
        running.append(TlsProxy(plain.port, (by or authority).issue(host, days=days), **options))
        return running[-1]

    yield make
    for proxy in running:
        proxy.close()


@pytest.fixture
def url_of(plain, authority):
    """``rediss://`` URL of the client through a proxy."""

    def make(proxy, *, host="127.0.0.1", scheme="rediss", ca=None, **options):
        words = {"ssl_ca_certs": ca or authority.path, **options} if scheme == "rediss" else {}
        query = "&".join(f"{name}={value}" for name, value in words.items())
        user = plain.url.partition("://")[2].partition("@")[0]
        return f"{scheme}://{user}@{host}:{proxy.port}/0?{query}"

    return make


def refusal_of(url, kind, *, timeout_s=2.0):
    """What each way in says, all in time."""
    texts = []
    link = RedisLink(url)
    for action in (
        lambda: link.call([("PING",)], timeout_s=timeout_s),
        lambda: require_server(url, timeout_s=timeout_s),
    ):
        start = time.monotonic()
        with pytest.raises(kind) as error:
            action()
        assert time.monotonic() - start < timeout_s + 4.0
        texts.append(str(error.value))
    link.close()
    assert texts[0] == texts[1]
    return texts[0]


def test_a_table_works_through_tls_large_images_included(make_proxy, url_of, make_episode):
    url = url_of(make_proxy())
    require_server(url)
    table = RedisReplayTable(url, SPEC, BufferConfig(name="images", context_steps=20))
    stored = [make_episode(f"e{n}", 100, spec=SPEC, num_steps=32, seed=n) for n in range(3)]
    for segments in stored:
        assert table.append_all(segments, timeout_s=30.0) == ["inserted"] * 4
    batch = table.sample(64, timeout_s=30.0)
    assert batch.images["front"].nbytes > 25_000_000
    frames = {
        float(s[0].proprio[0, 0]): np.concatenate([part.images["front"][: part.length] for part in s]) for s in stored
    }
    firsts = {float(s[0].proprio[0, 0]): np.concatenate([part.proprio[: part.length] for part in s]) for s in stored}
    for window in range(64):
        mask, steps = batch.padding_mask[window], batch.timesteps[window]
        (mine,) = [key for key, rows in firsts.items() if np.array_equal(rows[steps[-1]], batch.proprio[window][-1])]
        np.testing.assert_array_equal(batch.images["front"][window][mask], frames[mine][steps[mask]])
    for found, expected in zip(table.episodes(), stored, strict=True):
        np.testing.assert_array_equal(found[1].images["front"], expected[1].images["front"])
    table.close()


def test_connections_are_kept(make_proxy, url_of):
    """What TLS itself sends after the handshake must not look like a connection that broke."""
    link = RedisLink(url_of(make_proxy()))
    ids = {link.call([("CLIENT", "ID")], timeout_s=5.0)[0] for _ in range(20)}
    assert len(ids) == 1
    assert link.num_breaks == 0
    link.close()


def test_a_client_may_have_to_show_a_certificate(make_proxy, url_of, authority, folder):
    proxy = make_proxy(clients_of=authority.path)
    certificate, key = authority.issue("client")
    require_server(url_of(proxy, ssl_certfile=certificate, ssl_keyfile=key))
    assert "does not answer" in refusal_of(url_of(proxy), Unreachable)
    stranger, its_key = Authority(folder, "strangers").issue("stranger")
    refusal_of(url_of(proxy, ssl_certfile=stranger, ssl_keyfile=its_key), Unreachable)


def test_an_authority_that_signed_something_else(make_proxy, url_of, folder):
    other = Authority(folder, "others")
    text = refusal_of(url_of(make_proxy(), ca=other.path), ConfigError)
    assert "certificate of Redis at 127.0.0.1:" in text
    assert "is not accepted" in text
    assert "ssl_ca_certs=FILE" in text


def test_an_authority_nobody_named(make_proxy, url_of):
    proxy = make_proxy()
    text = refusal_of(url_of(proxy).partition("?")[0], ConfigError)
    assert "is not accepted" in text


def test_another_host_name(make_proxy, url_of):
    text = refusal_of(url_of(make_proxy("replay.example")), ConfigError)
    assert "IP address mismatch" in text
    assert "host name that it is made for" in text
    require_server(url_of(make_proxy("localhost"), host="localhost"))


def test_a_certificate_that_has_expired(make_proxy, url_of):
    assert "certificate has expired" in refusal_of(url_of(make_proxy(days=-1)), ConfigError)


def test_plain_text_to_a_port_with_tls(make_proxy, url_of):
    text = refusal_of(url_of(make_proxy(), scheme="redis"), Unreachable)
    assert "does not answer" in text


def test_tls_to_a_port_without(plain, url_of):
    text = refusal_of(url_of(plain), Unreachable)
    assert "no TLS handshake" in text
    assert "redis:// is for servers without TLS" in text


def test_files_that_are_not_there(make_proxy, url_of):
    text = refusal_of(url_of(make_proxy(), ca="/nowhere/ca.pem"), ConfigError)
    assert "the TLS files of the Redis URL cannot be used" in text


@pytest.mark.parametrize("value", ["none", "optional"])
def test_a_server_that_nobody_checks_is_refused(make_proxy, url_of, value):
    with pytest.raises(ConfigError, match="ssl_cert_reqs must be left out"):
        RedisLink(url_of(make_proxy(), ssl_cert_reqs=value))
    with pytest.raises(ConfigError, match="ssl_cert_reqs must be left out"):
        require_server(url_of(make_proxy(), ssl_cert_reqs=value))


@pytest.mark.parametrize("case", ["password", "host", "port", "certificate", "database", "gone"])
def test_no_error_and_no_log_shows_a_password(make_proxy, url_of, folder, case, caplog, capfd):
    secret = "hunter2@%2Fx"
    proxy = make_proxy(days=-1) if case == "certificate" else make_proxy()
    user = url_of(proxy).partition("://")[2].partition("@")[0]
    url = url_of(proxy).replace(user, f"client:{secret}")
    url = {
        "password": url,
        "host": url.replace("127.0.0.1", "no-such-host.invalid"),
        "port": url.replace(f":{proxy.port}", ":1"),
        "certificate": url,
        "database": url.replace("/0?", "/9?"),
        "gone": url.replace("rediss", "redis"),
    }[case]
    with caplog.at_level(logging.DEBUG):
        for action in (
            lambda: RedisLink(url).call([("PING",)], timeout_s=1.0),
            lambda: require_server(url, timeout_s=1.0),
            lambda: RedisReplayTable.open(url, "nothing"),
        )[: 3 if case in ("password", "certificate") else 2]:
            with pytest.raises((ConfigError, Unauthorised, Unreachable)) as error:
                action()
            shown = repr(error.value) + str(error.value)
            cause = error.value
            while cause is not None:
                shown += repr(cause)
                cause = cause.__cause__
            assert "hunter2" not in shown
    assert "hunter2" not in caplog.text + "".join(capfd.readouterr())
