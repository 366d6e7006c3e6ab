"""Released weights give the numbers of the code that they were released with.

The fixtures hold small models with random weights under the original names, with inputs and what the original code
made of them (float32, on a CPU): AudioMAE++ with its decoder, and AudioMAE's encoder.
"""

import argparse
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audiomaepp.config import Config
from audiomaepp.features import build_frontend
from audiomaepp.losses import reconstruction_loss
from audiomaepp.model import AudioMAEPlusPlus, patchify
from audiomaepp.pooling import extract_embeddings, frame_embeddings
from audiomaepp.pretrained import load_official, read_weights

FIXTURES = Path(__file__).parent / "fixtures"
PLUSPLUS, PLAIN = FIXTURES / "oracle_audiomaepp.safetensors", FIXTURES / "oracle_audiomae.safetensors"
HEADS = {PLUSPLUS: dict(num_heads=4, decoder_num_heads=4), PLAIN: dict(num_heads=4)}


def opened(path):
    """The model of an oracle, and the original's inputs and outputs."""
    io = {name.removeprefix("io."): t for name, t in load_file(path).items() if name.startswith("io.")}
    return load_official(path, **HEADS[path]), io


def in_order(io):
    """The original's visible tokens in ascending order of their patches, as ours are."""
    order = io["ids_keep"].long().argsort(1)[..., None] + 1
    return torch.cat([io["latent"][:, :1], io["latent"].gather(1, order.expand(-1, -1, io["latent"].shape[-1]))], 1)


def close(ours, theirs, off=1e-5):
    """Within `off` of the largest value; the issue of parity asks for 1e-4."""
    assert (ours - theirs).abs().max() <= off * theirs.abs().max()


@pytest.fixture(scope="module")
def plusplus():
    return opened(PLUSPLUS)


@pytest.fixture(scope="module")
def plain():
    return opened(PLAIN)


@torch.no_grad()
def test_audiomaepp_under_a_given_mask(plusplus):
    model, io = plusplus
    out = model(io["spec"], mask=io["mask"])
    close(out.latent, in_order(io))
    close(out.pred, io["pred"])
    close(out.loss, io["loss"])
    assert out.losses.keys() == {"reconstruction"} and torch.equal(out.mask, io["mask"].float())
    target = patchify(io["spec"], model.cfg.patch_size)
    close(reconstruction_loss(out.pred, target, out.mask, norm_pix=True), io["loss_norm_pix"])


@torch.no_grad()
def test_as_many_patches_are_hidden(plusplus):
    model, io = plusplus
    assert torch.equal(model(io["spec"]).mask.sum(1), io["mask"].float().sum(1))


@torch.no_grad()
def test_tokens_and_features_of_an_unmasked_clip(plusplus):
    model, io = plusplus
    latent = model.encode(io["spec"][:2])
    close(latent[:, 1:], io["tokens"])
    close(frame_embeddings(latent[:1], model.cfg.grid_size, compat=True), io["features_official"])
    in_time = frame_embeddings(latent[:1], model.cfg.grid_size)
    assert (in_time - io["features_official"]).abs().max() > 0.1
    # the scene embedding of the paper is a mean over time of wrongly ordered frames: not ours either
    close(extract_embeddings(latent[:1], "frame", model.cfg.grid_size), in_time.mean(1))


@torch.no_grad()
def test_audiomae_encoder(plain):
    model, io = plain
    close(model.encode(io["spec"])[:, 1:], io["tokens"][:, 1:])
    close(model.encode(io["spec"])[:, 0], io["tokens"][:, 0])
    close(model(io["spec"], mask=io["mask"]).latent, in_order(io))


@torch.no_grad()
def test_default_frames_follow_a_click(plusplus):
    """Whoever asks where in a clip something happened would be sent to another moment."""
    model, _ = plusplus
    frontend, places = build_frontend(model.cfg), range(4, 46, 3)
    wav = torch.zeros(1 + len(places), 32_000)
    wav += 1e-4 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    for row, place in enumerate(places, 1):
        wav[row, 640 * place + 320] += 0.9
    frames = frame_embeddings(model.encode(frontend(wav)), model.cfg.grid_size)
    moved = (frames[1:] - frames[:1]).square().mean(-1).argmax(1)
    assert torch.equal(moved, torch.tensor(list(places)))


def test_a_whole_released_file_opens_without_its_packages(tmp_path, monkeypatch):
    """{model, optimizer, epoch, scaler, args}, whose args hold a config of a package that need not be there."""
    module = types.ModuleType("ml_collections.config_dict.config_dict")
    module.ConfigDict = type("ConfigDict", (), {"__module__": module.__name__})
    for name in ("ml_collections", "ml_collections.config_dict", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    config = module.ConfigDict()
    config.__dict__ |= {"_fields": {"arch": "mae_plusplus_tiny"}, "_locked": False}
    weights = read_weights(PLUSPLUS)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    whole = dict(model=weights, optimizer=optimizer.state_dict(), epoch=99, scaler={"scale": 1.0},
                 args=argparse.Namespace(config=config, lr=1e-4, output_dir=Path("runs")))
    torch.save(whole, tmp_path / "checkpoint-99.pth")
    for name in ("ml_collections", "ml_collections.config_dict", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    model = load_official(tmp_path / "checkpoint-99.pth", **HEADS[PLUSPLUS])
    assert model.placement.placed == 112 and not model.placement.unexpected


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", ""])
def test_wrappers_names_do_not_matter(wrapper):
    weights = {wrapper + name: t for name, t in read_weights(PLAIN).items()}
    model = load_official({"state_dict": weights}, num_heads=4)
    assert torch.equal(model.encoder.cls_token, weights[wrapper + "cls_token"])


def test_audiomae_with_its_own_kinds_of_decoder():
    """One that attends everywhere is placed, on 2-D positions; the released one, in windows, is left out and said."""
    weights, donor = read_weights(PLAIN), load_official(PLAIN, num_heads=4, decoder_depth=2)
    decoder = {}
    for name, tensor in donor.decoder.state_dict().items():
        stem, _, rest = name.partition(".")
        rest = rest.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")
        decoder["mask_token" if stem == "mask_token" else f"decoder_{stem}.{rest}"] = torch.randn_like(tensor)
    decoder["decoder_pos_embed"] = donor.decoder.pos_embed
    whole = load_official(weights | decoder, num_heads=4)
    assert whole.cfg.decoder_depth == 2 and not whole.placement.remarks and not whole.placement.missing
    assert torch.equal(whole.decoder.blocks[1].mlp[2].weight, decoder["decoder_blocks.1.mlp.fc2.weight"])
    in_windows = decoder | {"decoder_blocks.0.attn.meta_mlp.fc1.weight": torch.ones(4, 2)}
    encoder = load_official(weights | in_windows, num_heads=4)
    assert "attends in windows" in str(encoder.placement) and "random weights" in str(encoder.placement)
    assert torch.equal(encoder.encoder.norm.weight, whole.encoder.norm.weight)


def test_a_fine_tuned_audiomae_has_its_last_norm_elsewhere():
    weights = read_weights(PLAIN)
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in weights.items()}
    tuned |= {"head.weight": torch.ones(50, 96), "head.bias": torch.ones(50)}
    with pytest.warns(UserWarning, match=r"2 unexpected \(head.weight, head.bias\)"):
        model = load_official(tuned, num_heads=4)
    assert "came after the pooling" in str(model.placement)
    assert torch.equal(model.encoder.norm.weight, weights["norm.weight"])


BACK = [  # our name → AudioMAE++'s
    (r"^encoder\.cls_token", "cls_token"), (r"^encoder\.patch_embed", "patch_embed.proj"),
    (r"^encoder\.norm", "encoder.encoder_norm"), (r"^decoder\.(embed|blocks|norm|pred)", r"decoder.decoder_\1"),
    (r"attn\.(qkv|proj)", r"attn.\1_layer"), (r"ffn1\.0", "ffn1.layer1"), (r"ffn1\.2", "ffn1.layer2"),
    (r"ffn2\.value", "ffn2.linear1"), (r"ffn2\.gate", "ffn2.linear2"), (r"ffn2\.norm", "ffn2.ln"),
]


@pytest.mark.parametrize("name", ["official_tiny", "official_base", "official_large"])
def test_released_sizes_need_no_words(name):
    """Their heads are known: whoever has a released file can open it without reading a paper first."""
    model = AudioMAEPlusPlus(Config.preset(name, depth=1, decoder_depth=1))
    weights = {"encoder.pos_embed": model.encoder.pos_embed, "decoder.decoder_pos_embed": model.decoder.pos_embed}
    for ours, tensor in model.state_dict().items():
        theirs = ours
        for pattern, back in BACK:
            theirs = re.sub(pattern, back, theirs)
        weights[theirs] = tensor.unflatten(1, (1, 4, 16)) if theirs == "patch_embed.proj.weight" else tensor
    again = load_official(weights)
    assert again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    """The same folder under a repository's name; a name that leads nowhere says both things that it could have been."""
    cfg = Config.preset("nano", depth=1)
    model, asked = AudioMAEPlusPlus(cfg).eval(), []
    model.save_pretrained(tmp_path / "there")

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(tmp_path / "there" / filename)

    monkeypatch.setattr("audiomaepp.pretrained.hf_hub_download", download)
    again = AudioMAEPlusPlus.from_pretrained("someone/sounds", revision="v2")
    spec = torch.randn(2, 1, 200, 80)
    with torch.no_grad():
        assert torch.equal(again.get_embedding(spec), model.get_embedding(spec))
    assert asked == [("someone/sounds", name, {"revision": "v2"}) for name in ("config.json", "model.safetensors")]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="someone/sounds must be a folder or a Hub repo.*, and from the Hub"):
        AudioMAEPlusPlus.from_pretrained("someone/sounds", local_files_only=True, cache_dir=tmp_path / "cache")


def test_an_upload_is_what_save_pretrained_writes(monkeypatch):
    """A repository without its config or card, or in another owner's name, is found out by whoever downloads it."""
    model, calls = AudioMAEPlusPlus(Config.preset("nano", depth=1)).eval(), []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))
            return types.SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, folder_path, **options):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            calls.append((files, options))
            return "https://hub/commit"

    monkeypatch.setattr("audiomaepp.pretrained.HfApi", Api)
    url = model.push_to_hub("sounds", token="t", private=True, branch="v2", create_pr=True,
                            model_card_kwargs=dict(data="Eight clips."))  # fmt: skip
    token, repo, (files, options) = calls
    assert (url, token, repo) == ("https://hub/commit", "t", ("sounds", True, True))
    assert files.keys() == {"README.md", "config.json", "model.safetensors"} and b"Eight clips." in files["README.md"]
    assert (options["repo_id"], options["revision"], options["create_pr"]) == ("someone/sounds", "v2", True)


def test_saving_may_upload(tmp_path, monkeypatch):
    """The repository takes the name of the folder unless another is given, as the Hub's own library does it."""
    model, calls = AudioMAEPlusPlus(Config.preset("nano", depth=1)), []
    monkeypatch.setattr(AudioMAEPlusPlus, "push_to_hub", lambda self, *args, **options: calls.append((args, options)))
    model.save_pretrained(tmp_path / "a", push_to_hub=True, private=True)
    model.save_pretrained(tmp_path / "b", push_to_hub=True, repo_id="someone/sounds")
    model.save_pretrained(tmp_path / "c")
    assert calls == [(("a",), dict(model_card_kwargs=None, private=True)),
                     (("someone/sounds",), dict(model_card_kwargs=None))]  # fmt: skip


def test_the_model_alone_loads_nothing_of_the_hub():
    """Whoever reads or trains the model needs no library that speaks to a server."""
    look = "import sys, audiomaepp.model; print(*({'huggingface_hub', 'audiomaepp.pretrained'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
