"""Text by domain: what is found, how it is split, and which sample is of which domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from thinwire.dist import domains
from thinwire.dist.data import DataSettings
from thinwire.dist.domain_data import DomainData
from thinwire.dist.domains import installed_domains

CPU = torch.device("cpu")
SETTINGS = DataSettings(corpus="domains", samples_per_domain=4, validation_fraction=0.1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five domains of about 100 kB, each of documents in which one letter abounds."""

    def source(letter: str) -> Callable[[], Iterator[bytes]]:
        return lambda: (f"{number} {letter * (900 + number)}".encode() for number in range(100))

    monkeypatch.setattr(domains, "_SOURCES", {letter: source(letter) for letter in "abcde"})


def test_domains_are_large_enough_and_split_without_overlap() -> None:
    found = installed_domains(0.1)
    assert len(found) >= 4
    assert {"python", "headers", "prose"} <= {domain.name for domain in found}
    for domain in found:
        assert not set(domain.training) & set(domain.validation)
        training, validation = sum(map(len, domain.training)), sum(map(len, domain.validation))
        assert 60_000 <= training + validation <= 640_000
        # Whole documents, so the share may be too large by one of them.
        assert 0.1 * (training + validation) <= validation < 0.1 * (training + validation) + 32_000


def test_a_paragraph_of_a_licence_counts_once() -> None:
    paragraphs = Counter(
        b" ".join(paragraph.lower().split())
        for text in domains._legal()
        for paragraph in text.split(b"\n\n")
        if paragraph.strip()
    )
    assert paragraphs
    assert set(paragraphs.values()) == {1}


def test_too_few_domains_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {name: lambda: iter([b"x" * 30_000, b"y" * 40_000]) for name in ("a", "b", "c")}
    monkeypatch.setattr(domains, "_SOURCES", one | {"empty": lambda: iter([b"short"] * 10**6)})
    with pytest.raises(ValueError, match=r"data\.corpus: domains needs text of 4 domains, .* has 3: .* of empty"):
        installed_domains(0.1)


@pytest.mark.usefixtures("small")
def test_a_block_of_samples_is_of_one_domain_however_it_is_shared() -> None:
    data = DomainData(SETTINGS, context=64, seed=3)
    blocks = [{data.domain_of(sample) for sample in range(first, first + 4)} for first in range(0, 4 * 600, 4)]
    assert all(len(block) == 1 for block in blocks)
    drawn = Counter(block.pop() for block in blocks)
    assert set(drawn) == set(range(len(data.domains)))
    # Six standard deviations of a fair draw.
    expected = 600 / len(drawn)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in drawn.values())
    whole = data.training_batch(range(8), CPU)
    halves = [data.training_batch(range(first, first + 4), CPU) for first in (0, 4)]
    assert torch.equal(whole.inputs, torch.cat([half.inputs for half in halves]))
    assert whole.text_bytes == 8 * 64
    for sample, row in enumerate(whole.inputs):
        assert (row == ord(data.domains[data.domain_of(sample)])).float().mean() > 0.8
    other = DomainData(SETTINGS, context=64, seed=4)
    assert [other.domain_of(4 * i) for i in range(50)] != [data.domain_of(4 * i) for i in range(50)]


@pytest.mark.usefixtures("small")
def test_validation_windows_come_from_all_domains_in_turn() -> None:
    data = DomainData(SETTINGS, context=64, seed=3)
    names, count = data.domains, data.validation.count
    assert count % len(names) == 0
    batch = data.validation.batch(range(len(names)), CPU)
    for row, name in enumerate(names):
        alone = data.validation_by_domain[name].batch([0], CPU)
        assert torch.equal(batch.inputs[row], alone.inputs[0])
        assert torch.equal(batch.targets[row], alone.targets[0])
    assert {f"{what} {name}" for what in ("training", "validation") for name in names} == set(data.fingerprint)
    data.validation.batch([count - 1], CPU)


@pytest.mark.parametrize(
    "wrong", [{"corpus": "stdlib", "samples_per_domain": 2}, {"corpus": "domains", "files": ["a"]}]
)
def test_settings_of_other_corpora_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"data\.(samples_per_domain|files) is .* corpus is"):
        DataSettings(**wrong)  # type: ignore[arg-type]
