"""Files that are damaged, hostile or of another kind: a loader says at once which file is wrong, in little memory."""

import json
import subprocess
import sys

import fuzz_artefacts
import numpy as np
import pandas as pd
import pytest
import torch
from fuzz_artefacts import SMALL, Folder
from safetensors.torch import load_file, save_file

from audiomaepp.checkpoints import load_checkpoint, read_progress
from audiomaepp.config import Config
from audiomaepp.data import open_recordings
from audiomaepp.embed import EmbeddingGenerator, WindowEncoder
from audiomaepp.finetune import Classifier
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.pretrained import load_official
from audiomaepp.search import SoundIndex
from audiomaepp.source import open_again
from audiomaepp.train import Trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("artefacts"))


@pytest.fixture
def folder(made):
    "A folder with an artefact of each kind, whole again after the test."
    yield made.at
    made.restore()


def edit(path, **changes):
    "Change some keys of a JSON file."
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- any damage


@pytest.mark.parametrize("first", range(0, 150, 10))
def test_a_damaged_file_is_named(made, first):
    """A raw KeyError or a traceback of a library says neither which of ten files is damaged nor what to do about it."""
    wrong = []
    for seed in range(first, first + 10):
        try:
            name, way = fuzz_artefacts.mutate(seed, made.at, made.names)
            fuzz_artefacts.check(made.at, name)
        except AssertionError as error:
            wrong.append(f"seed {seed}, {name} {way}: {error}")
        finally:
            made.restore()
    assert not wrong, "\n".join(wrong)


def test_whole_files_load(made):
    """A check that refuses good files would pass every test of bad ones."""
    for name in made.names:
        for load in fuzz_artefacts.loaders(name):
            assert fuzz_artefacts.finite(load(made.at)), (name, load)


# ---- more than there is


BOMBS = {
    "depth": dict(depth=10**7), "decoder_depth": dict(decoder_depth=10**7), "num_heads": dict(num_heads=10**9),
    "embed_dim": dict(embed_dim=2**20), "img_size": dict(img_size=[10**9, 16]), "n_fft": dict(n_fft=10**9),
    "mlp_ratio": dict(mlp_ratio=64.0), "in_chans": dict(in_chans=10**6), "both": dict(depth=999, embed_dim=65536),
}  # fmt: skip

LOAD = """
import json, resource, sys, time
from pathlib import Path
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.finetune import Classifier
from audiomaepp.train import Trainer
folder, bombs, slow = Path(sys.argv[1]), json.loads(sys.argv[2]), []
loaders = {"run/config.json": lambda: EmbeddingGenerator(folder / "run", "cpu"),
           "classifier/config.json": lambda: Classifier.from_pretrained(folder / "classifier"),
           "run/checkpoint.safetensors": lambda: Trainer.resume(folder / "run", quiet=True)}
for load in loaders.values(): load()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, load in loaders.items():
    path = folder / name
    data = path.read_bytes()
    for what, changes in bombs.items():
        if name.endswith("json"):
            path.write_text(json.dumps(json.loads(data) | changes))
        else:
            n = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + n])
            progress = json.loads(header["__metadata__"]["progress"])
            progress["config"] |= changes
            header["__metadata__"]["progress"] = json.dumps(progress)
            head = json.dumps(header).encode()
            path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + n :])
        began = time.process_time()
        try: load()
        except ValueError as error: assert path.name in str(error), error
        else: raise AssertionError(f"{what} was loaded")
        if time.process_time() - began > 20: slow.append((name, what))
    path.write_bytes(data)
assert not slow, slow
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
"""


def test_a_config_that_the_weights_do_not_bear_out_fills_no_memory(folder):
    """A downloaded config with depth=10**7 took all of the memory before the weights were looked at."""
    program = [sys.executable, "-c", LOAD, str(folder), json.dumps(BOMBS)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 200, f"{done.stdout} MB"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(depth=10**7), "depth must be at most 1000, got 10000000"),
        (dict(num_heads=10**9), "num_heads must be at most 65536, got 1000000000"),
        (dict(img_size=(10**6, 10**6)), "img_size"),
        (dict(n_fft=2**40), "n_fft"),
        (dict(base_lr=10**400), "base_lr"),
        (dict(sample_rate=10**400), "sample_rate"),
        (dict(seed=10**30), "seed"),
    ],
)
def test_a_setting_beyond_any_use_is_refused(changes, words):
    """`--num-heads 1000000000` looked for a better number for ever, and a depth of ten million filled the memory."""
    with pytest.raises(ValueError, match=words) as caught:
        Config(**changes)
    assert len(str(caught.value)) < 400


# ---- weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["run/model", "classifier/head", "run/checkpoint", "released"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    """NaN weights loaded without a word, and every embedding and score after them was NaN."""
    path = folder / f"{name}.safetensors"
    tensors, notes = load_file(path), fuzz_artefacts.notes_of(path)
    bad = next(key for key, value in tensors.items() if value.ndim == 2 and value.is_floating_point())
    tensors[bad].view(-1)[-1] = value
    save_file(tensors, path, notes)
    load = {
        "run/model": lambda: AudioMAEPlusPlus.from_pretrained(folder / "run"),
        "classifier/head": lambda: Classifier.from_pretrained(folder / "classifier"),
        "run/checkpoint": lambda: Trainer.resume(folder / "run", quiet=True),
        "released": lambda: load_official(path, num_heads=4, decoder_num_heads=4),
    }[name]
    with pytest.raises(ValueError) as caught:
        load()
    assert path.name in str(caught.value) and bad in str(caught.value)


def test_a_refused_checkpoint_leaves_the_model_alone(folder):
    """Half of a damaged checkpoint in a model is worse than none of it."""
    path, model = folder / "run/checkpoint.safetensors", AudioMAEPlusPlus(Config(**SMALL))
    tensors, notes = load_file(path), fuzz_artefacts.notes_of(path)
    name = next(key for key in tensors if key.startswith("exp_avg_sq."))
    save_file(tensors | {name: torch.zeros(3)}, path, notes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint.safetensors"):
        load_checkpoint(path, model, torch.optim.AdamW(model.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_config_name_both_files(folder):
    edit(folder / "run/config.json", embed_dim=16)
    with pytest.raises(ValueError) as caught:
        AudioMAEPlusPlus.from_pretrained(folder / "run")
    said = str(caught.value)
    assert "config.json" in said and "model.safetensors" in said and "embed_dim=16" in said


# ---- what a file must hold


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("run/config.json", dict(depth="4"), "depth"),
        ("run/config.json", dict(format_version="a"), "format_version"),
        ("run/data.json", dict(fold=[5]), "fold"),
        ("run/data.json", dict(fraction=7.0), "fraction"),
        ("classifier/classifier.json", dict(classes=["a", 3]), "classes"),
        ("classifier/classifier.json", dict(classes=["a", "b", "c"]), "head"),
        ("lab/comparison.json", dict(experiment=3), "experiment"),
        ("lab/a/seed0/results.json", dict(history=[3]), "history"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_and_key(folder, name, changes, words):
    edit(folder / name, **changes)
    with pytest.raises(ValueError) as caught:
        fuzz_artefacts.loaders(name)[0](folder)
    assert (folder / name).name in str(caught.value) and words in str(caught.value)


def test_a_run_whose_data_json_lost_its_digest_says_so(folder):
    facts = json.loads((folder / "run/data.json").read_text())
    del facts["held_out"]
    (folder / "run/data.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"data\.json"):
        open_again(folder / "run", Config(**SMALL), quiet=True)


def test_a_table_of_embeddings_is_checked(folder):
    """One NaN row made every search an error about arrays that the user had never seen."""
    path = folder / "embeddings.parquet"
    table = pd.read_parquet(path)
    for row, words in [([np.nan] * 8, "NaN"), ([1.0], "1 number"), (None, "row 2")]:
        rows = list(table["embedding"])
        rows[2] = row
        table.assign(embedding=rows).to_parquet(path)
        with pytest.raises(ValueError, match=r"embeddings\.parquet") as caught:
            SoundIndex(path)
        assert words in str(caught.value)


def test_a_damaged_part_is_found_before_hours_of_embedding(folder):
    """A NaN in what an earlier call left behind went into the finished file."""
    path = folder / "embeddings.parquet"
    EmbeddingGenerator(folder / "run", "cpu").embed_folder(folder / "sounds", path, quiet=True)  # as it is
    fuzz_artefacts.with_embedding(path, 1, [float("nan")] * 8)
    with pytest.raises(ValueError, match=r"embeddings\.parquet.*row 1"):
        EmbeddingGenerator(folder / "run", "cpu").embed_folder(folder / "sounds", path, quiet=True)


def test_an_embedding_that_is_not_finite_is_never_written(folder, monkeypatch, tmp_path):
    """A table with one NaN row cannot be searched, and the next call would refuse it."""
    plain = WindowEncoder.embed

    def overflowing(self, wav, lengths, pooling_mode):
        vectors = plain(self, wav, lengths, pooling_mode)
        vectors[wav.std(dim=1).argmin()] = float("inf")
        return vectors

    monkeypatch.setattr(WindowEncoder, "embed", overflowing)
    embed = EmbeddingGenerator(folder / "run", "cpu")
    table = embed.embed_folder(folder / "sounds", tmp_path / "x.parquet", quiet=True)
    ((path, reason),) = table.attrs["skipped"]
    assert "NaN or infinity" in reason and path not in set(table["path"]) and len(table) == 3
    assert len(SoundIndex(tmp_path / "x.parquet")) == 3


@pytest.mark.parametrize("value", ["soon", "-1", "inf"])
def test_durations_that_are_none_are_named(folder, value):
    path = folder / "manifest.csv"
    path.write_text(path.read_text().replace("0.25", value, 1))
    with pytest.raises(ValueError, match=r"manifest\.csv.*seconds"):
        open_recordings(path)


def test_the_progress_of_a_checkpoint_is_checked(folder):
    path = folder / "run/checkpoint.safetensors"
    tensors, progress = load_file(path), json.loads(fuzz_artefacts.notes_of(path)["progress"])
    for key, value in dict(epoch=-1, step="many", rows=[1], best=[], config=None).items():
        save_file(tensors, path, {"progress": json.dumps(progress | {key: value})})
        with pytest.raises(ValueError, match=rf"{key}.*checkpoint\.safetensors|checkpoint\.safetensors.*{key}"):
            read_progress(path)
