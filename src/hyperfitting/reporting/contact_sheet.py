"""All figures of a folder of reports on one page, at the size at which a paper prints them."""

from pathlib import Path

from hyperfitting import templates
from hyperfitting.runtime.files import write_text

PAGE = "figures.html"


def write_contact_sheet(reports: Path) -> Path:
    """Write the page of all figures that lie in the reports of a folder, and return its path.

    Figures are read from where they lie (`NAME/FIGURE.svg`), so that the page stays small. It has
    no script; a browser runs none in a picture either.
    """
    figures = {
        folder.name: [path.name for path in sorted(folder.glob("*.svg"))]
        for folder in sorted(reports.iterdir())
        if folder.is_dir()
    }
    template = templates.environment("hyperfitting.reporting").get_template(PAGE)
    text = template.render(reports=[(name, names) for name, names in figures.items() if names])
    path = reports / PAGE
    write_text(path, text)
    return path
