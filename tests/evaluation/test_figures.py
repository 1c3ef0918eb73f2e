import numpy as np
import pytest
from PIL import Image

from vla_dist.core.errors import DataError
from vla_dist.evaluation.figures import draw_learning_curve, write_film
from vla_dist.evaluation.statistics import success_rate


def test_curve_shows_as_many_versions_as_were_judged(tmp_path):
    rates = [success_rate(n, 10) for n in (0, 5, 9)]
    draw_learning_curve(
        tmp_path / "curve.png",
        updates=[0, 10, 20],
        overall=rates,
        by_task=[{"go": r} for r in rates],
        language={"right": rates[2], "zeroed": rates[1], "wrong": rates[0]},
        title="t",
    )
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 800
    assert (pixels < 50).all(axis=2).sum() > 500  # the black curve
    with pytest.raises(DataError, match="as many"):
        draw_learning_curve(tmp_path / "x.png", updates=[0], overall=rates, by_task=[], language={}, title="t")


def test_film_keeps_every_frame_under_its_caption(tmp_path):
    frames = [np.full((40, 60, 3), 60 * i, np.uint8) for i in range(3)]
    write_film(tmp_path / "film.gif", [("open the drawer", frames), ("close it", frames[:2])])
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 5
        assert film.size == (60, 40)
    with pytest.raises(DataError, match="at least one frame"):
        write_film(tmp_path / "none.gif", [])
