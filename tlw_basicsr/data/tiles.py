"""Where the tiles of an image begin."""


def tile_starts(length: int, crop: int, step: int, threshold: int | None) -> list[int]:
    """Return where the tiles of one side begin.

    Args:
        length: Length of the side in pixels.
        crop: Side of a tile; a shorter ``length`` is one tile.
        step: Distance from one tile to the next; ``crop`` for tiles that do not overlap.
        threshold: Add a tile that ends at the border if more than this many pixels are left there; None for never.
    """
    if length <= crop:
        return [0]
    starts = list(range(0, length - crop + 1, step))
    if threshold is not None and length - crop - starts[-1] > threshold:
        starts.append(length - crop)
    return starts
