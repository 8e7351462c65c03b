"""What a report holds of the images: prompts and seeds, the text tokens as people read them, pictures."""

from collections.abc import Iterable
from typing import Any

import pyarrow.parquet as pq

from analyze.inputs import Analysis
from analyze.report.columns import readable
from analyze.report.folder import ReportFolder
from analyze.report.picture_files import FOLDER_IMAGES, write_pictures
from store.strata import RealText

BLOCK = 1024
"""images whose prompts are in a file"""


def write_images(folder: ReportFolder, analysis: Analysis, images: Iterable[int], side: int) -> dict[str, Any]:
    """Write prompts, pieces and the pictures of these images; what the page has to know of them."""
    store = analysis.store
    table = pq.read_table(analysis.out / "images.parquet", columns=["prompt", "seed", "split"])
    starts = range(0, store.n_images, BLOCK)
    for number, start in enumerate(starts):
        folder.script(f"prompts/{number}", {"first": start, **table.slice(start, BLOCK).to_pydict()})
    pieces = set(analysis.streams()) != {"img"} and "text_pieces" in store.prompts().column_names
    if pieces:
        table = store.prompts()
        for number, start in enumerate(starts):
            some = table.slice(start, BLOCK)
            texts = [[readable(piece) for piece in group] for group in some["text_pieces"].to_pylist()]
            text = RealText.of(some)
            for row, words in enumerate(texts):
                for place in text.of_image(row)[1]:
                    words[place] = ""  # the page finds words by their places
            folder.script(f"pieces/{number}", {"first": start, "pieces": texts})
    there = store.meta.pictures != "none" and set(analysis.streams()) != {"txt"}
    same = write_pictures(folder, store, images, side) if there else {}
    return {
        "there": there,
        "folder_images": FOLDER_IMAGES,
        "same": {str(image): earlier for image, earlier in same.items()},
        "block": BLOCK,
        "pieces": pieces,
    }
