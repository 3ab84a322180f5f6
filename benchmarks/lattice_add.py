"""lattice_add: adding a direction takes at least 10 times less than drawing it by torch.randn and adding it."""

from __future__ import annotations

import torch
from runner import Row, arguments, copying, measure, report
from torch import Tensor

from thinwire.kernels.lattice_add import lattice_add, lattice_add_reference

ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
DIRECTIONS = (1, 4, 16, 64, 256)
EXPONENT = 24


def with_randn(weights: Tensor, steps: list[float]) -> None:
    """What a memory-efficient zeroth-order optimizer does: a direction of normal numbers per seed, and an axpy."""
    for seed, step in enumerate(steps):
        torch.manual_seed(seed)
        weights.add_(torch.randn(weights.shape, device=weights.device), alpha=step)


def with_signs(weights: Tensor, steps: list[float]) -> None:
    for seed, step in enumerate(steps):
        torch.manual_seed(seed)
        signs = torch.randint(0, 2, weights.shape, device=weights.device, dtype=torch.int8).mul_(2).sub_(1)
        weights.add_(signs, alpha=step)


def check(weights: Tensor, coefficients: Tensor, places: Tensor) -> None:
    ours, expected = weights[:10_000].clone(), weights[:10_000].clone()
    options = {"key": 1, "tensor": 2, "exponent": EXPONENT, "first": 128}
    lattice_add(ours, coefficients, places, **options)
    lattice_add_reference(expected, coefficients, places, out=expected, **options)
    if not torch.equal(ours, expected):
        raise SystemExit(f"lattice_add is wrong for {len(coefficients)} directions: no speed is reported")


def bench(directions: int, device: torch.device, repeats: int, d: int) -> Row:
    weights = (torch.randn(d, device=device) * 2**18).round() * 2.0**-EXPONENT
    # Steps of opposite signs, so that repeated calls leave the weights where they are.
    coefficients = torch.arange(1, directions + 1, dtype=torch.int32, device=device)
    places = torch.stack([torch.zeros(directions), torch.arange(directions)], dim=1).to(torch.int64).to(device)
    check(weights, coefficients, places)
    some = min(directions, 4)  # more take as long each
    steps = [1e-6 * (seed + 1) for seed in range(some)]
    opposite = {"sign": 1}

    def ours() -> None:
        lattice_add(weights, coefficients * opposite["sign"], places, key=1, tensor=2, exponent=EXPONENT)
        opposite["sign"] *= -1

    works = {
        "ours": ours,
        "randn": lambda: with_randn(weights, steps),
        "signs": lambda: with_signs(weights, steps),
        "pass": lambda: weights.mul_(1.0),
        "copy": copying(8 * d, device=device),
    }
    timing = measure(works, device=device, repeats=repeats, warm_up=1)
    each_s = {name: timing[name].median_s / some for name in ("randn", "signs")}
    ours_s, pass_s = timing["ours"].median_s, timing["pass"].median_s
    return {
        "directions": directions,
        "elements": d,
        "ms": ours_s * 1e3,
        "ps_per_element_and_direction": ours_s / d / directions * 1e12,
        "randn_ps": each_s["randn"] / d * 1e12,
        "signs_ps": each_s["signs"] / d * 1e12,
        "times_randn": each_s["randn"] * directions / ours_s,
        "times_signs": each_s["signs"] * directions / ours_s,
        "passes": ours_s / pass_s,
        "GB/s": 8 * d / ours_s / 1e9,
        "share_of_copy": timing["copy"].median_s / ours_s,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--elements", type=int, help="weights, fp32; 2^24 on a CPU, 2^28 on a GPU if not given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    d = options.elements or ELEMENTS[device.type]
    with torch.no_grad():
        rows = [bench(directions, device, options.repeats, d) for directions in DIRECTIONS]
    report(__doc__, rows, device=device, path=options.json)


if __name__ == "__main__":
    main()
