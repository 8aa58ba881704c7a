r"""T(x): the perturbed view of an image.

    noise   x' = clip(x + ε, 0, 1),  ε ~ N(0, σ²) per pixel and channel, x in [0, 1]
    paper   horizontal flip (p = ½), vertical flip (p = ½), rotation by U(−10°, 10°),
            brightness and contrast each × U(0.85, 1.15), then noise; hue and saturation stay

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


def perturb(image: Image.Image | torch.Tensor, preset: str = "noise", sigma: float = 0.4, seed: int = 0) -> Image.Image:
    """The perturbed copy of an image, RGB and of the same size.

    image   PIL, or a float tensor (3, H, W) in [0, 1]
    preset  "noise" or "paper", as above
    sigma   standard deviation of the noise on pixels in [0, 1]; `noise` with 0 is the identity
    seed    of everything random here; give every image and step its own
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = _pixels(image)
    if {"noise": False, "paper": True}[preset]:
        pixels = _jitter(_move(pixels, generator), generator)
    pixels = (pixels + sigma * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    # Rounded, because torchvision's own conversion truncates and would darken the image.
    return F.to_pil_image((255 * pixels).round().to(torch.uint8))


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
