"""lattice_add: numba's code, the interpreted kernel, the compiled kernel and a real GPU against the reference."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import lattice_add as module
from thinwire.kernels import lattice_add_on_gpu
from thinwire.kernels.lattice_add import OUT_DTYPES, lattice_add, lattice_add_reference

FP32, BF16, FP16 = OUT_DTYPES
BITS = {FP32: torch.int32, BF16: torch.int16, FP16: torch.int16}

RECORDS = [(0, 0, 0, 3), (0, 1, 0, -5), (1, 0, 0, 7), (1, 1, 2, 11)]  # round, slot, sample, coefficient
BEFORE = ((torch.arange(131_072) % 1000) - 500) * 2.0**-12
AFTER = "3d1c09d0b9e119df9c2907895360fa3536bb1f7648e2b2c70aa9d75b7351c9ce"  # SHA-256 of the fp32 numbers


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def as_arguments(records: list[tuple[int, int, int, int]], sign: int = -1) -> tuple[Tensor, Tensor]:
    """The coefficients and places that take these records off the weights, or put them back."""
    coefficients = torch.tensor([sign * record[3] for record in records], dtype=torch.int32)
    places = torch.tensor([[number, slot << 16 | sample] for number, slot, sample, _ in records])
    return coefficients, places.to(torch.int64).reshape(-1, 2)


def replay(weights: Tensor, records: list[tuple[int, int, int, int]], *, first: int = 0, sign: int = -1) -> int:
    return lattice_add(weights, *as_arguments(records, sign), key=0, tensor=0, exponent=20, first=first)


class Case:
    """A random call: arguments, what the reference makes of them, and a check of what another path makes."""

    def __init__(self, seed: int, d: int, directions: int, first: int, distribution: str, masked: bool, dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.randint(low, high, shape, dtype=dtype, generator=generator)

        exponent = int(draw(-2, 45))
        self.weights = draw(-(2**23), 2**23, d).float() * 2.0**-exponent
        self.arguments = draw(-(2**20), 2**20, directions, dtype=torch.int32), draw(0, 2**32, directions, 2)
        self.options = {
            "key": int(draw(-(2**63), 2**63 - 1)) % 2**64,
            "tensor": int(draw(0, 2**28)),
            "exponent": exponent,
            "first": first,
            "distribution": distribution,
            "mask": draw(0, 256, (first + d + 7) // 8, dtype=torch.uint8) if masked else None,
        }
        self.expected = torch.empty(d, dtype=dtype)
        self.peak = lattice_add_reference(self.weights, *self.arguments, out=self.expected, **self.options)

    def check(self, add) -> None:
        """Into an output with known numbers on both sides, and in place."""
        d, dtype, before = len(self.weights), self.expected.dtype, self.weights.clone()
        storage = torch.full((d + 64,), 3.0, dtype=dtype)
        peak = add(self.weights, *self.arguments, out=storage[32 : 32 + d], **self.options)
        assert peak == self.peak
        assert torch.equal(storage[32 : 32 + d].view(BITS[dtype]), self.expected.view(BITS[dtype]))
        assert (storage[:32] == 3).all(), "wrote before the output"
        assert (storage[32 + d :] == 3).all(), "wrote past the output"
        assert torch.equal(self.weights, before), "the weights were changed"
        if dtype == FP32:
            assert add(before, *self.arguments, out=before, **self.options) == self.peak
            assert torch.equal(before, self.expected)


def test_replay_gives_the_known_bits_in_any_order_and_split() -> None:
    for order in itertools.permutations(RECORDS):
        weights = BEFORE.clone()
        replay(weights, list(order))
        assert sha256(weights) == AFTER
    for cut in range(5):
        weights = BEFORE.clone()
        replay(weights, RECORDS[cut:])
        replay(weights, RECORDS[:cut])
        assert sha256(weights) == AFTER
    peak = replay(weights, RECORDS, sign=1)
    assert torch.equal(weights, BEFORE)
    assert peak == BEFORE.abs().max() * 2**20


def test_sum_of_the_replay_is_known() -> None:
    weights = torch.zeros(131_072)
    assert lattice_add(weights, *as_arguments(RECORDS, 1), key=0, tensor=0, exponent=0) == 26
    assert weights[:8].tolist() == [-6, 6, -10, -16, 2, -12, 16, 26]
    assert weights.sum() == -1188
    assert weights.min() == -26
    expected = "6d61d4ac84861061117d009f9fc8865ef213b60925668619958d557c5df36cb7"
    assert sha256(weights.to(torch.int32)) == expected


@pytest.mark.parametrize("cuts", [[128, 4096, 70_016], [1, 2, 129, 2047, 2048, 77_777], [131_071]])
def test_shards_generate_their_part(cuts: list[int]) -> None:
    edges = [0, *cuts, len(BEFORE)]
    shards = [BEFORE[start:stop].clone() for start, stop in itertools.pairwise(edges)]
    for first, shard in zip(edges, shards, strict=False):
        replay(shard, RECORDS, first=first)
    assert sha256(torch.cat(shards)) == AFTER


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    d=st.integers(1, 300) | st.integers(1900, 4300),
    directions=st.integers(0, 9),
    first=st.integers(0, 5000) | st.integers(2**33, 2**33 + 1000),
    distribution=st.sampled_from(["rademacher", "gaussian"]),
    masked=st.booleans(),
    dtype=st.sampled_from(OUT_DTYPES),
)
@example(seed=1, d=70_001, directions=3, first=129, distribution="rademacher", masked=True, dtype=FP16)
@example(seed=2, d=70_001, directions=1, first=2047, distribution="gaussian", masked=True, dtype=BF16)
@example(seed=3, d=400_000, directions=2, first=5, distribution="rademacher", masked=False, dtype=BF16)
@example(seed=4, d=300, directions=200, first=5, distribution="rademacher", masked=False, dtype=FP32)
def test_cpu_equals_the_reference(seed, d, directions, first, distribution, masked, dtype) -> None:
    case = Case(seed, d, directions, first, distribution, masked and first < 2**33, dtype)
    case.check(lattice_add)


def test_cpu_equals_the_reference_on_any_number_of_threads() -> None:
    case = Case(5, 300_001, 7, 129, "rademacher", False, FP32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 64):
            torch.set_num_threads(count)
            case.check(lattice_add)
    finally:
        torch.set_num_threads(threads)


def test_parameters_may_be_weights_and_outputs() -> None:
    weights = torch.nn.Parameter(torch.zeros(400_000))
    out = torch.nn.Parameter(torch.zeros(400_000, dtype=FP16))
    lattice_add(weights, *as_arguments(RECORDS), key=0, tensor=0, exponent=4, out=out)
    replay(weights, RECORDS)
    assert torch.equal(out, (weights * 2.0**16).half())
    assert out.is_leaf
    assert weights.is_leaf


def test_ranks_that_are_threads_may_add_at_the_same_time() -> None:
    weights = [BEFORE.clone() for _ in range(4)]
    ranks = [threading.Thread(target=replay, args=(mine, RECORDS * 11)) for mine in weights]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    alone = BEFORE.clone()
    replay(alone, RECORDS * 11)
    assert all(torch.equal(mine, alone) for mine in weights)


def test_perturbing_back_and_forth_changes_nothing() -> None:
    weights = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2**20).round() * 2.0**-24
    before, place = weights.clone(), torch.tensor([[7, 3 << 16]])
    for distribution in ("rademacher", "gaussian"):
        for step in (1 << 14, -(1 << 15), 1 << 14):
            assert step != 1 << 15 or torch.equal(weights, before)
            coefficient = torch.tensor([step], dtype=torch.int32)
            lattice_add(weights, coefficient, place, key=5, tensor=1, exponent=24, distribution=distribution)
            moved = (weights - before).abs().max()
            assert moved == 0 or moved >= 2.0**-10
        assert torch.equal(weights, before)


def test_a_mask_holds_elements_still() -> None:
    mask = torch.tensor([0b00000101, 0b10000000], dtype=torch.uint8)
    weights = torch.zeros(16)
    peak = lattice_add(weights, *as_arguments([(0, 0, 0, 4)]), key=0, tensor=0, exponent=1, mask=mask)
    assert weights.nonzero().flatten().tolist() == [0, 2, 15]
    assert weights.abs().max() == 2.0
    assert peak == 4


def test_the_peak_tells_of_weights_that_leave_the_grid() -> None:
    weights = torch.tensor([2.0**23, 0.0, 0.0])
    coefficient, place = torch.tensor([2**23], dtype=torch.int32), torch.tensor([[0, 0]])
    assert lattice_add(weights, coefficient, place, key=0, tensor=0, exponent=0) == 2**24
    assert lattice_add(weights, -coefficient[:0], place[:0], key=0, tensor=0, exponent=0) == 2**24
    lowest = torch.tensor([1 - 2**31], dtype=torch.int32)
    assert lattice_add(torch.tensor([-1.0]), lowest, place, key=0, tensor=0, exponent=0) == 2**31
    assert lattice_add(torch.zeros(0), coefficient, place, key=0, tensor=0, exponent=0) == 0


def test_sums_that_wrap_around_come_back() -> None:
    large = torch.tensor([2**31 - 1, 2**31 - 1, -(2**31), -(2**31), 2], dtype=torch.int32)
    weights = torch.zeros(500)
    assert lattice_add(weights, large, torch.zeros(5, 2, dtype=torch.int64), key=0, tensor=0, exponent=0) == 0


def call(**changed) -> int:
    given = {
        "weights": torch.zeros(9),
        "coefficients": torch.ones(2, dtype=torch.int32),
        "places": torch.zeros(2, 2, dtype=torch.int64),
        "key": 0,
        "tensor": 0,
        "exponent": 20,
        **changed,
    }
    return lattice_add(given.pop("weights"), given.pop("coefficients"), given.pop("places"), **given)


STORAGE = torch.zeros(20)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": torch.zeros(9, dtype=BF16)}, "weights has dtype torch.bfloat16; it must be float32"),
        ({"weights": torch.zeros(3, 3)}, r"weights has shape \(3, 3\); it must be \(9,\)"),
        ({"weights": torch.zeros(18)[::2]}, r"weights has strides \(2,\); call .contiguous\(\) first"),
        ({"coefficients": torch.ones(2)}, "coefficients has dtype torch.float32; it must be int32"),
        ({"coefficients": torch.ones(3, dtype=torch.int32)}, r"places has shape \(2, 2\); it must be \(3, 2\)"),
        ({"places": torch.zeros(2, 2, dtype=torch.int32)}, "places has dtype torch.int32; it must be int64"),
        ({"places": torch.tensor([[0, 0], [-1, 5]])}, "places has values from -1 to 5; they must be from 0"),
        ({"places": torch.tensor([[0, 0], [0, 2**32]])}, "places has values from 0 to 4294967296"),
        ({"places": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, "places is on meta but weights is on cpu"),
        ({"out": torch.zeros(9, dtype=torch.float64)}, "out has dtype torch.float64"),
        ({"out": torch.zeros(8)}, r"out has shape \(8,\); it must be \(9,\)"),
        ({"weights": STORAGE[:9], "out": STORAGE[4:13]}, "out overlaps weights"),
        ({"weights": STORAGE[:9], "out": STORAGE.view(BF16)[:9]}, "out overlaps weights"),
        ({"key": -1}, "key is -1; it must be from 0"),
        ({"tensor": 1 << 28}, "tensor is 268435456; it must be from 0"),
        ({"exponent": 127}, "exponent is 127; it must be from -100 to 126"),
        ({"distribution": "normal"}, "distribution is 'normal'; it must be one of rademacher, gaussian"),
        ({"first": -1}, "first is -1 with 9 weights"),
        ({"first": 2**34 - 8, "distribution": "gaussian"}, "a gaussian direction has elements 0 to 17179869183"),
        ({"mask": torch.zeros(1, dtype=torch.uint8)}, "mask has 1 bytes; for elements up to 9 it needs 2"),
        ({"mask": torch.zeros(2)}, r"mask is torch.float32 \(2,\); it must be contiguous uint8"),
    ],
)
def test_refuses(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_without_numba_warns_once_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    module._fastest.cache_clear()
    try:
        weights = BEFORE.clone()
        with pytest.warns(RuntimeWarning, match=r"numba is not installed.*pip install 'thinwire\[onebyte\]'") as caught:
            replay(weights, RECORDS)
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
        assert sha256(weights) == AFTER
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replay(weights, RECORDS, sign=1)
        assert torch.equal(weights, BEFORE)
    finally:
        module._fastest.cache_clear()


@interpreted
def test_interpreted_kernel_equals_the_reference() -> None:
    calls = [  # d, directions, first, distribution, masked, dtype
        (1, 0, 0, "rademacher", False, FP32),
        (2047, 1, 1, "rademacher", True, BF16),
        (2048, 2, 127, "gaussian", False, FP16),
        (4096, 8, 128 * 7, "rademacher", False, FP32),
        (5000, 9, 2**33 + 5, "rademacher", False, BF16),
        (3000, 1, 16, "gaussian", True, FP32),
        (4100, 17, 64, "rademacher", True, FP16),
    ]
    for seed, arguments in enumerate(calls):
        Case(seed, *arguments).check(lattice_add_on_gpu.launch)


def loop_instructions(sass: str) -> int:
    """How many instructions the longest loop has."""
    places = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(place, int(to, 16)) for place, text in places for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)]
    return max(sum(to <= place <= back for place, _ in places) for back, to in jumps if to < back)


@needs_compiler
@pytest.mark.parametrize(
    ("target", "directions", "distribution", "masked", "dtype", "most"),
    [
        *((target, 9, "rademacher", True, FP32, 4) for target in TARGETS),
        ("sm_90", 1, "rademacher", False, BF16, 9),
        ("sm_90", 9, "gaussian", False, FP32, 20),
    ],
)
def test_compiles_wide_and_without_spills(target, directions, distribution, masked, dtype, most) -> None:
    tensors = {"weights": FP32, "out": dtype, "coefficients": torch.int32, "places": torch.int64, "peak": torch.int64}
    constants = lattice_add_on_gpu.compile_time(directions, distribution, masked=masked)
    compiled = compile_ahead(
        lattice_add_on_gpu.kernel,
        target,
        tensors={**tensors, "mask": torch.uint8 if masked else torch.int64},
        constants=constants,
        multiples_of_16=[*tensors, "mask", "head"],
    )
    elements = lattice_add_on_gpu.BLOCK // 128  # of each lane
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= (256 if target.startswith("gfx") else 128)
    assert compiled.fused == ()
    assert compiled.keeps_subnormals
    assert compiled.wide_loads >= elements * 4 // 16
    assert compiled.wide_stores >= elements * dtype.itemsize // 16
    if not target.startswith("gfx"):
        # Per direction and element. Were a counter made by every lane that needs it, many directions would take 18.
        assert loop_instructions(compiled.assembly) <= most * constants["SEEDS"] * elements


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


@needs_gpu
def test_gpu_equals_the_reference() -> None:
    def on_gpu(*arguments: Tensor, out: Tensor, mask: Tensor | None, **options: object) -> int:
        result = out.cuda()
        mask = None if mask is None else mask.cuda()
        peak = lattice_add(*(argument.cuda() for argument in arguments), out=result, mask=mask, **options)
        out.copy_(result)
        return peak

    shapes = [(1, 1, 3), (2048, 1, 0), (100_003, 2, 127), (100_003, 8, 4096), (4099, 300, 2**20)]
    kinds = itertools.product(("rademacher", "gaussian"), (False, True), OUT_DTYPES)
    for seed, (shape, kind) in enumerate(itertools.product(shapes, kinds)):
        Case(seed, *shape, *kind).check(on_gpu)
