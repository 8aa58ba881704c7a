"""Every answer worked out again by another method, from nothing but the question and the printed state."""

import re
from collections import deque
from datetime import datetime, timedelta
from itertools import combinations, product

import pytest

from vogue.data.puzzles import KINDS, draw_puzzles

STEPS = (-1, 1, -1j, 1j)  # squares as complex numbers: column to the right, row upwards


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def pairs(text):
    found = numbers(text)
    return list(zip(found[::2], found[1::2]))


def squares(lines):
    """Each character of a printed board by its place; row 1, column 1 is 1 - 1j."""
    return {x - y * 1j: symbol for y, line in enumerate(lines, 1) for x, symbol in enumerate(line, 1)}


# ------------------------------------------------------------------------------------------------------- solvers


def clock(question, state):
    """The calendar's arithmetic."""
    time = datetime.strptime(state, "Current time: %I:%M")
    amounts = {unit + "s": int(number) for number, unit in re.findall(r"(\d+) (hour|minute)", question)}
    shift = timedelta(**amounts)
    assert ("later" in question) != ("before" in question)
    return (time + shift if "later" in question else time - shift).strftime("%-I:%M")


def maze(question, state):
    """Fill dead ends until nothing but the way is left, then walk it."""
    _, *lines, green, blue = state.splitlines()
    entry, exit = (column - row * 1j for row, column in map(numbers, (green, blue)))
    free = {square for square, symbol in squares(line.split() for line in lines).items() if symbol == "0"}
    while dead := {s for s in free - {entry, exit} if sum(s + step in free for step in STEPS) < 2}:
        free -= dead
    way, heading, turns = [entry], 1, []
    while way[-1] != exit:
        (ahead,) = [step for step in STEPS if way[-1] + step in free and way[-1] + step not in way]
        turns.append(ahead / heading)
        heading = ahead
        way.append(way[-1] + ahead)
    assert len(way) == len(free)
    left, right = turns.count(1j), turns.count(-1j)
    asked = {"squares": len(way), "left turns": left, "right turns": right, "turns do you make, left and": left + right}
    (answer,) = [value for words, value in asked.items() if f"How many {words}" in question]
    return str(answer)


def move_box(question, state):
    """Breadth-first search of single steps, of which a push costs one and a walk nothing."""
    board = squares(state.splitlines()[1:])
    (player,), (box,), (goal,) = ([s for s, symbol in board.items() if symbol == wanted] for wanted in "PBX")
    queue, fewest = deque([(player, box, 0)]), {}
    while queue:
        player, box, pushes = queue.popleft()
        if box == goal:
            return str(pushes)
        if fewest.setdefault((player, box), pushes) < pushes:
            continue
        for step in STEPS:
            if board[player + step] == "#":
                continue
            if player + step != box:
                if fewest.get((player + step, box), pushes + 1) > pushes:
                    queue.appendleft((player + step, box, pushes))
            elif board[box + step] != "#":
                queue.append((player + step, box + step, pushes + 1))


def n_queens(question, state):
    """Try every two squares of the board."""
    board, placed = state.splitlines()
    n, _ = numbers(board)
    queens = pairs(placed)[1:]  # the first pair explains how squares are counted
    assert len(queens) == n - 2

    def free(square, others):
        row, column = square
        return all(row != r and column != c and abs(row - r) != abs(column - c) for r, c in others)

    candidates = [square for square in product(range(1, n + 1), repeat=2) if free(square, queens)]
    distances = {abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in combinations(candidates, 2) if free(a, [b])}
    (distance,) = distances
    return str(distance)


def water_jugs(question, state):
    """Try every sequence of pours."""
    capacities, start = map(numbers, state.splitlines())
    (goal,) = re.findall(r"until they hold ([\d, ]+) litres", question)
    moves = [(a, b) for a in range(len(start)) for b in range(len(start)) if a != b]
    for length in range(1, 5):
        for sequence in product(moves, repeat=length):
            water = list(start)
            for giver, taker in sequence:
                total = water[giver] + water[taker]
                water[taker] = min(total, capacities[taker])
                water[giver] = total - water[taker]
            if water == numbers(goal):
                return str(length)


def tower_of_hanoi(question, state):
    """The largest disk that has to move does so once or twice; all smaller ones first gather out of its way."""
    lines = state.splitlines()
    start, end = (
        {disk: rod for rod, line in enumerate(part) for disk in numbers(line.split(":")[1])}
        for part in (lines[1:4], lines[5:8])
    )

    def gather(disks, at, rod):
        if disks == 0:
            return 0
        if at[disks] == rod:
            return gather(disks - 1, at, rod)
        return gather(disks - 1, at, 3 - rod - at[disks]) + 2 ** (disks - 1)

    def fewest(disks):
        if disks == 0:
            return 0
        a, b = start[disks], end[disks]
        if a == b:
            return fewest(disks - 1)
        spare = 3 - a - b
        once = gather(disks - 1, start, spare) + 1 + gather(disks - 1, end, spare)
        twice = gather(disks - 1, start, b) + 1 + 2 ** (disks - 1) - 1 + 1 + gather(disks - 1, end, a)
        return min(once, twice)

    return str(fewest(len(start)))


def number_slide(question, state):
    """Boards as strings of squares; every sequence of moves is tried."""
    rows = [line.split() for line in state.splitlines()[1:]]
    n = len(rows)
    directions = {"up": -n, "down": n, "left": -1, "right": 1}

    def slide(tiles, move):
        at = tiles.index("_")
        to = at + directions[move]
        if not 0 <= to < n * n or (abs(directions[move]) == 1 and at // n != to // n):
            return None
        tiles = list(tiles)
        tiles[at], tiles[to] = tiles[to], tiles[at]
        return tuple(tiles)

    tiles = tuple(tile for row in rows for tile in row)
    if "How many different boards" in question:
        boards = {tiles}
        for _ in range(int(re.search(r"exactly (\d+) move", question)[1])):
            boards = {slide(board, move) for board in boards for move in directions} - {None}
        return str(len(boards))
    times, listed = re.search(r"moves (\d+) times?: ([a-z, ]+)\.", question).groups()
    assert int(times) == len(listed.split(", "))
    for move in listed.split(", "):
        tiles = slide(tiles, move)
    line, number = re.search(r"(row|column) (\d+)", question).groups()
    start = int(number) - 1
    wanted = tiles[start * n : start * n + n] if line == "row" else tiles[start::n]
    return str(sum(int(tile) for tile in wanted if tile != "_"))


def checker_move(question, state):
    """No order within a colour ever changes, so squares travelled less pairs that crossed (by a jump) are the moves."""
    start, end = (line.split(": ")[1] for line in state.splitlines())
    places = {
        colour: [([i for i, c in enumerate(row) if c == colour]) for row in (start, end)] for colour in ("G", "R")
    }
    travelled = sum(abs(a - b) for before, after in places.values() for a, b in zip(before, after))
    (green, green_after), (red, red_after) = places["G"], places["R"]
    crossed = sum((g < r) and (ga > ra) for g, ga in zip(green, green_after) for r, ra in zip(red, red_after))
    return str(travelled - crossed)


def board_tiling(question, state):
    """Match squares of one colour with neighbours of the other, by augmenting paths (Kuhn)."""
    size, cut = state.splitlines()
    rows, columns = numbers(size)
    left = {*product(range(1, rows + 1), range(1, columns + 1))} - {*pairs(cut)[1:]}
    partner = {}

    def augment(square, seen):
        row, column = square
        for other in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if other in left and other not in seen:
                seen.add(other)
                if other not in partner or augment(partner[other], seen):
                    partner[other] = square
                    return True
        return False

    matched = sum(augment(square, set()) for square in left if sum(square) % 2 == 0)
    return "Yes" if 2 * matched == len(left) else "No"


SOLVERS = (clock, maze, move_box, n_queens, water_jugs, tower_of_hanoi, number_slide, checker_move, board_tiling)
CHECKED = {"water_jugs": 20, "move_box": 100}  # trying everything takes long


@pytest.mark.parametrize("solve", SOLVERS, ids=lambda solve: solve.__name__)
def test_answers_follow_from_question_and_printed_state_alone(solve):
    kind = solve.__name__
    for split in ("train", "test"):
        for puzzle in draw_puzzles(kind, split, CHECKED.get(kind, 200), seed=5):
            assert solve(puzzle.question, puzzle.state) == puzzle.answer, f"{puzzle.question}\n{puzzle.state}"


def test_every_kind_is_solved_again():
    assert [solve.__name__ for solve in SOLVERS] == list(KINDS)


@pytest.mark.parametrize(
    ("solve", "question", "state", "answer"),
    [
        (clock, "What time was it 3 hours and 1 minute before?", "Current time: 2:43", "11:42"),
        (
            maze,
            "How many left turns do you make?",
            "Maze:\n1 1 1 1 1\n0 0 1 0 0\n1 0 1 0 1\n1 0 0 0 1\n1 1 1 1 1\n"
            "Green arrow (entry): row 2, column 1\nBlue arrow (exit): row 2, column 5",
            "2",  # down is a right turn, then left, then left (up), then right
        ),
        (move_box, "", "Board:\n#####\n#P..#\n#.B.#\n#..X#\n#####", "2"),
        (tower_of_hanoi, "", "Start\nRod 1: 3, 2, 1\nRod 2: \nRod 3: \nEnd\nRod 1: \nRod 2: \nRod 3: 3, 2, 1", "7"),
        (checker_move, "", "Start: GG_RR\nEnd: RR_GG", "8"),  # (g + 1)(r + 1) - 1, the frogs' puzzle
        (board_tiling, "", "Board: 8 rows × 8 columns\nCut out, (1, 1): (1, 1), (8, 8)", "No"),
        (water_jugs, "until they hold 3, 2, 3 litres", "Capacities: 8, 5, 3\nWater: 8, 0, 0", "2"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_other_methods_solve_what_is_known(solve, question, state, answer):
    assert solve(question, state) == answer
