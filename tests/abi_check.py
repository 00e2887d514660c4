"""One built library, several torches: the libraries of this checkout, unchanged, under another torch.

    python tests/abi_check.py [--torch torch==2.10.0]        (make abi-check)

Copies the built package to build/abi, makes a second virtual environment there with the other torch, and
runs the same calls on both sides: forward, backward, double backward, opcheck, torch.compile, torch.export.
The calls must run on the compiled kernels and give bitwise the values that they give under the torch of
this environment.

Where only a CUDA build of the other torch can be had, its CUDA packages (gigabytes, and no GPU is used here)
are left out; empty libraries of their names, made from what torch's own libraries ask for, let it load.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "abi"
WORKER = "--worker"
LEFT_OUT = ("nvidia", "cuda", "triton")  # torch's requirements that serve GPUs only


# ---- the second environment ----


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, **options)


def environment(requirement):
    """The Python of a virtual environment that holds the other torch; made once."""
    folder = FOLDER / re.sub(r"[^\w.]+", "-", requirement)
    python, done = folder / "bin" / "python", folder / "done"
    if done.exists():
        return python
    venv.create(folder, clear=True, with_pip=True)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-cache-dir")
    run(*pip, "--no-deps", requirement)
    packages = next(folder.glob("lib/python*/site-packages"))
    metadata = next(importlib.metadata.distributions(name="torch", path=[str(packages)]))
    wanted = [r for r in metadata.requires or [] if not r.startswith(LEFT_OUT) and "extra ==" not in r]
    # pip complains that what is left out is missing: shown only if it fails.
    done_pip = subprocess.run([*map(str, pip), "numpy", *wanted], capture_output=True, text=True)
    if done_pip.returncode:
        raise SystemExit(done_pip.stdout + done_pip.stderr)
    stub_libraries(packages / "torch" / "lib")
    done.touch()
    return python


def readelf(option, library):
    return run("readelf", "--wide", option, library, capture_output=True, text=True).stdout


def loads(name):
    code = f"import ctypes; ctypes.CDLL({name!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def stub(function):
    """Source of a function that fails: 100 is "no device", and the text of an error must be readable."""
    kind, value = ("const char*", '"absent"') if function.endswith(("String", "Name")) else ("long", "100")
    return f'extern "C" {kind} {function}() {{ return {value}; }}\n'


def stub_libraries(folder):
    """Puts a library of the right name and symbol versions beside torch's own for each one that is missing.

    On a CPU nothing calls their functions but the registration of kernels when torch loads, and the question
    how many GPUs there are.
    """
    libraries = sorted(folder.glob("*.so"))
    needed = {
        name for lib in libraries for name in re.findall(r"NEEDED.*\[(.*)\]", readelf("--dynamic", lib))
    }
    missing = {name for name in needed if not (folder / name).exists() and not loads(name)}
    symbols = {name: defaultdict(set) for name in missing}  # library → version → symbols
    plain, defined = set(), set()  # symbols without a version: asked for, and there
    for lib in libraries:
        files = {}  # version → the library that it is needed from
        for line in readelf("--version-info", lib).splitlines():
            if found := re.search(r"File: (\S+)", line):
                current = found[1]
            elif (found := re.search(r"Name: (\S+)\s+Flags:.*Version: (\d+)", line)) and current in missing:
                files[found[1]] = current
                symbols[current][found[1]]  # a version must exist even if none of its symbols is needed
        table = readelf("--dyn-syms", lib)
        for name, version in re.findall(r" UND (\w+)@(\S+)", table):
            if version in files:
                symbols[files[version]][version].add(name)
        plain |= set(re.findall(r"GLOBAL \w+ +UND (\w+)$", table, re.MULTILINE))
        defined |= set(re.findall(r" \d+ (\w+)(?:@@\S+)?$", table, re.MULTILINE))
    # Which library a plain symbol is asked of is not said; any one will do. Python's are Python's own.
    plain = {name for name in plain - defined if not name.startswith(("_Z", "Py", "_Py"))}
    compiler = os.environ.get("CXX", "g++").split()
    for name, versions in symbols.items():
        source, script = FOLDER / f"{name}.cpp", FOLDER / f"{name}.map"
        names = sorted(plain.union(*versions.values()))
        source.write_text("".join(stub(n) for n in names))
        script.write_text(
            "".join(f"{v} {{ {' '.join(f'{n};' for n in s)} }};\n" for v, s in versions.items())
        )
        extra = [f"-Wl,--version-script={script}"] if versions else []
        flags = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{name}"]
        run(*compiler, *flags, *extra, source, "-o", folder / name)
        plain = set()
    if missing:
        print(f"left out, with empty libraries in their place: {', '.join(sorted(missing))}")


# ---- what runs on both sides ----


def compute():
    """{name: tensor} of every call; raises where one does not run on a compiled kernel."""
    import torch

    import cnnrnn_ext as cx
    from cnnrnn_ext import info

    kernels = [row for row in info.collect()["kernels"] if row["device"] == "cpu"]
    absent = [row for row in kernels if row["dtype"] in ("float32", "float64") and not row["kernel"]]
    if absent:
        raise AssertionError(f"not compiled: {absent}")

    generator = torch.Generator().manual_seed(0)
    values = {}

    def random(*shape, dtype):
        # Through integers: how torch turns bits into normal numbers may change between its versions.
        integers = torch.randint(-(2**20), 2**20, shape, generator=generator)
        return (integers.to(dtype) / 2**20).requires_grad_()

    def record(name, call, tensors, modes):
        with cx.backend("compiled"):
            y = call(*tensors)
        outputs = list(y) if isinstance(y, tuple) else [y]
        values.update({f"{name} output {i}": t.detach() for i, t in enumerate(outputs)})
        grad_outputs = [random(*t.shape, dtype=t.dtype).detach().requires_grad_() for t in outputs]
        grads = torch.autograd.grad(outputs, tensors, grad_outputs, create_graph=True)
        values.update({f"{name} gradient {i}": g.detach() for i, g in enumerate(grads)})
        # Second derivatives come from plain PyTorch, which rounds as its version does: only that they exist.
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
        if not all(g.isfinite().all() for g in second):
            raise AssertionError(f"{name}: a second derivative is not finite")
        for mode in modes:
            torch.testing.assert_close(mode(call, tensors), tuple(t.detach() for t in outputs))

    def compiled(call, tensors):
        y = torch.compile(call, fullgraph=True)(*tensors)
        return y if isinstance(y, tuple) else (y,)

    def exported(call, tensors):
        class Exported(torch.nn.Module):
            def forward(self, *inputs):
                return call(*inputs)

        inputs = tuple(t.detach() for t in tensors)
        y = torch.export.export(Exported(), inputs).module()(*inputs)
        return y if isinstance(y, tuple) else (y,)

    operators = torch.ops.cnnrnn_ext
    for dtype in (torch.float32, torch.float64):
        modes = (compiled, exported) if dtype == torch.float32 else ()

        x, weight, bias = (random(*s, dtype=dtype) for s in ((3, 5, 11, 9), (7, 5, 3, 3), (7,)))
        record(f"conv_pool2d {dtype}", cx.functional.conv_pool2d, (x, weight, bias), modes)
        config = ([1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False)
        torch.library.opcheck(operators.conv_pool2d_train.default, (x, weight, bias, *config))

        for cell, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1)):
            rows, name = gates * 8, cell.removesuffix("_tanh")
            states = [(3, 8)] * (2 if cell == "lstm" else 1)
            shapes = ((6, 3, 5), *((1, *s) for s in states), (rows, 5), (rows, 8), (rows,), (rows,))
            tensors = tuple(random(*s, dtype=dtype) for s in shapes)
            count = 1 + len(states)

            def split(tensors, count=count):
                x, *states = tensors[:count]
                return x, tuple(states) if count == 3 else states[0], tensors[count:]

            def sequence(*tensors, name=name, split=split):
                output, states = getattr(cx.functional, name)(*split(tensors))
                return output, *(states if isinstance(states, tuple) else (states,))

            def step(*tensors, name=name, split=split):
                x, hx, weights = split(tensors)
                return getattr(cx.functional, name + "_cell")(x, hx, *weights)

            record(f"{name} {dtype}", sequence, tensors, modes)
            given = (*tensors[:count], None)[:3]
            weights = ([t] for t in tensors[count:])
            torch.library.opcheck(operators.rnn_train.default, (cell, *given, *weights, None, None, None))

            tensors = (*(t[0] for t in tensors[:count]), *tensors[count:])
            tensors = tuple(t.detach().requires_grad_() for t in tensors)
            record(f"{name}_cell {dtype}", step, tensors, modes)
            given = (*tensors[:count], None)[:3]
            torch.library.opcheck(operators.rnn_cell_train.default, (cell, *given, *tensors[count:]))
    return values


def worker(mode, path):
    import torch

    torch.set_num_threads(2)
    values = compute()
    print(f"torch {torch.__version__}: forward, backward, double backward, opcheck, compile, export run")
    if mode == "save":
        torch.save(values, path)
        return
    saved = torch.load(path)
    if saved.keys() != values.keys():
        raise SystemExit(f"other calls than saved: {sorted(saved.keys() ^ values.keys())}")
    wrong = [name for name in saved if not torch.equal(saved[name], values[name])]
    for name in wrong:
        print(f"  {name}: differs by up to {(saved[name] - values[name]).abs().max():.3g}")
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(saved)} tensors differ")
    print(f"torch {torch.__version__}: all {len(saved)} outputs and gradients are bitwise equal to the saved")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch==2.10.0", help="pip requirement; default %(default)s")
    parser.add_argument("--remove", action="store_true", help="remove the other torch afterwards")
    parser.add_argument(WORKER, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)

    package = FOLDER / "package" / "cnnrnn_ext"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "cnnrnn_ext", package, ignore=shutil.ignore_patterns("__pycache__"))
    if not (package / "_ops_cpu.so").exists():
        raise SystemExit("_ops_cpu.so is not built: make test builds it")
    print(f"built: {', '.join(sorted(path.name for path in package.glob('*.so')))}", flush=True)

    python = environment(arguments.torch)
    settings = {**os.environ, "PYTHONPATH": str(package.parent), "CNNRNN_REQUIRE_EXT": "1"}
    script, values = Path(__file__).resolve(), FOLDER / "values.pt"
    for side, mode in ((sys.executable, "save"), (python, "compare")):
        run(side, script, WORKER, mode, values, cwd=FOLDER, env=settings)
    if arguments.remove:
        shutil.rmtree(python.parents[1])
    return None


if __name__ == "__main__":
    sys.exit(main())
