"""Products of Hopper's tensor cores run side by side, and no copy overwrites what they read."""

import re

import pytest
import torch

pytest.importorskip("triton")

from vlm_fast.devtools import ahead_of_time, sass
from vlm_fast.kernels._nearest_tokens import nearest_kernel
from vlm_fast.ops.declaration import OPS

COPY = re.compile(r"async_copy_global_to_local %[\w#]+, (%\w+)")
INDEX = re.compile(r"(%\w+) = ttg\.memdesc_index (%\w+)\[")
VIEW = re.compile(r"(%\w+) = ttg\.memdesc_(?:trans|subslice|reshape|reinterpret)\w* (%\w+)")
ALLOCATION = re.compile(r"(%\w+) = ttg\.local_alloc : .*memdesc<(\d+)x\d+x\d+x")
PRODUCT = re.compile(r"warp_group_dot (%[\w#]+), (%[\w#]+), ")
WAIT = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")


def overwritten(ttgir):
    """Buffers that a loop copies into while a product that reads them may be pending.

    Copies run ahead of products by as many steps as there are copies before the loop. With no more
    buffers than that, a step copies into the buffer that its own product reads.
    """
    lines = ttgir.splitlines()
    buffers = {m[1]: int(m[2]) for line in lines if (m := ALLOCATION.search(line))}
    found = []
    for start, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = len(line) - len(line.lstrip())
        end = next(i for i in range(start + 1, len(lines)) if lines[i][: indent + 1].strip() == "}")
        body = lines[start + 1 : end]
        if any("scf.for" in inner for inner in body):
            continue
        of = {m[1]: m[2] for inner in body if (m := INDEX.search(inner))}
        for inner in body:
            if (m := VIEW.search(inner)) and m[2] in of:
                of[m[1]] = of[m[2]]
        before = {m[1]: m[2] for outer in lines[:start] if (m := INDEX.search(outer))}
        copied = [before.get(m[1]) for outer in lines[:start] if (m := COPY.search(outer))]
        for i, inner in enumerate(body):
            for factor in m.groups() if (m := PRODUCT.search(inner)) else ():
                buffer = of.get(factor)
                later = body[i + 1 :]
                copies = [
                    j
                    for j, x in enumerate(later)
                    if (m := COPY.search(x)) and of.get(m[1]) == buffer
                ]
                if buffer is None or not copies or buffers[buffer] > copied.count(buffer):
                    continue
                later = later[: copies[0]]
                newer = sum("warp_group_dot " in x for x in later)
                if min((int(m[1]) for x in later if (m := WAIT.search(x))), default=99) > newer:
                    found.append(buffer)
    return found


def matching_build(size):
    shape = {"batch": size, "tokens": 577, "features": 1024, "r": 288, "protected": 1}
    launches = ahead_of_time.launches_at(OPS["bipartite_match"], shape, torch.bfloat16)
    (launch,) = (launch for launch in launches if launch.kernel is nearest_kernel)
    return ahead_of_time.build_of(launch, "sm_90", launch.config).compile().asm["ttgir"]


def test_token_matching_copies_over_no_pending_product():
    ttgir = matching_build(64)
    assert PRODUCT.search(ttgir) and COPY.search(ttgir)
    assert overwritten(ttgir) == []


@pytest.mark.slow
def test_no_kernel_copies_over_a_pending_product(builds):
    listings = {str(build): build.compile().asm["ttgir"] for build in builds}
    assert sum(bool(PRODUCT.search(ttgir)) for ttgir in listings.values()) > 20
    assert {name: bad for name, ttgir in listings.items() if (bad := overwritten(ttgir))} == {}


@pytest.mark.slow
def test_products_do_not_wait_one_for_another(builds, monkeypatch):
    """ptxas runs each wgmma alone if, for example, a factor is changed between load and product."""
    kinds = {"products": r"\bHGMMA\b", "waits": r"\bWARPGROUP\.DEPBAR\b"}
    monkeypatch.setattr(sass, "NVIDIA", {kind: re.compile(x) for kind, x in kinds.items()})
    counts = sass.inspect([build.compile().asm for build in builds], "sm_90")
    found = dict(zip(map(str, builds), counts, strict=True))
    many = {name: c for name, c in found.items() if c["products"] >= 12}
    assert len(many) > 20
    assert {name: c for name, c in many.items() if 2 * c["waits"] > c["products"]} == {}


def test_a_pending_product_is_found():
    ttgir = matching_build(64)
    assert overwritten(re.sub(r"pendings = 0", "pendings = 1", ttgir))
