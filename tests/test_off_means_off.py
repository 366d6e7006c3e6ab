"""With the extra losses off, training is the plain masked autoencoder, bit for bit; flags draw no random numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from audiomaepp.config import Config
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.train import Trainer

OFF = dict(use_contrastive_loss=False, use_uniformity_loss=False, pooling_mode="cls")
FLAGS = [(a, b) for a in (False, True) for b in (False, True)]


def config(**changes):
    small = dict(
        img_size=(48, 80), embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=24, decoder_num_heads=2, batch_size=6,
        epochs=5, base_lr=0.1, warmup_epochs=1.5, seed=3, precision="fp32",
    )  # fmt: skip
    return Config.preset("nano", **{**small, **OFF, **changes})


def batches(labels=True):
    "Four batches; in five epochs twenty steps."
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        batch = {"spec": torch.randn(6, 1, 48, 80, generator=generator)}
        yield {**batch, "label": torch.tensor([0, 0, 1, 1, 2, -1])} if labels else batch


# ---- another program for the same thing: functions on a dict of tensors; of the package, its first weights alone


def block(x, w, heads):
    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    x = x + 0.5 * linear("ffn1.2", F.silu(linear("ffn1.0", norm("norm1", x))))
    clips, tokens, dim = x.shape
    qkv = linear("attn.qkv", norm("norm2", x)).view(clips, tokens, 3, heads, dim // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    x = x + linear("attn.proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    h = norm("norm2", x)
    return x + linear("ffn2.project", norm("ffn2.norm", F.silu(linear("ffn2.gate", h)) * linear("ffn2.value", h)))


def stack(x, w, part, depth, heads):
    for i in range(depth):
        prefix = f"{part}.blocks.{i}."
        x = block(x, {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}, heads)
    return F.layer_norm(x, x.shape[-1:], w[part + ".norm.weight"], w[part + ".norm.bias"], 1e-6)


def plain_loss(w, spec, positions, cfg):
    "Masked autoencoder: cut, hide, encode what is seen, decode, squared error of what was hidden."
    (pt, pm), clips = cfg.patch_size, len(spec)
    patches = spec[:, 0].unfold(1, pt, pt).unfold(2, pm, pm).flatten(1, 2).flatten(2)  # (B, N, pt·pm)
    count = patches.shape[1]
    seen = int(count * (1 - cfg.mask_ratio))
    noise = torch.rand(clips, count)
    keep = torch.stack([row.argsort(stable=True)[:seen].sort().values for row in noise])
    hidden = torch.ones(clips, count)
    for row, ids in zip(hidden, keep, strict=True):
        row[ids] = 0

    each = torch.arange(clips)[:, None]
    tokens = F.linear(patches[each, keep], w["encoder.patch_embed.weight"], w["encoder.patch_embed.bias"])
    cls = w["encoder.cls_token"].expand(clips, -1, -1)
    x = torch.cat([cls, tokens + positions["encoder"][keep + 1]], 1)
    x = stack(x, w, "encoder", cfg.depth, cfg.num_heads)
    x = F.linear(x, w["decoder.embed.weight"], w["decoder.embed.bias"])
    everywhere = w["decoder.mask_token"].expand(clips, count, -1).clone()
    everywhere[each, keep] = x[:, 1:]
    x = torch.cat([x[:, :1], everywhere], 1) + positions["decoder"]
    x = stack(x, w, "decoder", cfg.decoder_depth, cfg.decoder_num_heads)
    pred = F.linear(x, w["decoder.pred.weight"], w["decoder.pred.bias"])[:, 1:]
    return (((pred - patches) ** 2).mean(-1) * hidden).sum() / hidden.sum()


def plain_training(cfg):
    "Twenty steps: AdamW, decay on matrices alone, warm-up, half a cosine, clipping."
    torch.manual_seed(cfg.seed)
    model = AudioMAEPlusPlus(cfg)
    w = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    positions = {"encoder": model.encoder.pos_embed[0], "decoder": model.decoder.pos_embed[0]}
    groups = [dict(params=[v for v in w.values() if (v.ndim == 2) == decays], weight_decay=cfg.weight_decay * decays)
              for decays in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=cfg.betas)
    peak, total, warmup = cfg.base_lr * cfg.batch_size / 256, 20, 6
    for step in range(20):
        spec = list(batches())[step % 4]["spec"]
        rate = peak * (step + 1) / (warmup + 1)
        if step >= warmup:
            rate = peak * 0.5 * (1 + math.cos(math.pi * ((step - warmup) / (total - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = plain_loss(w, spec, positions, cfg)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w[name] for name, _ in model.named_parameters()], cfg.grad_clip)
        optimizer.step()
    return w, loss.item(), torch.get_rng_state()


def trained(cfg, labels=True):
    "What `Trainer` makes of the same batches: parameters, last loss, masks, random state."
    torch.manual_seed(cfg.seed)
    model, masks = AudioMAEPlusPlus(cfg), []
    with torch.random.fork_rng():
        trainer = Trainer(cfg, quiet=True)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
    trainer = Trainer(cfg, quiet=True)
    trainer.model.register_forward_hook(lambda module, args, out: masks.append(out.mask))
    history = trainer.fit(list(batches(labels)))
    return dict(trainer.model.named_parameters()), history, torch.stack(masks), torch.get_rng_state()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Trainer goes to the GPU, the loop here stays on the CPU")
def test_twenty_steps_are_those_of_a_plain_masked_autoencoder():
    cfg = config()
    w, loss, state = plain_training(cfg)
    parameters, history, masks, their_state = trained(cfg)
    assert len(masks) == 20 and history.columns[3:5] == ["loss", "reconstruction"]
    torch.manual_seed(cfg.seed)
    first = AudioMAEPlusPlus(cfg).state_dict()
    assert w.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(value, w[name]), f"{name} differs by {(value - w[name]).abs().max():.1e}"
        assert not torch.equal(value, first[name]), f"{name} did not learn"
    assert torch.equal(state, their_state)


@pytest.fixture(scope="module")
def plain():
    return trained(config())


def test_pooling_alone_changes_nothing(plain):
    for mode in ("mean", "cls+mean"):
        parameters, _, masks, state = trained(config(pooling_mode=mode))
        assert all(torch.equal(value, plain[0][name]) for name, value in parameters.items()), mode
        assert torch.equal(masks, plain[2]) and torch.equal(state, plain[3])


def test_labels_alone_change_nothing(plain):
    parameters, _, _, state = trained(config(), labels=False)
    assert all(torch.equal(value, plain[0][name]) for name, value in parameters.items())
    assert torch.equal(state, plain[3])


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("contrastive, uniformity", FLAGS[1:])
def test_the_flags_leave_the_random_stream_alone(plain, contrastive, uniformity, labels):
    cfg = config(use_contrastive_loss=contrastive, use_uniformity_loss=uniformity)
    parameters, history, masks, state = trained(cfg, labels)
    assert torch.equal(masks, plain[2]), "another mask was drawn"
    assert torch.equal(state, plain[3]), "other random numbers were drawn"
    assert not all(torch.equal(value, plain[0][name]) for name, value in parameters.items()), "the loss does nothing"
    assert [name in history.columns for name in ("contrastive", "uniformity")] == [contrastive, uniformity]


@pytest.mark.parametrize("which", ["contrastive", "uniformity"])
def test_a_weight_of_zero_is_off_too(plain, which):
    parameters, *_ = trained(config(**{f"use_{which}_loss": True, f"{which}_weight": 0.0}))
    for name, value in parameters.items():  # the zero joins the sum of gradients, so not bit for bit
        torch.testing.assert_close(value, plain[0][name], rtol=1e-4, atol=1e-5)
