"""Every kernel, compiled once for all tests."""

import functools
import hashlib
import importlib
from pathlib import Path

import pytest

import vlm_fast.kernels
from vlm_fast.kernels._triton import AVAILABLE, triton

if AVAILABLE:
    from vlm_fast.devtools import ahead_of_time

for path in vlm_fast.kernels.__path__:
    for file in Path(path).glob("[!_]*.py"):
        importlib.import_module(f"vlm_fast.kernels.{file.stem}")


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def cache_of_these_sources():
    """A cache of Triton for exactly these kernels: it serves no binary of other code."""
    sources = sorted(Path(vlm_fast.kernels.__path__[0]).glob("*.py"))
    content = b"".join(source.read_bytes() for source in sources)
    digest = hashlib.sha256(triton.__version__.encode() + content)
    place = Path(__file__).resolve().parents[2] / ".cache" / "triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(place / digest.hexdigest()[:16]))
        yield


@pytest.fixture(scope="module")
def compiled(cache_of_these_sources):
    """A function that compiles every kernel with every config for an architecture."""
    return functools.cache(lambda arch: ahead_of_time.compile_all([arch], thorough=False))


@pytest.fixture(scope="module")
def builds(compiled):
    compiled("sm_90")  # in parallel; the calls below find the results in the cache
    found = list(ahead_of_time.builds(["sm_90"], thorough=False))
    enough = {b.kernel for b in found if b.signature.startswith("q bf16")}  # of attention
    return [b for b in found if not (b.kernel in enough and b.signature.startswith("q fp32"))]
