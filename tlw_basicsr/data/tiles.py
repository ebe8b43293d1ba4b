"""Where the tiles of an image begin."""


def tile_starts(length: int, crop: int, step: int, threshold: int | None) -> list[int]:
    """Return where the tiles of one side begin; a side shorter than ``crop`` is one tile.

    A tile that ends at the border is added if more than ``threshold`` pixels are left there; None for never.
    """
    if length <= crop:
        return [0]
    starts = list(range(0, length - crop + 1, step))
    if threshold is not None and length - crop - starts[-1] > threshold:
        starts.append(length - crop)
    return starts


def even_tiles(length: int, largest: int, overlap: int, multiple: int, smallest: int = 0) -> tuple[list[int], int]:
    """Return where the tiles of one side begin, and their length: few tiles, and short ones.

    There are as many as tiles of at most ``largest`` need that overlap by ``overlap``, and they are no longer than that
    needs, but not shorter than ``smallest``. Starts and lengths are multiples of ``multiple``, as all lengths
    given are; one such unit of a tile at least is not overlap.
    """
    if length <= largest:
        return [0], length
    length, largest, overlap = length // multiple, largest // multiple, -(-overlap // multiple)
    overlap = min(overlap, largest - 1)
    number = -(-(length - overlap) // (largest - overlap))
    tile = max(-(-(length + (number - 1) * overlap) // number), smallest // multiple)
    return [n * (length - tile) // (number - 1) * multiple for n in range(number)], tile * multiple
