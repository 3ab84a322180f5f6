"""Texts that every machine with Python has: docstrings by topic, and the language reference as prose."""

from __future__ import annotations

import ast
import inspect
import json
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

from thinwire.dist.corpus import standard_library

# Topic -> the packages and modules of the standard library whose docstrings are about it.
TOPICS = {
    "email": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "network": ("http", "urllib", "socket", "socketserver", "ssl", "ftplib", "xmlrpc", "wsgiref", "ipaddress"),
    "asyncio": ("asyncio",),
    "threads": ("threading", "multiprocessing", "concurrent", "queue", "subprocess"),
    "markup": ("xml", "html"),
    "testing": ("unittest", "doctest"),
    "files": ("os", "pathlib", "shutil", "zipfile", "tarfile", "tempfile", "gzip", "bz2", "posixpath", "ntpath"),
    "windows": ("tkinter", "turtle", "idlelib"),
    "numbers": ("decimal", "_pydecimal", "fractions", "statistics", "random", "datetime", "_pydatetime", "calendar"),
    "code": ("ast", "inspect", "tokenize", "dis", "importlib", "pydoc", "lib2to3", "pdb", "traceback", "typing"),
}


def labelled_docstrings(path: Path, per_topic: int) -> dict[str, int]:
    """Write a JSON-lines file of docstrings with the topic of their module as label; returns how many of each.

    Each text once; the shortest are left out, for they could be about anything.

    Args:
        per_topic: at most so many of a topic, spread over its modules.
    """
    found: dict[str, dict[str, None]] = {topic: {} for topic in TOPICS}
    root = next(file for file in standard_library() if file.name == "abc.py").parent
    for file in standard_library():
        module = file.relative_to(root).parts[0].removesuffix(".py")
        for topic, modules in TOPICS.items():
            if module in modules:
                found[topic].update(dict.fromkeys(docstrings(file)))
    counts = {}
    with path.open("w", encoding="utf-8") as out:
        for topic, texts in found.items():
            chosen = list(texts)[:: max(1, len(texts) // per_topic)][:per_topic]
            counts[topic] = len(chosen)
            for text in chosen:
                out.write(json.dumps({"text": text, "label": topic}) + "\n")
    return counts


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a module's classes and functions, each on one line."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split())
            if len(text) >= 40:
                yield text


def language_reference(folder: Path) -> int:
    """Write the Python language reference, English prose, as one text file per topic; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        total += len(text.encode())
    return total
