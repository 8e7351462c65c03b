"""Features for one page with no picture twice: as in FLUX-SAE, greedy by rank."""

from collections.abc import Iterable, Sequence


def globally_unique(candidates: Iterable[Sequence[int]], each: int, most: int) -> list[tuple[int, list[int]]]:
    """The first `most` features that find `each` images that no feature before them shows: (place, its images), in their order.

    `candidates`: the images of every feature, best first; the features in the order of their rank.  One pass: a feature takes the
    best free ones; one that finds fewer than `each` is left out and takes none.
    """
    taken: set[int] = set()
    chosen: list[tuple[int, list[int]]] = []
    for place, images in enumerate(candidates):
        if len(chosen) == most:
            break
        free = [image for image in dict.fromkeys(images) if image not in taken][:each]
        if len(free) == each:
            taken.update(free)
            chosen.append((place, free))
    return chosen
