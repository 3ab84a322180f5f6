"""Text to token ids: the bytes themselves, or any Hugging Face tokenizer file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# Stands between two files. No text holds a zero byte, so the model can learn that what follows is a new file.
_SEPARATOR = 0
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokens:
    """A text as token ids, and how many bytes of the text each of them stands for.

    ids: (n,) unsigned integers. byte_counts: (n,) or None where every token is one byte.
    """

    ids: npt.NDArray[Any]
    byte_counts: npt.NDArray[np.uint16] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer(Protocol):
    """vocab: number of token ids. identity: changes whenever the encoding of any text might."""

    vocab: int
    identity: str

    def encode(self, files: list[bytes]) -> Tokens:
        """Tokens of all files, one after another."""
        ...


class ByteTokenizer:
    """One token per byte, ids 0 to 255; a zero byte ends each file."""

    vocab = 256
    identity = "bytes"

    def encode(self, files: list[bytes]) -> Tokens:
        """Tokens of all files, one after another."""
        text = b"".join(part for file in files for part in (file, bytes([_SEPARATOR])))
        return Tokens(np.frombuffer(text, dtype=np.uint8))


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Args:
        path: the file.
    Raises:
        ValueError: the library is not installed, or the file is missing or not a tokenizer's.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ValueError(
                f"data.tokenizer: {path} needs the `tokenizers` library: pip install 'thinwire[tokenizers]', "
                "or use data.tokenizer=bytes"
            ) from error
        if not path.is_file():
            raise ValueError(f"data.tokenizer: there is no file {path}; give a tokenizer.json, or bytes")
        content = path.read_bytes()
        try:
            self._tokenizer = Library.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer: {path} is not a Hugging Face tokenizer file: {error}") from error
        self.vocab: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.identity = hashlib.sha256(content).hexdigest()
        ends = (self._tokenizer.token_to_id(token) for token in _END_OF_TEXT)
        self._end = next((end for end in ends if end is not None), None)

    def encode(self, files: list[bytes]) -> Tokens:
        """Tokens of all files, one after another, each ended by the end-of-text token if the tokenizer has one."""
        ids: list[npt.NDArray[Any]] = []
        counts: list[npt.NDArray[Any]] = []
        dtype = np.uint16 if self.vocab <= 1 << 16 else np.uint32
        for file in files:
            text = file.decode("utf-8", errors="replace")
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            ends_at = np.array([end for _, end in encoding.offsets], dtype=np.int64)
            ids.append(np.array(encoding.ids, dtype=dtype))
            counts.append(_bytes_of_tokens(text, ends_at))
            if self._end is not None:
                ids.append(np.array([self._end], dtype=dtype))
                counts.append(np.zeros(1, dtype=np.int64))
        if not ids:
            return Tokens(np.zeros(0, dtype), np.zeros(0, np.uint16))
        byte_counts = np.concatenate(counts)
        return Tokens(np.concatenate(ids), np.minimum(byte_counts, 65535).astype(np.uint16))


def _bytes_of_tokens(text: str, ends_at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """UTF-8 bytes between each token's end and the end of the one before; all together the whole text.

    Args:
        ends_at: for each token the position in `text`, in characters, at which it ends.
    """
    if not len(ends_at):
        return np.zeros(0, dtype=np.int64)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    position = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))
    ends = position[np.maximum.accumulate(ends_at)]
    ends[-1] = position[-1]
    return np.diff(ends, prepend=0)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", or the path of a tokenizer.json.

    Raises:
        ValueError: see FileTokenizer.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name).expanduser())
