import numpy as np
import pytest
from basicsr.utils.matlab_functions import imresize as basicsr_imresize

from tlw_basicsr import imresize
from tlw_basicsr.data.bicubic import resize_matrix


@pytest.mark.parametrize("shape", [(48, 64, 3), (37, 53, 3), (40, 31), (9, 120, 1), (20, 24, 6)])
def test_same_as_basicsrs(shape):
    image = np.random.rand(*shape).astype(np.float32)
    for scale in (1 / 2, 1 / 3, 1 / 4, 0.37, 2, 3, 4):
        expected = basicsr_imresize(image, scale)
        ours = imresize(image, scale)
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_without_antialiasing():
    image = np.random.rand(37, 53, 3).astype(np.float32)
    np.testing.assert_allclose(imresize(image, 0.37, False), basicsr_imresize(image, 0.37, False), atol=1e-6)


def test_replicated_borders_are_those_of_an_image_that_goes_on():
    image = np.random.rand(36, 48, 3).astype(np.float32)
    wide = np.pad(image, ((16, 16), (16, 16), (0, 0)), mode="edge")
    ours = imresize(image, 1 / 4, borders="replicate")
    np.testing.assert_allclose(ours, imresize(wide, 1 / 4)[4:-4, 4:-4], atol=1e-6)
    assert np.abs(ours - imresize(image, 1 / 4))[0].max() > 1e-3


def test_matlabs_value_of_a_step():
    """imresize([0 0 0 0 1 1 1 1], 0.5, 'bicubic') worked out by the kernel: weights at odd quarters, mirrored."""
    step = np.tile(np.repeat([0.0, 1.0], 4).astype(np.float32), (8, 1))

    def cubic(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0

    expected = []
    for i in range(4):
        centre = 2 * i + 0.5
        weights = {j: cubic((j - centre) / 2) for j in range(-6, 14)}
        mirrored = [(-1 - j if j < 0 else 15 - j if j > 7 else j, v) for j, v in weights.items()]
        expected.append(sum(v * (j >= 4) for j, v in mirrored) / sum(weights.values()))
    np.testing.assert_allclose(imresize(step, 0.5)[0], expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 3])
def test_uint8_is_rounded_and_saturated_after_each_pass(scale):
    image = (np.random.rand(36, 48, 3) > 0.5).astype(np.uint8) * 255
    ours = imresize(image, scale)
    assert ours.dtype == np.uint8
    expected = np.empty(ours.shape)
    rows = resize_matrix(36, scale).toarray().astype(np.float64)
    columns = resize_matrix(48, scale).toarray().astype(np.float64)
    for c in range(3):
        half = np.floor((rows @ image[..., c]).clip(0, 255) + 0.5)
        expected[..., c] = np.floor((half @ columns.T).clip(0, 255) + 0.5)
    assert (ours != expected).mean() < 0.01  # float32 may round a half to the other side
    assert np.abs(ours - expected).max() <= 1
    # one rounding at the end is not the same
    assert (ours != basicsr_imresize(image.astype(np.float32), scale).clip(0, 255).round()).mean() > 0.05


def test_a_constant_stays_and_too_short_sides_are_refused():
    constant = np.full((32, 32, 3), 0.3, np.float32)
    np.testing.assert_allclose(imresize(constant, 1 / 4), np.full((8, 8, 3), 0.3), atol=1e-6)
    with pytest.raises(ValueError, match="too short"):
        imresize(np.zeros((4, 64), np.float32), 1 / 4)
