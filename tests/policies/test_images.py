import numpy as np
import pytest
import torch
from PIL import Image

from vlahub_policies.parts import images

SIZES = [((48, 64), (28, 20)), ((17, 33), (40, 50)), ((256, 256), (224, 224)), ((5, 7), (1, 3)), ((224, 224), (224, 100))]


def pictures(*shape, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", [images.BILINEAR, images.BICUBIC])
@pytest.mark.parametrize("old, new", SIZES)
def test_torch_resizes_byte_for_byte_as_pillow(old, new, method):
    given = pictures(2, *old)
    assert torch.equal(images.resize_in_torch(given, *new, method), images.resize(given, *new, method))


def test_resize_is_pillow():
    given = pictures(1, 30, 40)
    expected = np.asarray(Image.fromarray(given[0].numpy()).resize((16, 12), Image.Resampling.BILINEAR))
    assert np.array_equal(images.resize(given, 12, 16)[0].numpy(), expected)
    assert images.resize(given, 30, 40) is given


def test_padding_is_black_and_centred():
    white = torch.full((1, 20, 40, 3), 255, dtype=torch.uint8)
    for kind in (images.resize_with_pad, images.pad_then_resize):
        padded = kind(white, 40)[0]
        assert padded.shape == (40, 40, 3)
        assert (padded[:9] == 0).all() and (padded[12:28] == 255).all() and (padded[31:] == 0).all()
    floats = images.resize_float_with_pad(torch.ones(1, 3, 20, 40), 40)[0]
    assert (floats[:, :10] == -1).all() and (floats[:, 10:30] == 1).all() and (floats[:, 30:] == -1).all()


def test_pixels_span_minus_one_to_one():
    assert images.to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    floats = torch.rand(3)
    assert images.to_pixels(floats) is floats


def test_augmentation_moves_fixed_cameras_only():
    """A picture without contrast keeps its shape visible: only crop and rotation can bring in black corners."""
    pixels = torch.full((16, 2, 3, 32, 32), 0.2)
    seeds = torch.stack([torch.arange(16), torch.zeros(16, dtype=torch.int64)], 1)
    out = images.augment(pixels, seeds, fixed=[0])
    assert out.shape == pixels.shape and out.min() >= -1 and out.max() <= 1
    corners = out[..., 0, 0] - out[..., 16, 16]
    assert (corners[:, 0].abs() > 0.1).any() and (corners[:, 1].abs() < 1e-4).all()
    assert out[:, :, :, 16, 16].std(0).min() > 0.01  # every picture has its own brightness
    torch.testing.assert_close(images.augment(pixels[3:4], seeds[3:4], fixed=[0]), out[3:4])
