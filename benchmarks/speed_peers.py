"""The models that speed.py compares: ours and its peers, behind one interface.

A peer knows its `module`, the `loss` and the predictions of spectrograms (with the random numbers that choose the
patches, if given), the `tokens` of unmasked spectrograms, and `ours`, our model with the peer's weights.
"""

import contextlib
import importlib
import io
import re
import sys

import torch
import torch.nn.functional as F

from audiomaepp.audio import import_torchaudio
from audiomaepp.config import Config
from audiomaepp.model import AudioMAEPlusPlus, split_by_noise
from audiomaepp.pretrained import load_official

TOLERANCE = 1e-3  # largest difference between a peer's numbers and ours, in float32, relative to the largest number


class Ours:
    """Our model."""

    def __init__(self, cfg):
        self.cfg, self.module = cfg, AudioMAEPlusPlus(cfg)

    def ours(self):
        return self.module

    def loss(self, spec, noise=None):
        mask = None if noise is None else split_by_noise(noise, self.cfg.num_visible)[1]
        out = self.module(spec, mask=mask)
        return out.loss, out.pred

    def tokens(self, spec):
        return self.module.encode(spec)[:, 1:]


class PlainReference(Ours):
    """The released mathematics written out: every patch embedded, then masked; attention by softmax; nothing fused."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.weights = dict(self.module.named_parameters())

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def block(self, name, x, heads):
        y = F.silu(self.linear(f"{name}.ffn1.0", self.norm(f"{name}.norm1", x)))
        x = x + self.linear(f"{name}.ffn1.2", y) * 0.5
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm2", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.linear(f"{name}.attn.proj", y.transpose(1, 2).reshape(x.shape))
        y = self.norm(f"{name}.norm2", x)
        y = F.silu(self.linear(f"{name}.ffn2.gate", y)) * self.linear(f"{name}.ffn2.value", y)
        return x + self.linear(f"{name}.ffn2.project", self.norm(f"{name}.ffn2.norm", y))

    def encode(self, patches, ids=None):
        pos = self.module.encoder.pos_embed
        x = self.linear("encoder.patch_embed", patches) + pos[:, 1:]
        if ids is not None:
            x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.weights["encoder.cls_token"] + pos[:, :1]).expand(len(x), -1, -1), x], 1)
        for i in range(self.cfg.depth):
            x = self.block(f"encoder.blocks.{i}", x, self.cfg.num_heads)
        return self.norm("encoder.norm", x)

    def loss(self, spec, noise=None):
        patches = self.module.patchify(spec)
        noise = torch.rand(patches.shape[:2], device=spec.device) if noise is None else noise
        shuffle, visible = noise.argsort(1), self.cfg.num_visible
        restore = shuffle.argsort(1)
        x = self.linear("decoder.embed", self.encode(patches, shuffle[:, :visible]))
        hidden = self.weights["decoder.mask_token"].to(x.dtype).repeat(len(x), patches.shape[1] - visible, 1)
        full = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], full], 1) + self.module.decoder.pos_embed
        for i in range(self.cfg.decoder_depth):
            x = self.block(f"decoder.blocks.{i}", x, self.cfg.decoder_num_heads)
        pred, mask = self.linear("decoder.pred", self.norm("decoder.norm", x))[:, 1:], (restore >= visible).float()
        return (((pred.float() - patches) ** 2).mean(-1) * mask).sum() / mask.sum(), pred

    def tokens(self, spec):
        return self.encode(self.module.patchify(spec))[:, 1:]


class Released(Ours):
    """AudioMAE++ as released, from a checkout."""

    folder = None  # the checkout

    def __init__(self, cfg):
        pp = dict.fromkeys((f"{part}_{what}" for part in ("encoder", "decoder") for what in
                            ("plusplus_block", "use_swiglu_final_ffn")), True)  # fmt: skip
        name = next(n for n in ("tiny", "small", "medium", "base") if Config.preset(n).embed_dim == cfg.embed_dim)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            self.module = getattr(self.find(), f"mae_plusplus_{name}")(
                img_size=cfg.img_size, patch_size=cfg.patch_size, mask_ratio=cfg.mask_ratio, use_cls_token=True,
                decoder_embed_dim=cfg.decoder_embed_dim, decoder_depth=cfg.decoder_depth,
                decoder_num_heads=cfg.decoder_num_heads, **pp)  # fmt: skip
        self.cfg = cfg

    @classmethod
    def find(cls):
        if cls.folder is None:
            raise ImportError("no --peer-path")
        sys.path[:] = [str(cls.folder), *(p for p in sys.path if p != str(cls.folder))]
        import_torchaudio()
        return importlib.import_module("src.models.mae_pp")

    def ours(self):
        return load_official(self.module.state_dict(), img_size=self.cfg.img_size)

    def loss(self, spec, noise=None):
        if noise is None:
            pred, target, mask = self.module(spec)
        else:
            shuffle, visible = noise.argsort(1), self.cfg.num_visible
            restore = shuffle.argsort(1)
            mask, target = (restore >= visible).float(), self.module.patchify(spec)
            given = mask, restore, shuffle[:, :visible]
            x = self.module.forward_encoder(self.module.patch_embed(spec), self.cfg.mask_ratio, *given)[0]
            pred = self.module.forward_decoder(x, restore)
        return self.module.compute_loss(pred, target, mask), pred

    def tokens(self, spec):
        return self.module.encoder.forward_features(self.module.patch_embed(spec), self.module.cls_token)


class HuggingFace(Ours):
    """Hugging Face's ViTMAE (plain blocks, square images), for training."""

    NAMES = (  # its name → MAE's
        (r"^vit\.embeddings\.", ""), ("position_embeddings", "pos_embed"), (r"^vit\.layers", "blocks"),
        (r"patch_embeddings\.projection", "patch_embed.proj"), (r"^vit\.layernorm", "norm"),
        ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), (r"^decoder\.decoder_layers", "decoder_blocks"),
        (r"^decoder\.(decoder_|mask)", r"\1"), (r"attention\.o_proj", "attn.proj"),
    )  # fmt: skip

    def __init__(self, cfg):
        kind, sizes = self.find(), dict(image_size=cfg.img_size[0], patch_size=cfg.patch_size[0])
        self.cfg, self.module = cfg, kind.ViTMAEForPreTraining(kind.ViTMAEConfig(
            **sizes, num_channels=cfg.in_chans, hidden_size=cfg.embed_dim, num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.num_heads, intermediate_size=4 * cfg.embed_dim, layer_norm_eps=1e-6,
            decoder_hidden_size=cfg.decoder_embed_dim, decoder_num_hidden_layers=cfg.decoder_depth,
            decoder_num_attention_heads=cfg.decoder_num_heads, mask_ratio=cfg.mask_ratio,
            decoder_intermediate_size=4 * cfg.decoder_embed_dim))  # fmt: skip
        ours = AudioMAEPlusPlus(cfg)
        self.module.vit.embeddings.position_embeddings.data.copy_(ours.encoder.pos_embed)
        self.module.decoder.decoder_pos_embed.data.copy_(ours.decoder.pos_embed)

    @classmethod
    def find(cls):
        import_torchaudio()  # transformers imports it
        return importlib.import_module("transformers")

    def ours(self):
        named = {}
        for name, tensor in self.module.state_dict().items():
            for theirs, mae in self.NAMES:
                name = re.sub(theirs, mae, name)
            named[name] = tensor
        for name in [n for n in named if ".attention.q_proj." in n]:
            parts = [named.pop(name.replace("q_proj", f"{one}_proj")) for one in "qkv"]
            named[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        settings = {n: getattr(self.cfg, n) for n in ("img_size", "decoder_num_heads", "mask_ratio", "mlp_ratio")}
        return load_official(named, **settings)

    def loss(self, spec, noise=None):
        out = self.module(spec, noise=noise)
        return out.loss, out.logits


class Timm(Ours):
    """timm's VisionTransformer with the fixed positions of MAE, for embedding."""

    def __init__(self, cfg):
        self.cfg, self.module = cfg, self.find().VisionTransformer(
            img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, num_classes=0,
            embed_dim=cfg.embed_dim, depth=cfg.depth, num_heads=cfg.num_heads)  # fmt: skip
        self.module.pos_embed.data.copy_(AudioMAEPlusPlus(cfg).encoder.pos_embed)

    @classmethod
    def find(cls):
        import_torchaudio()
        return importlib.import_module("timm.models.vision_transformer")

    def ours(self):
        return load_official(self.module.state_dict(), img_size=self.cfg.img_size, num_heads=self.cfg.num_heads)

    def tokens(self, spec):
        return self.module.forward_features(spec)[:, 1:]


def found(*kinds):
    """{name: class} of the peers that can be imported; says which cannot."""
    names = {Released: "released", HuggingFace: "ViTMAE", Timm: "timm", PlainReference: "plain reference"}
    rows = {}
    for kind in kinds:
        try:
            getattr(kind, "find", lambda: None)()
            rows[names[kind]] = kind
        except ImportError as error:
            print(f"{names[kind]} is left out: {error}", file=sys.stderr)
    return rows


class OtherNumbers(ValueError):
    """A peer computes something else."""


def need_equal(name, theirs, ours, tolerance=TOLERANCE):
    """The largest difference, relative to the largest of our numbers; raises if it is above the tolerance."""
    off = ((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-12)).item()
    if not off <= tolerance:
        raise OtherNumbers(f"{name} must give our numbers within {tolerance:g}, got a difference of {off:.2g}; "
                           "compare only peers of the same mathematics")
    return off


def check_model(name, kind, cfg, train):
    """Compare predictions and loss, or tokens, of a peer with those of our model with the same random weights."""
    torch.manual_seed(0)
    peer, spec, noise = kind(cfg), torch.randn(2, cfg.in_chans, *cfg.img_size), torch.rand(2, cfg.num_patches)
    with torch.no_grad():
        for part, weight in peer.module.named_parameters():
            if "pos" not in part:  # positions are fixed
                weight += 0.1 * weight.std().nan_to_num(1).clamp_min(0.1) * torch.randn_like(weight)
        peer.module.eval()
        ours = peer.ours().eval()
        if not train:
            return need_equal(name, peer.tokens(spec), ours.encode(spec)[:, 1:])
        (loss, pred), mask = peer.loss(spec, noise), split_by_noise(noise, cfg.num_visible)[1]
        out = ours(spec, mask=mask)
        return max(need_equal(name, pred, out.pred), need_equal(name, loss, out.loss))
