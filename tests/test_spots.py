"""The vote in the plane: golden numbers, and every number against a dense grid of pixels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ttrl.rewards.spots import SpotVote, spot_vote, square, to_pixels


def vote(boxes, width=10, height=10) -> SpotVote:
    return spot_vote(to_pixels([None if box is None else tuple(map(float, box)) for box in boxes], width, height))


def painted(pixels: np.ndarray, width: int, height: int) -> SpotVote:
    """The slow twin: paint every region on a grid of pixels."""
    grid = np.zeros((height, width), int)
    for x1, y1, x2, y2 in pixels:
        grid[y1:y2, x1:x2] += 1
    peak = int(grid.max())
    if peak == 0:
        return SpotVote(peak=0, region=None, area=0, densities=np.zeros(len(pixels)))
    labels, count = ndimage.label(grid == peak)
    sizes = [int((labels == i).sum()) for i in range(1, count + 1)]
    rows, columns = ndimage.find_objects(labels)[int(np.argmax(sizes))]
    densities = [grid[y1:y2, x1:x2].mean() / peak if x2 > x1 else 0.0 for x1, y1, x2, y2 in pixels]
    region = (columns.start, rows.start, columns.stop, rows.stop)
    return SpotVote(peak=peak, region=region, area=max(sizes), densities=np.asarray(densities))


def test_the_golden_example_of_the_paper():
    found = vote([(0, 0, 4, 4), (2, 2, 6, 6), (2, 2, 4, 4)])
    assert (found.peak, found.region, found.area, found.centre) == (3, (2, 2, 4, 4), 4, (3.0, 3.0))
    np.testing.assert_allclose(found.densities, [0.5, 0.5, 1.0])


def test_equal_boxes_are_all_paid_one_and_disjoint_ones_carry_no_signal():
    np.testing.assert_array_equal(vote([(1, 1, 5, 5)] * 4).densities, np.ones(4))
    apart = vote([(0, 0, 2, 2), (4, 4, 8, 8), (8, 0, 10, 2)])
    assert (apart.peak, apart.region) == (1, (4, 4, 8, 8))  # the largest box
    np.testing.assert_array_equal(apart.densities, np.ones(3))


def test_of_two_peaks_the_larger_wins_and_of_equals_the_first_in_reading_order():
    four, nine = (0, 0, 2, 2), (5, 5, 8, 8)
    assert vote([four, four, nine, nine]).region == nine
    assert vote([(6, 0, 8, 2), (6, 0, 8, 2), four, four]).region == four
    assert vote([(6, 0, 8, 2), (6, 0, 8, 2), (0, 4, 2, 6), (0, 4, 2, 6)]).region == (6, 0, 8, 2)


def test_parts_that_touch_at_a_corner_are_two():
    assert vote([(0, 0, 2, 2), (2, 2, 5, 5)]).region == (2, 2, 5, 5)
    assert vote([(0, 0, 2, 2), (2, 0, 5, 2)]).region == (0, 0, 5, 2)  # a common side makes one


def test_the_centre_of_an_l_can_lie_outside_it():
    found = vote([(0, 0, 2, 10), (2, 8, 10, 10)])
    assert (found.region, found.area, found.centre) == ((0, 0, 10, 10), 36, (5.0, 5.0))


def test_a_point_stands_for_a_square_that_is_cut_at_the_border():
    pixels = to_pixels([square(5, 5, 4), square(0, 0, 4)], 8, 8)
    np.testing.assert_array_equal(pixels, [[3, 3, 7, 7], [0, 0, 2, 2]])


def test_what_has_no_area_does_not_vote():
    failures = [None, (3, 3, 3, 9), (5, 5, 2, 2), (20, 20, 30, 30), (-9, -9, -1, -1)]
    found = vote([*failures, (1, 1, 3, 3)])
    assert (found.peak, found.region) == (1, (1, 1, 3, 3))
    np.testing.assert_array_equal(found.densities, [0, 0, 0, 0, 0, 1])
    nothing = vote(failures)
    assert (nothing.peak, nothing.region, nothing.centre, nothing.area) == (0, None, None, 0)
    np.testing.assert_array_equal(nothing.densities, np.zeros(5))
    assert spot_vote(to_pixels([], 4, 4)).peak == 0


def test_a_region_smaller_than_a_pixel_keeps_its_pixel():
    np.testing.assert_array_equal(to_pixels([(2.2, 3.1, 2.4, 3.9)], 8, 8), [[2, 3, 3, 4]])


@pytest.mark.parametrize("bad", [(np.nan, 0, 1, 1), (0, 0, np.inf, 1)])
def test_numbers_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        to_pixels([bad], 8, 8)
    with pytest.raises(ValueError, match="at least one pixel"):
        to_pixels([], 0, 8)


def test_the_sweep_equals_the_dense_grid_on_a_thousand_random_sets():
    rng = np.random.default_rng(0)
    for trial in range(1000):
        width, height = rng.integers(1, 40, 2)
        count = int(rng.integers(0, 12))
        corners = rng.integers(-4, 44, (count, 2, 2))
        # every third set from a coarse grid: shared edges, touching corners, equal boxes
        corners = corners // 5 * 5 if trial % 3 == 0 else corners
        boxes = [(float(a), float(b), float(c), float(d)) for (a, b), (c, d) in np.sort(corners, axis=1).tolist()]
        pixels = to_pixels(boxes, int(width), int(height))
        fast, slow = spot_vote(pixels), painted(pixels, int(width), int(height))
        assert (fast.peak, fast.region, fast.area) == (slow.peak, slow.region, slow.area), (trial, boxes)
        np.testing.assert_allclose(fast.densities, slow.densities, rtol=1e-12)


def test_one_4k_screen_against_the_dense_grid():
    rng = np.random.default_rng(1)
    low = rng.random((64, 2)) * (3000, 1500)
    pixels = to_pixels(
        [tuple(map(float, box)) for box in np.hstack([low, low + rng.random((64, 2)) * 900])], 3840, 2160
    )
    fast, slow = spot_vote(pixels), painted(pixels, 3840, 2160)
    assert (fast.peak, fast.region, fast.area) == (slow.peak, slow.region, slow.area)
    np.testing.assert_allclose(fast.densities, slow.densities, rtol=1e-12)


def test_shifts_move_the_centre_and_the_order_changes_nothing():
    rng = np.random.default_rng(2)
    for _ in range(50):
        low = rng.integers(0, 30, (7, 2))
        boxes = np.hstack([low, low + rng.integers(1, 20, (7, 2))])
        here, there = vote(boxes, 100, 100), vote(boxes + np.array([13, 7, 13, 7]), 100, 100)
        assert there.centre == (here.centre[0] + 13, here.centre[1] + 7)
        np.testing.assert_array_equal(here.densities, there.densities)
        order = rng.permutation(7)
        shuffled = vote(boxes[order], 100, 100)
        assert shuffled.region == here.region
        np.testing.assert_array_equal(shuffled.densities, here.densities[order])
