import json

import pytest

from vla_dist.cli.main import main

QUICK = ("--budget-s", "0.05")


def run_json(capsys, *words):
    main(("analyze", *words, *QUICK, "--json"))
    return json.loads(capsys.readouterr().out)


def test_a_size_is_measured_and_judged(capsys, tmp_path):
    picture = tmp_path / "costs.png"
    (found,) = run_json(
        capsys, "decision_transformer/tiny", "--control-hz", "0.5", "--network-ms", "20", "--picture", str(picture)
    )
    assert found["name"] == "decision_transformer/tiny"
    assert found["num_parameters"] == 128004
    assert found["act_flops"] == found["act_flops_closed_form"]
    assert found["verdict"]["control_hz"] == 0.5
    assert found["verdict"]["keeps_up_synchronously"]
    assert 1000 / found["verdict"]["synchronous_hz"] == pytest.approx(found["latency_ms"]["p99"] + 20)
    assert picture.stat().st_size > 10_000


def test_the_name_of_a_size_that_one_member_has_is_enough(capsys):
    (found,) = run_json(capsys, "gym")
    assert found["name"] == "decision_transformer/gym"


def test_a_run_is_analyzed_for_its_own_robot(capsys):
    (found,) = run_json(capsys, "babyai")
    assert found["name"].endswith("babyai run")


def test_tables_name_every_part(capsys):
    main(("analyze", "decision_transformer/tiny", *QUICK))
    out = capsys.readouterr().out
    assert all(word in out for word in ("128 k", "515 kB", "p99", "transformer 100,096", "Hz"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("decision_transformr/tiny",), "did you mean 'decision_transformer'"),
        (("decision_transformer/smal",), "did you mean 'small'"),
        (("tiny",), "did you mean decision_transformer/tiny"),
        (("demmo",), "did you mean demo"),
        (("gym", "--control-hz", "-3"), "-3"),
        (("gym", "--threads", "0"), "--threads 0"),
    ],
)
def test_what_cannot_be_analyzed_is_one_sentence(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        main(("analyze", *words, *QUICK))
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert said in err
    assert err.count("\n") == 1
