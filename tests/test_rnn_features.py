"""What no stock module has besides lengths and reset: return_all; and what such calls refuse."""

import pytest
import torch
from _feature_cases import KINDS, H, I, N, T, tensors, twins
from _oracle import running_on
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import cnnrnn_ext as cx


@pytest.mark.pure
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("kind", [*KINDS, "lstm proj"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_return_all(mode, kind, batch_first, grad):
    """Every layer's h and c at each step, against one step at a time through the stock cells' formulas."""
    options = {"num_layers": 2, "batch_first": batch_first}
    if kind == "lstm proj":
        mode, op, hidden = "reference", "lstm", 3
        stock = nn.LSTM(I, H, proj_size=3, **options).double()
        ours = cx.LSTM(I, H, proj_size=3, **options).double()
        ours.load_state_dict(stock.state_dict())
    else:
        op, hidden = KINDS[kind][0], H
        ours, stock = twins(kind, **options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    inputs = x.transpose(0, 1) if batch_first else x
    with running_on(mode, op), torch.set_grad_enabled(grad):
        output, states, everything = ours(inputs, return_all=True)
    everything = tensors(everything)
    assert everything[0].requires_grad == grad
    if batch_first:
        everything = [s.transpose(1, 2) for s in everything]
        output = output.transpose(0, 1)
    assert list(everything[0].shape) == [2, T, N, hidden]
    for t in range(T):  # the states after step t are those of the sequence cut there
        part = inputs[:, : t + 1] if batch_first else inputs[: t + 1]
        finals = tensors(stock(part)[1])
        for all_steps, final in zip(everything, finals, strict=True):
            torch.testing.assert_close(all_steps[:, t], final)
    assert torch.equal(everything[0][-1], output)
    for all_steps, final in zip(everything, tensors(states), strict=True):
        assert torch.equal(all_steps[:, -1], final)


@pytest.mark.parametrize("kind", KINDS)
def test_return_all_has_gradients(mode, kind):
    """A loss on h_all and c_all alone: the same gradients as through the sequences cut after each step."""
    ours, stock = twins(kind, num_layers=2)
    x = torch.randn(4, N, I, dtype=torch.float64, requires_grad=True)
    with running_on(mode, KINDS[kind][0]):
        everything = tensors(ours(x, return_all=True)[2])
    steps = [tensors(stock(x[: t + 1])[1]) for t in range(4)]
    wanted = [torch.stack(s, 1) for s in zip(*steps, strict=True)]
    weights = [torch.randn_like(s) for s in wanted]
    losses = [
        sum((s * w).sum() for s, w in zip(group, weights, strict=True)) for group in (everything, wanted)
    ]
    ours_grads = torch.autograd.grad(losses[0], [x, *ours.parameters()])
    stock_grads = torch.autograd.grad(losses[1], [x, *stock.parameters()])
    for a, b in zip(ours_grads, stock_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(mode, kind, batch_first):
    """[T, I] with a reset [T], a length [] and all states: the batch of one without its dimension."""
    ours, _ = twins(kind, batch_first=batch_first, num_layers=2, bidirectional=True)
    x, reset = torch.randn(T, I, dtype=torch.float64), torch.rand(T) < 0.4
    with running_on(mode, KINDS[kind][0]):
        alone = tensors(ours(x, lengths=torch.tensor(5), reset=reset, return_all=True))
        dim = 0 if batch_first else 1
        batch = ours(x.unsqueeze(dim), lengths=torch.tensor([5]), reset=reset.unsqueeze(dim), return_all=True)
    output, states, everything = batch
    for a, b in zip(
        alone,
        [
            output.squeeze(dim),
            *(s.squeeze(1) for s in tensors(states)),
            *(s.squeeze(dim + 1) for s in tensors(everything)),
        ],
        strict=True,
    ):
        assert torch.equal(a, b)


X = torch.randn(T, N, I)
BAD_CALLS = {
    "lengths shape": ({"lengths": torch.tensor([1, 2])}, RuntimeError, "lengths"),
    "lengths float": ({"lengths": torch.ones(N)}, RuntimeError, "lengths"),
    "lengths bool": ({"lengths": torch.ones(N, dtype=torch.bool)}, RuntimeError, "lengths"),
    "lengths too large": ({"lengths": torch.tensor([1, 2, 3, T + 1])}, RuntimeError, "lengths"),
    "lengths negative": ({"lengths": torch.tensor([1, 2, 3, -1])}, RuntimeError, "lengths"),
    "lengths a list": ({"lengths": [1, 2, 3, 4]}, TypeError, "lengths"),
    "reset shape": ({"reset": torch.zeros(N, T, dtype=torch.bool)}, RuntimeError, "reset"),
    "reset dtype": ({"reset": torch.zeros(T, N)}, RuntimeError, "reset"),
    "reset device": ({"reset": torch.zeros(T, N, dtype=torch.bool, device="meta")}, RuntimeError, "reset"),
    "reset a list": ({"reset": [False] * T}, TypeError, "reset"),
}


@pytest.mark.pure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(mode, kind, case):
    arguments, error, name = BAD_CALLS[case]
    module = KINDS[kind][2](I, H, **KINDS[kind][3])
    with cx.backend(mode), pytest.raises(error, match=name):
        module(X, **arguments)


def test_bad_calls_of_packed_sequences():
    packed = pack_padded_sequence(X, [7, 5, 3, 1])
    with pytest.raises(RuntimeError, match="lengths"):
        cx.GRU(I, H)(packed, lengths=torch.tensor([7, 5, 3, 1]))
    for reset in (torch.zeros(N, T, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="reset"):
            cx.GRU(I, H)(packed, reset=reset)
    with pytest.raises(RuntimeError, match="reset"):
        cx.GRU(I, H)(packed, reset=torch.zeros(T, N))


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.1", None, (0.1, 0.2, 0.3)], ids=str)
def test_bad_rates(value):
    for our_class in (cx.LSTM, cx.GRU, cx.RNN):
        with pytest.raises(ValueError, match="zoneout"):
            our_class(I, H, zoneout=value)
        with pytest.raises(ValueError, match="recurrent_dropout"):
            our_class(I, H, recurrent_dropout=value)
    for our_class in (cx.GRU, cx.RNN):
        with pytest.raises(ValueError, match="zoneout"):
            our_class(I, H, zoneout=(0.1, 0.1))


def test_bad_constructors():
    with pytest.raises(TypeError, match="layer_norm"):
        cx.LSTM(I, H, layer_norm=1)
    for our_class in (cx.GRU, cx.RNN):
        with pytest.raises(TypeError, match="layer_norm"):
            our_class(I, H, layer_norm=True)
        with pytest.raises(ValueError, match="proj_size"):
            our_class(I, H, proj_size=3)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'selu'"):
        cx.RNN(I, H, nonlinearity="selu")


def test_bad_layer_norm_tensors():
    module = cx.LSTM(I, H, layer_norm=True)
    weights = list(module.parameters())[:4]
    norms = [getattr(module, n) for n in module._norm_names]
    with pytest.raises(RuntimeError, match="layer_norm"):
        cx.functional.lstm(X, None, weights, layer_norm=norms[:5])
    for index, name in enumerate(module._norm_names):
        spoiled = [*norms[:index], torch.randn(3), *norms[index + 1 :]]
        with pytest.raises(RuntimeError, match=name):
            cx.functional.lstm(X, None, weights, layer_norm=spoiled)
