"""Parameters laid side by side: one GEMM reads them in place, and nobody else can tell."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cases import OPS
from vlm_fast.kernels._stacking import lay_side_by_side, stacked

STACKED_LINEAR = OPS["stacked_linear"]


def three_linears():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(7, out) for out in (5, 3, 4))


def packed_linears():
    linears = three_linears()
    lay_side_by_side([linear.weight for linear in linears])
    lay_side_by_side([linear.bias for linear in linears])
    return linears


def parameters_of(linears):
    return [linear.weight for linear in linears] + [linear.bias for linear in linears]


def is_view(result, first):
    return result.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def assert_stacks(linears, *, without_copy):
    for kind in ("weight", "bias"):
        tensors = [getattr(linear, kind).detach() for linear in linears]
        result = stacked(tensors)
        assert torch.equal(result, torch.cat(tensors))
        assert is_view(result, tensors[0]) == without_copy


def test_what_lies_side_by_side_is_viewed_and_the_rest_copied():
    assert_stacks(three_linears(), without_copy=False)
    assert_stacks(packed_linears(), without_copy=True)


BUFFER = torch.arange(60.0).view(10, 6)


@pytest.mark.parametrize(
    "tensors, without_copy",
    {
        "neighbours": ([BUFFER[2:4], BUFFER[4:5], BUFFER[5:9]], True),
        "one": ([BUFFER[2:4]], True),
        "an empty one between": ([BUFFER[2:4], BUFFER[4:4], BUFFER[4:6]], False),
        "a gap": ([BUFFER[:2], BUFFER[3:4]], False),
        "the wrong order": ([BUFFER[2:4], BUFFER[:2]], False),
        "the same twice": ([BUFFER[:2], BUFFER[:2]], False),
        "columns": ([BUFFER[:, :3], BUFFER[:, 3:][:, :3]], False),
        "transposed": ([BUFFER[:6].t(), BUFFER[6:].new_ones(2, 6)], False),
        "other storages": ([BUFFER[:2], BUFFER[2:4].clone()], False),
    }.values(),
)
def test_stacking_never_changes_values(tensors, without_copy):
    result = stacked(tensors)
    assert torch.equal(result, torch.cat(tensors))
    assert is_view(result, tensors[0]) == without_copy


def test_stand_ins_have_no_addresses():
    with FakeTensorMode():
        parts = list(torch.empty(5, 7).split([2, 3]))
        assert stacked(parts).shape == (5, 7)
    assert stacked(list(torch.empty(5, 7, device="meta").split([2, 3]))).is_meta


def test_packing_leaves_objects_names_and_values():
    plain, packed = three_linears(), three_linears()
    before = parameters_of(packed)
    lay_side_by_side(before[:3])
    assert all(one is other for one, other in zip(before, parameters_of(packed), strict=True))
    assert plain.state_dict().keys() == packed.state_dict().keys()
    for one, other in zip(plain.parameters(), packed.parameters(), strict=True):
        assert torch.equal(one, other) and other.is_leaf and other.is_contiguous()


def test_packing_again_moves_nothing():
    linears = packed_linears()
    addresses = [p.data_ptr() for p in linears.parameters()]
    lay_side_by_side([linear.weight for linear in linears])
    assert addresses == [p.data_ptr() for p in linears.parameters()]


class OfAnotherKind(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "change",
    {
        "another dtype": lambda linear: linear.bfloat16(),
        "another device": lambda linear: linear.to("meta"),
        "another width": lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(4, 6))),
        "a subclass": lambda linear: setattr(linear, "weight", OfAnotherKind(torch.ones(4, 7))),
    }.values(),
)
def test_what_cannot_be_packed_is_left_alone(change):
    linears = three_linears()
    change(linears[1])
    weights = [linear.weight for linear in linears]
    addresses = [w.data_ptr() for w in weights]
    lay_side_by_side(weights)
    assert addresses == [w.data_ptr() for w in weights]


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_step_is_seen_by_both(foreach):
    plain, packed = three_linears(), packed_linears()
    x = torch.randn(6, 7)
    for _ in range(2):
        for linears in (plain, packed):
            optimizer = torch.optim.AdamW(linears.parameters(), lr=0.1, foreach=foreach)
            optimizer.zero_grad()
            STACKED_LINEAR.fast(x, parameters_of(linears)).square().sum().backward()
            optimizer.step()
    assert_stacks(packed, without_copy=True)
    for one, other in zip(plain.parameters(), packed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_can_be_changed_in_place():
    """Clipping and scaling do; the gradients of one GEMM are slices of one buffer."""
    linears = packed_linears()
    STACKED_LINEAR.fast(torch.randn(6, 7), parameters_of(linears)).sum().backward()
    before = linears[1].weight.grad.clone()
    linears[0].weight.grad.zero_()
    assert all(p.grad.is_contiguous() for p in linears.parameters())
    assert torch.equal(linears[1].weight.grad, before)


def through_torch_save(linears):
    file = io.BytesIO()
    torch.save(linears.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def through_safetensors(linears):
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save(linears.state_dict()))


@pytest.mark.parametrize("write_and_read", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("target", [three_linears, packed_linears])
def test_checkpoints(write_and_read, target):
    source = packed_linears()
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(3)
    linears = target()
    linears.load_state_dict(write_and_read(source))
    assert_stacks(linears, without_copy=target is packed_linears)
    for one, other in zip(source.parameters(), linears.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_deep_copy_is_apart():
    """torch copies parameter by parameter: the twin's are no neighbours until packed again."""
    source = packed_linears()
    twin = copy.deepcopy(source)
    assert_stacks(twin, without_copy=False)
    lay_side_by_side([linear.weight for linear in twin])
    assert is_view(stacked([linear.weight for linear in twin]), twin[0].weight)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert source[0].weight.count_nonzero() == source[0].weight.numel()


def test_another_dtype_loses_the_place_and_no_values():
    linears = packed_linears().to(torch.bfloat16)
    expected = three_linears().to(torch.bfloat16)
    for one, other in zip(expected.parameters(), linears.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_stacks(linears, without_copy=False)
