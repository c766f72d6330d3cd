"""HTML to the text that a reader came for, with what the page says of its own use.

Two field libraries; both drop navigation, comments and footers by rules of their own. Measured on 181 news and blog
pages with hand-made main text (scrapinghub/article-extraction-benchmark): bag-of-words F1, mean over pages, one core:

    resiliparse    F1 0.945 (precision 0.912, recall 0.988)    about 1,200 pages/s      the default
    trafilatura    F1 0.961 (precision 0.951, recall 0.984)    about   130 pages/s

A crawl of a billion pages costs 230 core-hours with the one and 2,100 with the other; tests/benchmarks/extraction.py
measures both again.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Literal

from storage.errors import RecipeError, SourceError

Extractor = Literal["resiliparse", "trafilatura"]

MAX_DEPTH = 512
"""Elements inside elements; Blink's limit too. resiliparse's main-content rules take time by its square."""

_MANY_TAGS = 4096  # fewer take no time, however they are nested
_DEEP = " > ".join(["*"] * MAX_DEPTH)
_LONG_TAG = re.compile(r"<[a-zA-Z][^<>]{65536,}")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_RIGHTS = "meta[name='robots' i], meta[name^='tdm-' i], link[rel~='license' i], a[rel~='license' i]"


@dataclass(frozen=True)
class Page:
    """Main text, the title, the language that the page declares, and `rights`: robots, tdm_*, license."""

    text: str
    title: str | None = None
    language: str | None = None
    rights: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=2)
def html_extractor(name: Extractor) -> Callable[[str], Page]:
    """The function from a page's HTML (no lone surrogates) to its Page.

    It raises SourceError("broken_html") for a page that would take the extractor hours. RecipeError if the library is
    missing.
    """
    text_of = _resiliparse() if name == "resiliparse" else _trafilatura()
    from resiliparse.parse.html import HTMLParserException, HTMLTree

    def extract(html: str) -> Page:
        if len(html) > 200_000:  # a tag's attributes are compared pair by pair
            for tag in _LONG_TAG.finditer(html):
                if len(_QUOTED.sub("", tag[0])) > 65536:
                    raise SourceError("broken_html", f"a tag of {len(tag[0])} characters")
        try:
            tree: Any = HTMLTree.parse(html)
        except HTMLParserException as error:
            raise SourceError("broken_html", str(error)) from error
        if html.count("<") > _MANY_TAGS and tree.document.query_selector(_DEEP):
            raise SourceError("broken_html", f"nested deeper than {MAX_DEPTH} elements")
        root = tree.document.query_selector("html")
        language = root.getattr("lang") if root else None
        return Page(text_of(html, tree).strip(), (tree.title or "").strip() or None, language or None, _rights(tree))

    return extract


def extractor_version(name: Extractor) -> str:
    """For instance "resiliparse 2.0.1"."""
    return f"{name} {version(name)}"


def _resiliparse() -> Callable[[str, Any], str]:
    from resiliparse.extract.html2text import extract_plain_text

    def text(html: str, tree: Any) -> str:
        return str(
            extract_plain_text(
                tree,
                preserve_formatting=True,
                main_content=True,
                # Each of these gains precision and costs at most 0.001 of recall: F1 from 0.898 to 0.945.
                alt_texts=False,
                comments=False,
                post_meta=False,
                skip_elements=["header"],
            )
        )

    return text


def _trafilatura() -> Callable[[str, Any], str]:
    try:
        import trafilatura
        from lxml.etree import LxmlError  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise RecipeError(f"ingest.extractor: {error.name} is not installed; {INSTALL_TRAFILATURA}") from error

    def text(html: str, tree: Any) -> str:
        try:
            # Without its fallbacks (fast) it is quicker and, here, better: F1 0.961 against 0.958.
            return trafilatura.extract(html, fast=True, include_comments=False) or ""
        except (LxmlError, ValueError, RecursionError) as error:
            raise SourceError("broken_html", f"{type(error).__name__}: {error}") from error

    return text


INSTALL_TRAFILATURA = "run: pip install 'trafilatura>=2'"


def _rights(tree: Any) -> dict[str, Any]:
    rights: dict[str, Any] = {}
    for element in tree.document.query_selector_all(_RIGHTS):
        if element.tag.lower() == "meta":
            name, content = element.getattr("name").lower().replace("-", "_"), element.getattr("content")
            if content:
                rights[name] = f"{rights[name]}, {content}" if name in rights else content
        elif (href := element.getattr("href")) and href not in rights.setdefault("license", []):
            rights["license"].append(href)
    return {name: value for name, value in rights.items() if value}
