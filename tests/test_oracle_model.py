"""The same weights give the numbers of the original AudioMAE++.

The oracle holds random weights under the original names, with inputs and the original code's outputs. The decoder
(1.3 MB) is in fixtures/ and is checked everywhere; the whole model where ../shared/oracle is there.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from audiomaepp.config import Config
from audiomaepp.losses import reconstruction_loss
from audiomaepp.model import AudioMAEPlusPlus, patchify
from audiomaepp.pooling import frame_embeddings

SMALL = Path(__file__).parent / "fixtures" / "decoder_oracle.safetensors"
WHOLE = Path(__file__).parents[2] / "shared" / "oracle" / "audiomaepp_official_small.safetensors"
RENAMED = [  # original name → ours
    (r"^cls_token", "encoder.cls_token"),
    (r"^patch_embed\.proj", "encoder.patch_embed"),
    (r"^encoder\.encoder_norm", "encoder.norm"),
    (r"^decoder\.decoder_", "decoder."),
    (r"(qkv|proj)_layer", r"\1"),
    (r"ffn1\.layer1", "ffn1.0"),
    (r"ffn1\.layer2", "ffn1.2"),
    (r"linear1", "value"),
    (r"linear2", "gate"),
    (r"ffn2\.ln", "ffn2.norm"),
]


def opened(path):
    "The config, the weights under our names, and the inputs and outputs."
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["config"])
    cfg = Config(**settings, use_contrastive_loss=False, use_uniformity_loss=False)
    weights, io = {}, {}
    for name, tensor in load_file(path).items():
        where, name = name.split(".", 1)
        if where == "io":
            io[name] = tensor
        elif "norm3" not in name and "pos_embed" not in name:  # in the checkpoint but unused; fixed tables
            for old, new in RENAMED:
                name = re.sub(old, new, name)
            weights[name] = tensor.flatten(1) if name == "encoder.patch_embed.weight" else tensor
    return cfg, weights, io


def in_order(io):
    "The visible patches in ascending order, as ours are, and the original's tokens in that order."
    ids, order = io["ids_keep"].long().sort(1)
    tokens = io["latent"][:, 1:].gather(1, order[..., None].expand(-1, -1, io["latent"].shape[-1]))
    return ids, torch.cat([io["latent"][:, :1], tokens], 1)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_decoder_and_losses():
    cfg, weights, io = opened(SMALL)
    model = AudioMAEPlusPlus(cfg)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("encoder.") for name in missing)
    ids, latent = in_order(io)
    pred = model.decoder(latent, ids)
    close(pred, io["pred"])
    close(reconstruction_loss(pred, io["target"], io["mask"]), io["loss"])
    close(reconstruction_loss(pred, io["target"], io["mask"], norm_pix=True), io["loss_norm_pix"])


@pytest.fixture(scope="module")
def whole():
    if not WHOLE.exists():
        pytest.skip("../shared/oracle is not there")
    cfg, weights, io = opened(WHOLE)
    model = AudioMAEPlusPlus(cfg)
    model.load_state_dict(weights)  # strict: no name is missing, none is too many
    return model.eval(), io


@torch.no_grad()
def test_whole_model_under_a_given_mask(whole):
    model, io = whole
    out = model(io["spec"], mask=io["mask"])
    close(patchify(io["spec"], model.cfg.patch_size), io["target"])
    close(out.latent, in_order(io)[1])
    close(out.pred, io["pred"])
    close(out.loss, io["loss"])
    assert out.losses.keys() == {"reconstruction"} and torch.equal(out.mask, io["mask"])
    close(reconstruction_loss(out.pred, io["target"], out.mask, norm_pix=True), io["loss_norm_pix"])


@torch.no_grad()
def test_as_many_patches_are_hidden(whole):
    model, io = whole
    assert torch.equal(model(io["spec"]).mask.sum(1), io["mask"].sum(1))


@torch.no_grad()
def test_tokens_of_an_unmasked_clip(whole):
    model, io = whole
    close(model.encode(io["spec"])[:, 1:], io["tokens"])


@torch.no_grad()
def test_frames_hold_what_the_original_holds_in_another_order(whole):
    "The original rearranges the tokens in the wrong order: the same numbers, at other times."
    model, io = whole
    frames = frame_embeddings(model.encode(io["spec"]), model.cfg.grid_size)
    assert frames.shape == io["features_official"].shape
    close(frames.flatten(1).sort(1).values, io["features_official"].flatten(1).sort(1).values)
    assert (frames - io["features_official"]).abs().max() > 0.1
