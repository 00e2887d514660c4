"""No copy of a weight outlives a change of it: each way to change a module that has already run, and stock's
twin changed likewise."""

import copy
import io
import pickle

import pytest
import torch
from _oracle import FUNCTION, cell_class, flat, running_on, sequence_class
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm

import cnnrnn_ext as cx

SHAPES = {
    "rows": (6, 5, 7),
    "one row": (20, 1, 7),
    "one step": (1, 1, 7),
}  # packed weights, and weights as they are


class Pair:
    """Ours and stock's with the same parameters, both used in training and in inference."""

    def __init__(self, cell, **options):
        self.cell = cell
        self.ours, self.stock = (sequence_class(p, cell)(7, 20, **options) for p in (cx, torch.nn))
        self.ours.load_state_dict(self.stock.state_dict())
        self.warm()

    @property
    def modules(self):
        return self.ours, self.stock

    def warm(self):
        dtype = next(self.ours.parameters()).dtype
        for shape in SHAPES.values():
            for module in self.modules:
                x = torch.randn(shape, dtype=dtype)
                module(x)[0].sum().backward()
                module.zero_grad()
                with torch.inference_mode():
                    module(x)

    def change(self, function):
        """The same in both; what it returns, if anything, takes the module's place."""
        changed = []
        for module in self.modules:
            torch.manual_seed(7)
            changed.append(function(module) or module)
        self.ours, self.stock = changed

    def check(self, **tolerance):
        """As stock's, in inference and in training, with the gradients of every parameter."""
        dtype = next(self.ours.parameters()).dtype
        for shape in SHAPES.values():
            x = torch.randn(shape, dtype=dtype)
            with torch.no_grad(), running_on("compiled", FUNCTION[self.cell]):
                inference = flat(self.ours(x))
            results = []
            for module in self.modules:
                outputs = flat(module(x))
                loss = sum((y * torch.linspace(0, 1, y.numel()).view_as(y).to(dtype)).sum() for y in outputs)
                wanted = [p for p in module.parameters() if p.requires_grad]
                results.append((outputs, torch.autograd.grad(loss, wanted) if wanted else ()))
            (ours, our_grads), (stock, stock_grads) = results
            for a, b, c in zip(ours, stock, inference, strict=True):
                torch.testing.assert_close(a, b, **tolerance)
                torch.testing.assert_close(c, b, **tolerance)
            for a, b in zip(our_grads, stock_grads, strict=True):
                torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture(params=["lstm", "gru"])
def pair(request, compiled):
    return Pair(request.param, num_layers=2, bidirectional=True)


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_go_their_own_way(pair, copied):
    """A copy of a module that has run, then new values in the original, then in the copy."""
    original = copy.copy(pair)
    pair.change(copied)
    pair.check()
    for changed in (original, pair):
        changed.change(overwrite)
        original.check()
        pair.check()


def noise(tensor):
    """Values at the scale of an initial weight: large ones would make each rounding error grow."""
    return torch.randn_like(tensor) * 0.2


@torch.no_grad()
def overwrite(module):
    for parameter in module.parameters():
        parameter.copy_(noise(parameter))


def through_data(module):
    """A change that no version counter sees."""
    for parameter in module.parameters():
        parameter.data.copy_(noise(parameter))


def new_data(module):
    for parameter in module.parameters():
        parameter.data = noise(parameter).detach()
    module.flatten_parameters()  # stock keeps a list of what was there before


def through_numpy(module):
    """A change behind torch's back altogether."""
    for parameter in module.parameters():
        parameter.detach().numpy()[:] = noise(parameter).detach().numpy()


def load_other(module):
    module.load_state_dict({k: noise(v) for k, v in module.state_dict().items()})


def assign_other(module):
    module.load_state_dict({k: noise(v) for k, v in module.state_dict().items()}, assign=True)


def from_vector(module):
    vector_to_parameters(noise(parameters_to_vector(module.parameters())), module.parameters())


def new_parameters(module):
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(noise(parameter).detach()))


def new_initial_values(module):
    module.reset_parameters()


def share_memory(module):
    module.share_memory()


def freeze_and_overwrite(module):
    module.requires_grad_(False)
    overwrite(module)


CHANGES = (
    overwrite, through_data, new_data, through_numpy, load_other, assign_other, from_vector, new_parameters,
    new_initial_values, freeze_and_overwrite, share_memory,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_new_values(pair, change):
    pair.change(change)
    pair.check()
    pair.change(overwrite)
    pair.check()


def test_swapped_tensors(pair):
    """torch.utils.swap_tensors, which stock's weak references to its parameters forbid."""
    for name, ours in pair.ours.named_parameters():
        other = noise(ours).detach()
        with torch.no_grad():
            getattr(pair.stock, name).copy_(other)
        torch.utils.swap_tensors(ours, torch.nn.Parameter(other))
    pair.check()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps(pair, name):
    """In place, some of them without a trace in the version counter; the next step sees them all."""
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in pair.modules]
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(6, 5, 7)
        for module, optimizer in zip(pair.modules, optimizers, strict=True):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
        pair.check(rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["half", "bfloat16", "double"])
def test_other_dtypes_and_back(pair, dtype):
    loose = {} if dtype == "double" else {"rtol": 0.1, "atol": 0.1}
    pair.change(lambda module: getattr(module, dtype)())
    pair.check(**loose)
    pair.change(overwrite)
    pair.check(**loose)
    pair.change(lambda module: module.float())
    pair.check()


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse"])
def test_weight_norm(pair, name):
    pair.change(lambda module: weight_norm(module, name))
    pair.check()
    with torch.no_grad():
        for module in pair.modules:
            getattr(module.parametrizations, name).original0.mul_(1.7)
    pair.check()
    pair.ours = copy.deepcopy(pair.ours)  # stock cannot
    pair.check()
    pair.change(lambda module: torch.nn.utils.parametrize.remove_parametrizations(module, name))
    pair.check()


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse"])
def test_pruning(pair, name):
    """Masks that change between calls. nn.RNNBase reads a list of its own, which pruning does not reach: the
    stock twin gets the masked weights by value."""
    ours = pair.ours
    for amount in (0.3, 0.5):
        prune.l1_unstructured(ours, name, amount=amount)
        masked = getattr(ours, name).detach()
        assert (masked == 0).sum() > 0.25 * masked.numel()
        with torch.no_grad():
            getattr(pair.stock, name).copy_(masked)
        for shape in SHAPES.values():
            x = torch.randn(shape)
            with running_on("compiled", FUNCTION[pair.cell]):
                outputs = flat(ours(x))
            for a, b in zip(outputs, flat(pair.stock(x)), strict=True):
                torch.testing.assert_close(a, b)
            grads = []
            for module, key in ((ours, name + "_orig"), (pair.stock, name)):
                grads.append(torch.autograd.grad(flat(module(x))[0].sum(), getattr(module, key))[0])
            mask = getattr(ours, name + "_mask")
            torch.testing.assert_close(grads[0], grads[1] * mask)
    prune.remove(ours, name)
    assert torch.equal(getattr(ours, name), masked)
    assert set(dict(ours.named_parameters())) == set(dict(pair.stock.named_parameters()))


def test_functional_call_with_other_weights(pair):
    """Weights that belong to no module, between calls that use the module's own."""
    x = torch.randn(6, 5, 7)
    for _ in range(2):
        weights = {k: noise(v).detach() for k, v in pair.stock.named_parameters()}
        results = [flat(torch.func.functional_call(m, weights, (x,))) for m in pair.modules]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        pair.check()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    "change", [overwrite, through_data, through_numpy, load_other], ids=lambda f: f.__name__
)
def test_cells(compiled, cell, change):
    ours, stock = (cell_class(package, cell)(7, 20) for package in (cx, torch.nn))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(1, 7)
    for _ in range(3):
        with torch.inference_mode():
            a, b = ours(x), stock(x)
        torch.testing.assert_close(a, b)
        for module in (ours, stock):
            torch.manual_seed(3)
            change(module)
