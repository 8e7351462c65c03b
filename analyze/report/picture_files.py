"""The pictures of the report: each once, WebP, its longer side scaled down to a given length."""

import hashlib
import io
from collections.abc import Iterable

from PIL import Image
from tqdm import tqdm

from analyze.pictures.drawing import fitted
from analyze.report.folder import ReportFolder
from store import Store

QUALITY = 82
FOLDER_IMAGES = 1000
"""pictures in a folder"""


def picture_path(image: int) -> str:
    """Where the picture of an image lies in the report."""
    return f"pictures/{image // FOLDER_IMAGES:03d}/{image}.webp"


def write_pictures(folder: ReportFolder, store: Store, images: Iterable[int], side: int) -> dict[int, int]:
    """Write the pictures of these images; for every image that looks like an earlier one, that one."""
    same: dict[int, int] = {}
    first: dict[bytes, int] = {}
    for image in tqdm(sorted(images), desc="pictures", unit="picture", mininterval=0.5):
        picture = store.picture(image)
        assert picture is not None, "asked for only where the store keeps pictures"
        data = webp_bytes(picture if max(picture.size) <= side else fitted(picture, side))
        earlier = first.setdefault(hashlib.sha256(data).digest(), image)
        if earlier != image:
            same[image] = earlier
        else:
            folder.write(picture_path(image), data)
    return same


def webp_bytes(image: Image.Image, lossless: bool = False) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=2, lossless=lossless)
    return buffer.getvalue()
