import socket
import time

import pytest

from vla_dist.core.errors import ConfigError, Unauthorised, Unreachable
from vla_dist.replay.external import require_server
from vla_dist.replay.link import address_of


def test_a_good_server_passes(server):
    require_server(server.url)


@pytest.mark.parametrize("kind", ["nobody listens", "never answers"])
def test_a_server_that_does_not_answer_is_unreachable_in_time(kind):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "never answers":
            listener.listen()
        start = time.monotonic()
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1.* does not answer"):
            require_server(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", timeout_s=0.5)
        assert time.monotonic() - start < 2.0


def test_a_wrong_password_is_named_and_not_shown(server):
    path = server.directory / "server.sock"
    for url in (f"unix://client:hunter2@{path}", f"unix://{path}?username=client&password=hunter2@x"):
        with pytest.raises(Unauthorised, match="refuses this user") as error:
            require_server(url)
        assert "hunter2" not in str(error.value)
        assert "@x" not in str(error.value)


def test_no_redis_url_is_a_config_error():
    with pytest.raises(ConfigError, match=r"expected unix://..., redis://... or rediss://"):
        require_server("http://localhost")


def test_an_address_holds_no_secret():
    assert address_of("redis://user:secret@host:1/0") == "host:1/0"
    assert address_of("unix:///run/s.sock?username=u&password=a@b") == "unix:///run/s.sock"
