"""Pictures of attention, by their pixels, and the files of an episode."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vla_dist.core.errors import DataError, NotFound
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.interpretation.attention import InterpretableVLA
from vla_dist.models.interpretation.episode import EpisodeWindows, _grid, _named_tokens, explain_episode
from vla_dist.models.interpretation.pictures import overlay, patch_grid, token_sheet, write_video
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_segment, make_spec
from vla_dist.testing.zoo import ZooCase, zoo_cases

CASES = {case.name: case for case in zoo_cases()}


def make_windows(case: ZooCase, *, num_steps: int = 6) -> EpisodeWindows:
    segments = [
        make_segment(case.spec, episode_id="e", segment_index=0, num_steps=4),
        make_segment(case.spec, episode_id="e", segment_index=1, num_steps=4, length=num_steps - 4, is_last=True),
    ]
    return EpisodeWindows(segments, case.spec, case.config, conditioning=ReturnConditioning(), goals=case.goals())


def test_a_grid_has_the_images_aspect_and_sums_to_one():
    weights = np.full((2, 3, 8), 0.125)
    grid = patch_grid(weights, height=20, width=40)
    assert grid is not None
    assert grid.shape == (2, 4)
    assert grid.sum() == pytest.approx(1)
    assert patch_grid(weights, height=40, width=40) is None


def test_a_class_token_is_asked_and_left_out():
    weights = np.zeros((1, 5, 5))
    weights[0, 0] = [0.6, 0.0, 0.4, 0.0, 0.0]
    weights[0, 1:, 4] = 1.0
    grid = patch_grid(weights, height=8, width=8)
    assert grid is not None
    assert grid.tolist() == [[0, 1], [0, 0]]


def test_the_overlay_shines_where_it_was_looked_at():
    image = np.full((8, 8, 3), 40, np.uint8)
    shown = overlay(image, np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert shown.shape == (224, 224, 3)
    assert shown[50, 50].sum() > 300
    assert shown[150, 150].tolist() == [40, 40, 40]
    assert overlay(image, np.ones((2, 2)))[0, 0].tolist() == [40, 40, 40], "equal weights highlight nothing"
    with pytest.raises(DataError, match="uint8"):
        overlay(image.astype(np.float32), np.ones((2, 2)))


def test_a_map_without_layers_is_refused():
    with pytest.raises(DataError, match="no attention map"):
        token_sheet({}, columns=[], rows={}, title="")


def test_videos_have_one_size_and_all_frames(tmp_path: Path):
    frames = [np.full((33, 41, 3), shade, np.uint8) for shade in (0, 120, 240)]
    write_video(tmp_path / "film.mp4", frames, rate_hz=5.0)
    with av.open(str(tmp_path / "film.mp4")) as film:
        shown = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [frame.shape for frame in shown] == [(32, 40, 3)] * 3
    assert [abs(int(frame.mean()) - shade) < 12 for frame, shade in zip(shown, (0, 120, 240), strict=True)] == [
        True
    ] * 3
    with pytest.raises(DataError, match="one size"):
        write_video(tmp_path / "film.mp4", [frames[0], frames[1][1:]], rate_hz=5.0)


def test_windows_are_those_of_the_episode():
    case = CASES["decision_transformer-camera"]
    windows = make_windows(case)
    assert windows.num_steps == 6
    window = windows.window(4)
    segments = [make_segment(case.spec, episode_id="e", segment_index=i, num_steps=4) for i in range(2)]
    proprio = np.concatenate([segment.proprio for segment in segments])
    np.testing.assert_array_equal(window.states[0].numpy(), proprio[:5])
    early = windows.window(1)
    assert early.padding_mask[0].tolist() == [False, False, False, True, True]
    assert early.timesteps[0].tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_array_equal(windows.frame("top", 5), segments[1].images["top"][1])
    with pytest.raises(NotFound, match="no camera"):
        windows.frame("nose", 0)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("rt1-default", {"top.png", "top.mp4", "tokens.png"}),
        ("decision_transformer-default", {"tokens.png"}),
        ("memory-default", {"tokens.png"}),
    ],
)
def test_an_episode_becomes_files(name: str, files: set[str], tmp_path: Path):
    case = CASES[name]
    written = explain_episode(case.build(), make_windows(case), tmp_path / "out", every=2)
    assert {path.name for path in written} == files == {path.name for path in (tmp_path / "out").iterdir()}
    for path in written:
        if path.suffix == ".png":
            assert np.asarray(Image.open(path)).std() > 5, "not an empty picture"
        else:
            with av.open(str(path)) as film:
                assert sum(1 for _ in film.decode(video=0)) == 3


def test_tokens_are_named_by_kind_and_step_and_steps_before_the_episode_are_left_out():
    plain = CASES["decision_transformer-default"].build()
    assert plain.token_names() == [("s", step) for step in range(-4, 1)]
    full = architecture("decision_transformer")
    names = full.model(full.configure("small", make_spec(), context_steps=2)).token_names()
    assert names == [("goal", None), ("R", -1), ("s", -1), ("a", -1), ("R", 0), ("s", 0)]
    model = CASES["rt1-default"].build()
    size = len(model.token_names())
    weights = np.arange(2 * size * size, dtype=float).reshape(2, size, size)
    trimmed, columns, rows = _named_tokens(model, {"layer": weights}, np.array([False, True, True]))
    per_step = size // 3
    assert columns == rows["layer"]
    assert columns[0] == "image 0 -1"
    assert columns[-1] == f"action {model.num_slots - 1} 0"
    np.testing.assert_array_equal(trimmed["layer"], weights[:, per_step:, per_step:])


def test_all_tokens_of_a_window_have_a_name():
    for name in ("decision_transformer-default", "decision_transformer-discrete", "rt1-default", "memory-default"):
        case = CASES[name]
        model = case.build()
        watched = InterpretableVLA(model)
        with watched.watch():
            model.loss(case.batch())
        widths = {
            weights.shape[-1] for layer, weights in watched.get_attention_maps().items() if "learner" not in layer
        }
        assert len(model.token_names()) in widths, name


def test_patches_that_look_at_words_are_drawn_where_they_are():
    weights = np.zeros((1, 4, 3))
    weights[0, :, 0] = [0.2, 1.0, 1.0, 1.0]
    weights[0, 0, 1] = 0.8
    grid = _grid("fusion.attention", weights, np.zeros((8, 8, 3), np.uint8))
    assert grid is not None
    np.testing.assert_allclose(grid, [[1, 0], [0, 0]])
    assert _grid("layers.0.attention", weights, np.zeros((8, 8, 3), np.uint8)) is None


def test_steps_and_episodes_that_are_not_there_are_refused(tmp_path: Path):
    case = CASES["decision_transformer-default"]
    with pytest.raises(NotFound, match="no step 6"):
        explain_episode(case.build(), make_windows(case), tmp_path, step=6)
    half = make_segment(case.spec, episode_id="e", num_steps=4)
    with pytest.raises(DataError, match="complete"):
        EpisodeWindows([half], case.spec, case.config, conditioning=ReturnConditioning(), goals=None)


@pytest.mark.parametrize("skills", [[], ["go"]], ids=["latent", "skills"])
def test_a_model_without_attention_is_refused(skills: list[str], tmp_path: Path):
    case = CASES["hierarchical-default"]
    case = replace(case, config=case.architecture.presets["tiny"](case.spec, skills=skills))
    with pytest.raises(NotFound, match="no attention"):
        explain_episode(case.build(), make_windows(case), tmp_path)
