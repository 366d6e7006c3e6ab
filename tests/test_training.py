"""Training learns: the reconstruction gets better, on clips it never saw as well, and every loss is written down."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch

from audiomaepp.config import POOLING_MODES, Config
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.run import train_run
from audiomaepp.source import Source
from audiomaepp.train import History, Trainer

ALWAYS = {"epoch", "step", "lr", "loss", "reconstruction", "grad_norm", "clips_per_s"}


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("uniformity", [False, True])
def test_two_epochs(tmp_path, contrastive, uniformity):
    cfg = Config.preset(
        "nano", depth=1, epochs=2, warmup_epochs=0.5, batch_size=12, base_lr=2e-2, eval_every=1,
        use_contrastive_loss=contrastive, use_uniformity_loss=uniformity,
    )  # fmt: skip
    model, history = train_run(cfg, Source(synthetic_clips=6), tmp_path, quiet=True)
    assert len(history) == 2 and history["epoch"] == [1, 2]
    before, after = history["reconstruction"]
    assert after < 0.9 * before, "the reconstruction does not get better"
    before, after = history["validation_reconstruction"]
    assert after < before, "what was learned does not carry over to validation clips"

    extra = {name for name, on in (("contrastive", contrastive), ("uniformity", uniformity)) if on}
    scores = {"validation_reconstruction", "validation_uniformity", "rankme", "knn"}  # no class has two
    assert set(history.columns) == ALWAYS | extra | scores
    weights = {"contrastive": cfg.contrastive_weight, "uniformity": cfg.uniformity_weight}
    for row in history.rows:
        assert all(np.isfinite(value) for value in row.values())
        parts = row["reconstruction"] + sum(weights[name] * row[name] for name in extra)
        assert row["loss"] == pytest.approx(parts, abs=1e-4)
    if uniformity:
        assert all(-4.5 < value < 0 for value in history["uniformity"])
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == history.rows


def test_a_history_that_is_read_back_shows_what_it_showed(tmp_path):
    history = History()
    for epoch in range(1, 31):  # scores in some rows only, as every training leaves them
        row = {"epoch": epoch, "step": 7 * epoch, "lr": 1e-4 / epoch, "loss": 1 / 3 / epoch}
        history.rows.append(row | ({"accuracy": epoch / 31} if epoch % 5 == 0 else {}))
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        strings = list(csv.DictReader(file))
    read = [History.from_csv(tmp_path / "history.csv"), History(json.loads(json.dumps(history.rows))),
            History(pd.read_csv(tmp_path / "history.csv").to_dict("records"))]  # fmt: skip
    assert read[0].rows == read[1].rows == history.rows
    for again in read:
        assert (str(again), again._repr_html_()) == (str(history), history._repr_html_())
        assert "nan" not in str(again) and again.plot()._repr_png_()
        assert again["accuracy"] == pytest.approx(history["accuracy"])  # pandas may round the last digit
    assert len(History(strings).shown()) == len(history.shown()) == 6
    History().to_csv(tmp_path / "none.csv")
    assert len(History.from_csv(tmp_path / "none.csv")) == 0


def test_a_checkpoint_within_the_first_epoch_finds_its_folder(tmp_path):
    "An epoch may last for hours: the first checkpoint comes before the first evaluation."
    cfg = Config.preset("nano", depth=1, epochs=1, warmup_epochs=0)
    batches = [{"spec": torch.randn(4, 1, 200, 80)}] * 2
    Trainer(cfg, out_dir=tmp_path / "new" / "run", quiet=True, save_minutes=0).fit(batches)
    assert (tmp_path / "new" / "run" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_every_pooling_mode_trains_where_whole_bands_are_hidden(mode):
    torch.manual_seed(0)
    cfg = Config.preset("nano", depth=1, mask_ratio=0.95, pooling_mode=mode, embedding_norm="batch")
    model = AudioMAEPlusPlus(cfg)
    spec = torch.randn(6, 1, *cfg.img_size)
    out = model(spec, labels=torch.arange(6) // 2)
    visible = (out.mask == 0).unflatten(1, cfg.grid_size).sum(dim=1)  # (clips, bands)
    assert (visible == 0).any() and (visible == 1).any()
    assert out.embeddings.shape == (6, cfg.embedding_dim)
    out.losses["contrastive"].backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters() if p.grad is not None)
    assert model.encoder.patch_embed.weight.grad.abs().max() > 0

    again = torch.where(model.unpatchify(out.mask[..., None].expand(-1, -1, cfg.patch_dim)) > 0, 99.0, spec)
    assert torch.equal(model(again, mask=out.mask).embeddings, out.embeddings), "a hidden patch reaches the embedding"
