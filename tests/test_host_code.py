"""The host's code of a call avoids conveniences of Python that cost more than a launch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for folder in ("kernels", "vlm_fast/ops") for p in (ROOT / folder).rglob("*.py"))
# A place that is reached by symbolic sizes or wrong calls only.
EXEMPT = {
    ("_sizes.py", "triton.next_power_of_2"): "of a symbolic integer",
    ("op_arguments.py", "self.__signature__.bind"): "words the error of a wrong call",
}
SLOW = {  # the calls' name, and what serves in their place
    "triton.cdiv": "_sizes.cdiv: 2 us less",
    "triton.next_power_of_2": "_sizes.next_power_of_2: 2 us less",
    "torch.cuda.current_stream": "torch._C._cuda_getCurrentRawStream: 4 us less",
    "bind": "positions that are known: 11 us less",
    "dataclasses.replace": "a dict or a new object: 4 us less",
}
SIZES = {"view", "new_empty", "new_zeros", "empty"}  # of a torch.Size: 1 us more than of integers


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def calls(tree):
    """The calls of a file outside kernels, which are compiled."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and is_kernel(node):
            continue
        if isinstance(node, ast.Call):
            yield node
        yield from calls(node)


def faults(path):
    for call in calls(ast.parse(path.read_text())):
        name = ast.unparse(call.func)
        last = name.split(".")[-1]
        for slow, instead in SLOW.items():
            matches = name == slow or ("." not in slow and last == slow)
            if matches and (path.name, name) not in EXEMPT:
                yield f"{path.name}:{call.lineno}: {name}; {instead}"
        sole = call.args[0] if len(call.args) == 1 else None
        if last in SIZES and isinstance(sole, ast.Attribute) and sole.attr == "shape":
            yield f"{path.name}:{call.lineno}: {ast.unparse(call)} of a Size, not of integers"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_calls_on_the_host_are_cheap(path):
    assert not list(faults(path))


def test_faults_are_found(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(
        "def host(x, n):\n    triton.cdiv(n, 2); x.view(x.shape); sig.bind(x); x.new_empty(n, 2)\n"
        "@triton.jit\ndef kernel(x):\n    triton.cdiv(x, 2)\n"
    )
    assert len(list(faults(file))) == 3
