"""CNNRNN, RNNCNN and ParallelCNNRNN: a padded batch gives what torch.nn gives of each row alone."""

import pytest
import torch
import torch.nn.functional as F
from _oracle import running_on
from _stock_models import CNNRNN, RNNCNN, ParallelCNNRNN, twin

import cnnrnn_ext as cx
from cnnrnn_ext import models

LENGTHS = torch.tensor([7, 3, 4, 1])


def compare(ours, stock, batch, rows, lengths, mode, ops):
    """Logits, and the gradients of all parameters and of the input, of a batch against each row by itself.

    Args:
        batch: the padded input; rows: the same, each as the stock model takes it.
    """
    floating = batch.is_floating_point()
    batch, rows = batch.clone(), [row.clone() for row in rows]
    if floating:
        batch.requires_grad_()
        rows = [row.requires_grad_() for row in rows]
    with running_on(mode, *ops):
        result = ours(batch, lengths)
        expected = [stock(row) for row in rows]
        loss = 0.0
        for index, logits in enumerate(expected):
            for name, part in logits.items():
                of_row = result[name][index][: len(part)]
                torch.testing.assert_close(of_row, part, rtol=1e-9, atol=1e-10)
                weights = torch.randn_like(part)
                loss = loss + (weights * of_row).sum()
                (weights * part).sum().backward(retain_graph=True)
        loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = theirs[name].grad
        if name == "embedding.weight":
            gradient = gradient.clone()
            gradient[ours.embedding.padding_idx] = 0.0  # padding stays 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-9, msg=name)
        assert gradient.any(), name
    if floating:
        for index, row in enumerate(rows):
            torch.testing.assert_close(batch.grad[index, : len(row)], row.grad, rtol=1e-8, atol=1e-9)
            assert not batch.grad[index, len(row) :].any()


def padded(rows, fill):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


OPTIONS = [
    {"rnn": "lstm", "readout": "last"},
    {"rnn": "gru", "readout": "mean", "bidirectional": True},
    {"rnn": "rnn", "readout": "attention", "num_layers": 2},
    {"rnn": "rnn_relu", "readout": "mean", "bidirectional": True, "num_layers": 2},
    {"rnn": "lstm", "readout": "steps", "bidirectional": True},
]


def operator(options):
    return options["rnn"].partition("_")[0]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_cnnrnn(mode, options):
    ours = models.CNNRNN({"a": 3, "b": 2}, 2, (12, 14), (4, 5), 6, **options)
    if options["rnn"] == "rnn_relu":  # with no unit that never answers, and so has no gradient
        for name, parameter in ours.rnn.named_parameters():
            parameter.data += 1.0 if "bias_ih" in name else 0.0
    stock = twin(CNNRNN(ours, "seed", (4, 5)), ours)
    rows = [torch.randn(length, 2, 12, 14, dtype=torch.float64) for length in LENGTHS]
    compare(ours, stock, padded(rows, torch.nan), rows, LENGTHS, mode, ["conv_pool2d", operator(options)])


@pytest.mark.parametrize(
    ("cnn", "channels", "size"), [("vgg", (4, 5, 6), (17, 9)), ("resnet", (4, 4, 6), (12, 17))]
)
def test_presets(cnn, channels, size):
    """The CNNs of the presets, BatchNorms as training leaves them; no lengths are one length for all."""
    ours = models.CNNRNN({"a": 3}, 2, size, channels, 6, cnn=cnn).eval()
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    stock = twin(CNNRNN(ours, cnn, channels), ours)
    rows = [torch.randn(length, 2, *size, dtype=torch.float64) for length in LENGTHS]
    with cx.trace() as log:
        compare_untraced(ours, stock, padded(rows, torch.nan), rows, LENGTHS)
    assert {call.op for call in log} == {"conv_pool2d", "lstm"}
    whole = [row[:1] for row in rows]
    compare_untraced(ours, stock, torch.stack(whole), whole, None)


def compare_untraced(ours, stock, batch, rows, lengths):
    """compare, for models of which a part may run on plain torch."""
    result = ours(batch, lengths)
    for index, row in enumerate(rows):
        for name, part in stock(row).items():
            torch.testing.assert_close(result[name][index], part, rtol=1e-9, atol=1e-10)


def test_presets_run_on_kernels(compiled):
    """In float32 and of 8 channels or more, every convolution of the presets has a kernel."""
    for cnn in ("vgg", "resnet"):
        model = models.CNNRNN(2, 3, (32, 32), (8, 16, 16), 8, cnn=cnn)
        with cx.backend("compiled"):
            model(torch.randn(2, 3, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("rnn", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize("given", ["lengths", "padding"])
def test_rnncnn(mode, rnn, given):
    """Filters wider than the text among them; behind the ends other tokens stand, or padding."""
    ours = models.RNNCNN(20, {"a": 3}, 5, 4, rnn=rnn, num_layers=2, channels=6, widths=(1, 3, 5))
    ours.embedding.weight.data.normal_()[0] = 0.0
    stock = twin(RNNCNN(ours), ours)
    rows = [torch.randint(1, 20, (length,)) for length in LENGTHS]
    batch = padded(rows, 0 if given == "padding" else 3)
    lengths = LENGTHS if given == "lengths" else None
    compare(ours, stock, batch, rows, lengths, mode, ["conv_pool2d", operator({"rnn": rnn})])


PARALLEL = [
    {"fusion": "concatenate", "output": "classes"},
    {"fusion": "gated", "output": "classes", "readout": "mean", "rnn": "lstm"},
    {"fusion": "attention", "output": "classes", "time_pools": 0, "rnn": "rnn", "bidirectional": False},
    {"fusion": "gated", "output": "steps", "time_pools": 2},
    {"fusion": "attention", "output": "steps", "num_layers": 2},
]


@pytest.mark.parametrize("options", PARALLEL, ids=lambda o: "-".join(map(str, o.values())))
def test_parallel(mode, options):
    ours = models.ParallelCNNRNN({"a": 3}, 9, channels=(4, 5), hidden_size=6, **options)
    stock = twin(ParallelCNNRNN(ours), ours)
    lengths = torch.tensor([19, 6, 9, 4])
    rows = [torch.randn(length, 9, dtype=torch.float64) for length in lengths]
    steps = []

    def logits(batch, lengths):
        y = ours(batch, lengths)
        if options["output"] == "steps":
            y, reduced = y
            steps.append(reduced)
        return y

    logits.named_parameters = ours.named_parameters
    ops = ["conv_pool2d", options.get("rnn", "gru")]
    compare(logits, stock, padded(rows, torch.nan), rows, lengths, mode, ops)
    if options["output"] == "steps":
        assert steps[0].tolist() == [len(stock(row)["a"]) for row in rows]


def test_parallel_steps_feed_ctc():
    """Logits and lengths go into F.ctc_loss as the docstring says, without lengths too."""
    model = models.ParallelCNNRNN(5, 8, channels=(4,), hidden_size=4, output="steps")
    x, lengths = torch.randn(2, 12, 8), torch.tensor([12, 9])
    targets, target_lengths = torch.tensor([[1, 2, 3], [4, 4, 0]]), torch.tensor([3, 2])

    def loss(lengths, rows):
        logits, steps = model(x[rows], lengths)
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            targets[rows],
            steps,
            target_lengths[rows],
            reduction="none",
        )

    both = loss(lengths, slice(None))
    torch.testing.assert_close(both[:1], loss(None, slice(0, 1)))
    assert both.isfinite().all()
    logits, steps = model(x)
    assert logits.shape == (2, 6, 5)
    assert steps.tolist() == [6, 6]


@pytest.mark.parametrize("kind", ["attention", "mean", "last", "steps"])
def test_rows_of_no_steps(kind):
    """A row without a step is no NaN, and changes no other row."""
    model = models.CNNRNN(3, 1, (12, 12), (4, 4), 5, readout=kind)
    x, lengths = torch.randn(3, 4, 1, 12, 12), torch.tensor([2, 0, 4])
    y = model(x, lengths)
    y.sum().backward()
    torch.testing.assert_close(y[1], model.heads(torch.zeros_like(model.features(x, lengths)[1])))
    torch.testing.assert_close(y[2:], model(x[2:]))
    assert all(p.grad.isfinite().all() for p in model.parameters())
    text = models.RNNCNN(9, 3, 4, 4, channels=4)
    tokens = torch.tensor([[3, 4, 0], [0, 0, 0]])
    torch.testing.assert_close(text(tokens)[1], text.heads.bias)
    assert text(torch.zeros(2, 0, dtype=torch.int64)).equal(text.heads.bias.expand(2, 3))
    speech = models.ParallelCNNRNN(3, 8, channels=(4,), hidden_size=4, fusion="gated")
    y = speech(torch.randn(2, 4, 8), torch.tensor([4, 1]))  # one frame is no whole step
    torch.testing.assert_close(y[1], speech.heads.bias)


def test_attention_weights():
    """They are those that the readout used: the features are the steps, so weighed."""
    model = models.CNNRNN(3, 1, (12, 12), (4, 4), 5, readout="attention")
    x, lengths = torch.randn(3, 4, 1, 12, 12), torch.tensor([2, 1, 4])
    weights = model.attention(x, lengths)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert not weights[0, 2:].any()
    steps = models.CNNRNN(3, 1, (12, 12), (4, 4), 5, readout="steps")
    steps.load_state_dict(model.state_dict(), strict=False)
    features = (weights[..., None] * steps.features(x, lengths)).sum(1)
    torch.testing.assert_close(model.features(x, lengths), features)
    with pytest.raises(RuntimeError, match="readout"):
        steps.attention(x)


def test_named_or_one_head():
    named = models.CNNRNN({"a": 3}, 1, (12, 12), (4, 4), 5)
    one = models.CNNRNN(3, 1, (12, 12), (4, 4), 5)
    one.load_state_dict({key.replace(".a.", "."): value for key, value in named.state_dict().items()})
    x = torch.randn(2, 3, 1, 12, 12)
    assert one(x).equal(named(x)["a"])


def test_dropout_in_training_only():
    for model, x in (
        (models.CNNRNN(3, 1, (12, 12), (4, 4), 5, dropout=0.5), torch.randn(2, 3, 1, 12, 12)),
        (models.RNNCNN(9, 3, 4, 4, dropout=0.5), torch.randint(1, 9, (2, 6))),
        (models.ParallelCNNRNN(3, 8, dropout=0.5), torch.randn(2, 6, 8)),
    ):
        assert not model(x).equal(model(x))
        model.eval()
        assert model(x).equal(model(x))
