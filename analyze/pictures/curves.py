"""Small curves as inline SVG: they scale, follow the page's colours, and say in words what they show."""

from collections.abc import Mapping

from markupsafe import Markup, escape

WIDTH, HEIGHT, PAD = 96.0, 30.0, 4.0


def sparkline(values: Mapping[int, float], highest: float, what: str) -> Markup:
    """A curve of one value a step, from 0 to `highest`; each point names itself, `what` is read aloud."""
    steps = sorted(values)
    top = highest if highest > 0 else 1.0
    gap = (WIDTH - 2 * PAD) / max(1, len(steps) - 1)
    points = [
        (PAD + gap * place, HEIGHT - PAD - (HEIGHT - 2 * PAD) * values[step] / top) for place, step in enumerate(steps)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"><title>step {step}: {values[step]:.3f}</title></circle>'
        for (x, y), step in zip(points, steps, strict=True)
    )
    spoken = escape(f"{what}: " + ", ".join(f"{step}: {values[step]:.3f}" for step in steps))
    return Markup(
        f'<svg class="spark" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="{WIDTH:g}" height="{HEIGHT:g}" role="img" aria-label="{spoken}">'
        f'<line x1="0" y1="{HEIGHT - PAD:g}" x2="{WIDTH:g}" y2="{HEIGHT - PAD:g}"/><polyline points="{line}"/>{dots}</svg>'
    )
