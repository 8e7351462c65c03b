"""How fast a harvest goes: rates that the user states, or that are measured here and now; nothing else makes a time.

`--images-per-second` and `--disk-per-second` are taken as they are.  Without the first a batch is drawn where the model is.
"""

from dataclasses import dataclass

from harvest.planning.estimate import Disk
from harvest.planning.measure import bytes_a_second, seconds_a_batch
from harvest.planning.plan import Outline, Plan
from store.format import CHUNK_BYTES
from store.sizes import human_size, parse_size


@dataclass(frozen=True)
class Rates:
    """Images a second of one device and bytes a second of the disk, None where they are unknown, and where they come from."""

    images: float | None
    why_images: str
    disk: float | None
    why_disk: str


def rates_of(plan: Outline) -> Rates:
    """The rates of a plan; what was stated is not measured."""
    settings, meta = plan.settings, plan.meta
    images, why = settings.images_per_second, "as stated by --images-per-second"
    if images is not None:
        why = f"{images:g} images/s, {why}"
    elif isinstance(plan, Plan):
        seconds, size = seconds_a_batch(plan, 0)
        images = size / seconds
        why = f"{images:.3g} images/s, measured now with the tokens asked for ({meta.device}, a batch of {size} in {seconds:.2g} s)"
    else:
        why = (
            f"no rate is known of {meta.model['id']}: its weights are not here. State one that you measured, such as "
            "--images-per-second 2, or run this where the model is"
        )
    if settings.disk_per_second is not None:
        disk: float | None = float(parse_size(settings.disk_per_second))
        return Rates(images, why, disk, f"{human_size(disk or 0)}/s, as stated by --disk-per-second")
    disk = None
    if settings.images_per_second is None and isinstance(plan, Plan) and settings.out is not None:
        disk = bytes_a_second(Disk.of(settings.out).folder, CHUNK_BYTES)
    return Rates(images, why, disk, "" if disk is None else f"{human_size(disk)}/s, measured now at {settings.out}")
