"""Re-generated data sets are what they are said to be."""

from __future__ import annotations

import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import generated_data as data


def test_all_hands_there_are_have_the_published_numbers_of_each_class() -> None:
    """Every 20th of the 2,598,960 sets of five cards, to within what chance allows; the sum of all
    numbers is that of the sets."""
    assert data.SETS.sum() == 2_598_960
    sets = np.array(list(combinations(range(52), 5))[::20])
    counts = np.bincount(data.rank_of(sets), minlength=10)
    expected = data.SETS / 20
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 2).all(), counts


def test_dealt_hands_have_the_frequencies_of_the_classes() -> None:
    found = np.bincount(data.rank_of(data.hands(100_000)), minlength=10)
    expected = data.SETS / data.SETS.sum() * 100_000
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected) + 2).all(), found
    x, y = data.poker(20_000, seed=1)
    assert (x.reshape(-1, 5, 17).sum(2) == 2).all()
    assert abs(y.mean() - 0.4988) < 0.02


def test_cards_of_a_hand_are_different() -> None:
    assert (np.diff(np.sort(data.hands(1000)), axis=1) > 0).all()


def test_labels_are_those_of_the_published_hands() -> None:
    folder = os.environ.get("GRAPHGROW_DATA")
    path = Path(folder or "") / "poker-hand-training-true.data"
    if not folder or not path.exists():
        pytest.skip("GRAPHGROW_DATA names no directory with poker-hand-training-true.data")
    rows = np.loadtxt(path, delimiter=",", dtype=int)
    cards = (rows[:, 0:10:2] - 1) * 13 + rows[:, 1:10:2] - 1
    assert (data.rank_of(cards) == rows[:, 10]).all()


def test_convex_images_are_convex_and_the_others_are_not() -> None:
    images, labels = data.convex(300)
    found = np.array([data.is_convex(image > 0) for image in images])
    assert (found == labels.astype(bool)).all()
    assert abs(labels.mean() - 0.5) < 0.1
    white = images.sum(1)
    ratio = white[labels == 1].mean() / white[labels == 0].mean()
    assert 0.85 < ratio < 1.15  # as many in both classes, so that counting does not help


@pytest.mark.parametrize(
    ("rows", "convex"),
    [
        (["###"], True),
        (["#.#"], False),
        (["##", "##"], True),
        (["#..", ".#.", "..#"], True),
        (["#..", "...", "..#"], False),
        (["###", "#.#", "###"], False),
        (["##.", "#..", "..."], True),
        (["####", "#...", "#...", "#..."], False),
        (["#"], True),
    ],
)
def test_small_shapes_are_told_apart(rows: list[str], convex: bool) -> None:
    image = np.zeros((28, 28), dtype=bool)
    for i, row in enumerate(rows):
        for j, mark in enumerate(row):
            image[i + 3, j + 5] = mark == "#"
    assert data.is_convex(image.reshape(-1)) == convex


def test_rectangles_are_tall_or_wide_as_often_and_of_the_published_sizes() -> None:
    """Published: half of the images are of each class; sides from 10, and differ by 5 or more."""
    images, labels = data.rectangles(4000)
    assert abs(labels.mean() - 0.5) < 5 * 0.5 / 4000**0.5
    assert images.min() >= 0 and images.max() <= 1 and images.shape == (4000, 784)
    height, width, top, left = data.sides(np.random.default_rng(0), 4000)
    assert ((height > width) == labels.astype(bool)).all()
    assert min(height.min(), width.min()) == 10 and max(height.max(), width.max()) == 28
    assert np.abs(height - width).min() == 5
    assert (top + height).max() == (left + width).max() == 28 and min(top.min(), left.min()) == 0


def test_a_rectangle_is_another_picture_than_what_is_around_it() -> None:
    """Steps of brightness are larger across its border than elsewhere, and nothing else tells."""
    images, labels = data.rectangles(3000)
    images = images.reshape(-1, 28, 28)
    _, _, top, left = data.sides(np.random.default_rng(0), 3000)
    step = np.abs(np.diff(images, axis=1))
    inner = [k for k in range(3000) if top[k] > 0]
    across = np.mean([step[k, top[k] - 1, left[k] : left[k] + 10].mean() for k in inner])
    within = np.mean([step[k, top[k] + 1, left[k] : left[k] + 10].mean() for k in inner])
    assert across > 1.7 * within
    means = [images[labels == k].mean() for k in (0, 1)]
    assert abs(means[0] - means[1]) < 0.01


def test_the_same_seed_gives_the_same_data() -> None:
    for make in (data.poker, data.convex, data.rectangles):
        (x, y), (again, labels) = make(50, seed=3), make(50, seed=3)
        assert (x == again).all() and (y == labels).all()
