"""From a slope to a byte, from committed bytes to whole numbers: the same on every machine."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.comm.onebyte.byte_code import ABSENT, LARGEST, MAGNITUDES, SIGN, ZERO, ByteCode
from thinwire.comm.onebyte.coefficients import Progress, Slopes, coefficients
from thinwire.comm.onebyte.errors import WeightRangeError
from thinwire.comm.onebyte.manifest import Manifest, TensorEntry
from thinwire.comm.onebyte.robust import combine
from thinwire.comm.onebyte.rounds import SHARED_SLOT, Contribution, Round
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.onebyte.step_size import Pace, next_pace, scale_of
from thinwire.comm.onebyte.stream import place

CODE = ByteCode(-8)
ONE = CODE.encode(1.0)
KEY = 0x0123456789ABCDEF

codes_of_some = st.lists(st.integers(0, 255), min_size=1, max_size=6).map(bytes)


def manifest_of(tensors: int = 2, eps_log2: tuple[int, ...] = (), **settings: object) -> Manifest:
    chosen = OneByteSettings.model_validate(settings)
    numerics = chosen.numerics()
    entries = [
        TensorEntry(
            name=f"w{t}",
            shape=(4,),
            dtype="float32",
            exponent=20 + t,
            eps_log2=eps_log2[t] if eps_log2 else numerics.eps_log2,
        )
        for t in range(tensors)
    ]
    return Manifest(seed=0, base_hash="", numerics=numerics, tensors=tuple(entries))


def read(manifest: Manifest, *rounds: Round) -> Slopes:
    slopes, progress = Slopes(), Progress()
    for round_ in rounds:
        progress = slopes.take(round_, progress, manifest.numerics, CODE)
    return slopes


def test_the_table_is_that_of_the_format() -> None:
    table = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)
    assert list(MAGNITUDES) == [0, *(table[e % 8] << e // 8 for e in range(127))]
    assert all(abs(t / 2 ** (16 + i / 8) - 1) < 7e-6 for i, t in enumerate(table))


def test_every_code_decodes_to_an_fp32_number_and_encodes_to_itself() -> None:
    assert len(CODE.values) == 256
    for code, value in enumerate(CODE.values):
        if code == ABSENT:
            assert math.isnan(value)
            continue
        assert float(torch.tensor(value, dtype=torch.float32)) == value
        assert CODE.encode(value) == code
    assert CODE.values[1] == 2.0**-8
    assert CODE.values[LARGEST] == pytest.approx(2.0 ** (-8 + 15.75))


@given(st.floats(2.0**-8, 2.0**7.75), st.integers(-60, 60))
def test_a_code_is_near_its_slope_whatever_the_floor(slope: float, octaves: int) -> None:
    scaled = ByteCode(-8 + octaves)
    assert abs(CODE.values[CODE.encode(slope)] / slope - 1) <= 2 ** (1 / 16) - 1 + 1e-5
    assert CODE.encode(-slope) == CODE.encode(slope) | SIGN
    assert scaled.encode(math.ldexp(slope, octaves)) == CODE.encode(slope)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_codes_are_monotone(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert CODE.values[CODE.encode(low)] <= CODE.values[CODE.encode(high)]


def test_special_slopes() -> None:
    assert [CODE.encode(x) for x in (math.nan, math.inf, -math.inf)] == [ABSENT] * 3
    assert [CODE.encode(x) for x in (0.0, -0.0, 1e-300, -1e-300, 2.0**-9.01)] == [ZERO] * 5
    assert [CODE.encode(x) for x in (1e300, -1e300)] == [LARGEST, LARGEST | SIGN]
    assert CODE.encode(2.0**-8.99) == 1


@pytest.mark.parametrize("robust", ["none", "clip", "drop"])
@given(st.lists(codes_of_some, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_combining_does_not_depend_on_the_order(robust: str, codes: list[bytes], chance: object) -> None:
    contributions = [Contribution(slot, row) for slot, row in enumerate(codes)]
    shuffled = list(contributions)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    for shared in (False, True):
        ours, theirs = (combine(c, robust, 11, CODE, shared=shared) for c in (contributions, shuffled))
        assert sorted(ours) == sorted(theirs)
        places = [pair[:2] for pair in ours]
        assert len(set(places)) == len(places)
        assert all(math.isfinite(value) and abs(value) <= CODE.values[LARGEST] for _, _, value in ours)


def test_drop_and_clip_at_a_multiple_of_the_median() -> None:
    sent = [Contribution(0, bytes([ONE, ONE | SIGN])), Contribution(1, bytes([ONE + 11, ONE + 12, ABSENT]))]
    assert combine(sent, "none", 11, CODE, shared=False) == [
        (0, 0, 1.0), (0, 1, -1.0), (1, 0, CODE.values[ONE + 11]), (1, 1, CODE.values[ONE + 12]),
    ]  # fmt: skip
    assert combine(sent, "drop", 11, CODE, shared=False) == [(0, 0, 1.0), (0, 1, -1.0), (1, 0, CODE.values[ONE + 11])]
    clipped = combine([*sent, Contribution(2, bytes([LARGEST | SIGN]))], "clip", 0, CODE, shared=False)
    assert [value for _, _, value in clipped] == [1.0, -1.0, *[CODE.values[ONE + 11]] * 2, -CODE.values[ONE + 11]]
    assert combine([Contribution(0, bytes([ABSENT]))], "drop", 11, CODE, shared=False) == []


def test_shared_directions_take_the_mean_or_the_median_of_machines() -> None:
    rows = [[1.0, 4.0], [2.0, math.nan], [64.0, -8.0]]
    sent = [Contribution(slot, bytes(CODE.encode(x) for x in row)) for slot, row in enumerate(rows)]
    third = float(torch.tensor(67 / 3, dtype=torch.float32))
    assert combine(sent, "none", 11, CODE, shared=True) == [(SHARED_SLOT, 0, third), (SHARED_SLOT, 1, -2.0)]
    assert combine(sent, "median", 11, CODE, shared=True) == [(SHARED_SLOT, 0, 2.0), (SHARED_SLOT, 1, -2.0)]


@pytest.mark.parametrize(("scaling", "divisor"), [("mean", 4.0), ("sqrt", 2.0)])
def test_coefficients_are_the_update_in_units_of_the_grid(scaling: str, divisor: float) -> None:
    """Powers of two and 1.5 at a rate that makes them whole: rounding leaves them alone."""
    manifest = manifest_of(scaling=scaling)
    codes = [bytes([CODE.encode(x) for x in row]) for row in ((1.0, -4.0), (0.0, 0.5))]
    round_ = Round(7, 2.0**-10, (Contribution(0, codes[0]), Contribution(3, codes[1])))
    slopes = read(manifest, round_)
    found = coefficients(slopes, manifest, KEY)
    units = [[-g * 2.0**-10 / divisor * 2.0**k for g in (1.0, -4.0, 0.0, 0.5)] for k in (20, 21)]
    assert found.tolist() == units
    assert slopes.places.tolist() == [list(place(7, slot, sample)) for slot, sample in ((0, 0), (0, 1), (3, 0), (3, 1))]


def test_a_group_with_a_smaller_eps_gets_the_same_expected_step() -> None:
    manifest = manifest_of(3, eps_log2=(-10, -12, -10), eps=2.0**-10)
    tensors = tuple(entry.model_copy(update={"exponent": 20}) for entry in manifest.tensors)
    tensors = (*tensors[:2], tensors[2].model_copy(update={"rate_scale": 0.5}))
    manifest = manifest.model_copy(update={"tensors": tensors})
    found = coefficients(read(manifest, Round(0, 2.0**-4, (Contribution(0, bytes([ONE])),))), manifest, KEY)
    # The slope is along z / 4 there, so z has 4 times the coefficient; the third has half the rate.
    assert found[:, 0].tolist() == [-(2**16), -(2**18), -(2**15)]


def test_rounding_is_unbiased_and_independent_between_tensors_and_places() -> None:
    manifest = manifest_of(8)
    rounds = [Round(n, 0.3 * 2.0**-20, (Contribution(0, bytes([ONE, ONE | SIGN])),)) for n in range(2000)]
    found = coefficients(read(manifest, *rounds), manifest, KEY).double()
    wanted = 0.15 * 2.0 ** torch.arange(8)
    share = wanted % 1
    error = (4000 * share * (1 - share)).sqrt() / 4000
    assert set(found[0].tolist()) == {-1.0, 0.0, 1.0}
    assert bool(((found * torch.tensor([-1.0, 1.0]).repeat(2000)).mean(1) - wanted).abs().le(4 * error).all())
    ups = (found.abs() - wanted.floor()[:, None])[:3]
    assert float(torch.corrcoef(ups).fill_diagonal_(0).abs().max()) < 0.06


@given(st.permutations(range(4)), st.lists(codes_of_some, min_size=4, max_size=4))
def test_an_order_of_contributions_only_orders_the_columns(order: list[int], codes: list[bytes]) -> None:
    manifest = manifest_of(5, step_size="std")
    contributions = [Contribution(slot, row) for slot, row in enumerate(codes)]

    def columns(these: list[Contribution]) -> set[tuple[int, ...]]:
        slopes = read(manifest, Round(3, 1e-5, tuple(these)))
        both = torch.cat((slopes.places, coefficients(slopes, manifest, KEY).t()), dim=1) if slopes.values else []
        return {tuple(row.tolist()) for row in both}

    assert columns(contributions) == columns([contributions[i] for i in order])


def test_a_step_beyond_all_grids_is_refused() -> None:
    for distribution, size in (("rademacher", 2.0**30), ("gaussian", 2.0**29)):
        manifest = manifest_of(1, distribution=distribution)
        many = Round(4, size * 2.0**-22, (Contribution(0, bytes([ONE] * 4)),))
        assert coefficients(read(manifest, many), manifest, KEY).numel() == 4
        with pytest.raises(WeightRangeError, match=r"round 4 would move w0 .* lower the learning rate"):
            coefficients(read(manifest, Round(4, size * 2.0**-20, many.contributions)), manifest, KEY)
    infinite = Round(0, 3e38, (Contribution(0, bytes([ONE])),))
    with pytest.raises(WeightRangeError):
        coefficients(read(manifest, infinite), manifest, KEY)


def test_std_divides_by_the_standard_deviation_but_never_by_an_accident() -> None:
    slopes = [1.0, -3.0, 2.5, 0.0, -0.25]
    assert scale_of(next_pace(Pace(), slopes, 0.9), "std") == pytest.approx(1 / statistics.stdev(slopes), rel=1e-15)
    assert scale_of(next_pace(Pace(), [2.0, 2.0], 0.9), "std") == 1 / (0.25 * 2.0)
    assert scale_of(next_pace(Pace(), [-4.0], 0.9), "std") == 1 / 4.0
    pace = next_pace(Pace(), slopes, 0.9)
    assert next_pace(pace, [], 0.9) == pace


def test_ema_is_adams_second_moment_of_the_slopes() -> None:
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    pace, v = Pace(), 0.0
    for t, slopes in enumerate(rounds, 1):
        pace = next_pace(pace, slopes.tolist(), 0.9)
        v = 0.9 * v + 0.1 * float(slopes.square().mean())
        assert scale_of(pace, "ema") == pytest.approx(math.sqrt((1 - 0.9**t) / v), rel=1e-12)
    assert scale_of(pace, "fixed") == 1.0


def test_automatic_steps_do_not_depend_on_how_rounds_are_taken_together() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 256, (12, 2, 3), generator=generator, dtype=torch.uint8).numpy()
    for step_size, directions in itertools.product(("fixed", "std", "ema"), ("distinct", "shared")):
        manifest = manifest_of(2, step_size=step_size, directions=directions, samples=3)
        rounds = [
            Round(n, 1e-3, (Contribution(0, row[0].tobytes()), Contribution(5, row[1].tobytes())))
            for n, row in enumerate(rows)
        ]
        together = coefficients(read(manifest, *rounds), manifest, KEY)
        progress, apart = Progress(), []
        for round_ in rounds:
            slopes = Slopes()
            progress = slopes.take(round_, progress, manifest.numerics, CODE)
            apart.append(coefficients(slopes, manifest, KEY))
        assert torch.equal(together, torch.cat(apart, dim=1))
        assert progress.rounds == 12
