"""The layers whose experts are balanced, by name, in the order of the forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class LayerMap:
    """Names and their numbers. Given in advance, or learned from the first forward pass.

    Args:
        names: of all layers; None = learn them.
    Raises:
        ValueError: a name is given twice.
    """

    def __init__(self, names: Sequence[str | int] | None) -> None:
        self.names: list[str] = []
        self.complete = names is not None
        for name, count in Counter(map(str, names or ())).items():
            if count > 1:
                raise ValueError(f"layers: {name!r} is given {count} times; each router needs a name of its own")
            self.names.append(name)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def number(self, name: str) -> int:
        """Of a layer; a new one where they are still being learned.

        Raises:
            ValueError: no such layer.
        """
        if name not in self._numbers:
            if self.complete:
                raise ValueError(
                    f"layer: {name!r} is none of the {len(self)} layers that are balanced, "
                    f"{', '.join(self.names[:4])}{', ...' if len(self) > 4 else ''}; every layer has a part in every "
                    "forward pass, so name all in layers=, or let the first forward pass go through all of them"
                )
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]
