"""Compression without DDP, scope "global", and which way each tensor goes."""

from __future__ import annotations

import pytest
import torch
from compress_models import gradients_alone, gradients_of, inputs_of, make_model, same, tensors_in, wrap
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.compress.compressors import BF16, Int8, LowRank, TopK
from thinwire.comm.compress.decoded import Sparse, to_dense
from thinwire.comm.compress.door import compress
from thinwire.comm.compress.joined import split_decoded
from thinwire.comm.compress.routes import choose_routes, describe_routes
from thinwire.comm.compress.standalone import CompressedMean
from thinwire.comm.method import Method

SHAPES = {
    "matrix": torch.Size((64, 64)),
    "vector": torch.Size((5000,)),
    "bias": torch.Size((64,)),
    "scalar": torch.Size(()),
}


def test_it_gives_what_the_hook_of_ddp_gives() -> None:
    def work(rank: Rank) -> list[dict[str, Tensor]]:
        queue = rank.queue()
        model = wrap(rank, make_model(), bucket_cap_mb=0.001)
        compress(model, compressor=TopK(density=0.1), dense_below=30, queue=queue)
        names = list(dict(model.module.named_parameters()))
        mean = CompressedMean(
            [(name, model.module.get_parameter(name)) for name in reversed(names)],
            compressor=TopK(density=0.1),
            dense_below=30,
            group_bytes=1048,
            queue=queue,
        )
        assert isinstance(mean, Method)
        outcomes = []
        for step in range(3):
            model.zero_grad()
            model(inputs_of(rank.rank, step)).square().mean().backward()
            mine = gradients_alone(rank.rank, step)
            before = queue.meter.sent_bytes()["world"]
            assert mean.allreduce(mine)
            assert queue.meter.sent_bytes()["world"] - before == mean.predicted_bytes()["world"]
            outcomes += [gradients_of(model.module), mine]
        queue.close()
        return outcomes

    for outcomes in run_ranks(2, work):
        for hooked, called in zip(outcomes[::2], outcomes[1::2], strict=True):
            assert same(hooked, called)


def test_a_tensor_that_is_not_finite_is_told_to_all_and_remembered_by_none() -> None:
    def work(rank: Rank) -> list[bool]:
        queue = rank.queue()
        given = {"a": torch.ones(50), "b": torch.ones(2000)}
        mean = CompressedMean(given, compressor=TopK(density=0.1), queue=queue)
        told = []
        for step in range(4):
            tensors = {name: x * (rank.rank + step + 1) for name, x in given.items()}
            if step == 1 and rank.rank == 0:
                tensors["a"][3] = float("inf")  # sent dense
            if step == 2 and rank.rank == 1:
                tensors["b"][7] = float("nan")
            before = mean.metrics()["error_norm"]
            told.append(mean.allreduce(tensors))
            assert told[-1] == all(bool(x.isfinite().all()) for x in tensors.values())
            assert (mean.metrics()["error_norm"] == before) == (not told[-1])
        queue.close()
        return told

    assert run_ranks(2, work) == [[True, False, False, True]] * 2


def test_what_overflows_only_as_it_leaves_is_not_remembered_either() -> None:
    """fp16: each step's entries fit, but not their sum with what was left behind."""

    def work(rank: Rank) -> None:
        queue = rank.queue()
        mean = CompressedMean({"x": torch.zeros(64)}, compressor=TopK(k=1), dense_below=0, queue=queue)
        x = torch.zeros(64, dtype=torch.float16)
        x[:2] = torch.tensor([50000.0, 60000.0])
        assert mean.allreduce({"x": x})
        kept = tensors_in(mean.state_dict())
        x = torch.zeros(64, dtype=torch.float16)
        x[0] = 50000.0
        assert not mean.allreduce({"x": x})
        assert not x.isfinite().all()
        assert same(kept, tensors_in(mean.state_dict()))
        queue.close()

    run_ranks(2, work)


def test_state_goes_to_another_object() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        outcomes = []
        for resumed in (False, True):
            mean = CompressedMean({"x": torch.zeros(2000)}, compressor="int8", feedback="ef21_bc", queue=queue)
            for step in range(4):
                if resumed and step == 2:
                    state = mean.state_dict()
                    mean = CompressedMean({"x": torch.zeros(2000)}, compressor="int8", feedback="ef21_bc", queue=queue)
                    mean.load_state_dict(state)
                x = torch.randn(2000, generator=torch.Generator().manual_seed(10 * step + rank.rank))
                mean.allreduce({"x": x})
            outcomes.append(x)
        assert torch.equal(*outcomes)
        queue.close()

    run_ranks(3, work)


def test_what_it_cannot_take_is_refused() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        with pytest.raises(ValueError, match="2 of them have 1 names"):
            CompressedMean([("x", torch.zeros(1)), ("x", torch.zeros(1))], compressor="int8", queue=queue)
        with pytest.raises(ValueError, match=r"x is torch\.float64"):
            CompressedMean({"x": torch.zeros(1, dtype=torch.float64)}, compressor="int8", queue=queue)
        with pytest.raises(ValueError, match=r"x is torch\.float32, torch\.sparse_coo"):
            CompressedMean({"x": torch.zeros(4).to_sparse()}, compressor="int8", queue=queue)
        mean = CompressedMean({"x": torch.zeros(4), "y": torch.zeros(2)}, compressor="int8", queue=queue)
        with pytest.raises(ValueError, match="tensors: y, z differ"):
            mean.allreduce({"x": torch.zeros(4), "z": torch.zeros(2)})
        with pytest.raises(ValueError, match="tensors: x differ"):
            mean.allreduce({"x": torch.zeros(5), "y": torch.zeros(2)})
        assert queue.meter.snapshot()["operations"] == {}
        queue.close()

    run_ranks(1, work)


def test_small_tensors_go_dense_and_say_so() -> None:
    routes = choose_routes(SHAPES, TopK(density=0.01), dense_below=1024)
    assert [routes[name].codec for name in SHAPES] == ["topk", "topk", "dense", "dense"]
    assert routes["bias"].reason == "fewer than 1,024 elements"
    routes = choose_routes(SHAPES, LowRank(rank=4), dense_below=0)
    assert [routes[name].codec for name in SHAPES] == ["lowrank", "dense", "dense", "dense"]
    assert "two dimensions" in routes["vector"].reason
    routes = choose_routes({"thin": torch.Size((3, 4))}, LowRank(rank=4), dense_below=0)
    assert "would not make it smaller" in routes["thin"].reason
    assert {route.codec for route in choose_routes(SHAPES, BF16(), dense_below=1024).values()} == {"bf16"}
    assert {route.codec for route in choose_routes(SHAPES, TopK(scope="global"), dense_below=1024).values()} == {"topk"}
    for route, shape in zip(choose_routes(SHAPES, Int8(), dense_below=0).values(), SHAPES.values(), strict=True):
        assert route.payload_bytes(shape) <= 4 * shape.numel()


def test_a_long_table_joins_what_differs_in_numbers_only() -> None:
    shapes = {f"blocks.{i}.{part}": torch.Size((32, 64)) for i in range(30) for part in ("up", "down")}
    table = describe_routes(shapes, choose_routes(shapes, Int8(), dense_below=0)).splitlines()
    assert len(table) == 4
    assert "blocks.*.up (x30)" in table[1]
    assert f"{30 * 4 * 2048:,}" in table[1]


def test_what_was_decoded_as_one_is_cut_where_the_tensors_end() -> None:
    sizes = [3, 0, 5, 1]
    dense = torch.tensor([1.0, 0, 2, 0, 0, 3, 0, 4, 5])
    indices = dense.nonzero().view(-1)
    for decoded in (dense, Sparse(9, indices, dense[indices])):
        parts = split_decoded(decoded, sizes)
        assert [to_dense(part).tolist() for part in parts] == [x.tolist() for x in dense.split(sizes)]


def test_entries_compete_across_tensors_when_the_scope_is_global() -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        mean = CompressedMean(
            {"small": torch.zeros(1000), "large": torch.zeros(1000)},
            compressor=TopK(density=0.1, scope="global"),
            queue=queue,
        )
        generator = torch.Generator().manual_seed(rank.rank)
        tensors = {
            "small": torch.rand(1000, generator=generator) + 0.1,
            "large": torch.rand(1000, generator=generator) + 2.0,
        }
        mean.allreduce(tensors)
        queue.close()
        return tensors

    for tensors in run_ranks(2, work):
        assert int((tensors["small"] != 0).sum()) == 0
        assert 200 <= int((tensors["large"] != 0).sum()) <= 400
