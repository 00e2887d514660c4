"""lengths and reset: torch.nn in float64 on each row and each piece of it alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from _feature_cases import KINDS, LENGTHS, OPTIONS, I, N, T, check_alike, part, random_states, tensors, twins
from _oracle import running_on
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def pieces(length, reset):
    """The spans of a row between its resets."""
    borders = sorted({0, length, *(t for t in range(length) if reset is not None and reset[t])})
    return list(itertools.pairwise(borders))


def row_alone(layer_of, x, states, row, length, reset):
    """(output [length, D*H], final states [D, H]) of one layer on one row, direction by direction.

    ``layer_of(direction)`` is a stock module of one direction. A span in which no state comes from hx starts
    from zero.
    """
    outputs, finals = [], []
    directions = 2 if layer_of(1) is not None else 1
    for d in range(directions):
        module, spans = layer_of(d), pieces(length, reset)
        order = spans if d == 0 else spans[::-1]
        hx = None if states is None else part(states, d, row)
        if d == 0 and length and reset is not None and reset[0]:
            hx = None  # the state does not cross into step 0
        empty, spans_out = x.new_zeros(0, module.hidden_size), []
        last = hx
        for begin, end in order:
            piece = x[begin:end, row : row + 1]
            y, last = module(piece if d == 0 else piece.flip(0), hx)
            spans_out.append((y if d == 0 else y.flip(0))[:, 0])
            hx = None
        outputs.append(torch.cat([empty, *(spans_out if d == 0 else spans_out[::-1])]))
        if last is None:
            zeros = x.new_zeros(1, 1, module.hidden_size)
            last = (zeros, zeros) if isinstance(module, nn.LSTM) else zeros
        finals.append([s[0, 0] for s in tensors(last)])
    return torch.cat(outputs, -1), [torch.stack(s) for s in zip(*finals, strict=True)]


def expected(kind, stock, x, states, lengths, reset):
    """[output, states ...] of the stock module's parameters, row by row, layer by layer."""
    _, stock_class, _, more = KINDS[kind]
    batch_first = stock.batch_first
    x = x.transpose(0, 1) if batch_first else x
    reset = reset.t() if batch_first and reset is not None else reset
    directions, finals = 2 if stock.bidirectional else 1, []
    for layer in range(stock.num_layers):

        def layer_of(d, layer=layer, width=x.shape[-1]):
            if d >= directions:
                return None
            module = stock_class(width, stock.hidden_size, bias=stock.bias, **more).double()
            for name in [n for n, _ in module.named_parameters()]:
                source = name.replace("_l0", f"_l{layer}" + ("_reverse" if d else ""))
                delattr(module, name)
                setattr(module, name, getattr(stock, source))
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
            module._update_flat_weights = lambda: None
            return module

        rows = slice(layer * directions, (layer + 1) * directions)
        mine = None
        if states is not None:
            mine = tuple(s[rows] for s in states) if isinstance(states, tuple) else states[rows]
        padded, last = [], []
        for n in range(x.shape[1]):
            length = len(x) if lengths is None else int(lengths[n])
            output, final = row_alone(layer_of, x, mine, n, length, None if reset is None else reset[:, n])
            padded.append(F.pad(output, (0, 0, 0, len(x) - length)))
            last.append(final)
        x = torch.stack(padded, 1)
        finals.append([torch.stack(s, 1) for s in zip(*last, strict=True)])
    x = x.transpose(0, 1) if batch_first else x
    return [x, *(torch.cat(s) for s in zip(*finals, strict=True))]


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", ["lengths", "reset", "both"])
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
def test_lengths_and_reset(mode, kind, options, given, state):
    op = KINDS[kind][0]
    ours, _ = twins(kind, **options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.4
    reset[0, 1] = True
    if options.get("batch_first"):
        x, reset = x.transpose(0, 1).contiguous(), reset.t().contiguous()
    lengths = LENGTHS if given != "reset" else None
    reset = reset if given != "lengths" else None
    leaves = [x.requires_grad_()]
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = random_states(kind, rows) if state else None
    leaves += [] if hx is None else tensors(hx)
    with running_on(mode, op):
        result = tensors(ours(x, hx, lengths=lengths, reset=reset))
    wanted = expected(kind, ours, x, hx, lengths, reset)
    check_alike(result, wanted, [*leaves, *ours.parameters()])


@pytest.mark.isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_not_read(mode, kind, bidirectional):
    """NaN behind a row's end, and resets there, change nothing, forward and backward."""
    op = KINDS[kind][0]
    ours, _ = twins(kind, bidirectional=bidirectional, num_layers=2)
    x = torch.randn(T, N, I, dtype=torch.float64)
    behind = torch.arange(T)[:, None] >= LENGTHS
    reset = torch.rand(T, N) < 0.4
    results = []
    for spoiled in (False, True):
        inputs = x.masked_fill(behind[..., None], float("nan") if spoiled else 0.0).requires_grad_()
        cut = reset | behind if spoiled else reset & ~behind
        with running_on(mode, op):
            outputs = tensors(ours(inputs, lengths=LENGTHS, reset=cut))
        loss = sum((y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [inputs, *ours.parameters()])])
    for a, b in zip(*results, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not results[1][0][behind].any()
    assert not results[1][-len(list(ours.parameters())) - 1][behind].any()


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_packing(mode, kind):
    """lengths= on padded input gives what torch gives for the packed one."""
    ours, stock = twins(kind, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, N, I, dtype=torch.float64), torch.tensor([3, 7, 1, 5], dtype=torch.int32)
    with running_on(mode, KINDS[kind][0]):
        output, states = ours(x, lengths=lengths)
    packed, wanted = stock(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(output, pad_packed_sequence(packed)[0])
    torch.testing.assert_close(states, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_with_reset_and_return_all(mode, kind, batch_first, enforce_sorted):
    """A PackedSequence gives what lengths= gives, with resets in the caller's order of rows."""
    ours, _ = twins(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([7, 5, 3, 1] if enforce_sorted else [3, 7, 1, 5])
    x = torch.randn(T, N, I, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.4
    if batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    hx = random_states(kind, 4)
    leaves = [x.requires_grad_(), *tensors(hx), *ours.parameters()]
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=enforce_sorted)
    with running_on(mode, KINDS[kind][0]):
        output, states, everything = ours(packed, hx, reset=reset, return_all=True)
        result = [pad_packed_sequence(output, batch_first)[0], *tensors(states), *tensors(everything)]
        wanted = tensors(ours(x, hx, lengths=lengths, reset=reset, return_all=True))
    check_alike(result, wanted, leaves)
