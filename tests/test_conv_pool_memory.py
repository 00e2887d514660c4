"""What a training step keeps and takes at most, beside stock modules."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cnnrnn_ext as cx

sys.path.append(str(Path(__file__).parents[1]))  # at the end: an installed cnnrnn_ext keeps its place

from benchmarks import peers
from benchmarks.memory import peak_bytes, saved_bytes

# (n, c, s, k, padding): the first layers of the benchmark's grid, fewer images
FIRST_LAYERS = {"digits": (64, 1, 28, 32, 0), "colour": (4, 3, 112, 32, 1), "large": (2, 3, 224, 64, 1)}


def modules(c, k, padding, **options):
    stock = nn.Sequential(nn.Conv2d(c, k, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2))
    ours = cx.ConvPool2d(c, k, 3, padding=padding, **options)
    ours.load_state_dict(stock[0].state_dict())
    return ours, stock


@pytest.mark.parametrize("shape", [*FIRST_LAYERS.values(), (2, 32, 20, 64, 1)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_one_byte_of_each_output_is_kept(compiled, shape, activation):
    """Beside the input and the parameters; of ReLU not even the output, which the code tells of."""
    n, c, s, k, padding = shape
    ours, stock = modules(c, k, padding, activation=activation)
    x = torch.randn(n, c, s, s, requires_grad=True)
    outputs = ours(x).numel()
    assert saved_bytes(lambda: ours(x), [x, *ours.parameters()]) == outputs
    assert saved_bytes(lambda: stock(x), [x, *stock.parameters()]) > 16 * outputs


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_a_first_layer_takes_a_third_of_stock_at_most(compiled, name):
    n, c, s, k, padding = FIRST_LAYERS[name]
    x = torch.randn(n, c, s, s)

    def peak(module):
        gradient = torch.randn_like(module(x))
        return peak_bytes(lambda: torch.autograd.grad(module(x), module.parameters(), gradient))

    ours, stock = map(peak, modules(c, k, padding))
    assert 0 < 3 * ours <= stock


# ---- the benchmark's own ----


def test_peak_is_of_what_lives_at_a_time():
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 12000
    assert peak_bytes(lambda: torch.ones(1000).sum() + torch.ones(1000)) == 8004


def test_saved_is_counted_once_and_without_what_was_given():
    x = torch.rand(500, requires_grad=True)
    assert saved_bytes(lambda: x * x, [x]) == 0
    assert saved_bytes(lambda: torch.sigmoid(x) * torch.sigmoid(x), [x]) == 4000


def test_peers_that_keep_to_no_instruction_set_are_left_out(monkeypatch):
    monkeypatch.setenv(peers.RESTRICTED, "AVX2")
    out = {peer.name for peer in peers.PEERS if "instruction set" in (peer.missing() or "")}
    assert out == {"ONNX Runtime", "OpenVINO"}
    assert all(peers.RESTRICTED in settings for settings in peers.RESTRICTIONS.values())
