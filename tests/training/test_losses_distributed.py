"""Training losses on 1 to 4 gloo ranks: values, gradients and communicated bytes."""

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import vlm_fast
from tests.support import reference_losses, tiny_blip2
from tests.support.dispatch_modes import LargestResult
from tests.support.distributed_helpers import on_ranks
from vlm_fast.training import losses
from vlm_fast.training.losses import blip2_stage1, rank_exchange
from vlm_fast.training.losses.cross_entropy import LOGITS_AT_ONCE

BATCH, QUERIES, WIDTH = 3, 5, 8
MIXED_DTYPES = [
    [torch.bfloat16, torch.float16], [torch.float32, torch.float64],
    [torch.float32, torch.bfloat16],
]  # fmt: skip


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, WIDTH), nn.Linear(4, WIDTH)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, images, texts):
        features = (self.image(images), self.text(texts))
        return *(F.normalize(x, dim=-1) for x in features), self.temperature


def averaged_gradients(loss, parameters, world):
    """Gradients averaged over ranks, as by DistributedDataParallel."""
    gradients = list(torch.autograd.grad(loss, parameters))
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gradient / world for gradient in gradients]


def itc_loss_matches_one_process(rank, world, local_loss, smoothing, dtype):
    torch.manual_seed(0)
    towers = Towers().to(dtype)
    images = torch.randn(world * BATCH, QUERIES, 6, dtype=dtype)
    texts = torch.randn(world * BATCH, 4, dtype=dtype)
    expected, logits = reference_losses.itc(*towers(images, texts), smoothing)
    wanted = torch.autograd.grad(expected, list(towers.parameters()))

    own = slice(rank * BATCH, (rank + 1) * BATCH)
    with vlm_fast.disabled() if dtype == torch.float64 else vlm_fast.strict():
        loss, i2t, t2i = losses.itc_loss(
            *towers(images[own], texts[own]), label_smoothing=smoothing, local_loss=local_loss
        )
    torch.testing.assert_close(i2t, logits[own])
    torch.testing.assert_close(t2i, logits.t()[own])
    found = averaged_gradients(loss, list(towers.parameters()), world)
    for gradient, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, exact)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / world, expected.detach())
    if not local_loss:
        torch.testing.assert_close(loss, expected)


def itc_loss_under_ddp(rank, world):
    """Uses DistributedDataParallel itself."""
    torch.manual_seed(0)
    plain = Towers()
    images, texts = torch.randn(world * BATCH, QUERIES, 6), torch.randn(world * BATCH, 4)
    expected, _ = reference_losses.itc(*plain(images, texts))
    wanted = torch.autograd.grad(expected, list(plain.parameters()))
    wrapped = nn.parallel.DistributedDataParallel(plain)
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    losses.itc_loss(*wrapped(images[own], texts[own])).loss.backward()
    for parameter, exact in zip(plain.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, exact)


def exchange_rows_returns_the_requested_rows(rank, world):
    torch.manual_seed(1)
    whole = torch.randn(world * BATCH, 4, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(world, 7, 4, 2, dtype=torch.float64)
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    choices = {
        "random": torch.randint(world * BATCH, (world, 7)),
        "own": torch.arange(world)[:, None] * BATCH + torch.randint(BATCH, (world, 7)),
        "one row for all": torch.full((world, 7), world * BATCH - 1),
        "the next rank's": (torch.arange(world)[:, None] + 1) % world * BATCH + torch.arange(7) % 2,
    }
    for rows in choices.values():
        (wanted,) = torch.autograd.grad((whole[rows] * weights).sum(), whole)
        tensor = whole[own].detach().requires_grad_()
        found = losses.exchange_rows(tensor, rows[rank])
        assert torch.equal(found, whole[rows[rank]])
        (gradient,) = torch.autograd.grad((found * weights[rank]).sum(), tensor)
        torch.testing.assert_close(gradient, wanted[own])
        numbers = torch.arange(world * BATCH)[own]
        assert torch.equal(losses.exchange_rows(numbers, rows[rank]), rows[rank])


def exchange_rows_sends_only_requested_rows(rank, world):
    sent = []
    transport = dist.all_to_all_single
    dist.all_to_all_single = lambda out, tensor, *args, **options: (
        sent.append(len(tensor)), transport(out, tensor, *args, **options)
    )  # fmt: skip
    try:
        last = world * BATCH - 1
        losses.exchange_rows(torch.randn(BATCH, 2), torch.tensor([last, rank * BATCH]))
    finally:
        dist.all_to_all_single = transport
    assert sent == ([] if world == 1 else [world - 1 if rank == world - 1 else 0])


def out_of_range_rows_raise_on_all_ranks(rank, world):
    if world > 1:
        for wrong in (-1, world * BATCH):
            rows = torch.tensor([0, wrong if rank == 0 else 1])
            with pytest.raises(ValueError, match=rf"exchange_rows: rows .* {world * BATCH - 1}"):
                losses.exchange_rows(torch.randn(BATCH, 2), rows)


def uneven_sizes_raise_on_all_ranks(rank, world):
    if world == 1:
        return
    sizes = [1] * (world - 1) + [2]
    for batch in (sizes, [0, *sizes[1:]]):
        features = torch.randn(batch[rank], QUERIES, 4), torch.randn(batch[rank], 4)
        with pytest.raises(ValueError) as error:
            losses.itc_loss(*features, 0.1)
        assert f"batch is {batch} on ranks 0 to {world - 1}" in str(error.value)
    queries = QUERIES + rank
    with pytest.raises(ValueError, match="queries is"):
        losses.itc_loss(torch.randn(2, queries, 4), torch.randn(2, 4), 0.1)
    model, head, *batch = tiny_blip2.parts(2, tokens=6 + rank)
    lengths = re.escape(str([6 + r for r in range(world)]))
    with pytest.raises(ValueError, match=rf"stage1_loss: text tokens is {lengths} on ranks"):
        losses.stage1_loss(model, *batch, lm_head=head, bos_token_id=60)


def mixed_dtypes_raise_on_all_ranks(rank, world):
    """One rank uses autocast or another model dtype, so its bytes would be misread."""
    if world == 1:
        return
    for first, other in MIXED_DTYPES:
        dtype = other if rank else first
        named = re.escape(str([first] + [other] * (world - 1)))
        features = torch.ones(2, QUERIES, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype)
        with vlm_fast.disabled():  # which serves all of them
            for local in (True, False):
                with pytest.raises(ValueError, match=rf"itc_loss: dtype is {named} on ranks"):
                    losses.itc_loss(*features, 0.1, local_loss=local)
            with pytest.raises(ValueError, match=rf"exchange_rows: dtype of tensor is {named}"):
                losses.exchange_rows(features[1], torch.tensor([0, 2]))
        model, head, images, *texts = tiny_blip2.parts(2)
        for module in (model.vision_projection, model.text_projection):
            module.to(dtype)
        with pytest.raises(ValueError, match=rf"stage1_loss: dtype of image features is {named}"):
            losses.stage1_loss(model, images, *texts, lm_head=head, bos_token_id=60)
    with pytest.raises(ValueError, match="exchange_rows: rows of tensor is"):
        losses.exchange_rows(torch.ones(2 + rank, 4), torch.tensor([0, 1]))
    model, head, images, *texts = tiny_blip2.parts(2)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=rank > 0),
        pytest.raises(ValueError, match="stage1_loss: dtype of image features is"),
    ):
        losses.stage1_loss(model, images, *texts, lm_head=head, bos_token_id=60)


def gradient_penalty_crosses_ranks(rank, world):
    whole = [x.double() for x in siglip_features(world * BATCH)]
    images, texts = (x.detach().requires_grad_() for x in whole)
    loss = reference_losses.itc(images[:, None], texts, 0.5)[0]
    penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, [images, texts],
                                                               create_graph=True))  # fmt: skip
    wanted = torch.autograd.grad(penalty, [images, texts])
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    for local in (True, False):
        inputs = [x[own].detach().requires_grad_() for x in whole]
        with vlm_fast.disabled():
            loss = losses.itc_loss(inputs[0][:, None], inputs[1], 0.5, local_loss=local).loss
            first = torch.autograd.grad(loss, inputs, create_graph=True)
        # Each rank's loss has its share of the mean; penalties of ranks are added.
        found = torch.autograd.grad(sum((g / world).square().sum() for g in first), inputs)
        for gradient, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, exact[own])


def size_check_can_be_disabled(rank, world):
    features = torch.randn(2, QUERIES, 4), torch.randn(2, 4)
    gathered = []
    gather = rank_exchange._all_gather
    rank_exchange._all_gather = lambda tensor, *rest: (
        gathered.append(tensor) or gather(tensor, *rest)
    )
    try:
        losses.itc_loss(*features, 0.1)
        losses.itc_loss(*features, 0.1, check_sizes=False)
        losses.siglip_loss(*siglip_features(2), 10.0, -10.0)
        losses.siglip_loss(*siglip_features(2), 10.0, -10.0, check_sizes=False)
    finally:
        rank_exchange._all_gather = gather
    checks = [t for t in gathered if t.dtype == torch.int64]
    assert (len(checks), len(gathered)) == ((0, 0) if world == 1 else (2, 4))


def siglip_features(batch, dtype=torch.float32):
    torch.manual_seed(3)
    features = torch.randn(2, batch, WIDTH).to(dtype)
    return [F.normalize(x, dim=-1).requires_grad_() for x in features]


def siglip_loss_matches_one_process(rank, world, batches, dtype):
    """Also if ranks have different numbers of rows and loss weights."""
    batches = batches[:world]
    features = siglip_features(sum(batches), dtype)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -6.0)]
    exact = [*(x.detach().double().requires_grad_() for x in features), *numbers]
    loss_per_image = reference_losses.siglip_per_image(*exact)
    weights = torch.arange(1.0, world + 1, dtype=torch.float64)
    loss = (loss_per_image * weights.repeat_interleave(torch.tensor(batches))).mean()
    wanted = torch.autograd.grad(loss, exact)

    own = slice(sum(batches[:rank]), sum(batches[: rank + 1]))
    inputs = [x.detach().requires_grad_() for x in (*(f[own] for f in features), *numbers)]
    with mock.patch.dict(LOGITS_AT_ONCE, cpu=4):  # no block of logits is allocated at once
        found = losses.siglip_loss(*inputs)
        gradients = torch.autograd.grad(found * weights[rank], inputs)
    for number in (found, *gradients[2:]):
        dist.all_reduce(number.detach())
    torch.testing.assert_close(
        found.detach() / world, loss_per_image.mean().detach().to(found.dtype)
    )
    for gradient, value in zip(gradients, (x[own] if x.ndim else x for x in wanted), strict=True):
        # Sums are in fp32; the bf16 gradient of a row is rounded once, by half an ulp.
        rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (1e-5, 1e-6)
        rtol += 2**-8 if gradient.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(gradient.double() / world, value, rtol=rtol, atol=atol)


def siglip_loss_sends_one_text_batch_at_a_time(rank, world):
    """Texts are sent in their dtype, gradients in fp32; no tensor holds all texts or logits."""
    images, texts = siglip_features(BATCH, torch.bfloat16)
    sent = []
    transport = dist.all_to_all_single
    dist.all_to_all_single = lambda out, tensor, *args, **options: (
        sent.append((tensor.dtype, len(tensor))), transport(out, tensor, *args, **options)
    )[1]  # fmt: skip
    try:
        with LargestResult() as largest:
            loss = losses.siglip_loss(images, texts, 10.0, -5.0)
            forward = len(sent)
            loss.backward()
    finally:
        dist.all_to_all_single = transport
    there, back = (torch.bfloat16, BATCH), (torch.float32, BATCH)
    assert sent[:forward] == [there] * (world - 1)
    assert sent[forward:] == [there, back] * (world - 1) + [back] * (world > 1)
    assert largest.numbers == BATCH * WIDTH


def siglip_loss_refuses_mismatched_ranks(rank, world):
    if world == 1:
        return
    for width, dtype, words in (
        (WIDTH + rank, torch.float32, f"features is {[WIDTH + r for r in range(world)]}"),
        *(
            (WIDTH, mixed[rank > 0], f"dtype is {mixed[:1] + mixed[1:] * (world - 1)}")
            for mixed in MIXED_DTYPES
        ),
    ):
        features = torch.ones(rank, width, dtype=dtype)
        with pytest.raises(ValueError, match=rf"siglip_loss: .*{re.escape(words)} on ranks 0"):
            losses.siglip_loss(features, features, 10.0, -10.0)
        losses.siglip_loss(*siglip_features(2), 10.0, -10.0)  # the ranks are still synchronised
    with pytest.raises(ValueError, match="one row at least"):
        losses.siglip_loss(torch.ones(0, 4), torch.ones(0, 4), 10.0, -10.0)


def hard_negatives_come_from_all_ranks(rank, world):
    if world == 1:
        return
    counts = torch.zeros(2 * world)
    for _ in range(200):
        drawn = losses.hard_negatives(torch.zeros(2, 2 * world), 2 * rank)
        assert (drawn != 2 * rank + torch.arange(2)).all()
        counts += torch.bincount(drawn, minlength=2 * world)
    assert (counts > 0).all()


def losses_in_a_subgroup(rank, world):
    if world < 3:
        return
    group = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        rows = torch.arange(4)
        found = losses.exchange_rows(torch.tensor([rank, rank + 10]), rows, group)
        assert found.tolist() == [0, 10, world - 1, world + 9]
        images, texts = siglip_features(4)
        own = slice(2, 4) if rank else slice(0, 2)
        loss = losses.siglip_loss(images[own], texts[own], 10.0, -5.0, group=group)
        torch.testing.assert_close(
            loss, reference_losses.siglip_per_image(images, texts, 10.0, -5.0)[own].mean()
        )
    else:
        with pytest.raises(ValueError, match="group"):
            losses.exchange_rows(torch.zeros(2), torch.zeros(1, dtype=torch.int64), group)


def stage1_matches_one_process(rank, world):
    model, head, image_embeds, ids, mask = tiny_blip2.parts(world * 2)
    own = slice(rank * 2, rank * 2 + 2)
    drawn = {}

    def fixed(similarity, offset, generator=None):  # the same on any number of ranks
        kind = "text" if not drawn else "image"
        drawn[kind] = offset
        step = 1 if kind == "text" else 2 * world - 1
        return (offset + torch.arange(len(similarity)) + step) % (2 * world)

    every = torch.arange(2 * world)
    negatives = ((every + 1) % len(every), (every - 1) % len(every))
    expected = reference_losses.stage1(
        model, image_embeds, ids, mask, head, 60, model.temp, 0.1, negatives
    )
    parameters = [*model.parameters(), *head.transform.parameters(), head.decoder.bias]
    wanted = torch.autograd.grad(expected[0], parameters, allow_unused=True)
    original, blip2_stage1.hard_negatives = blip2_stage1.hard_negatives, fixed
    try:
        found = losses.stage1_loss(
            model, image_embeds[own], ids[own], mask[own], lm_head=head, bos_token_id=60
        )
    finally:
        blip2_stage1.hard_negatives = original
    summed = torch.stack([x.detach() for x in found])
    dist.all_reduce(summed)
    torch.testing.assert_close(summed / world, torch.stack([x.detach() for x in expected]))
    gradients = torch.autograd.grad(found.loss, parameters, allow_unused=True)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (exact is None)
        if exact is not None:
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            torch.testing.assert_close(gradient / world, exact, rtol=1e-4, atol=2e-5)


CHECKS = [
    *(
        (itc_loss_matches_one_process, local_loss, smoothing, torch.float32)
        for local_loss in (True, False)
        for smoothing in (0.0, 0.1)
    ),
    (itc_loss_matches_one_process, True, 0.1, torch.float64),
    (itc_loss_under_ddp,),
    (exchange_rows_returns_the_requested_rows,),
    (exchange_rows_sends_only_requested_rows,),
    (out_of_range_rows_raise_on_all_ranks,),
    (uneven_sizes_raise_on_all_ranks,),
    (mixed_dtypes_raise_on_all_ranks,),
    (gradient_penalty_crosses_ranks,),
    (size_check_can_be_disabled,),
    *(
        (siglip_loss_matches_one_process, batches, dtype)
        for batches in ([BATCH] * 4, [2, 0, 0, 3])
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ),
    (siglip_loss_sends_one_text_batch_at_a_time,),
    (siglip_loss_refuses_mismatched_ranks,),
    (hard_negatives_come_from_all_ranks,),
    (losses_in_a_subgroup,),
    (stage1_matches_one_process,),
]


@pytest.mark.multiprocess
def test_on_ranks(tmp_path):
    on_ranks(tmp_path, CHECKS, worlds=(1, 2, 3, 4))
