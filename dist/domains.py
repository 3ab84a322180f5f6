"""Text of known domains that this machine has anyway: code, prose, licences, certificates, number tables."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import re
import ssl
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from thinwire.dist import corpus

# Of each domain at most so much, so that all are about as large; a longer file lends its beginning.
_DOMAIN_BYTES = 600_000
_DOCUMENT_BYTES = 32_000
_SMALLEST_DOCUMENT_BYTES = 200
# Less than this is no domain: a few windows that a model learns by heart.
_SMALLEST_DOMAIN_BYTES = 60_000
_FEWEST = 4

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", re.DOTALL)
_LEGAL = ("LICEN[CS]E*", "COPYING*", "NOTICE*")


@dataclass(frozen=True)
class Domain:
    """The documents of one domain, none of which is on both sides."""

    name: str
    training: list[bytes]
    validation: list[bytes]


def installed_domains(validation_fraction: float) -> list[Domain]:
    """The domains of which this machine has enough text, by name.

    Of python, headers, prose, legal, base64 and decimal: the standard library's code; torch's and Python's C and C++
    headers; Python's reference and the descriptions of installed packages; licences; root certificates; and the
    decimal module's test vectors. What they hold depends on what is installed, so ranks compare it before they train.

    Each document counts once, and each paragraph of a licence, since many licences differ by a name alone. Documents
    are taken in the order of their SHA-256, whatever their names, the first of them for validation.

    Args:
        validation_fraction: share of each domain's bytes that is kept for validation.
    Raises:
        ValueError: fewer than four domains are here.
    """
    found, missing = [], []
    for name, documents in _SOURCES.items():
        chosen = _choose(documents())
        if sum(map(len, chosen)) < _SMALLEST_DOMAIN_BYTES:
            missing.append(name)
            continue
        found.append(_split(name, chosen, validation_fraction))
    if len(found) < _FEWEST:
        raise ValueError(
            f"data.corpus: domains needs text of {_FEWEST} domains, and this machine has {len(found)}: there is too "
            f"little of {', '.join(missing)}; install Python with its headers and its test package, or give your own "
            "text by data.corpus=files"
        )
    return found


def _choose(documents: Iterable[bytes]) -> list[bytes]:
    """Up to _DOMAIN_BYTES of different documents, in the order of their hash."""
    kept = {document[:_DOCUMENT_BYTES] for document in documents if len(document) >= _SMALLEST_DOCUMENT_BYTES}
    chosen, total = [], 0
    for document in sorted(kept, key=lambda text: hashlib.sha256(text).digest()):
        if total >= _DOMAIN_BYTES:
            break
        chosen.append(document)
        total += len(document)
    return chosen


def _split(name: str, documents: list[bytes], validation_fraction: float) -> Domain:
    wanted, total, place = validation_fraction * sum(map(len, documents)), 0, 0
    while total < wanted:
        total += len(documents[place])
        place += 1
    return Domain(name, documents[place:], documents[:place])


def _python() -> Iterator[bytes]:
    return map(_beginning, corpus.standard_library())


def _headers() -> Iterator[bytes]:
    for root in (Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))):
        yield from (_beginning(path) for path in root.rglob("*.h") if path.is_file())


def _prose() -> Iterator[bytes]:
    yield from (text.encode() for text in pydoc_data.topics.topics.values())
    for path in _site_packages().glob("*.dist-info/METADATA"):
        yield path.read_bytes().partition(b"\n\n")[2]  # after the header lines


def _legal() -> Iterator[bytes]:
    """Without the paragraphs that a licence before it has, read in the order of their hash."""
    found = [path for name in _LEGAL for path in _site_packages().glob(f"*.dist-info/**/{name}")]
    found += Path("/usr/share/common-licenses").glob("*")
    texts = {path.read_bytes() for path in found if path.is_file()}
    seen: set[bytes] = set()
    for text in sorted(texts, key=lambda text: hashlib.sha256(text).digest()):
        new = []
        for paragraph in text.replace(b"\r\n", b"\n").split(b"\n\n"):
            words = b" ".join(paragraph.lower().split())
            if words not in seen:
                seen.add(words)
                new.append(paragraph)
        yield b"\n\n".join(new)


def _base64() -> Iterator[bytes]:
    bundles = [
        *(_site_packages() / folder / "cacert.pem" for folder in ("certifi", "pip/_vendor/certifi")),
        Path(ssl.get_default_verify_paths().openssl_cafile),
    ]
    bundles.append(Path("/etc/ssl/certs/ca-certificates.crt"))
    for path in bundles:
        if path.is_file():
            yield from _PEM.findall(path.read_bytes())


def _decimal() -> Iterator[bytes]:
    folder = Path(sysconfig.get_path("stdlib")) / "test" / "decimaltestdata"
    return map(_beginning, folder.glob("*.decTest"))


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_DOCUMENT_BYTES)


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


_SOURCES: dict[str, Callable[[], Iterator[bytes]]] = {
    "python": _python,
    "headers": _headers,
    "prose": _prose,
    "legal": _legal,
    "base64": _base64,
    "decimal": _decimal,
}
