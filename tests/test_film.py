"""The film on the README's first screen, as it is committed: short, small, and moving."""

from __future__ import annotations

import pytest

from .film import IMAGES, LARGEST, LONGEST

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_film_is_short_small_and_moves(theme: str) -> None:
    file = IMAGES / f"film-{theme}.webp"
    assert file.stat().st_size <= LARGEST
    length, before, moved = 0, b"", 0
    with Image.open(file) as film:
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            length += film.info["duration"]
            now = film.convert("L").tobytes()
            moved, before = moved + (now != before), now
    assert 10_000 <= length <= 1000 * LONGEST and moved > 50
