"""The frame of the learning benchmarks, and their quick forms, which catch rot and claim nothing."""

import dataclasses
import importlib
import json
import runpy
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in (FOLDER / "learn").glob("*.py") if path.stem not in ("__init__", "settings"))
OURS = tuple(name for name in NAMES if name != "dt_teachers")


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def settings(tmp_path, **changes):
    from learn.settings import Settings

    return Settings(**{"seeds": (0,), "quick": True, "in_process": True, "work_dir": tmp_path, **changes})


def run_quick(name, tmp_path, **changes):
    module = importlib.import_module(f"learn.{name}")
    result = json.loads(json.dumps(module.run(settings(tmp_path, **changes))))
    module.figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    return result


def check(result, name):
    assert result["name"] == name.replace("_", "-")
    assert result["claims"] is False
    assert result["targets"] == []
    assert result["wall_s"].keys() == {"0"}
    for label, found in result["measures"].items():
        assert found["low"] <= found["mean"] <= found["high"], label
        assert found["by_seed"].keys() == {"0"}


@pytest.mark.timeout(400)
def test_quick_key_to_door_runs_in_one_process_and_keeps_its_seed(tmp_path):
    result = run_quick("key_to_door", tmp_path)
    check(result, "key_to_door")
    again = run_quick("key_to_door", tmp_path)
    assert again["wall_s"] == result["wall_s"]
    assert list(tmp_path.glob("key-to-door-*/seed-0.json"))
    assert not list(tmp_path.glob("key-to-door-*/seed-0"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.gl] if name.endswith("camera") else [])
        for name in OURS
        if name != "key_to_door"
    ],
)
def test_quick_forms_run_in_one_process(name, tmp_path):
    check(run_quick(name, tmp_path), name)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_quick_key_to_door_runs_through_ray(tmp_path):
    result = run_quick("key_to_door", tmp_path, in_process=False)
    check(result, "key_to_door")
    assert "Ray" in result["path"]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_quick_dt_teachers_runs_with_rllib(tmp_path):
    result = run_quick("dt_teachers", tmp_path)
    check(result, "dt_teachers")
    (found,) = result["by_seed"].values()
    assert [found["data"][level]["episodes"] > 0 for level in ("random", "medium", "expert")] == [True] * 3
    assert len(found["asked"]) == len(result["protocol"]["asked_shares"])


def answer_of(name, **changes):
    from learn.settings import Settings
    from learn_parts.results import answer, measure, target

    rates = {f"DT, {size}": measure({0: (60, 100), 1: (70, 100)}) for size in ("1,000 episodes", "10,000 episodes")}
    found = answer(
        Settings(),
        name=name,
        title="Key-to-Door",
        question="Does it?",
        protocol={"layouts": "split", "sizes": [1, 2]},
        seeds={
            seed: {"wall_s": wall_s, "date": f"2026-11-2{seed}", "git_revision": "0123456789ab"}
            for seed, wall_s in ((0, 12.4), (1, 13.6))
        },
        measures=rates,
        targets=[target("DT", 0.65, 0.6, source="a paper"), target("wrong", 0.3, 0.1, at_most=True)],
        notes=["A note."],
    )
    return {**found, **changes}


def test_the_page_is_made_from_the_files_alone(tmp_path):
    from learn_parts.page import write_page

    results, page = tmp_path / "results", tmp_path / "docs" / "results.md"
    results.mkdir()
    page.parent.mkdir()
    (results / "key-to-door.json").write_text(json.dumps(answer_of("key-to-door")))
    (results / "key-to-door-in-process.json").write_text(json.dumps(answer_of("key-to-door")))
    assert write_page(results, page) == ["key-to-door-in-process.json", "key-to-door.json"]
    text = page.read_text()
    assert "## Key-to-Door: in-process" in text
    assert "| DT, 1,000 episodes | **0.65** | 0.582 to 0.713 | 0.6 | 0.7 | 200 |" in text
    assert "| DT | at least 0.6 (a paper) | 0.65 | met |" in text
    assert "| wrong | at most 0.1 | 0.3 | **missed** |" in text
    assert "`vla-dist bench learn key-to-door --seeds 3`: 12, 14 s for each seed" in text
    assert "| [Key-to-Door](#key-to-door) | 0, 1 | 1 of 2 |" in text
    assert "seed 0: 2026-11-20, revision 0123456789; seed 1: 2026-11-21, revision 0123456789; `benchmarks" in text
    for name in ("key-to-door", "key-to-door-in-process"):
        assert f"](results/{name}.png)" in text
        assert (page.parent / "results" / f"{name}.png").exists()


def test_the_page_says_whether_one_process_and_the_whole_system_agree(tmp_path):
    from learn_parts.agreement import agreement, differences
    from learn_parts.results import measure

    hosted = answer_of("key-to-door")
    alone = answer_of("key-to-door", command="vla-dist bench learn key-to-door --seeds 3 --in-process")
    assert agreement([hosted]) == ""
    assert agreement([hosted, {**alone, "protocol": {"updates": 3}}]) == "", "another protocol is another benchmark"
    text = agreement([hosted, alone])
    assert "| Key-to-Door | DT, 1,000 episodes | +0.000 |" in text
    assert text.count("| agree |") == 2
    apart = {**hosted["measures"], "DT, 1,000 episodes": measure({0: (10, 100), 1: (20, 100)})}
    found = differences(alone, {**hosted, "measures": apart})["DT, 1,000 episodes"]
    assert found["mean"] == pytest.approx(-0.5)
    assert found["low"] < -0.5 < found["high"] < 0.0
    assert (found["seeds_low"], found["seeds_high"]) == pytest.approx((-0.5, -0.5))
    assert "**differ**" in agreement([alone, {**hosted, "measures": apart}])
    single = {"DT, 1,000 episodes": measure({0: (60, 100)})}
    lone = agreement([{**alone, "measures": single}, {**hosted, "measures": single}])
    assert "| - | agree |" in lone
    wild = {**hosted["measures"], "DT, 1,000 episodes": measure({0: (95, 100), 1: (60, 100)})}
    assert "agree over seeds, **differ** over episodes" in agreement([alone, {**hosted, "measures": wild}])


def test_a_quick_run_does_not_get_onto_the_page(tmp_path):
    from learn_parts.page import write_page

    (tmp_path / "key-to-door.json").write_text(json.dumps(answer_of("key-to-door", claims=False)))
    with pytest.raises(ValueError, match="claims nothing"):
        write_page(tmp_path, tmp_path / "page.md")


def test_the_page_in_the_repository_is_that_of_the_results(tmp_path):
    from learn_parts.page import PAGE, RESULTS, write_page

    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    write_page(RESULTS, page)
    assert page.read_text() == PAGE.read_text(), "run: vla-dist bench learn --page"


def test_seeds_are_run_once_and_only_for_one_protocol(tmp_path):
    from learn_parts.seeds import run_seeds

    from vla_dist.run.presets import preset

    ran = []

    def run_seed(seed, folder, parts, say):
        ran.append(seed)
        if seed == 2 and ran.count(2) == 1:
            time.sleep(0.25)
            raise KeyboardInterrupt
        return {"value": seed}

    def run(seeds, **protocol):
        return run_seeds(settings(tmp_path, seeds=seeds), "one", protocol, preset("key-to-door"), run_seed)

    with pytest.raises(KeyboardInterrupt):
        run((1, 2), size=3)
    found = run((1, 2), size=3)
    assert ran == [1, 2, 2]
    assert [found[seed]["value"] for seed in (1, 2)] == [1, 2]
    assert found[2]["wall_s"] >= 0.2, "the interrupted attempt counts"
    run((1,), size=4)
    assert ran == [1, 2, 2, 1]


def test_seeds_that_an_earlier_answer_holds_are_not_run_again(tmp_path):
    from learn_parts.results import answer
    from learn_parts.seeds import run_seeds

    from vla_dist.run.presets import preset

    ran, file = [], tmp_path / "one.json"

    def run_seed(seed, folder, parts, say):
        ran.append(seed)
        return {"value": seed}

    def run(seeds, work_dir, **protocol):
        given = settings(tmp_path / work_dir, seeds=seeds, earlier=file)
        found = run_seeds(given, "one", protocol, preset("key-to-door"), run_seed)
        words = dict.fromkeys(("name", "title", "question"), "one")
        file.write_text(json.dumps(answer(given, **words, protocol=protocol, seeds=found, measures={})))
        return found

    first = run((0,), "a", size=3)
    found = run((0, 1), "b", size=3)
    assert ran == [0, 1]
    assert found[0] == first[0]
    assert {"machine", "date", "git_revision"} <= found[0].keys()
    run((0,), "c", size=4)
    assert ran == [0, 1, 0], "another protocol is another benchmark"


def test_results_call_a_missed_figure_missed():
    from learn_parts.results import target

    assert target("share", 0.94, 0.95)["met"] is False
    assert target("share", 0.95, 0.95)["met"] is True
    assert target("wrong", 0.11, 0.10, at_most=True)["met"] is False


def test_demonstrations_that_were_needed_are_those_of_the_first_size_that_reached():
    from learn.babyai_interactive import _describe, _needed, _ratio, _ratio_of_means

    quick, slow = [(100, (60, 100)), (150, (96, 100)), (230, (99, 100))], [(100, (60, 100)), (900, (97, 100))]
    curves = {"interactive": quick, "passive": slow}
    assert [_needed(quick, share) for share in (0.5, 0.95, 0.99, 1.0)] == [100, 150, 230, None]
    assert _ratio(curves, 0.95) == 6.0
    assert _describe(3, curves, 0.95) == "Demonstrations to 95%, seed 3: interactive 150, passive 900; 6.0 times."
    assert "passive not with 900; at least 3.9 times" in _describe(3, curves, 0.99)
    assert _describe(3, curves, 1.0).endswith("interactive not with 230, passive not with 900.")
    assert _ratio(curves, 1.0) == 0.0
    seeds = {0: curves, 1: {"interactive": [(100, (95, 100))], "passive": [(100, (95, 100))]}}
    assert _ratio_of_means(seeds, 0.95) == (900 + 100) / (150 + 100)
    assert _ratio_of_means(seeds, 0.99) == 0.0


def test_shuffled_words_are_the_same_words_on_other_episodes():
    from learn.babyai_fusion import with_shuffled_words

    from vla_dist.testing.fakes import make_segment, make_spec

    spec = make_spec()
    plain = [make_segment(spec, episode_id=f"e{n}", num_steps=4, is_last=True) for n in range(30)]
    episodes = [[dataclasses.replace(one, instruction=f"go to {n}")] for n, one in enumerate(plain)]
    shuffled = list(with_shuffled_words(episodes, seed=0))
    assert sorted(e[0].instruction for e in shuffled) == sorted(e[0].instruction for e in episodes)
    moved = sum(e[0].instruction != f"go to {e[0].episode_id[1:]}" for e in shuffled)
    assert moved > 20


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(("key-to-dor",), "did you mean key-to-door"), ((), "which one"), (("t-maze", "--seeds", "0"), "at least 1")],
)
def test_a_wrong_call_is_told_what_there_is(words, complaint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vla-dist bench learn", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / "learn.py"), run_name="__main__")
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
