"""A one-byte run gives the same bits on one machine and on many, in any order, fused or round by round."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from onebyte_logs import random_round
from ranks import Rank, run_ranks
from torch import Tensor, nn

from thinwire.comm.onebyte import directions
from thinwire.comm.onebyte.byte_code import ABSENT, ByteCode
from thinwire.comm.onebyte.canonical import canonical, describe_run
from thinwire.comm.onebyte.coefficients import Progress, Slopes, coefficients
from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.measure import measure
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Contribution, Round
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.onebyte.stream import key_of
from thinwire.kernels.lattice_add import lattice_add, lattice_add_reference

ROUNDS = 1000
RATE = 2.0**-10
SHAPES = {"matrix": (11, 31), "vector": (13,)}


def base(dtypes: Sequence[torch.dtype] = (torch.float32,) * 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=True)
    }


def matrix() -> dict[str, Tensor]:
    return {"matrix": base()["matrix"]}


def manifest_of(weights: dict[str, Tensor], **settings: Any) -> Manifest:
    chosen = OneByteSettings(lr=RATE, **settings)
    parameters = [tensor.clone().requires_grad_() for tensor in weights.values()]
    options = {"lr": RATE, "eps": chosen.eps, "weight_decay": chosen.weight_decay}
    return describe_run(canonical([{"params": parameters, "param_names": list(weights), **options}]), chosen)


def replica_of(manifest: Manifest, weights: dict[str, Tensor]) -> Replica:
    return Replica(manifest, [tensor.clone() for tensor in weights.values()])


def loss_at(weights: Sequence[Tensor], turn: Turn) -> float:
    """Another one for each machine and round; 0 for nobody."""
    goal = 0.125 * ((3 * turn.round + turn.slot) % 7)
    return float(sum((w - goal).square().sum() for w in weights))


@dataclass
class Reference:
    """A run of four machines that one process has carried out."""

    manifest: Manifest
    rounds: list[Round]
    weights: list[Tensor]
    model_hash: bytes


@pytest.fixture(scope="module")
def reference() -> Reference:
    weights = matrix()
    manifest = manifest_of(weights)
    parameters = [tensor.clone() for tensor in weights.values()]
    replica, code, settings = Replica(manifest, parameters), ByteCode(manifest.numerics.floor_log2), OneByteSettings()
    rounds = []
    for number in range(ROUNDS):
        contributions = []
        for slot in range(4):
            turn = Turn(number, slot, 1)
            _, slopes = measure(lambda turn=turn: loss_at(parameters, turn), turn, replica, settings)
            contributions.append(Contribution(slot, bytes(code.encode(slope) for slope in slopes)))
        rounds.append(Round(number, RATE, tuple(contributions)))
        replica.apply(rounds[-1:])
    assert loss_at(parameters, Turn(0, 0, 1)) < 0.2 * loss_at(list(weights.values()), Turn(0, 0, 1))
    return Reference(manifest, rounds, parameters, replica.model_hash())


def test_four_ranks_have_the_bits_of_one_process(reference: Reference) -> None:
    def work(rank: Rank) -> bytes:
        parameters = [nn.Parameter(tensor.clone()) for tensor in matrix().values()]
        queue = rank.queue()
        optimizer = OneByteSPSA([("matrix", parameters[0])], RATE, queue=queue)
        before = queue.meter.sent_bytes()
        for number in range(ROUNDS):
            optimizer.step(lambda: loss_at(parameters, optimizer.turn))
            assert optimizer.replica.newest == reference.rounds[number]
        sent = queue.meter.sent_bytes()
        assert sent["world"] - before["world"] == 3 * (ROUNDS + 32)  # one byte to each rank, and a hash at the snapshot
        queue.close()
        return optimizer.replica.model_hash()

    assert run_ranks(4, work, timeout_s=300) == [reference.model_hash] * 4


def test_one_pass_or_many_in_any_order_give_the_same_bits(reference: Reference) -> None:
    fused = replica_of(reference.manifest, matrix())
    fused.apply(reference.rounds)
    assert fused.model_hash() == reference.model_hash
    slopes, progress = Slopes(), Progress()
    for round_ in reference.rounds:
        progress = slopes.take(round_, progress, reference.manifest.numerics, ByteCode(-8))
    columns = coefficients(slopes, reference.manifest, key_of(reference.manifest.to_bytes()))
    for seed in range(3):
        order = torch.randperm(4 * ROUNDS, generator=torch.Generator().manual_seed(seed))
        lattice = replica_of(reference.manifest, matrix()).lattice
        for part in order.split(997 * seed + 1500):
            lattice.add(columns[:, part].contiguous(), slopes.places[part])
        assert lattice.digest() == reference.model_hash


def test_shards_make_their_part_alone(reference: Reference) -> None:
    slopes, progress = Slopes(), Progress()
    for round_ in reference.rounds:
        progress = slopes.take(round_, progress, reference.manifest.numerics, ByteCode(-8))
    key = key_of(reference.manifest.to_bytes())
    columns = coefficients(slopes, reference.manifest, key)
    entry = reference.manifest.tensors[0]
    whole = next(iter(replica_of(reference.manifest, matrix()).lattice.weights()))[1]
    for start, stop in ((0, 5), (5, 130), (130, 341)):
        lattice_add(
            whole[start:stop], columns[0], slopes.places, key=key, tensor=0, exponent=entry.exponent, first=start
        )
    assert torch.equal(whole, reference.weights[0].flatten())


def test_the_definition_of_the_kernel_gives_these_bits() -> None:
    """That every other path gives the bits of the definition is tested with the kernel."""
    assert carried_out(lattice_add_reference) == carried_out(lattice_add)


def carried_out(add: Callable[..., int], rounds: int = 12) -> list[bytes]:
    """The hash after each of some rounds of mixed dtypes, with perturbations between them, where `add` adds."""

    def adding(weights: Tensor, *arguments: Tensor, out: Tensor | None = None, **options: Any) -> int:
        return add(weights, *arguments, out=weights if out is None else out, **{"first": 0, "mask": None, **options})

    hashes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directions, "lattice_add", adding)
        for distribution in ("rademacher", "gaussian"):
            weights = base((torch.bfloat16, torch.float32))
            manifest = manifest_of(weights, distribution=distribution, kept=0.7, snapshot_every=2)
            parameters = [tensor.clone() for tensor in weights.values()]
            replica, chance = Replica(manifest, parameters), random.Random(1)
            for number in range(rounds):
                replica.perturb((number, 5), 1)
                shown = b"".join(p.view(torch.uint8).numpy().tobytes() for p in parameters)
                hashes.append(hashlib.sha256(shown).digest())
                replica.apply([random_round(number, chance)])
                hashes.append(replica.model_hash())
    return hashes


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"distribution": "gaussian"},
    "decay": {"weight_decay": 0.5, "snapshot_every": 7},
    "kept": {"kept": 0.5, "snapshot_every": 10, "weight_decay": 0.1},
    "shared": {"directions": "shared", "samples": 2, "robust": "median", "step_size": "std"},
    "subspace": {"directions": "subspace", "rank": 4, "basis_every": 3},
    "ema": {"step_size": "ema", "robust": "clip", "scaling": "sqrt"},
}
DTYPES = {"fp32": (torch.float32,) * 2, "16bit": (torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_fused_incremental_undone_and_perturbed_replicas_agree(
    settings: dict[str, Any], dtypes: tuple[torch.dtype, ...]
) -> None:
    weights, chance = base(dtypes), random.Random(2)
    manifest = manifest_of(weights, **settings)
    rounds = [random_round(number, chance) for number in range(40)]
    fused, parts = replica_of(manifest, weights), replica_of(manifest, weights)
    fused.apply(rounds)
    parts.apply(rounds[:13])
    parts.apply(rounds[13:30])
    parts.apply(rounds[30:])
    parameters = [tensor.clone() for tensor in weights.values()]
    stepwise = Replica(manifest, parameters)
    for round_ in rounds:
        before, shown, state = stepwise.model_hash(), [p.clone() for p in parameters], str(stepwise.state()["progress"])
        stepwise.perturb((round_.number, 1 << 16), 1)
        assert not any(torch.equal(p, w) for p, w in zip(parameters, shown, strict=True))
        stepwise.perturb((round_.number, 1 << 16), -1)
        if round_.number % 3 == 0:
            assert stepwise.model_hash() == before
            assert all(torch.equal(p, w) for p, w in zip(parameters, shown, strict=True))
        stepwise.apply([round_])
        if not stepwise.is_snapshot(round_.number):
            after = stepwise.model_hash()
            assert after != before
            stepwise.undo(round_)
            assert (stepwise.model_hash(), str(stepwise.state()["progress"])) == (before, state)
            assert all(torch.equal(p, w) for p, w in zip(parameters, shown, strict=True))
            stepwise.apply([round_])
            assert stepwise.model_hash() == after
    assert fused.model_hash() == parts.model_hash() == stepwise.model_hash()
    assert str(fused.state()) == str(parts.state()) == str(stepwise.state())


def test_a_parameter_in_16_bits_shows_its_master_rounded_to_nearest() -> None:
    weights = base(DTYPES["16bit"])
    parameters = [tensor.clone() for tensor in weights.values()]
    replica, chance = Replica(manifest_of(weights), parameters), random.Random(3)
    for number in range(50):
        replica.apply([random_round(number, chance)])
    masters = [tensor for _, tensor in replica.lattice.weights()]
    for parameter, master in zip(parameters, masters, strict=True):
        assert torch.equal(parameter.flatten(), master.to(parameter.dtype))
        assert not torch.equal(parameter.flatten().float(), master)


def test_weight_decay_and_masks_are_settled_at_snapshots_alone() -> None:
    weights = base()
    parameters = [tensor.clone() for tensor in weights.values()]
    replica = Replica(manifest_of(weights, weight_decay=0.5, kept=0.25, snapshot_every=4), parameters)
    matrix = parameters[0]
    still = matrix.abs() > matrix.abs().flatten().kthvalue(86).values  # the smallest quarter of 341 moves
    for number in range(3):
        before = matrix.clone()
        replica.apply([Round(number, 0.125, (Contribution(0, bytes([0x50])),))])
        assert torch.equal(matrix[still], before[still])
        assert bool((matrix[~still] != before[~still]).all())
    replica.apply([Round(3, 0.125, (Contribution(0, bytes([ABSENT])),))])
    torch.testing.assert_close(matrix[still], weights["matrix"][still] * (1 - 0.5 * 4 * 0.125), rtol=1e-5, atol=1e-6)
    before = matrix.clone()
    still = matrix.abs() > matrix.abs().flatten().kthvalue(86).values
    replica.perturb((4, 0), 1)
    assert torch.equal(matrix[still], before[still])
    assert bool((matrix[~still] != before[~still]).all())


class Odd(nn.Module):
    """Tied weights (two parameters that share memory), buffers, a frozen weight, dropout, statistics of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.detach())
        self.bias = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.norm(self.embed(x)))) + self.bias
        return out


def test_tied_weights_move_once_and_the_rest_of_the_model_not_at_all() -> None:
    torch.manual_seed(0)
    model = Odd()
    others = {n: t.clone() for n, t in model.state_dict().items() if n not in ("embed.weight", "head.weight")}
    moving = {"norm.weight", "norm.bias"}
    eps = 2.0**-10
    optimizer = OneByteSPSA(model.named_parameters(), 0.01, model=model)
    assert [entry.name for entry in optimizer.manifest.tensors] == ["embed.weight", "norm.weight", "norm.bias"]
    before = model.embed.weight.detach().clone()
    seen: list[Tensor] = []
    masks: list[Tensor] = []
    modes: list[list[bool]] = []

    def closure() -> Tensor:
        seen.append(model.embed.weight.detach() - before)
        modes.append([m.training for m in model.modules()])
        masks.append(nn.functional.dropout(torch.ones(50)))
        return model(torch.arange(6)).logsumexp(1).mean()

    modes_before = [module.training for module in model.modules()]
    optimizer.step(closure)
    assert bool((seen[0].abs() == eps).all())
    assert torch.equal(seen[1], -seen[0])
    assert torch.equal(masks[0], masks[1])
    assert not any(any(mode) for mode in modes)
    assert [module.training for module in model.modules()] == modes_before
    after = model.state_dict()
    assert torch.equal(after["head.weight"], after["embed.weight"])
    assert not torch.equal(after["embed.weight"], before)
    assert all(torch.equal(after[n], t) for n, t in others.items() if n not in moving)
    assert not any(torch.equal(nn.functional.dropout(torch.ones(50)), mask) for mask in masks)


def test_a_closure_that_raises_leaves_no_trace() -> None:
    model = Odd()
    optimizer = OneByteSPSA(model.named_parameters(), 0.01, model=model, samples=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, calls = str(optimizer.state_dict()), iter(range(100))

    def closure() -> Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return model(torch.arange(6)).logsumexp(1).mean()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.norm.training
    assert not model.drop.training
    assert str(optimizer.state_dict()) == state
    optimizer.step(closure)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_absent_everywhere(bad: float) -> None:
    def work(rank: Rank) -> tuple[bytes, list[float], str]:
        parameters = [nn.Parameter(tensor.clone()) for tensor in base().values()]
        queue = rank.queue()
        optimizer = OneByteSPSA(zip(SHAPES, parameters, strict=True), RATE, queue=queue, step_size="ema")
        absent = []
        for number in range(3):
            before = optimizer.replica.model_hash()

            def loss(number: int = number) -> float:
                return bad if number == 1 or rank.rank <= number - 1 else loss_at(parameters, optimizer.turn)

            optimizer.step(loss)
            absent.append(optimizer.metrics()["absent"])
            assert (optimizer.replica.model_hash() == before) == (number == 1)
        queue.close()
        assert all(bool(p.isfinite().all()) for p in parameters)
        return optimizer.replica.model_hash(), absent, str(optimizer.replica.state()["progress"])

    first, *others = run_ranks(3, work)
    assert all(other == first for other in others)
    assert first[1] == [0.0, 3.0, 2.0]
    assert "nan" not in first[2]
