"""HTML pages: templates that escape everything inserted, and the policy that allows one script.

A package keeps its templates, style and script in its folder `assets`.
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment(package: str) -> Environment:
    """Return the environment of a package's templates, in which everything inserted is escaped."""
    return Environment(
        loader=PackageLoader(package, "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(package: str, name: str) -> str:
    """Return the text of one of a package's assets."""
    return (files(package) / "assets" / name).read_text("utf-8")


def csp_hash(content: str) -> str:
    """Return the source expression that allows this inline script or style (CSP level 2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
