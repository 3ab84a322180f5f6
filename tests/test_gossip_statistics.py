from __future__ import annotations

import pytest
import torch
from torch import nn

from thinwire.comm.gossip.statistics import normalisations, recalibrate


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2), nn.BatchNorm1d(2))


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_statistics_become_the_plain_mean_over_the_batches():
    model = network()
    batches = [torch.randn(16, 3, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(5)]
    model(batches[0])  # leaves statistics of another model
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert recalibrate(model, lambda: [model(batch) for batch in batches]) == 2
    hidden = [model[0](batch) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    # Dropout would have left a tenth of what the second one sees.
    seen = [model[3](nn.functional.batch_norm(h, None, None, *model[1].parameters(), training=True)) for h in hidden]
    torch.testing.assert_close(model[4].running_mean, torch.stack([h.mean(0) for h in seen]).mean(0))
    assert model[1].momentum == 0.1
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_modes_are_as_they_were():
    model = network().eval()
    model[2].train()
    recalibrate(model, lambda: model(torch.randn(8, 3)))
    assert [module.training for module in model] == [False, False, True, False, False]


def fail():
    raise OSError("no data")


@pytest.mark.parametrize(
    ("calibrate", "error", "said"),
    [
        (lambda model: None, ValueError, "no batch through 1, 4;"),
        (lambda model: model[1](model[0](torch.randn(8, 3))), ValueError, "no batch through 4;"),
        (lambda model: model.eval()(torch.randn(8, 3)), ValueError, "without model.eval()"),
        (lambda model: fail(), OSError, "no data"),
    ],
)
def test_a_calibration_that_does_not_run_the_model_changes_nothing(calibrate, error, said):
    model = network()
    model(torch.randn(8, 3))
    before = buffers(model)
    with pytest.raises(error, match=said.replace("(", r"\(").replace(")", r"\)")):
        recalibrate(model, lambda: calibrate(model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert model[1].momentum == 0.1


def test_a_model_without_running_statistics_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert not normalisations(model)
    assert recalibrate(model, fail) == 0
