"""Where the tiles of an image begin."""


def tile_starts(length: int, crop: int, step: int, threshold: int | None) -> list[int]:
    """Where the tiles of one side begin.

    Args:
        length: of the side, in pixels.
        crop: side of a tile; a shorter ``length`` is one tile.
        step: from one tile to the next; ``crop`` for tiles that do not overlap.
        threshold: add a last tile that ends at the border if more than this many pixels are left there; None for
            no such tile.
    """
    if length <= crop:
        return [0]
    starts = list(range(0, length - crop + 1, step))
    if threshold is not None and length - crop - starts[-1] > threshold:
        starts.append(length - crop)
    return starts
