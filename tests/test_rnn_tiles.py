"""The recurrent kernels' own source for 512-bit vectors, run on any machine, against plain loops."""

from _kernel_program import run_kernel_program


def test_tiles_of_512_bits(compiled, tmp_path):
    """Every cell and product: each tile height, whole and partial panels, packed, direct, narrow weights.

    Optimisation off: two thirds of the time go into compiling. rnn_tiles.cpp has its own oracle and counts.
    """
    defines = ["-DCNNRNN_EMULATE_512", "-DCNNRNN_EMULATE_AMX"]
    vector, checks = run_kernel_program("rnn_tiles", tmp_path, defines)
    assert vector == 64
    assert checks > 10**6
