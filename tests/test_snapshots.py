"""Snapshots of a training: they change nothing else, they survive an interruption, and they are the training's own."""

import pytest
import torch
from safetensors.torch import load_file

from audiomaepp import Config, Run
from audiomaepp.embed import fingerprint
from audiomaepp.run import RUN_FILES
from audiomaepp.train import SNAPSHOTS, Trainer, read_snapshots, untrained

SMALL = Config(
    img_size=(40, 16), patch_size=4, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1,
    decoder_num_heads=2, batch_size=8, epochs=5, warmup_epochs=1, base_lr=0.1, eval_every=2,
)  # fmt: skip
TINY = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=8,
            warmup_epochs=0, precision="fp32")  # fmt: skip


class Toy:
    def __len__(self):
        return 3

    def set_epoch(self, epoch, start=0, rank=0, count=1):
        self.epoch, self.start = epoch, start

    def __iter__(self):
        for i in range(self.start, 3):
            generator = torch.Generator().manual_seed(10 * self.epoch + i)
            yield {"spec": torch.randn(8, 1, 40, 16, generator=generator), "label": torch.arange(8) % 4}


def score(model):
    "An evaluation that draws random numbers."
    return {"knn": float(torch.rand(1))}


def trained(out, cfg=SMALL, **options):
    trainer = Trainer(cfg, out_dir=out, quiet=True, **options)
    trainer.fit(Toy(), score)
    return trainer


def snapshots(out):
    return {path.name: path.read_bytes() for path in out.glob(SNAPSHOTS)}


def test_they_change_nothing_of_the_training(tmp_path):
    "A person who turns them on to look at a training would look at another one."
    off = trained(tmp_path / "off")
    on = trained(tmp_path / "on", SMALL.replace(snapshots=True))
    assert not (tmp_path / "off" / "snapshots").exists()
    assert sorted(snapshots(tmp_path / "on")) == [f"epoch_{n:04d}.safetensors" for n in (1, 2, 4)]
    losses = [[{k: v for k, v in row.items() if k != "clips_per_s"} for row in one.history.rows] for one in (off, on)]
    assert losses[0] == losses[1]
    for name in ("model", "checkpoint"):  # the checkpoint holds the random state too
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("off", "on"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name


def test_a_resumed_training_leaves_the_same_ones(tmp_path):
    "A gap in the slider, or an epoch of another training in it."
    cfg = SMALL.replace(snapshots=True)
    trained(tmp_path / "whole", cfg)

    class PowerCut(Exception):
        pass

    def cut(row):
        if row["epoch"] == 4:
            raise PowerCut

    with pytest.raises(PowerCut):
        trained(tmp_path / "cut", cfg, callback=cut)
    (tmp_path / "cut" / "snapshots" / "epoch_0004.safetensors").unlink(missing_ok=True)
    Trainer.resume(tmp_path / "cut", quiet=True).fit(Toy(), score)
    assert len(snapshots(tmp_path / "whole")) == 3 and snapshots(tmp_path / "cut") == snapshots(tmp_path / "whole")


def test_those_of_a_training_that_left_nothing_else_are_removed(tmp_path):
    "A training killed before its first checkpoint begins anew, perhaps with other settings."
    trained(tmp_path, SMALL.replace(snapshots=True))
    for path in tmp_path.glob("*.*"):
        path.unlink()
    trained(tmp_path, SMALL.replace(epochs=1))
    assert not snapshots(tmp_path)


def test_epoch_0_is_where_the_training_starts():
    "The first stop of the slider would be another network."
    torch.manual_seed(7)
    before = torch.get_rng_state()
    start = untrained(SMALL)
    assert torch.equal(torch.get_rng_state(), before), "a look at the untrained network would change what follows"
    began = Trainer(SMALL, quiet=True).model
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), began.state_dict().values(), strict=True))


def test_a_snapshot_gives_the_vectors_of_its_epoch(tmp_path):
    on = trained(tmp_path, SMALL.replace(snapshots=True, epochs=4))
    spec = torch.randn(6, 1, 40, 16)
    models = read_snapshots(tmp_path, SMALL)
    assert list(models) == [1, 2, 4]
    with torch.no_grad():
        last, now = (model.eval().get_embedding(spec) for model in (models[4], on.model))
        first = models[1].get_embedding(spec)
    assert (last - now).norm() < 0.01 * now.norm() < 0.1 * (first - now).norm()


def test_a_damaged_snapshot_is_named(tmp_path):
    trained(tmp_path, SMALL.replace(snapshots=True, epochs=2))
    path = tmp_path / "snapshots" / "epoch_0002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="epoch_0002.safetensors must be a safetensors file"):
        read_snapshots(tmp_path, SMALL)


def test_a_file_of_somebody_else_is_no_snapshot(tmp_path):
    "A copy that a person keeps beside the snapshots ended the map with a message about int()."
    trained(tmp_path, SMALL.replace(snapshots=True))
    (tmp_path / "snapshots/epoch_0002 copy.safetensors").write_bytes(b"mine")
    assert list(read_snapshots(tmp_path, SMALL)) == [1, 2, 4]


def test_they_belong_to_the_files_of_a_run(tmp_path):
    "A demo that replaces a demo would leave the epochs of the old one; somebody else's would be overwritten."
    assert SNAPSHOTS in RUN_FILES
    run = Run.train(out=tmp_path / "run", quiet=True, synthetic_clips=2, snapshots=True, epochs=2, **TINY)
    assert len(snapshots(run.path)) == 2
    tuned = run.finetune(out=tmp_path / "tuned", quiet=True, epochs=1)
    assert not (tuned.path / "snapshots").exists(), "a classifier trains from another start"


def test_they_do_not_make_another_model_of_it():
    "Tables that were embedded before the setting existed could not be continued."
    model = untrained(SMALL)
    before = fingerprint(model)
    model.cfg = SMALL.replace(snapshots=True)
    assert fingerprint(model) == before
