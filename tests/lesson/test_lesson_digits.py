"""The embedded digits: whole, split before they are multiplied, the same each time."""

import hashlib
from importlib.resources import files

import pytest
import torch

from mbperf.lesson import digits as digits_module
from mbperf.lesson.digits import embedded_digits, embedded_samples
from mbperf.testing import test_near


def test_the_file_is_scikit_learns():
    packed = files("mbperf.lesson").joinpath("digits.csv.gz").read_bytes()
    assert (
        hashlib.sha256(packed).hexdigest()
        == "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
    )


def test_samples_are_all_there():
    images, labels = embedded_samples()
    assert images.shape == (1797, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images * 16).frac().abs().max() == 0
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_sizes_and_ranges_are_the_lessons(digits):
    x_train, y_train, x_valid, y_valid = digits
    assert x_train.shape == (50_000, 784)
    assert x_valid.shape == (10_000, 784)
    assert y_train.shape == (50_000,)
    assert y_valid.shape == (10_000,)
    for x, y in ((x_train, y_train), (x_valid, y_valid)):
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.is_contiguous()
        assert x.min() == 0
        assert 0.99 < x.max() <= 1
        assert 0.12 < x.mean() < 0.15  # MNIST: 0.131
        assert y.unique().tolist() == list(range(10))
        assert y.bincount().min() > 0.07 * len(y)


def test_no_two_images_are_the_same(digits):
    for x in (digits[0][:5000], digits[2][:5000]):
        assert len(torch.unique(x, dim=0)) == len(x)


def test_neighbours_are_of_mixed_classes(digits):
    assert len(digits[1][:64].unique()) == 10
    assert len(digits[3][:64].unique()) == 10


def test_the_same_arguments_give_the_same_digits_and_another_seed_others():
    once, again, other = (embedded_digits(60, 12, seed=seed) for seed in (3, 3, 4))
    test_near(once, again, rtol=0, atol=0)
    assert not torch.equal(once[0], other[0])
    assert not torch.equal(once[1], other[1])


def test_the_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    embedded_digits(6, 6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def still(monkeypatch):
    """Digits that do not move and have no noise: an image tells the sample it was made of."""
    for name in ("MAX_ANGLE", "MAX_SHIFT_PIXELS", "MAX_SCALE", "NOISE"):
        monkeypatch.setattr(digits_module, name, 0.0)


def test_no_sample_is_on_both_sides_of_the_split(still):
    x_train, _, x_valid, _ = embedded_digits(3000, 600)
    train, valid = ({tuple(row) for row in x.tolist()} for x in (x_train, x_valid))
    assert (len(train), len(valid)) == (1498, 299)
    assert not train & valid


def test_every_sample_is_used_equally_often(still):
    x_train = embedded_digits(1498 * 3, 1)[0]
    counts = torch.unique(x_train, dim=0, return_counts=True)[1]
    assert counts.tolist() == [3] * 1498


def test_enlarged_digits_look_like_their_samples_and_keep_their_labels(still):
    x, y, _, _ = embedded_digits(1498, 1)
    images, labels = embedded_samples()
    # The box of 20 pixels, shrunk to 8x8 again, is nearest to the sample it came from.
    box = x.view(-1, 1, 28, 28)[:, :, 4:24, 4:24] ** (1 / digits_module.THINNING)
    small = torch.nn.functional.interpolate(box, size=(8, 8), mode="area").flatten(1)
    nearest = torch.cdist(small, images.flatten(1)).argmin(1)
    assert (labels[nearest] == y).float().mean() > 0.99


def test_the_image_turns_and_shifts_within_its_bounds():
    matrices = digits_module._movements(10_000, torch.Generator().manual_seed(0))
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])
    scale = matrices[:, 0, :2].norm(dim=1) * 20 / 28
    shift = matrices[:, :, 2].abs() * 28 / 2
    assert angle.abs().max().rad2deg() == pytest.approx(7, abs=0.1)
    assert (scale.min().item(), scale.max().item()) == (
        pytest.approx(0.95, abs=1e-3),
        pytest.approx(1.05, abs=1e-3),
    )
    assert shift.max() == pytest.approx(1, abs=1e-3)
