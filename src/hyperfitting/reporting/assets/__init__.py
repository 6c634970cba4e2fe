"""Templates, style and script of the HTML pages."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment() -> Environment:
    """Return the templates' environment, in which everything inserted is escaped."""
    return Environment(
        loader=PackageLoader("hyperfitting.reporting", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(name: str) -> str:
    """Return the text of an asset."""
    return (files(__name__) / name).read_text("utf-8")
