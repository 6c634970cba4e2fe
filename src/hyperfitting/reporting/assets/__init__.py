"""Templates, style and script of the HTML pages."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment() -> Environment:
    """Return what the templates are rendered with: everything put in is escaped."""
    return Environment(
        loader=PackageLoader("hyperfitting.reporting", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source(name: str) -> str:
    """Return a file as it is."""
    return (files(__name__) / name).read_text("utf-8")
