"""Every size that divides trains; every other is refused when the config is made, with one to use instead."""

import ast
import re

import pytest
import torch

from audiomaepp.config import Config
from audiomaepp.features import build_frontend
from audiomaepp.model import AudioMAEPlusPlus, Encoder

SIZES = [((384, 384), (16, 16)), ((448, 448), (32, 32)), ((200, 80), (4, 16)), ((1024, 128), (16, 16))]
NAMES = [f"{t}x{m}" for (t, m), _ in SIZES]


def forward_and_backward(cfg):
    torch.manual_seed(0)
    model = AudioMAEPlusPlus(cfg)
    spec = torch.randn(2, 1, *cfg.img_size)
    assert torch.equal(model.unpatchify(model.patchify(spec)), spec)
    out = model(spec, torch.tensor([0, 0]))
    out.loss.backward()
    (t, m), (pt, pm) = cfg.img_size, cfg.patch_size
    assert out.pred.shape == (2, t // pt * (m // pm), pt * pm)
    assert (out.mask.sum(1) == cfg.num_patches - cfg.num_visible).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} gets no gradient"
    with torch.no_grad():
        assert model.get_embedding(spec).shape == (2, cfg.embed_dim)


@pytest.mark.parametrize("img_size, patch_size", SIZES, ids=NAMES)
def test_sizes(img_size, patch_size):
    forward_and_backward(Config.preset("nano", img_size=img_size, patch_size=patch_size))


@pytest.mark.slow
@pytest.mark.parametrize("img_size, patch_size", SIZES[:2], ids=NAMES[:2])
def test_sizes_at_base_width(img_size, patch_size):
    forward_and_backward(Config.preset("base", img_size=img_size, patch_size=patch_size))


@pytest.mark.parametrize("img_size, patch_size", SIZES, ids=NAMES)
@pytest.mark.filterwarnings("ignore:At least one mel filterbank")  # 384 bands are finer than an FFT of 400
def test_the_front_end_gives_what_the_model_takes(img_size, patch_size):
    cfg = Config.preset("nano", img_size=img_size, patch_size=patch_size)
    spec = build_frontend(cfg)(0.1 * torch.randn(1, cfg.clip_samples))
    assert spec.shape == (1, 1, *img_size) and spec.isfinite().all()


def test_one_number_is_a_square():
    cfg = Config.preset("nano", img_size=384, patch_size=16)
    assert (cfg.img_size, cfg.grid_size, cfg.num_patches) == ((384, 384), (24, 24), 576)


# ---- what is refused


def values(message):
    "The values that a message says to use: what stands behind its last semicolon, as Python."
    remedy = message.rpartition(";")[2]
    found = re.findall(r"'[^']+'|\([\d., ]+\)|(?<![\w.=])-?\d+(?:\.\d+)?(?:e-?\d+)?", remedy)
    return [ast.literal_eval(text) for text in found]


def second(at):
    "Puts a value for the mel axis into a pair."
    return lambda value: value if isinstance(value, tuple) else (at, value)


BAD = [  # field; its bad value; the other settings; how a value to use goes into the field
    ("img_size", 230, dict(patch_size=16), None),
    ("img_size", (200, 230), dict(patch_size=(4, 16)), second(200)),
    ("img_size", (202, 80), dict(patch_size=(4, 16)), lambda v: (v, 80)),
    ("img_size", 0, {}, None),
    ("img_size", -384, {}, None),
    ("img_size", (200, -80), {}, None),
    ("img_size", (200, 80, 1), {}, None),
    ("img_size", 200.0, {}, None),
    ("patch_size", 0, {}, None),
    ("patch_size", -16, {}, None),
    ("patch_size", (0, 16), {}, None),
    ("patch_size", (4, 128), {}, second(4)),
    ("patch_size", (400, 16), {}, lambda v: (v, 16)),
    ("embed_dim", 0, {}, None),
    ("embed_dim", -128, {}, None),
    ("embed_dim", 130, dict(num_heads=2), None),
    ("embed_dim", 194, dict(num_heads=3), None),
    ("num_heads", 3, {}, None),
    ("num_heads", 0, {}, None),
    ("num_heads", -4, {}, None),
    ("num_heads", 64, dict(rope=True), None),
    ("decoder_num_heads", 5, {}, None),
    ("mask_ratio", 0, {}, None),
    ("mask_ratio", 1, {}, None),
    ("mask_ratio", -0.5, {}, None),
    ("mask_ratio", 75, {}, None),
    ("mask_ratio", float("nan"), {}, None),
    ("mask_ratio", 0.9999, {}, None),
    ("mask_ratio", 0.75, dict(img_size=16, patch_size=4, mask_mode="time", mask_ratio=0.99), None),
    ("pooling_mode", "max", {}, None),
    ("pooling_mode", "", {}, None),
    ("depth", 0, {}, None),
    ("batch_size", 0, {}, None),
    ("epochs", -1, {}, None),
]


@pytest.mark.parametrize("field, bad, others, place", BAD, ids=[f"{field}={bad}" for field, bad, _, _ in BAD])
def test_a_bad_size_is_named_with_one_to_use(field, bad, others, place):
    with pytest.raises(ValueError) as caught:
        Config.preset("nano", **{field: bad, **others})
    message = str(caught.value)
    assert message.startswith(f"{field} must "), message
    good = values(message)
    assert good, f"no value to use: {message}"
    others = {name: value for name, value in others.items() if name != field}
    for value in good:
        cfg = Config.preset("nano", **{**others, field: place(value) if place else value})  # what it says is true
        AudioMAEPlusPlus(cfg)


def test_what_was_refused_once_is_refused_in_replace_and_from_a_file(tmp_path):
    cfg = Config.preset("nano")
    with pytest.raises(ValueError, match="img_size.*224 or 240"):
        cfg.replace(img_size=230, patch_size=16)
    (tmp_path / "config.json").write_text('{"img_size": 230, "patch_size": 16}')
    with pytest.raises(ValueError, match="img_size.*224 or 240"):
        Config.load(tmp_path / "config.json")


def test_another_size_at_the_model_is_named():
    model = AudioMAEPlusPlus(Config.preset("nano", depth=1))
    with pytest.raises(ValueError, match=r"\(batch, 1, 200, 80\).*\(1, 1, 80, 200\)"):
        model(torch.zeros(1, 1, 80, 200))


def test_tokens_follow_the_order_of_the_places_that_are_asked_for():
    torch.manual_seed(0)
    cfg = Config.preset("nano", depth=1)
    encoder, patches = Encoder(cfg).eval(), torch.randn(2, cfg.num_patches, cfg.patch_dim)
    order = torch.randperm(cfg.num_patches).expand(2, -1)
    whole, shuffled = encoder(patches)[:, 1:], encoder(patches, order)[:, 1:]
    torch.testing.assert_close(shuffled, whole[:, order[0]], atol=1e-5, rtol=1e-4)
