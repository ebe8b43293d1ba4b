"""MATLAB's bicubic ``imresize`` as two sparse matrix products."""

import math
from functools import lru_cache

import cv2
import numpy as np
from basicsr.utils.matlab_functions import calculate_weights_indices
from scipy.sparse import csr_matrix

KERNEL_WIDTH = 4  # width of the cubic kernel in pixels of the smaller image


@lru_cache(maxsize=512)
def resize_matrix(length: int, scale: float, antialiasing: bool = True, borders: str = "mirror") -> csr_matrix:
    """Return the matrix (out, ``length``) that resizes one side; beyond its borders the image is as they say.

    Row i holds BasicSR's weights for output pixel i. The result is cached and shared: do not change it.
    """
    out_length = math.ceil(length * scale)
    weights, indices, pad, _ = calculate_weights_indices(length, out_length, scale, "cubic", KERNEL_WIDTH, antialiasing)
    source = (indices.long() - pad).numpy()
    if borders == "replicate":
        source = source.clip(0, length - 1)
    source = np.where(source < 0, -1 - source, source)
    source = np.where(source >= length, 2 * length - 1 - source, source)
    if source.min() < 0 or source.max() >= length:
        raise ValueError(f"imresize: a side of {length} pixels is too short for the scale {scale}")
    row_ends = np.arange(0, source.size + 1, source.shape[1])
    matrix = csr_matrix((weights.numpy().ravel(), source.ravel(), row_ends), shape=(out_length, length))
    matrix.eliminate_zeros()  # a quarter of the weights at a scale of 3
    return matrix


def imresize(image: np.ndarray, scale: float, antialiasing: bool = True, borders: str = "mirror") -> np.ndarray:
    """Resize as MATLAB's ``imresize(image, scale, 'bicubic')`` does, rows first, then columns.

    For float32 the result is that of BasicSR's ``imresize``, only faster. For uint8 it is rounded and saturated after
    each of the two passes, as in MATLAB; the LR images of the benchmarks were made like this.

    Args:
        image: (H, W) or (H, W, C), float32 of any range or uint8.
        scale: Factor of both sides; the result has ceil(side · scale) pixels.
        antialiasing: Whether to widen the kernel when downscaling, MATLAB's default.
        borders: What lies beyond the image: ``'mirror'``, or ``'replicate'`` for its outermost pixels, with which the
            LR images of an older generation were made.

    Returns:
        (H', W') or (H', W', C) of the same dtype; float32 is neither rounded nor clamped.

    Raises:
        ValueError: A side is so short that the kernel would reach beyond the mirrored image.
    """
    columns = resize_matrix(image.shape[1], scale, antialiasing, borders)
    finish = to_8_bits if image.dtype == np.uint8 else np.asarray
    blocks = []
    for first, last, matrix in row_blocks(image.shape[0], scale, antialiasing, borders):
        # first the rows, then the columns, which swapped axes turn into rows
        block = finish(along_first_axis(matrix, image[first:last]))
        blocks.append(swap_axes(finish(along_first_axis(columns, swap_axes(block)))))
    return np.concatenate(blocks)


def along_first_axis(matrix: csr_matrix, image: np.ndarray) -> np.ndarray:
    """Return the product of a matrix (out, H) and an image (H, …), float32."""
    flat = np.ascontiguousarray(image).reshape(matrix.shape[1], -1).astype(np.float32, copy=False)
    return (matrix @ flat).reshape(matrix.shape[0], *image.shape[1:])


@lru_cache(maxsize=512)
def row_blocks(length: int, scale: float, antialiasing: bool, borders: str) -> list[tuple[int, int, csr_matrix]]:
    """Split :func:`resize_matrix` into blocks of 32 rows, whose results fit into a processor's cache.

    Each block is the first row of the image that it needs, the last one plus 1, and the matrix for these rows.
    """
    whole, blocks = resize_matrix(length, scale, antialiasing, borders), []
    for row in range(0, whole.shape[0], 32):
        block = whole[row : row + 32]
        first, last = int(block.indices.min()), int(block.indices.max()) + 1
        blocks.append((first, last, block[:, first:last].tocsr()))
    return blocks


def swap_axes(image: np.ndarray) -> np.ndarray:
    """Turn (H, W, …) into contiguous (W, H, …), by OpenCV, which takes a fifth of NumPy's time."""
    height, width, *channels = image.shape
    if channels and not 1 <= channels[0] <= 4:
        return np.ascontiguousarray(image.swapaxes(0, 1))
    return cv2.transpose(image).reshape(width, height, *channels)


def to_8_bits(image: np.ndarray) -> np.ndarray:
    """Saturate levels in [0, 255] and round them to uint8, halves up."""
    return np.floor(image.clip(0, 255) + 0.5).astype(np.uint8)
