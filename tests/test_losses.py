"""Losses where they meet the machine: autocast, several processes, odd batches."""

import itertools
import math
import weakref
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from audiomaepp.losses import (
    alignment,
    cosine_uniformity_loss,
    gather_with_grad,
    info_nce_loss,
    rankme,
    reconstruction_loss,
    uniformity_loss,
)

LABELS = torch.tensor([0, 1, 0, 2, 1, 1, -1, 2])


def batch(rows=8, dim=16, seed=0, dtype=torch.float32):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def embedding_loss(z, labels):
    return info_nce_loss(z, labels) + uniformity_loss(z)


# -- precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fn",
    [
        lambda z: info_nce_loss(z, LABELS),
        info_nce_loss,
        lambda z: info_nce_loss(z, labels=LABELS, temperature=0.01),
        uniformity_loss,
        lambda z: alignment(z, LABELS),
        rankme,
        lambda z: reconstruction_loss(z[None], -z[None], torch.ones(1, 8)),
    ],
)
def test_bf16_autocast_gives_the_float32_value_and_gradient(fn):
    def run(autocast):
        z = batch().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert (z @ z.T).dtype == (torch.bfloat16 if autocast else torch.float32)
            value = fn(z)
        value.backward()  # outside, as torch's documentation asks
        return value.detach(), z.grad

    for a, b in zip(run(False), run(True), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    z = batch(dtype=dtype)
    for fn in (lambda z: info_nce_loss(z, LABELS), uniformity_loss, lambda z: alignment(z, LABELS), rankme):
        assert torch.equal(fn(z), fn(z.float())) and fn(z).dtype == torch.float32
    z.requires_grad_()
    embedding_loss(z, LABELS).backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all()


def test_float64_stays_float64():
    assert embedding_loss(batch().double(), LABELS).dtype == torch.float64


# -- odd batches -------------------------------------------------------------------------------------------------------
def odd_embeddings():
    for rows, dim in itertools.product((0, 1, 2, 3, 16), (1, 4)):
        yield batch(rows, dim)
        yield torch.zeros(rows, dim)
        yield torch.ones(rows, dim)
        yield batch(rows, dim).sign()  # duplicates and opposites
        yield 1e-30 * batch(rows, dim)
        yield 1e30 * batch(rows, dim)
        yield torch.cat([batch(rows, dim), torch.zeros(1, dim), 1e-12 * torch.ones(1, dim)])
        yield 1 + 1e-7 * batch(rows, dim)  # nearly collapsed


def odd_labels(n):
    yield torch.zeros(n, dtype=torch.long)
    yield torch.arange(n)
    yield -torch.ones(n, dtype=torch.long)
    yield torch.arange(n) % 3 - 1
    yield torch.arange(n) % 2 * 10**9


def finite_with_gradient(loss, z):
    z = z.detach().requires_grad_()
    value = loss(z)
    value.backward()
    assert value.ndim == 0 and value.isfinite(), (value, z)
    assert z.grad.isfinite().all(), (z.grad, z)
    return value.item()


def test_a_batch_of_zeros_reads_as_collapsed():
    """A model that gives zeros for every clip must not read as one whose clips are spread perfectly."""
    zeros, ones = torch.zeros(16, 8), torch.ones(16, 8)
    for loss in (uniformity_loss, cosine_uniformity_loss, lambda z: alignment(z, torch.zeros(16))):
        assert loss(zeros).item() == pytest.approx(loss(ones).item(), abs=1e-6)
    assert finite_with_gradient(uniformity_loss, zeros) == finite_with_gradient(uniformity_loss, 1e-12 * ones) == 0
    half = torch.cat([zeros[:8], batch(8, 8)])
    assert uniformity_loss(batch(16, 8)) < uniformity_loss(half) < 0, "half of it is collapsed"


def test_without_zero_rows_the_losses_keep_every_bit():
    """The value and gradient that trained every model so far: the sums are 2 - 2cos, in this order."""
    def distances(z):
        z = z / z.norm(dim=1, keepdim=True)
        return (2 - 2 * z @ z.T).clamp_min(0), z

    def uniformity(z):
        apart = (-2.0 * distances(z)[0]).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return apart.flatten().logsumexp(0) - math.log(len(z) * (len(z) - 1))

    def cosine(z):
        z = distances(z)[1]
        return (z @ z.T).square().sum() / len(z) ** 2

    for seed, (ours, theirs) in itertools.product(range(5), [(uniformity_loss, uniformity),
                                                             (cosine_uniformity_loss, cosine)]):
        values, grads = [], []
        for loss in (ours, theirs):
            z = (batch(48, 32, seed) + seed).requires_grad_()
            values.append(loss(z))
            values[-1].backward()
            grads.append(z.grad)
        assert torch.equal(*values) and torch.equal(*grads)


def test_odd_batches_have_finite_values_and_gradients():
    for z in odd_embeddings():
        for t in (0.5, 2.0, 50.0):
            assert finite_with_gradient(lambda z, t=t: uniformity_loss(z, t), z) <= 1e-5
        for labels, temperature in itertools.product(odd_labels(len(z)), (0.01, 0.07, 1.0)):
            loss = finite_with_gradient(lambda z, y=labels, tau=temperature: info_nce_loss(z, y, tau), z)
            assert loss >= 0
            if labels.unique().numel() == len(labels) or (labels < 0).all():
                assert loss == 0
        if len(z) % 2 == 0:
            finite_with_gradient(info_nce_loss, z)
        if len(z):
            assert rankme(z.clamp(-1e6, 1e6)).isfinite()


def test_too_few_rows_give_zero_even_where_they_are_not_finite():
    z = torch.full((1, 4), torch.inf, requires_grad=True)
    uniformity_loss(z).backward()
    assert uniformity_loss(z) == 0 and z.grad.eq(0).all()


def test_nan_is_not_hidden():
    z = batch()
    z[3, 0] = torch.nan
    assert uniformity_loss(z).isnan() and info_nce_loss(z, LABELS).isnan()


def test_unlabeled_rows_are_negatives_and_nothing_more():
    z = batch()
    relabeled = torch.where(LABELS < 0, -7, LABELS)
    assert torch.equal(info_nce_loss(z, LABELS), info_nce_loss(z, relabeled))
    assert info_nce_loss(z, LABELS) > info_nce_loss(z[LABELS >= 0], LABELS[LABELS >= 0])


def test_reconstruction_ignores_what_was_visible():
    pred, target = batch(24, 8).view(4, 6, 8), batch(24, 8, seed=1).view(4, 6, 8)
    mask = (batch(4, 6, seed=2) > 0).long()
    for norm_pix in (False, True):
        leaf = pred.clone().requires_grad_()
        reconstruction_loss(leaf, target, mask, norm_pix).backward()
        assert torch.equal(leaf.grad.abs().sum(-1) > 0, mask.bool())
        expected = target
        if norm_pix:
            expected = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        errors = [(pred[b, n] - expected[b, n]).square().mean() for b, n in mask.nonzero().tolist()]
        torch.testing.assert_close(reconstruction_loss(pred, target, mask, norm_pix), sum(errors) / len(errors))


# -- several processes -------------------------------------------------------------------------------------------------
def new_encoder():
    torch.manual_seed(0)
    return torch.nn.Linear(16, 6)


def gradient(encoder):
    return torch.cat([p.grad.flatten() for p in encoder.parameters()])


def one_of_two(rank, store, whole, expected):
    torch.set_num_threads(1)
    import_module("torch.distributed.nn")  # DDP would, after the group, and the group could never end
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(4 * rank, 4 * rank + 4)
    x, labels = whole[mine], LABELS[mine]
    torch.testing.assert_close(gather_with_grad(labels), LABELS)

    def run(loss_of):
        encoder = DistributedDataParallel(new_encoder())
        loss = loss_of(encoder)
        loss.backward()
        return loss.detach(), gradient(encoder)

    def with_labels(encoder):
        return embedding_loss(gather_with_grad(encoder(x)), gather_with_grad(labels))

    def two_views(encoder):
        first, second = encoder(torch.cat([x, x.flip(1)])).chunk(2)
        return info_nce_loss(torch.cat([gather_with_grad(first), gather_with_grad(second)]))

    for ours, theirs in zip((run(with_labels), run(two_views)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    alone = run(lambda encoder: embedding_loss(encoder(x), labels))
    assert not torch.allclose(alone[1], expected[0][1], rtol=0.05)  # without the gather it is another gradient

    leaf = x.bfloat16().requires_grad_()
    gather_with_grad(leaf).square().sum().backward()  # each rank's loss holds all rows: its slope arrives twice
    torch.testing.assert_close(leaf.grad, 4 * leaf.detach())

    with pytest.raises(ValueError, match=r"same number of rows, got \[4, 3\]"):
        gather_with_grad(x[: 4 - rank])
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None  # so its threads have ended; one that outlives Python aborts the process


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_have_the_gradient_of_one(tmp_path):
    whole = batch()

    def run(loss_of):
        encoder = new_encoder()
        loss = loss_of(encoder)
        loss.backward()
        return loss.detach(), gradient(encoder)

    expected = (
        run(lambda encoder: embedding_loss(encoder(whole), LABELS)),
        run(lambda encoder: info_nce_loss(encoder(torch.cat([whole, whole.flip(1)])))),
    )
    mp.spawn(one_of_two, args=(tmp_path / "store", whole, expected), nprocs=2)
