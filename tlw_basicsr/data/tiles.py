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
