"""What `--trace` asks for, settled against what is harvested."""

from harvest.models.model import Geometry
from harvest.settings import HarvestSettings
from store.errors import UsageError
from store.format import CHUNK_IMAGES_MAX, StoreMeta
from store.sites import parse_numbers, spans
from store.traces import MOST_TRACED, Traced, TraceDtype, refuse_too_many

IMAGES_DEFAULT = 10
FEWER = "fewer --trace-images, fewer --trace-steps, or --trace-dtype bfloat16 take less"


def choose_traced(settings: HarvestSettings, meta: StoreMeta, geometry: Geometry) -> Traced | None:
    """What is traced, the names of its matrices left out; None without `--trace`.

    `UsageError` for images and steps that are not harvested, and for blocks that the model has not or that leave a gap.  Only
    double blocks are traced, whatever is harvested.
    """
    if not settings.trace:
        return None
    for name in ("trace_images", "trace_steps", "trace_blocks"):
        if (asked := getattr(settings, name)) is not None and not asked.strip():
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is empty: write numbers and ranges such as 0-3,7, or all, or leave {flag} out")
    dtype: TraceDtype = settings.trace_dtype or ("float32" if meta.dtype == "float32" else "bfloat16")
    traced = Traced(_images(settings, meta), _steps(settings, meta), _blocks(settings, meta, geometry), dtype)
    refuse_too_many(traced, CHUNK_IMAGES_MAX)
    return traced


def _images(settings: HarvestSettings, meta: StoreMeta) -> tuple[int, ...]:
    if settings.trace_images is None:
        return tuple(range(min(IMAGES_DEFAULT, meta.n_images)))
    asked = settings.trace_images
    try:
        images = parse_numbers(asked, meta.n_images, "image")
    except UsageError as error:
        raise UsageError(f"--trace-images {asked}: {error}; only what is harvested (--images) can be traced") from None
    if len(images) > MOST_TRACED:
        raise UsageError(f"--trace-images {asked}: at most {MOST_TRACED:,} images of a store can be traced")
    return images


def _steps(settings: HarvestSettings, meta: StoreMeta) -> tuple[int, ...]:
    if settings.trace_steps is None:
        return meta.steps
    asked = settings.trace_steps
    try:
        steps = parse_numbers(asked, meta.num_inference_steps, "step")
    except UsageError as error:
        raise UsageError(f"--trace-steps {asked}: {error}") from None
    missing = [step for step in steps if step not in meta.steps]
    if asked.strip() == "all":
        return meta.steps
    if missing:
        raise UsageError(
            f"--trace-steps {asked}: step {spans(missing)} is not harvested, only {spans(meta.steps)} are (--steps)"
        )
    return steps


def _blocks(settings: HarvestSettings, meta: StoreMeta, geometry: Geometry) -> tuple[int, ...]:
    there = f"{settings.model} has double blocks 0 to {geometry.double_blocks - 1}"
    if settings.trace_blocks is None:
        double = [site.layer for site in meta.site_objects if site.kind == "double"]
        if not double:
            raise UsageError(
                f"--trace keeps traces of double blocks, and only single ones are harvested; {there}: say which with "
                f"--trace-blocks 0-{geometry.double_blocks - 1}, or leave --trace out"
            )
        return tuple(range(1 + max(double)))
    asked = settings.trace_blocks
    if "single" in asked:
        raise UsageError(f"--trace-blocks {asked}: only double blocks can be traced; {there}")
    try:
        blocks = parse_numbers(asked.replace("double:", ""), geometry.double_blocks, "block")
    except UsageError as error:
        what = str(error).partition(": there are ")[0]  # which `there` says, and of which model
        raise UsageError(f"--trace-blocks {asked}: {what}; {there}") from None
    if blocks != tuple(range(len(blocks))):
        raise UsageError(
            f"--trace-blocks {asked}: a graph goes back to what enters block 0, so blocks are traced from 0 without a gap: "
            f"write --trace-blocks 0-{blocks[-1]}"
        )
    return blocks
