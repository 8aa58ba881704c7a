import numpy as np
import pytest
import torch
from PIL import Image

from vogue.method.perturb import annealed, perturb

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
GREY = torch.full((3, 200, 200), 0.5)


def array(image):
    return np.asarray(image, dtype=np.float64) / 255


@pytest.mark.parametrize("preset", ["noise", "paper"])
def test_equal_seeds_give_equal_pixels_whatever_the_global_generator_does(preset):
    torch.manual_seed(1)
    first = perturb(PHOTO, preset, seed=5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = perturb(PHOTO, preset, seed=5)
    assert first.tobytes() == again.tobytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert perturb(PHOTO, preset, seed=6).tobytes() != first.tobytes()


@pytest.mark.parametrize("preset", ["noise", "paper"])
def test_size_is_kept_and_the_mode_is_rgb(preset):
    for image in (PHOTO, PHOTO.convert("L"), PHOTO.convert("RGBA")):
        result = perturb(image, preset)
        assert result.size == (60, 40)
        assert result.mode == "RGB"


def test_noise_of_zero_is_the_identity_on_every_pixel_value():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    assert perturb(ramp, sigma=0).tobytes() == ramp.tobytes()


def test_a_tensor_and_its_picture_are_perturbed_alike():
    tensor = torch.from_numpy(np.asarray(PHOTO).copy()).permute(2, 0, 1) / 255
    assert perturb(tensor, seed=3).tobytes() == perturb(PHOTO, seed=3).tobytes()


def test_small_noise_has_the_standard_deviation_asked_for():
    noisy = array(perturb(GREY, sigma=0.1))  # 0.5 ± 5σ: nothing is clipped
    assert noisy.mean() == pytest.approx(0.5, abs=0.002)
    assert noisy.std() == pytest.approx(0.1, rel=0.01)


def test_the_default_noise_on_mid_grey_has_the_moments_of_a_clipped_gaussian():
    # clip(X, ±c) with X ~ N(0, σ²), σ = 0.4, c = 0.5, z = c/σ = 1.25:
    # tail P(X > c) = 1 − Φ(1.25) = 0.10565, density φ(1.25) = 0.18265,
    # variance = σ² [(1 − 2·0.10565) − 2·1.25·0.18265] + 2 c² · 0.10565
    #          = 0.16 · 0.33208 + 0.05283 = 0.10596, so std = 0.32551.
    noisy = array(perturb(GREY))
    assert noisy.std() == pytest.approx(0.32551, rel=0.01)
    assert (noisy == 0).mean() == pytest.approx(0.10565, rel=0.05)
    assert (noisy == 1).mean() == pytest.approx(0.10565, rel=0.05)


def test_noise_is_independent_between_channels_and_pixels():
    red, green, _ = (array(perturb(GREY))[..., channel].ravel() for channel in range(3))
    assert abs(np.corrcoef(red, green)[0, 1]) < 0.02
    assert abs(np.corrcoef(red[:-1], red[1:])[0, 1]) < 0.02


def test_paper_flips_each_way_half_of_the_time():
    # One bright quarter in the upper left: where it ends up tells the flips. Rotation keeps it in its quarter.
    corner = torch.full((3, 20, 20), 0.2)
    corner[:, :10, :10] = 0.8
    seen = np.zeros((2, 2))
    for seed in range(200):
        result = array(perturb(corner, "paper", sigma=0, seed=seed)).mean(axis=2)
        quarters = result.reshape(2, 10, 2, 10).mean(axis=(1, 3))
        seen[np.unravel_index(quarters.argmax(), (2, 2))] += 1
    assert (np.abs(seen / 200 - 0.25) < 0.1).all()  # 3.3 standard deviations


def test_paper_jitters_brightness_and_contrast_by_15_percent_and_keeps_grey_grey():
    # A uniform grey g stays g under contrast (its mean is g) and becomes b·g, b in [0.85, 1.15], under brightness.
    grey = GREY[:, :20, :20]
    centres = np.array([array(perturb(grey, "paper", sigma=0, seed=seed))[10, 10] for seed in range(100)])
    assert (centres == centres[:, :1]).all()  # no hue, no saturation
    assert centres.min() == pytest.approx(0.425, abs=0.01)
    assert centres.max() == pytest.approx(0.575, abs=0.01)


def test_paper_rotates_by_at_most_ten_degrees():
    # A line through the centre of 101 px: at 10° its end, 50 px away, moves 50·tan 10° = 8.8 px.
    line = torch.zeros(3, 101, 101)
    line[:, 49:52] = 1
    shifts = []
    for seed in range(60):
        end = array(perturb(line, "paper", sigma=0, seed=seed))[:, 99].mean(axis=1)
        shifts.append(abs((end * np.arange(101)).sum() / end.sum() - 50))
    assert 7.5 < max(shifts) < 9.2


def test_the_strength_falls_along_noisyrollouts_sigmoid():
    # 60 steps, γ = 40: 30 (20 − 40) / 60 = −10, so 1 − sigmoid(−10) = 0.9999546; at 44, 30 · 4 / 60 = 2: 0.1192029.
    found = [annealed(0.4, step, 60, 2 / 3) for step in (0, 20, 40, 44, 60)]
    assert found == pytest.approx([0.4, 0.4 * 0.9999546, 0.2, 0.4 * 0.1192029, 0.4 * 4.5398e-5], rel=1e-5)
    assert annealed(0.4, 4, 6, 2 / 3) == pytest.approx(0.2)  # a tenth of the steps, the same course


def test_an_image_is_rotated_one_way_as_often_as_the_other():
    # An upright bar stays upright however it is flipped; the slope of its centre over the rows is the rotation's sign.
    pixels = torch.zeros(3, 101, 101)
    pixels[:, :, 48:53] = 1
    slopes = []
    for seed in range(40):
        bar = np.asarray(perturb(pixels, "paper", sigma=0.0, seed=seed), dtype=float).mean(axis=2)[20:81]
        centre = (bar * np.arange(101)).sum(axis=1) / bar.sum(axis=1)
        slopes.append(np.polyfit(np.arange(61), centre, 1)[0])
    assert 10 < sum(slope > 0 for slope in slopes) < 30
    assert max(np.abs(slopes)) < np.tan(np.radians(10.5))
