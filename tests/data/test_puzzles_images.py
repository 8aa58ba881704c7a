"""What a puzzle's image shows is read from its pixels and must be what the printed state says."""

import re
from itertools import groupby, pairwise

import numpy as np
import pytest

from vogue.data.puzzles import draw_puzzles

SIZE = 448
MARGIN = 0.03  # of a board's longer side, left and right or above and below
NAMES = {
    "white": (255, 255, 255),
    "black": (34, 34, 34),
    "red": (215, 52, 44),
    "orange": (224, 138, 30),
    "green": (42, 157, 74),
    "blue": (43, 111, 194),
    "purple": (142, 79, 176),
    "teal": (21, 154, 156),
    "brick": (196, 98, 45),
    "grey": (138, 138, 138),
    "water": (88, 169, 230),
}


def drawn(kind):
    """(puzzle, pixels) of some puzzles of a kind."""
    for puzzle in draw_puzzles(kind, "train", 25, seed=2):
        yield puzzle, np.asarray(puzzle.image(SIZE))


def names(pixels):
    """The nearest of NAMES for each of (N, 3) pixels."""
    distances = np.abs(pixels.astype(int)[:, None] - np.array(list(NAMES.values()))).sum(axis=2)
    return np.array(list(NAMES))[distances.argmin(axis=1)].tolist()


def at(pixels, x, y):
    """The name of the colour at a point given as shares of the width and the height."""
    return names(pixels[int(y * len(pixels)), int(x * len(pixels))][None])[0]


def centers(rows, columns):
    """(row, column, x, y) of the centres of a board's squares, rows and columns from 1, and a square's side."""
    side = (1 - 2 * MARGIN) / max(rows, columns)
    places = [
        (row, column, 0.5 + (column - (columns + 1) / 2) * side, 0.5 + (row - (rows + 1) / 2) * side)
        for row in range(1, rows + 1)
        for column in range(1, columns + 1)
    ]
    return places, side


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def hands(pixels, radius):
    """The angles, in degrees from twelve, at which something else than the dial is found that far from the centre."""
    angles = np.arange(0, 360, 0.5)
    x = (0.5 + radius * np.sin(np.radians(angles))) * SIZE
    y = (0.5 - radius * np.cos(np.radians(angles))) * SIZE
    ring = pixels[y.astype(int), x.astype(int)].astype(int)
    return angles[np.abs(ring - np.median(ring, axis=0)).sum(axis=1) > 150]


def apart(angles, angle):
    return (angles - angle + 180) % 360 - 180


def test_the_hands_of_a_clock_show_its_time():
    for puzzle, pixels in drawn("clock"):
        hour, minute = numbers(puzzle.state)
        long_hand = apart(hands(pixels, 0.25), 6 * minute)  # the hour hand is shorter, the numerals are farther out
        assert np.abs(long_hand).max() < 4 and np.abs(long_hand.mean()) < 1.5
        both = hands(pixels, 0.17)
        short_hand = apart(both[np.abs(apart(both, 6 * minute)) > 5], 30 * hour + minute / 2)
        assert np.abs(apart(both, 30 * hour + minute / 2)).min() < 1
        assert (np.abs(short_hand) < 8).all()


def test_a_maze_has_its_walls_and_arrows_where_they_are_printed():
    for puzzle, pixels in drawn("maze"):
        _, *lines, entry, exit = puzzle.state.splitlines()
        printed = {(r, c): s for r, line in enumerate(lines, 1) for c, s in enumerate(line.split(), 1)}
        kinds = {"black": "1", "white": "0", "green": "entry", "blue": "exit"}
        for row, column, x, y in centers(len(lines), len(lines[0].split()))[0]:
            shown = kinds[at(pixels, x, y)]
            assert (shown == "entry") == ([row, column] == numbers(entry))
            assert (shown == "exit") == ([row, column] == numbers(exit))
            assert printed[row, column] == ("1" if shown == "1" else "0")


def test_the_squares_of_a_move_box_board_are_those_printed():
    kinds = {"blue": "P", "red": "X", "orange": "B"}
    for puzzle, pixels in drawn("move_box"):
        lines = puzzle.state.splitlines()[1:]
        places, side = centers(8, 8)
        for row, column, x, y in places:
            inner = {at(pixels, x + dx * side, y + dy * side) for dx in (-0.2, 0, 0.2) for dy in (-0.2, 0.2)}
            (shown,) = {kinds[color] for color in inner & kinds.keys()} or {"#" if "brick" in inner else "."}
            assert shown == lines[row - 1][column - 1]


def test_queens_stand_where_they_are_printed():
    for puzzle, pixels in drawn("n_queens"):
        board, placed = puzzle.state.splitlines()
        n, _ = numbers(board)
        listed = numbers(placed)[2:]  # (1, 1) explains how squares are counted
        shown = [
            v for row, column, x, y in centers(n, n)[0] if at(pixels, x, y + 0.01) == "black" for v in (row, column)
        ]
        assert shown == listed


def test_jugs_are_as_high_as_their_capacity_and_filled_with_their_water():
    water, ink = (np.array(NAMES[color]) for color in ("water", "black"))
    for puzzle, pixels in drawn("water_jugs"):
        capacities, amounts = map(numbers, puzzle.state.splitlines())
        litre = 0.83 / 14 * SIZE
        width = 0.94 / len(capacities)
        for jug, (capacity, amount) in enumerate(zip(capacities, amounts)):
            middle = 0.03 + (jug + 0.5) * width
            column = pixels[: int(0.87 * SIZE), int(middle * SIZE)]
            assert (abs(column - water) < 40).all(axis=1).sum() / litre == pytest.approx(amount, abs=0.3)
            wall = pixels[: int(0.87 * SIZE), int((middle + 0.36 * width) * SIZE)]
            assert (abs(wall - ink) < 40).all(axis=1).sum() / litre == pytest.approx(capacity, abs=0.3)


def test_the_rods_of_hanoi_hold_the_printed_disks():
    colors = ("red", "orange", "green", "blue", "purple", "teal")  # from the smallest
    for puzzle, pixels in drawn("tower_of_hanoi"):
        lines = [line for line in puzzle.state.splitlines() if line.startswith("Rod")]
        for line, (top, rod) in zip(lines, [(top, rod) for top in (0, 0.5) for rod in range(3)]):
            column = pixels[int((top + 0.1) * SIZE) : int((top + 0.45) * SIZE), int((0.19 + 0.31 * rod + 0.025) * SIZE)]
            runs = [color for color, _ in groupby(names(column)) if color in colors]
            assert [colors.index(color) + 1 for color in reversed(runs)] == numbers(line.split(":")[1])


def test_a_larger_disk_is_wider():
    colors = ("red", "orange", "green", "blue", "purple", "teal")
    for puzzle, pixels in drawn("tower_of_hanoi"):
        start = pixels[int(0.1 * SIZE) : int(0.45 * SIZE)]
        widths = [(start == NAMES[color]).all(axis=2).sum(axis=1).max() for color in colors]
        disks = max(numbers(" ".join(re.findall(r": (.*)", puzzle.state))))
        assert all(width > 15 for width in widths[:disks]) and not any(widths[disks:])
        assert all(small + 5 < large for small, large in pairwise(widths[:disks]))


def test_equal_numbers_look_equal_on_a_number_slide_and_others_differ():
    looks = {}
    for puzzle in draw_puzzles("number_slide", "train", 60, seed=2):
        rows = [line.split() for line in puzzle.state.splitlines()[1:]]
        if len(rows) != 3:
            continue
        pixels = np.asarray(puzzle.image(300))  # squares of 94 px behind a margin of 9 px
        for row, tiles in enumerate(rows):
            for column, tile in enumerate(tiles):
                crop = pixels[
                    9 + 94 * row + 12 : 9 + 94 * (row + 1) - 12, 9 + 94 * column + 12 : 9 + 94 * (column + 1) - 12
                ]
                looks.setdefault(tile, set()).add(crop.tobytes())
    assert sorted(looks) == [*"12345678", "_"]
    assert all(len(seen) == 1 for seen in looks.values())
    assert len(set.union(*looks.values())) == 9


def test_checkers_stand_as_printed():
    kinds = {"green": "G", "red": "R"}
    for puzzle, pixels in drawn("checker_move"):
        for line, middle in zip(puzzle.state.splitlines(), (0.32, 0.76)):
            row = line.split(": ")[1]
            side = 0.94 / len(row)
            colors = [at(pixels, 0.03 + (i + 0.5) * side, middle + 0.29 * side) for i in range(len(row))]
            assert "".join(kinds.get(color, "_") for color in colors) == row


def test_the_squares_cut_from_a_board_are_white_and_the_others_chequered():
    for puzzle, pixels in drawn("board_tiling"):
        size, cut = puzzle.state.splitlines()
        rows, columns = numbers(size)
        listed = numbers(cut)[2:]
        tones = {}
        shown = []
        for row, column, x, y in centers(rows, columns)[0]:
            color = tuple(pixels[int(y * SIZE), int(x * SIZE)])
            if color == NAMES["white"]:
                shown += [row, column]
            else:
                tones.setdefault((row + column) % 2, set()).add(color)
        assert shown == listed
        assert len(tones[0]) == len(tones[1]) == 1 and tones[0] != tones[1]


def test_the_arrows_of_a_maze_point_into_it_and_out_of_it():
    for puzzle, pixels in drawn("maze"):
        _, *lines, entry, exit = puzzle.state.splitlines()
        places, side = centers(len(lines), len(lines[0].split()))
        middles = {(row, column): (x, y) for row, column, x, y in places}
        out = "right" if numbers(exit)[1] == len(lines[0].split()) else "down"
        for place, color, heading in ((entry, "green", "right"), (exit, "blue", out)):
            x, y = middles[tuple(numbers(place))]
            for along, across in ((0.3, -0.05), (0.3, 0.05), (0.05, -0.3), (0.05, 0.3)):  # all of them in its head
                dx, dy = (along, across) if heading == "right" else (across, along)
                assert at(pixels, x + dx * side, y + dy * side) == color


@pytest.mark.parametrize("size", [112, 224, 448])
def test_an_image_has_the_size_asked_for(size):
    image = draw_puzzles("maze", "test", 1, seed=0)[0].image(size)
    assert (image.size, image.mode) == ((size, size), "RGB")
