"""Recurrent layers where numbers are extreme: long sequences, NaN and infinities, denormals; and ONNX Runtime
as a second oracle."""

import io
import warnings

import pytest
import torch
from _oracle import (
    CELLS,
    FUNCTION,
    as_states,
    check_error,
    compare,
    error,
    expected_kernel,
    flat,
    nonlinearity,
    our_rnn,
    outputs_and_gradients,
    rnn_tensors,
    running_on,
    sequence_class,
    stock_rnn,
)

import cnnrnn_ext as cx

INF, NAN = float("inf"), float("nan")
KERNELS = ["vectors", "direct", "tile registers"]  # what serves a shape, the last where the machine has them


# ---- long sequences ----


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_ten_thousand_steps(compiled, cell, rows):
    """Outputs, last states and (of three rows) gradients: errors do not pile up beyond twice torch's own."""
    tensors = rnn_tensors(cell, 10_000, rows, 4, 9)
    if cell == "rnn_relu":  # keeps a ReLU from growing or dying out over so many steps
        tensors["weight_hh_l0"] = torch.eye(9) * 0.9
    wanted = [] if rows == 1 else None
    compare(our_rnn(cell), stock_rnn(cell), tensors, compiled, [FUNCTION[cell]], wanted=wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_ten_thousand_steps_both_ways_by_lengths(compiled, cell):
    """Rows of 10,000, 1 and 5,000 steps, each as torch computes it alone."""
    lengths = torch.tensor([10_000, 1, 5_000])
    tensors = rnn_tensors(cell, 10_000, 3, 3, 5, bidirectional=True)
    with running_on(compiled, FUNCTION[cell]):
        output, *finals = our_rnn(cell, bidirectional=True, lengths=lengths)(**tensors)
    for row, length in enumerate(lengths.tolist()):
        alone = {k: v for k, v in tensors.items() if k not in ("input", "h_0", "c_0")}
        alone |= {k: tensors[k][:, row : row + 1] for k in ("h_0", "c_0") if k in tensors}
        alone["input"] = tensors["input"][:length, row : row + 1]
        wanted = stock_rnn(cell, bidirectional=True)(**{k: v.double() for k, v in alone.items()})
        theirs = stock_rnn(cell, bidirectional=True)(**alone)
        ours = (output[:length, row : row + 1], *(s[:, row : row + 1] for s in finals))
        for index, triple in enumerate(zip(ours, theirs, wanted, strict=True)):
            check_error(f"row {row}, output {index}", *triple)


# ---- extreme numbers ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(6, 5, 7, 19), (20, 1, 7, 19), (6, 14, 7, 19)], ids=KERNELS)
def test_huge_inputs(mode, cell, magnitude, dtype, shape):
    """Every gate at one of its ends, whatever the sign, and back: no overflow, as torch to rounding.

    A pre-activation of 1e4 is only known to 1e4 units of the last place, and so is its gate's gradient.
    """
    tensors = rnn_tensors(cell, *shape, dtype=dtype)
    signs = torch.where(torch.rand_like(tensors["input"]) < 0.5, -1.0, 1.0)
    # One feature of a row alone: huge products that cancel would leave a matter of luck between the ends.
    alone = torch.nn.functional.one_hot(torch.randint(shape[2], shape[:2]), shape[2])
    tensors["input"] = (signs * alone * magnitude).to(dtype)
    tensors["input"][3:5] = torch.randn_like(tensors["input"][3:5])
    compare(our_rnn(cell), stock_rnn(cell), tensors, mode, [FUNCTION[cell]], wanted=[])
    _, expected, outer = outputs_and_gradients(stock_rnn(cell), {k: v.double() for k, v in tensors.items()})
    with running_on(mode, FUNCTION[cell]):
        _, gradients, _ = outputs_and_gradients(our_rnn(cell), tensors, outer)
    tolerance = 2e4 * torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        scale = max(1, expected[name].abs().max().item())
        torch.testing.assert_close(
            gradient.double(),
            expected[name],
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("where", ["input", "h_0", "weights"])
@pytest.mark.parametrize("rows", [5, 14])
def test_denormals(mode, cell, where, rows):
    """Numbers below the smallest normal one neither trap nor turn into something else."""
    tensors = rnn_tensors(cell, 6, rows, 7, 19)
    for name in tensors:
        if name.startswith({"weights": "weight"}.get(where, where)):
            tensors[name] = tensors[name] * 1e-40
            assert (tensors[name].abs() < torch.finfo(torch.float32).tiny).all()
            assert tensors[name].any()
    if mode == "reference" or expected_kernel() != "cpu/amx":
        compare(our_rnn(cell), stock_rnn(cell), tensors, mode, [FUNCTION[cell]])
        return
    # Tile registers take them for zeros: no more is lost than what they stand for.
    theirs, their_grads, outer = outputs_and_gradients(stock_rnn(cell), tensors)
    with running_on(mode, FUNCTION[cell]):
        ours, our_grads, _ = outputs_and_gradients(our_rnn(cell), tensors, outer)
    smallest = torch.finfo(torch.float32).smallest_normal
    pairs = [*zip(ours, theirs, strict=True), *((our_grads[name], their_grads[name]) for name in their_grads)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=max(smallest, 1e-6 * b.abs().max().item()))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_denormal_states_are_kept(mode, cell):
    """Every number below the smallest normal one: h of a GRU and c of an LSTM are halved at each step, and
    fade as gradually as torch's."""
    tensors = {k: v * 1e-39 for k, v in rnn_tensors(cell, 4, 3, 5, 6, bias=False).items()}
    with running_on(mode, FUNCTION[cell]):
        ours = our_rnn(cell, bias=False)(**tensors)
    for a, b in zip(ours, stock_rnn(cell, bias=False)(**tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=torch.finfo(torch.float32).smallest_normal * 1e-6)
    assert ours[-1].any()


@pytest.mark.isa
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("cell", "where"),
    [
        (cell, where)
        for cell in CELLS
        for where in ("input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
        if cell == "lstm" or where != "c_0"
    ],
)
@pytest.mark.parametrize("shape", [(5, 4, 7, 19), (20, 1, 7, 19), (5, 14, 7, 19)], ids=KERNELS)
def test_special_values(mode, cell, where, value, shape):
    """One NaN or infinity, anywhere: outputs, states and gradients as torch propagates it, and no further."""
    tensors = rnn_tensors(cell, *shape)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    theirs, their_grads, outer = outputs_and_gradients(stock_rnn(cell), tensors)
    with running_on(mode, FUNCTION[cell]):
        ours, our_grads, _ = outputs_and_gradients(our_rnn(cell), tensors, outer)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, i=index: f"output {i}: {m}")
    for name, b in their_grads.items():
        torch.testing.assert_close(
            our_grads[name],
            b,
            equal_nan=True,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, n=name: f"grad of {n}: {m}",
        )


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [5, 19])
@pytest.mark.parametrize("rows", [9, 14])
def test_nan_stays_in_its_row(mode, cell, hidden, rows):
    tensors = rnn_tensors(cell, 5, rows, 6, hidden)
    tensors["input"][2, 4, 3] = NAN
    with running_on(mode, FUNCTION[cell]):
        results = our_rnn(cell)(**tensors)
    for a, b in zip(results, stock_rnn(cell)(**tensors), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert results[0][2:, 4].isnan().all()
    others = [row for row in range(rows) if row != 4]
    assert not results[0][:, others].isnan().any()


class WithStates(torch.nn.Module):
    def __init__(self, module, cell):
        super().__init__()
        self.module, self.cell = module, cell

    def forward(self, x, h_0, c_0):
        return flat(self.module(x, as_states(self.cell, h_0, c_0)))


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(7, 5, 9, 20), (30, 1, 12, 33)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_against_onnx_runtime(compiled, cell, bidirectional, layers, shape):
    """Stock's parameters, exported, in an implementation that shares nothing with torch's."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    t, n, i, h = shape
    options = {"num_layers": layers, "bidirectional": bidirectional, **nonlinearity(cell)}
    stock, ours = (sequence_class(package, cell)(i, h, **options) for package in (torch.nn, cx))
    ours.load_state_dict(stock.state_dict())
    rows = layers * (2 if bidirectional else 1)
    operands = torch.randn(t, n, i), torch.randn(rows, n, h), torch.randn(rows, n, h)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the exporter without dynamo is deprecated; it keeps one node a layer
        names = ["x", "h_0", "c_0"]
        torch.onnx.export(WithStates(stock.eval(), cell), operands, buffer, dynamo=False, input_names=names)
    assert {b"lstm": b"LSTM", b"gru": b"GRU", b"rnn": b"RNN"}[FUNCTION[cell].encode()] in buffer.getvalue()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(buffer.getvalue(), settings, ["CPUExecutionProvider"])
    given = {x.name for x in session.get_inputs()}
    feed = {k: v.numpy() for k, v in zip(names, operands, strict=True) if k in given}
    theirs = [torch.from_numpy(y) for y in session.run(None, feed)]
    with torch.no_grad(), running_on(compiled, FUNCTION[cell]):
        results = flat(ours(operands[0], as_states(cell, *operands[1:])))
    for a, b in zip(results, theirs, strict=True):
        assert error(a, b)[0] < 2e-6
        assert b.any()
