import json

import pytest

from vla_dist.cli.main import main
from vla_dist.models.catalogue import catalogue, reference_spec
from vla_dist.models.zoo import ARCHITECTURES, architecture
from vla_dist.run.serve_app import free_ports


def test_every_member_and_size_is_listed_with_what_it_needs(capsys):
    main(["models", "--json"])
    entries = json.loads(capsys.readouterr().out)
    assert {(e["architecture"], e["preset"]) for e in entries} == {
        (name, preset) for name, member in ARCHITECTURES.items() for preset in member.presets
    }
    assert all(e["num_parameters"] >= e["num_trainable"] > 0 for e in entries)
    assert all(e["source"] for e in entries)


def test_parameters_are_those_of_a_real_model():
    member, spec = architecture("decision_transformer"), reference_spec()
    entries = {entry.preset: entry for entry in catalogue(member, spec)}
    tiny, small = entries["tiny"], entries["small"]
    model = member.model(member.configure("tiny", spec))
    assert tiny.num_parameters == sum(p.numel() for p in model.parameters())
    assert (tiny.needs, small.needs) == (("language",), ("language", "returns"))


def test_what_reads_words_by_itself_needs_language_too():
    needs = {entry.preset: entry.needs for entry in catalogue(architecture("bcz"), reference_spec())}
    assert needs == dict.fromkeys(("tiny", "small", "full", "clip"), ("camera", "language"))
    vit = {entry.preset: entry.needs for entry in catalogue(architecture("rt1"), reference_spec())}["vit"]
    assert vit == ("camera", "language")


def test_the_table_names_one_member_alone_and_unknown_ones_get_the_nearest(capsys):
    main(["models", "decision_transformer"])
    out = capsys.readouterr().out
    assert "128,004" in out
    assert "memory" not in out
    with pytest.raises(SystemExit) as ended:
        main(["models", "decision_transfomer"])
    assert ended.value.code == 1
    assert "did you mean 'decision_transformer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model.changes", "n_layers=3", "n_layer=3"), "did you mean 'n_layers'"),
        (("--model.architecture", "rt2", "--model.preset", "tiny"), "did you mean 'rt1'"),
        (("--model.execution.rule", "real_time", "--model.n-heads", "7"), "7 heads"),
    ],
)
def test_a_run_of_a_model_that_cannot_be_built_is_refused_in_one_sentence(capsys, tmp_path, words, named):
    (port,) = free_ports(1)
    with pytest.raises(SystemExit) as ended:
        main(["run", "babyai", "--runs-dir", str(tmp_path), "--serving.port", str(port), "--min-memory-gib=0", *words])
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert named in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
