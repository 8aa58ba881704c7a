r"""T(x): the perturbed view of an image.

    noise   x' = clip(x + ε, 0, 1),  ε ~ N(0, σ²) per pixel and channel, x in [0, 1]
    paper   horizontal flip (p = ½), vertical flip (p = ½), rotation by U(−10°, 10°),
            brightness and contrast each × U(0.85, 1.15), then noise; hue and saturation stay
    mask    squares of `patch` pixels, those of a grid from the upper left corner on, are black, each with probability
            `share`: PAPO's (arXiv 2507.06448)

NoisyRollout (arXiv 2504.13055) lets the strength fall: σ_t = σ_0 (1 − sigmoid(λ (t − γ) / t_max)), λ = 30. Its own
strength counts diffusion steps, whose noise fades the image too; here it is σ.

Flips move what a question may ask about ("the left digit"), so `noise` is the default here.
Every number comes from one generator of its own: equal seeds give equal pixels whatever else
the program draws. torchvision's random transforms use the global generator and cannot.
"""

from math import exp

import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

MAX_ANGLE = 10.0  # degrees
JITTER = 0.15  # brightness and contrast; the official 0.15·strength at strength 1

SLOPE = 30.0  # λ


def annealed(sigma: float, step: int, total: int, half: float) -> float:
    """σ at `step` of `total`: `sigma` at first, half of it at γ = `half` · total, then towards 0.

    The paper states γ in steps, 40 of 60; a share of the run is ours, so that a short run anneals too.
    """
    return sigma / (1 + exp(SLOPE * (step / total - half)))


def perturb(
    image: Image.Image | torch.Tensor,
    preset: str = "noise",
    sigma: float = 0.4,
    seed: int = 0,
    *,
    patch: int = 14,
    share: float = 0.6,
) -> Image.Image:
    """The perturbed copy of an image, RGB and of the same size.

    image   PIL, or a float tensor (3, H, W) in [0, 1]
    preset  "noise", "paper" or "mask", as above
    sigma   standard deviation of the noise on pixels in [0, 1]; `noise` with 0 is the identity
    seed    of everything random here; give every image and step its own
    patch   side of a square, in pixels
    share   probability that a square is black; with 0 `mask` is the identity, with 1 all is black
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = _pixels(image)
    if preset == "mask":
        return _picture(_masked(pixels, patch, share, generator))
    if {"noise": False, "paper": True}[preset]:
        pixels = _jitter(_move(pixels, generator), generator)
    return _picture((pixels + sigma * torch.randn(pixels.shape, generator=generator)).clamp(0, 1))


def _picture(pixels: torch.Tensor) -> Image.Image:
    # Rounded, because torchvision's own conversion truncates and would darken the image.
    return F.to_pil_image((255 * pixels).round().to(torch.uint8))


def _masked(pixels: torch.Tensor, patch: int, share: float, generator: torch.Generator) -> torch.Tensor:
    _, height, width = pixels.shape
    seen = torch.rand(-(-height // patch), -(-width // patch), generator=generator) >= share
    return pixels * seen.repeat_interleave(patch, 0)[:height].repeat_interleave(patch, 1)[:, :width]


def _pixels(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    if isinstance(image, torch.Tensor):
        return image.float()
    return F.to_dtype(F.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)


def _move(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    across, upside_down, angle = torch.rand(3, generator=generator).tolist()
    if across < 0.5:
        pixels = F.horizontal_flip(pixels)
    if upside_down < 0.5:
        pixels = F.vertical_flip(pixels)
    # Smooth interpolation keeps thin strokes legible; the uncovered corners are black, as torchvision's are.
    return F.rotate(pixels, MAX_ANGLE * (2 * angle - 1), InterpolationMode.BILINEAR)


def _jitter(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    brightness, contrast = (1 + JITTER * (2 * torch.rand(2, generator=generator) - 1)).tolist()
    return F.adjust_contrast(F.adjust_brightness(pixels, brightness), contrast)
