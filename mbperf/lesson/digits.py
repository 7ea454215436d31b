"""Real handwritten digits inside the package, for a machine that cannot reach MNIST.

digits.csv.gz is scikit-learn's file of that name, byte for byte (BSD-3-Clause): 1,797 digits of 8x8 pixels in
0..16, the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (1998),
UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0.
"""

import gzip
import math
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor

# MNIST's own proportions: five samples to train on for each one to validate on. The file does not say who
# wrote which digit, so the split is by sample.
N_TRAIN, N_VALID = 50_000, 10_000
N_SAMPLES_VALID = 1_797 // 6
# MNIST's geometry: the digit's box is 20 of the image's 28 pixels wide.
SIDE, BOX = 28, 20
# Interpolation blurs strokes; this power thins them to MNIST's mean brightness, 0.13, at which the lesson's
# learning rate of 0.5 is about as (un)steady as on MNIST.
THINNING = 1.5
MAX_ANGLE = math.radians(7)
MAX_SHIFT_PIXELS = 1.0
MAX_SCALE = 0.05
# A grey level is a count of 16 subpixels; the noise is at most one and a half counts.
NOISE = 1.5 / 16
CHUNK = 4_096  # images; keeps grid_sample's temporaries in a few MB


def embedded_samples() -> tuple[Tensor, Tensor]:
    """Return the 1,797 digits as they are: images (1797, 8, 8) float32 in [0, 1], labels (1797,) int64.

    Source: see the head of this file.

    >>> images, labels = embedded_samples()
    >>> images.shape, labels[:3].tolist()
    (torch.Size([1797, 8, 8]), [0, 1, 2])
    """
    text = gzip.decompress(files("mbperf.lesson").joinpath("digits.csv.gz").read_bytes()).decode("ascii")
    table = torch.tensor([[int(v) for v in line.split(",")] for line in text.splitlines()])
    return table[:, :64].reshape(-1, 8, 8).float() / 16, table[:, 64].clone()


def embedded_digits(
    n_train: int = N_TRAIN, n_valid: int = N_VALID, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_train, y_train, x_valid, y_valid, made from the embedded samples.

    The samples are split first; each side is then drawn from its own samples only, every one equally often
    (to within one), in a shuffled order, enlarged to 28x28 with a small rotation, shift and scale and a
    little noise of its own. The same arguments give the same images.

    Args:
        n_train: training images to make.
        n_valid: validation images to make.
        seed: of the split, the order, the movements and the noise.

    Returns:
        Images (n, 784) float32 in [0, 1] and labels (n,) int64, as `get_data` gives them.

    Source: see the head of this file.

    >>> x_train, y_train, x_valid, y_valid = embedded_digits(n_train=30, n_valid=6)
    >>> x_train.shape, y_valid.shape
    (torch.Size([30, 784]), torch.Size([6]))
    """
    images, labels = embedded_samples()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    valid, train = order[:N_SAMPLES_VALID], order[N_SAMPLES_VALID:]
    x_train, y_train = _multiply(images[train], labels[train], n_train, generator)
    x_valid, y_valid = _multiply(images[valid], labels[valid], n_valid, generator)
    return x_train, y_train, x_valid, y_valid


def _multiply(images: Tensor, labels: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make n different enlarged images from a few samples."""
    index = torch.randperm(n, generator=generator) % len(images)
    x = torch.empty(n, SIDE * SIDE)
    for start in range(0, n, CHUNK):
        chosen = images[index[start : start + CHUNK]]
        x[start : start + CHUNK] = _enlarge(chosen, generator)
    return x, labels[index]


def _enlarge(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 8, 8) to (n, 784), each moved and made noisy in its own way."""
    noise = _uniform(images.shape, NOISE, generator)
    # Noise on ink only: MNIST's background is 0, and stays so here.
    inked = torch.where(images > 0, images + noise, images)
    grid = F.affine_grid(
        _movements(len(images), generator), [len(images), 1, SIDE, SIDE], align_corners=False
    )
    large = F.grid_sample(inked.unsqueeze(1), grid, mode="bicubic", align_corners=False)
    # Bicubic interpolation overshoots beside edges.
    return large.clamp_(0, 1).pow_(THINNING).flatten(1)


def _movements(n: int, generator: torch.Generator) -> Tensor:
    """Affine matrices (n, 2, 3) from places in the large image to places in the small one."""
    angle = _uniform((n,), MAX_ANGLE, generator)
    # A place outside the box lies outside the small image, where grid_sample reads 0.
    scale = SIDE / BOX * (1 + _uniform((n,), MAX_SCALE, generator))
    shift = _uniform((n, 2), MAX_SHIFT_PIXELS * 2 / SIDE, generator)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Uniform in [-bound, bound). Not normal: its values would depend on torch's instruction set."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
