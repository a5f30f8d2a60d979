"Members of an ensemble on the way of their training."
import pytest
import torch
from torch import nn
from whatmatters.core.ensemble import checkpoints, train_ensemble


def mlp(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("options", [dict(), dict(group=2), dict(optimizer=lambda p: torch.optim.SGD(p, lr=.1, momentum=.9))], ids=["adam", "groups", "momentum"])
def test_checkpoints_lie_on_the_way_of_training(blobs, options):
    "Every checkpoint is what a training of so many epochs would end with: the optimiser is never started anew."
    x, y = blobs
    way = checkpoints(mlp, x, y, [3, 4, 5], epochs=4, at=[0, 2, 4], **options)
    for e, kept in zip((2, 4), way[1:]):
        alone = train_ensemble(mlp, x, y, [3, 4, 5], epochs=e, **options)
        for name, p in alone.parameters.items(): torch.testing.assert_close(kept.parameters[name], p, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept.losses, alone.losses)
    assert len(way[0]) == 3 and way[0].losses.shape == (3, 0)


def test_checkpoints_begin_again_when_memory_runs_out(blobs):
    x, y = blobs
    calls = []
    def tight(parameters):
        calls.append(len(parameters[0]))
        if len(parameters[0]) > 2:
            class Fails(torch.optim.Adam):
                count = 0
                def step(self, closure=None):
                    Fails.count += 1
                    if Fails.count > 5: raise MemoryError
                    return super().step(closure)
            return Fails(parameters)
        return torch.optim.Adam(parameters)
    way = checkpoints(mlp, x, y, range(4), epochs=3, optimizer=tight, group=4)
    assert calls == [4, 2, 2]
    whole = train_ensemble(mlp, x, y, range(4), epochs=3, optimizer=torch.optim.Adam)
    for name, p in whole.parameters.items(): torch.testing.assert_close(way[-1].parameters[name], p, rtol=1e-4, atol=1e-6)


def test_checkpoints_keep_frozen_parameters_and_know_weights_and_starts(blobs):
    x, y = blobs
    def frozen():
        network = mlp()
        network[0].requires_grad_(False)
        return network
    weights = torch.ones(2, len(y))
    weights[1, :75] = 0
    way = checkpoints(frozen, x, y, [0, 0], epochs=2, weights=weights)
    assert torch.equal(way[0].parameters["0.weight"], way[2].parameters["0.weight"]) and not torch.equal(way[0].parameters["2.weight"], way[2].parameters["2.weight"])
    assert torch.equal(way[0].parameters["2.weight"][0], way[0].parameters["2.weight"][1]) and not torch.equal(way[2].parameters["2.weight"][0], way[2].parameters["2.weight"][1])
    told = []
    checkpoints(mlp, x, y, [0], epochs=2, initial=[way[2].member(0)], progress=lambda *a: told.append(a))
    assert told == [(1, 2), (2, 2)]


def test_checkpoints_refuse(blobs):
    x, y = blobs
    for at in ([], [2, 1], [-1], [4], [1, 1]):
        with pytest.raises(ValueError, match="at: got .*; want rising whole numbers from 0 to 3"): checkpoints(mlp, x, y, [0], epochs=3, at=at)
