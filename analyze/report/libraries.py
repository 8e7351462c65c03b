"""The JavaScript libraries of the report, out of their Python wheels, with their licences.

- DataTables 2 with Scroller and jQuery 4 (table), from the wheel `itables`: an ES module, which browsers block on `file://`, so its
  one `export` at the end becomes a global variable;
- Bokeh (plots), from the wheel `bokeh`: classic scripts, copied as they are.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.resources import files
from pathlib import Path

from analyze.report.folder import ReportFolder
from store.errors import UsageError

BOKEH = ("bokeh.min.js", "bokeh-api.min.js")
EXPORT = re.compile(r"(?m)^export\s*\{([^}]*)\}\s*;?[ \t]*$|;export\s*\{([^}]*)\}\s*;?[ \t]*$")


def bundle_libraries(folder: ReportFolder) -> dict[str, str]:
    """Copy the libraries into `libraries/`; name and version of each."""
    try:
        found = {name: version(name) for name in ("bokeh", "itables")}
    except PackageNotFoundError as error:
        raise UsageError(
            f"the report needs the package {error.name}: pip install --requirement requirements.lock"
        ) from None
    for name in BOKEH:
        folder.write(f"libraries/{name}", files("bokeh").joinpath("server", "static", "js", name).read_bytes())
    bundle = files("itables").joinpath("html", "dt_bundle.js").read_text(encoding="utf-8")
    folder.write("libraries/datatables.js", classic_script(bundle, "DataTable").encode())
    folder.write("libraries/datatables.css", files("itables").joinpath("html", "dt_bundle.css").read_bytes())
    for name in found:
        folder.write(f"libraries/LICENSE-{name}.txt", _licence(name).encode())
    return found


def classic_script(module: str, name: str) -> str:
    """An ES module that imports nothing as a classic script that sets the global `name` to the module's default export."""
    exports = list(EXPORT.finditer(module))
    default = re.search(r"([\w$]+) as default\b", (exports[-1][1] or exports[-1][2]) if exports else "")
    if len(exports) != 1 or default is None:
        raise UsageError(
            f"the table's library does not end in one export ({len(exports)} found): install the pinned version, "
            "pip install --requirement requirements.lock"
        )
    start, end = exports[0].span()
    return f"(() => {{\n{module[:start]};globalThis.{name}={default[1]};{module[end:]}\n}})();\n"


def _licence(package: str) -> str:
    """The texts of all licence files of an installed package."""
    found = [
        file for file in distribution(package).files or [] if "licen" in file.name.lower() and "dist-info" in str(file)
    ]
    return "\n\n".join(Path(str(file.locate())).read_text(encoding="utf-8") for file in sorted(found, key=str))
