"""What a pack is, in words: for `python -m store info PACK`."""

from typing import Any

from store.shards import Pack, shard_file
from store.sites import Site
from store.sizes import human_size, many


def describe(pack: Pack) -> str:
    """The text of `info`: what it was made from and how, and a line for every site with its rows and shards."""
    plan = pack.manifest["plan"]
    sites, files = pack.sites, pack.files
    size = sum(entry["bytes"] for entry in files.values())
    mlps = (
        f", with the MLPs of {many(len(pack.weights), 'site')} to compute mlp_out from mlp_in"
        if pack.recomputed
        else ""
    )
    images = max(content["images"] for content in pack.manifest["streams"].values())
    facts = [
        ("pack", f"{pack.path} (format {pack.manifest['format_version']}), finished, id {pack.id}"),
        ("parent", f"store {pack.store_id}"),
        ("model", model_line(pack.model)),
        ("split", f"{pack.split}: {many(images, 'image')}, denoising steps {', '.join(map(str, pack.steps))}"),
        ("seed", f"{pack.seed} decides the order of the rows ({plan.get('order', 'drawn as a whole: format 1')})"),
        ("numbers", f"d_model {pack.d_model}, {plan['dtype']}; columns {', '.join(pack.points)}; targets {pack.targets}{mlps}"),
        ("size", f"{human_size(size)} in {many(len(files) + 1, 'file')}; shards of at most {plan['shard_mb']} MB"),
    ]  # fmt: skip
    lines = [f"{name:>8}  {value}" for name, value in facts]
    joint = any("image" in pack.groups(site) for site in sites)
    image = f" {'of the image':>14}" if joint else ""
    head = f"{'site':>8} {'rows':>14} {'of real tokens':>15}{image} {'shards':>7} {'rows a shard':>19} {'bytes':>9}"
    return "\n".join([*lines, "", head, *(_site_line(pack, site, joint) for site in sites)])


def model_line(model: dict[str, Any]) -> str:
    """`tiny-flux, transformer sha256 1a2b3c4d5e6f…`, and whether it was quantised or compiled"""
    hashes = model.get("weights_sha256")
    digest = hashes.get("transformer") if isinstance(hashes, dict) else None
    known = f", transformer sha256 {str(digest)[:12]}…" if digest else ", weights unknown"
    quantized = f", quantised ({model['quantized'].get('as')})" if "quantized" in model else ""
    return f"{model.get('id')}{known}{quantized}" + (f", compiled ({model['compiled']})" if "compiled" in model else "")


def _site_line(pack: Pack, site: Site, joint: bool) -> str:
    shards, groups = pack.shard_rows(site.stream), pack.group_rows(site)
    kinds = f"{_number(groups.get('real')):>15}" + (f" {_number(groups.get('image')):>14}" if joint else "")
    spread = f"{min(shards):,}" + (f" to {max(shards):,}" if max(shards) > min(shards) else "")
    size = sum(pack.files[shard_file(site, index)]["bytes"] for index in range(len(shards)))
    return f"{site!s:>8} {sum(shards):>14,} {kinds} {len(shards):>7,} {spread:>19} {human_size(size):>9}"


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
