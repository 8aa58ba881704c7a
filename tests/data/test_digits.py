import numpy as np
import pytest

from vogue.data import DataError, load_samples
from vogue.data.digits import QUESTIONS, SPLITS, demonstration, digit_pairs, digits_samples, write_digits
from vogue.rewards import score


def halves(pairs):
    """The pixels of every single digit shown."""
    for pair in pairs:
        pixels = np.asarray(pair.image)
        width = pixels.shape[1] // 2
        yield pixels[:, :width].tobytes()
        yield pixels[:, width:].tobytes()


def test_no_digit_image_is_shared_between_splits_whatever_the_seeds():
    shown = {split: set(halves(digit_pairs(split, 1500, seed))) for seed, split in enumerate(SPLITS)}
    assert len(shown["train"]) > 1000 and len(shown["test"]) > 250
    assert not shown["train"] & shown["validation"]
    assert not shown["train"] & shown["test"]
    assert not shown["validation"] & shown["test"]


def test_every_class_has_its_share_of_each_split():
    labels = [pair.left for pair in digit_pairs("test", 3000, 0)]
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert (np.abs(shares - 0.1) < 0.03).all()


def test_no_pair_and_question_comes_twice():
    # 3,000 draws of 270² = 72,900 with replacement would repeat about 3000² / (2 · 72,900) = 62 times.
    pairs = digit_pairs("validation", 3000, 0, questions=("sum",))
    assert len({(pair.image.tobytes(), pair.question) for pair in pairs}) == 3000


def test_equal_seeds_give_equal_pairs_and_others_do_not():
    def shown(seed):
        return [(pair.left, pair.right, pair.question, pair.image.tobytes()) for pair in digit_pairs("train", 50, seed)]

    assert shown(3) == shown(3)
    assert shown(3) != shown(4)


def test_an_image_is_two_digits_wide_and_dark_on_white():
    image = digit_pairs("train", 1, 0, size=42)[0].image
    assert image.size == (84, 42)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels[0] == 255).all() and pixels.min() < 30


def test_samples_ask_about_their_digits_and_larger_never_ties():
    for pair in digit_pairs("train", 600, 1):
        sample = pair.sample()
        expected = {
            "sum": pair.left + pair.right,
            "difference": abs(pair.left - pair.right),
            "larger": max(pair.left, pair.right),
        }
        assert sample.answer == str(expected[pair.question])
        assert sample.problem == "<image>" + QUESTIONS[pair.question]
        assert sample.category == pair.question
        assert sample.state == f"Left digit: {pair.left}\nRight digit: {pair.right}"
        assert pair.question != "larger" or pair.left != pair.right


def test_questions_can_be_chosen():
    assert {pair.question for pair in digit_pairs("train", 50, 0, questions=("sum",))} == {"sum"}
    assert {pair.question for pair in digit_pairs("train", 50, 0)} == set(QUESTIONS)


def test_demonstrations_read_as_written():
    assert demonstration("sum", 3, 5) == "<think>3 and 5, 3 + 5 = 8</think>\n\\boxed{8}"
    assert demonstration("difference", 3, 5) == "<think>3 and 5, 5 - 3 = 2</think>\n\\boxed{2}"
    assert demonstration("larger", 3, 5) == "<think>3 and 5, 5 > 3</think>\n\\boxed{5}"
    assert demonstration("larger", 5, 5) == "<think>5 and 5, 5 = 5</think>\n\\boxed{5}"


def test_a_right_demonstration_earns_the_whole_reward_and_a_misread_sum_only_the_format():
    generator = np.random.default_rng(0)
    for pair in digit_pairs("train", 200, 2):
        assert score(pair.demonstration(), pair.sample().answer).reward == pytest.approx(1.0)
        left, right = pair.misread(generator)
        assert (left == pair.left) != (right == pair.right)  # exactly one is misread
        wrong = score(pair.demonstration(left, right), pair.sample().answer)
        assert wrong.format == 1.0
        assert pair.question != "sum" or wrong.accuracy == 0.0


def test_misreadings_are_spread_over_sides_and_digits():
    pair = digit_pairs("train", 1, 0)[0]
    generator = np.random.default_rng(0)
    readings = [pair.misread(generator) for _ in range(2000)]
    assert 0.45 < np.mean([left != pair.left for left, _ in readings]) < 0.55
    counts = np.bincount([left for left, _ in readings if left != pair.left], minlength=10)
    assert counts[pair.left] == 0
    assert (np.delete(counts, pair.left) > 70).all()  # 1000 / 9 = 111 expected


def test_a_digit_read_as_zero_is_not_taken_for_unread():
    pair = next(pair for pair in digit_pairs("train", 50, 0) if pair.left > 0 and pair.question == "sum")
    assert pair.demonstration(left=0).startswith(f"<think>0 and {pair.right}, ")


def test_written_splits_load_with_what_was_asked_for(tmp_path):
    write_digits(tmp_path, train=20, validation=5, test=10, seed=7)
    for split, count in (("train", 20), ("validation", 5), ("test", 10)):
        loaded = load_samples(tmp_path / f"{split}.parquet")
        made = digits_samples(split, count, seed=7)
        assert [sample.answer for sample in loaded] == [sample.answer for sample in made]
        assert loaded[0].load_images()[0].tobytes() == made[0].load_images()[0].tobytes()


def test_faint_digits_are_the_same_pairs_with_less_ink():
    full, faint = digit_pairs("train", 400, 0), digit_pairs("train", 400, 0, faintest=0.25)
    assert [(p.left, p.right, p.question) for p in full] == [(p.left, p.right, p.question) for p in faint]
    ink = [255 - np.asarray(pair.image, dtype=float).mean(axis=2) for pair in (*full, *faint)]
    halves = np.array([[half.sum() for half in np.split(pixels, 2, axis=1)] for pixels in ink]).ravel()
    contrasts = halves[800:] / halves[:800]  # of 800 digits, U(0.25, 1): mean 0.625, all over the range
    assert 0.24 < contrasts.min() < 0.27 and 0.98 < contrasts.max() < 1.01
    assert abs(contrasts.mean() - 0.625) < 0.025  # 3 standard errors of 0.217 / sqrt(800)
    assert abs(np.corrcoef(contrasts[::2], contrasts[1::2])[0, 1]) < 0.15  # each digit has its own


def test_nothing_is_written_where_one_split_is_too_small(tmp_path):
    with pytest.raises(DataError, match="pairs asked of the test split"):
        write_digits(tmp_path, train=10, validation=10, test=1_000_000)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_refused_with_its_value():
    with pytest.raises(DataError, match="the faintest contrast is 0"):
        digit_pairs("train", 1, 0, faintest=0.0)
    with pytest.raises(ValueError, match="split is 'dev'; it must be one of train, validation, test"):
        digit_pairs("dev", 1, 0)
    with pytest.raises(ValueError, match="question is 'product'; it must be one of sum, difference, larger"):
        digit_pairs("train", 1, 0, questions=("product",))
    with pytest.raises(ValueError, match="72901 pairs asked of the test split, which has 72900"):  # 270²
        digit_pairs("test", 72_901, 0, questions=("sum",))
