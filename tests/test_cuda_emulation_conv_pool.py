"""conv_pool on CUDA, host file and kernels, run on the CPU: see test_cuda_emulation.py."""

from dataclasses import replace

import _cuda_cases as cases
import pytest
import torch
from _emulation import NO_SHARED_MEMORY, SM_80, check_every_barrier_is_needed


@pytest.fixture
def library(emulation):
    return emulation


@pytest.fixture
def ops(emulated):
    return emulated


def _multi_chunk(ops):
    """Runs every kernel that has barriers, so that each of its loops goes round at least twice."""
    conv = [
        cases.Conv((2, 9, 24, 24), 3),
        cases.Conv((1, 9, 24, 24), 3, activation="silu"),
        cases.Conv((2, 9, 24, 24), 3, ceil_mode=True, pool=(3, 3)),
        cases.Conv((1, 9, 20, 21), 4, (5, 5), padding=(2, 2), pool=(3, 3)),
    ]
    tensor = [
        cases.Conv((1, 40, 4, 18), 40),
        cases.Conv((1, 9, 8, 8), 9, activation="silu"),
        cases.Conv((1, 3, 4, 18), 8),
        cases.Conv((1, 3, 8, 8), 9, activation="silu"),
        cases.Conv((1, 9, 12, 17), 9, (2, 2), padding=(0, 0), activation="silu"),
        cases.Conv((1, 3, 9, 16), 9, (5, 5), pool=(3, 3)),
    ]
    for case, dtype in [*((c, torch.float32) for c in conv), *((c, torch.float16) for c in tensor)]:
        x, weight, bias, grad_y = case.draw(cases.small_integers)
        cases.run_conv(ops, "cpu", case, dtype, x, weight, bias, grad_y)


def test_every_barrier_is_needed(library, ops):
    """Without any one of the kernels' barriers the emulator reports a violation."""
    check_every_barrier_is_needed(library, lambda: _multi_chunk(ops), at_least=20)


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CONVS.values(), ids=cases.CONVS)
def test_conv_pool_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cpu", case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in cases.GATHERED_CONVS if name != "groups"])  # 3x3 kernel's
def test_conv_pool_direct_exact_on_integers(library, ops, name, dtype):
    """Sums in registers, but for so few outputs that most of them would be idle."""
    library.emulator_seen_barriers()
    cases.check_conv_exact(ops, "cpu", cases.GATHERED_CONVS[name], dtype)
    ran = "conv_pool_direct.cuh" in library.emulator_seen_barriers().decode()
    assert ran == ((name, dtype) != ("odd_groups", torch.float32))


@pytest.mark.parametrize("name", ["five_strided", "stem", "overlapping", "odd_groups", "sequences", "gaps"])
def test_conv_pool_direct_from_memory(library, ops, name):
    """Where no tile fits into shared memory."""
    library.emulator_device(*NO_SHARED_MEMORY)
    library.emulator_seen_barriers()
    cases.check_conv_exact(ops, "cpu", cases.GATHERED_CONVS[name], torch.float32)
    assert "conv_pool_direct.cuh" not in library.emulator_seen_barriers().decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["one_by_one", "five_strided", "stem_nhwc", "dilated", "long_kernel"])
def test_conv_pool_direct_is_as_good_as_torch(ops, name, dtype):
    case = cases.GATHERED_CONVS[name]
    x, weight, bias, grad_y = case.draw(cases.normal)
    y = cases.run_conv(ops, "cpu", case, dtype, x, weight, bias, grad_y)[0]
    theirs = case.oracle(*(t.to(dtype) for t in (x, weight, bias)))
    cases.assert_as_good([y], [theirs], [case.oracle(x, weight, bias)])


TENSOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the last as TF32


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.TENSOR_CONVS.values(), ids=cases.TENSOR_CONVS)
def test_conv_pool_tensor_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cpu", case, dtype, "high")


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.GATHERED_CONVS.values(), ids=cases.GATHERED_CONVS)
def test_conv_pool_gathered_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cpu", case, dtype, "high")


@pytest.mark.parametrize("case", ["five_strided", "stem", "overlapping", "groups"])
def test_conv_pool_gathered_on_sm_80(library, ops, case):
    """Less shared memory: other rectangles, the same results."""
    library.emulator_device(*SM_80)
    cases.check_conv_exact(ops, "cpu", cases.GATHERED_CONVS[case], torch.float16)


@pytest.mark.parametrize("layout", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", ["five_strided", "stem", "overlapping", "odd_groups", "sequences"])
def test_conv_pool_gathered_layouts(ops, case, layout):
    case = replace(cases.GATHERED_CONVS[case], channels_last=layout)
    cases.check_conv_exact(ops, "cpu", case, torch.bfloat16)


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("channels", [3, 9])
@pytest.mark.parametrize("pool", [(2, 2), (3, 3)], ids=["in registers", "in shared memory"])
def test_conv_pool_gathered_activations(ops, pool, channels, activation, dtype):
    case = cases.Conv((1, channels, 9, 12), 17, (2, 2), activation=activation, pool=pool)
    cases.check_conv_activation(ops, "cpu", case, dtype, "high")


@pytest.mark.parametrize("channels", [1, 3, 9])
@pytest.mark.parametrize("pool", [(2, 2), (3, 3)], ids=["in registers", "in shared memory"])
def test_conv_pool_gathered_nan_and_infinity(ops, pool, channels):
    cases.check_conv_nan(ops, "cpu", cases.Conv((2, channels, 13, 12), 3, (3, 2), pool=pool), torch.float16)


def test_conv_pool_gathered_without_room_for_few_channels(ops):
    """A dilation whose pixels do not fit into shared memory: x is packed in units."""
    case = cases.Conv((1, 2, 90, 91), 5, dilation=(80, 80), padding=(40, 40), pool=(3, 3))
    cases.check_conv_exact(ops, "cpu", case, torch.float16)


def test_conv_pool_channels_of_a_larger_tensor(ops):
    """Whole units of 16 bytes may lie beyond what x has: nobody reads them, nor what stands there."""
    case = cases.Conv((2, 6, 9, 8), 4, (5, 5), padding=(2, 2))
    x, weight, bias, grad_y = case.draw(cases.small_integers)
    base = cases.run_conv(ops, "cpu", case, torch.float16, x, weight, bias, grad_y)
    wide = torch.full((2, 9, 8, 8), float("nan"), dtype=torch.float16).permute(0, 3, 1, 2)[:, :6].copy_(x)
    for other in (case, replace(case, kernel=(3, 3), padding=(1, 1))):
        if other is not case:
            weight = weight[..., :3, :3].contiguous()
            base = cases.run_conv(ops, "cpu", other, torch.float16, x, weight, bias, grad_y)
        for got, want in zip(
            cases.run_conv(ops, "cpu", other, torch.float16, wide, weight, bias, grad_y), base, strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [3, 9])
def test_conv_pool_tensor_activations(ops, channels, activation, channels_last, dtype):
    case = cases.Conv((1, channels, 9, 12), 17, activation=activation, channels_last=channels_last)
    cases.check_conv_activation(ops, "cpu", case, dtype, "high")


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("case", cases.ACTIVATED.values(), ids=cases.ACTIVATED)
def test_conv_pool_activations(ops, case, activation, dtype):
    cases.check_conv_activation(ops, "cpu", replace(case, activation=activation), dtype)


@pytest.mark.parametrize("activation", ["none", "relu", *cases.ACTIVATIONS])
@pytest.mark.parametrize("case", [n for n, case in cases.ACTIVATED.items() if case.kind == "max"])
def test_conv_pool_indices(ops, case, activation):
    cases.check_conv_indices(ops, "cpu", replace(cases.ACTIVATED[case], activation=activation))


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("pool", [(2, 2), (3, 3)], ids=["3x3 kernel", "general kernel"])
def test_conv_pool_nan_and_infinity(ops, activation, pool):
    cases.check_conv_nan(ops, "cpu", cases.Conv((2, 2, 13, 12), 3, activation=activation, pool=pool))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_conv_pool_tensor_nan_and_infinity(ops, channels):
    """What a fragment holds beyond its operands is multiplied by zero, and must be no infinity."""
    cases.check_conv_nan(ops, "cpu", cases.Conv((2, channels, 13, 12), 3), torch.float16)


@pytest.mark.parametrize("case", ["odd", "overlapping_pool"])
def test_conv_pool_random(ops, case):
    case = cases.CONVS[case]
    x, weight, bias, grad_y = case.draw(cases.normal)
    y_got, _, *grads = cases.run_conv(ops, "cpu", case, torch.float64, x, weight, bias, grad_y)
    y = case.oracle(*(t.requires_grad_() for t in (x, weight, bias)))
    expected = (y, *cases.gradients(y, grad_y, (x, weight, bias)))
    for got, want in zip((y_got, *grads), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_conv_pool_any_strides(ops):
    case = cases.Conv((2, 3, 9, 8), 4)
    x, weight, bias, grad_y = case.draw(cases.small_integers)
    base = cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, grad_y)
    spread = torch.zeros(2, 3, 18, 16, dtype=torch.float64)[:, :, ::2, ::2].copy_(x)
    turned = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    expanded = grad_y[:, :1, :1, :1].expand_as(grad_y)
    got = cases.run_conv(ops, "cpu", case, torch.float32, spread, turned, bias, grad_y)
    for ours, want in zip(got, base, strict=True):
        assert torch.equal(ours, want)
    sums = cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, expanded)
    dense = cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, expanded.contiguous())
    for ours, want in zip(sums, dense, strict=True):
        assert torch.equal(ours, want)


def test_conv_pool_empty_batch(ops):
    case = cases.Conv((0, 3, 9, 8), 4)
    y, code, grad_x, grad_weight, grad_bias = cases.run_conv(
        ops, "cpu", case, torch.float32, *case.draw(cases.normal)
    )
    assert y.shape == code.shape == (0, 4, 4, 4)
    assert grad_x.shape == (0, 3, 9, 8)
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="tan"), "activation: expected 'none' or the name of an activation, got 'tan'"),
        (dict(kind="min"), "pool: the CUDA kernels cover 'max' and 'avg', got 'min'"),
        (dict(pool=(16, 16)), "pool_size: expected at most 255 positions, got 16x16"),
        (dict(padding=(-1, 0)), "padding: expected at least 0, got -1"),
        (dict(stride=(1, 0)), "stride: expected at least 1, got 0"),
        (dict(groups=2), "groups: expected a divisor of 3"),
        (dict(dilation=(9, 9)), "the kernel .19 with dilation. is larger than the padded input"),
        (dict(pool_padding=(2, 2)), "pool_padding: expected at most half"),
    ],
)
def test_conv_pool_refuses(ops, change, message):
    case = cases.Conv((1, 3, 9, 8), 4, **change)
    with pytest.raises(RuntimeError, match=message):
        ops.conv_pool2d(torch.zeros(1, 3, 9, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4), *case.arguments)


def test_conv_pool_refuses_shapes(ops):
    arguments = cases.Conv((1, 3, 9, 8), 4).arguments
    x, weight, bias = torch.zeros(1, 3, 9, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"x: expected shape \[N, C, H, W\], got \[3, 9, 8\]"):
        ops.conv_pool2d(x[0], weight, bias, *arguments)
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[4, 3, 3, 3\], got \[4, 2, 3, 3\]"):
        ops.conv_pool2d(x, weight[:, :2], bias, *arguments)
    with pytest.raises(RuntimeError, match="weight and x must have the same dtype"):
        ops.conv_pool2d(x, weight.double(), bias, *arguments)
    with pytest.raises(RuntimeError, match="take float32, float64, float16 and bfloat16, got Int"):
        ops.conv_pool2d(x.int(), weight.int(), bias.int(), *arguments)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["stem", "five_strided", "odd_groups", "many_columns"])
def test_conv_pool_does_not_depend_on_the_schedule(library, ops, case, dtype, seed):
    """Sums of random numbers come out the same, bit for bit, in any order of warps and blocks."""
    torch.manual_seed(0)
    case = cases.GATHERED_CONVS[case]
    drawn = case.draw(cases.normal)
    first = cases.run_conv(ops, "cpu", case, dtype, *drawn, "high")
    library.emulator_seed(1 + seed)
    for a, b in zip(first, cases.run_conv(ops, "cpu", case, dtype, *drawn, "high"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["stem", "five_strided", "overlapping"])
def test_conv_pool_tf32_backward_is_tf32(ops, case):
    """Gradients of "highest" are nearer to those of float64 than those of rounded operands."""
    case = cases.GATHERED_CONVS[case]
    x, weight, bias, grad_y = case.draw(cases.normal)
    y = case.oracle(*(t.requires_grad_() for t in (x, weight, bias)))
    want = cases.gradients(y, grad_y, (x, weight))
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    exact, high = (
        cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, grad_y, precision)[2:4]
        for precision in ("highest", "high")
    )
    for fine, coarse, oracle in zip(exact, high, want, strict=True):
        units = oracle.abs().max().item() * 2.0**-11
        assert cases.error(fine, oracle) < 0.01 * units
        assert 0.05 * units < cases.error(coarse, oracle)


# ---- the experiment with sparse products ----


def test_sparse_fragments(library):
    """D = A B where A has one element in every four, by primitives_sparse.cuh."""
    place = torch.randint(4, (16, 8))
    a = (torch.nn.functional.one_hot(place, 4) * torch.randint(-9, 10, (16, 8, 1))).view(16, 32).half()
    b = torch.randint(-9, 10, (8, 32)).half()
    d = torch.full((16, 8), float("nan"))
    assert not library.run_fragments(4, a.data_ptr(), b.data_ptr(), d.data_ptr(), False)
    assert torch.equal(d, a.float() @ b.float().T)


SPARSE = {
    "chunks": cases.TENSOR_CONVS["chunks"],
    "chunks_nhwc": cases.TENSOR_CONVS["chunks_nhwc"],
    "tiles": cases.TENSOR_CONVS["tiles"],
    "no_activation": replace(cases.TENSOR_CONVS["tiles_nhwc"], activation="none"),
    "beyond_the_edge": cases.Conv((2, 9, 13, 21), 70, activation="none", ceil_mode=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SPARSE.values(), ids=SPARSE)
def test_sparse_weight_gradient_is_exact_on_integers(ops, monkeypatch, case, dtype):
    monkeypatch.setenv("CNNRNN_SPARSE_GRAD_WEIGHT", "1")
    cases.check_conv_exact(ops, "cpu", case, dtype)


def test_sparse_weight_gradient_is_only_on_demand(ops, monkeypatch):
    """The two sum in different orders: random numbers tell which one ran, and both are near."""
    case = cases.TENSOR_CONVS["chunks"]
    drawn = case.draw(cases.normal)
    dense = cases.run_conv(ops, "cpu", case, torch.float16, *drawn)[3]
    assert torch.equal(dense, cases.run_conv(ops, "cpu", case, torch.float16, *drawn)[3])
    monkeypatch.setenv("CNNRNN_SPARSE_GRAD_WEIGHT", "1")
    sparse = cases.run_conv(ops, "cpu", case, torch.float16, *drawn)[3]
    assert not torch.equal(dense, sparse)
    torch.testing.assert_close(sparse, dense, rtol=2e-3, atol=2e-2)
