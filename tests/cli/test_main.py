import subprocess
import sys

import pytest

from vla_dist.cli.main import VERBS, main


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_help_names_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


def test_nothing_said_is_a_wrong_call(capsys):
    assert run(capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("rnu", "demo"), "vla-dist run"),
        (("run", "dmo"), "did you mean demo"),
        (("run", "demo", "--learner.batchsize", "3"), "--learner.batch-size"),
        (("run", "demo", "--sede=3"), "--seed"),
        (("bench", "reply"), "did you mean replay"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest_in_one_line(capsys, words, near):
    code, _, err = run(capsys, *words)
    assert code in (1, 2)
    assert near in err
    assert err.count("\n") == 1


def test_every_verb_explains_itself(capsys):
    for verb in VERBS:
        code, out, _ = run(capsys, verb, "--help")
        assert code == 0, verb
        assert "usage" in out.lower(), verb


def test_a_reader_that_leaves_early_gets_no_traceback():
    command = [sys.executable, "-m", "vla_dist.cli", "run", "demo", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(timeout=60) in (0, 1)


def test_a_folder_that_is_no_run_is_named(capsys, tmp_path):
    for verb in ("inspect", "evaluate", "serve"):
        code, _, err = run(capsys, verb, str(tmp_path))
        assert code == 1
        assert str(tmp_path) in err


def test_other_machines_need_a_token(capsys, tmp_path):
    code, _, err = run(capsys, "serve", str(tmp_path), "--host", "0.0.0.0")
    assert code == 1
    assert "--token" in err


def test_a_taken_port_is_one_sentence_and_starts_nothing(capsys, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run(
            capsys, "run", "babyai", "--runs-dir", str(tmp_path), "--serving.port", str(port), "--min-memory-gib", "0"
        )
    assert code == 1
    assert f"port {port}" in err
    assert "taken" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_sentence(capsys, tmp_path):
    code, _, err = run(capsys, "run", "babyai", "--runs-dir", str(tmp_path), "--min-memory-gib", "100000")
    assert code == 1
    assert "100000" in err
    assert err.count("\n") == 1


def test_an_unreachable_redis_is_one_sentence(capsys, tmp_path):
    from vla_dist.run.serve_app import free_ports

    redis_port, port = free_ports(2)
    words = ("--replay.redis-url", f"redis://127.0.0.1:{redis_port}", "--serving.port", str(port))
    code, _, err = run(capsys, "run", "babyai", "--runs-dir", str(tmp_path), "--min-memory-gib", "0", *words)
    assert code == 1
    assert f"127.0.0.1:{redis_port} does not answer" in err
    assert err.count("\n") == 1


def test_cameras_without_graphics_name_the_packages(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    words = ("--cameras", "--runs-dir", str(tmp_path), "--min-memory-gib", "0")
    code, _, err = run(capsys, "run", "demo", *words)
    assert code == 1
    assert "libegl1" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_a_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "run", "demo", "--resume")
    assert code == 1
    assert "no run of preset 'demo'" in err


def test_a_pipe_that_breaks_while_a_run_is_stopped_is_still_ctrl_c(monkeypatch, capsys):
    def stopped(words):
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise ValueError("something on the way down")
        finally:
            raise BrokenPipeError

    monkeypatch.setattr("vla_dist.cli.doctor.main", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 130
    assert "stopped" in capsys.readouterr().err
