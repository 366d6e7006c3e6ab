"""File names are bytes: one that is not UTF-8 stops nothing and is lost nowhere; tables and pages show it escaped."""

import csv
import html
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audiomaepp import cli
from audiomaepp.data import Recordings, drop_unreadable, open_recordings, split
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.search import SoundIndex
from audiomaepp.tables import paths_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
TINY = """--preset tiny --epochs 1 --warmup-epochs 0 --batch-size 4 --embed-dim 32 --depth 1 --num-heads 2
    --precision fp32 --decoder-embed-dim 32 --decoder-depth 1 --decoder-num-heads 2
    --img-size 48 80 --patch-size 16 16""".split()
CLASSES, EACH = (b"caf\xe9", b"plain", b"th\xe9"), 6


def write(path, seed=0, samples=8000):
    "A short noise in a file whose name is bytes."
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(samples), 16000, format="WAV")
    return os.fsdecode(path)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    "Three classes; half of the names, two of the classes and the folder of all are not UTF-8; one file is broken."
    at = os.path.join(os.fsencode(tmp_path_factory.mktemp("in")), b"so\xfcnds")
    for k, name in enumerate(CLASSES):
        for i in range(EACH):
            write(os.path.join(at, name, (b"caf\xe9 %d.wav", b"ok %d.wav")[i % 2] % i), 10 * k + i)
    with open(os.path.join(at, b"th\xe9", b"le\xe8re.wav"), "wb"):
        pass
    return os.fsdecode(at)


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    "A run that was trained on them, through the command."
    out = tmp_path_factory.mktemp("run") / "first"
    cli.main(["train", "--data", sounds, "--out", str(out), *TINY])
    return out


def every_path(folder):
    return sorted(str(path) for path in Path(folder).rglob("*.wav") if path.stat().st_size)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- tables


def test_paths_are_bytes_and_tables_show_them_escaped(sounds):
    recordings = open_recordings(sounds)
    good = drop_unreadable(recordings, quiet=True)
    assert good.paths == every_path(sounds) and good.classes == [r"caf\xe9", "plain", r"th\xe9"]
    assert good.table["path"].str.contains(r"so\xfcnds/", regex=False).all()
    for shown in (repr(recordings), recordings._repr_html_(), str(good.table), repr(good.skipped)):
        shown.encode()
    assert good.source == r"so\xfcnds" and r"th\xe9" in good._repr_html_() and r"le\xe8re.wav" in repr(good.skipped)
    assert os.path.exists(good.skipped[0][0])


def test_parts_keep_their_paths(sounds):
    recordings = open_recordings(sounds)
    train, test, _ = split(recordings)
    assert sorted(train.paths + test.paths) == sorted(recordings.paths)
    assert test.at_rate(8000).paths == test.paths and test.at_rate(8000).wav(0).shape[0] >= 1
    chosen = recordings.select(r"label == 'caf\\xe9'")
    assert len(chosen) == EACH and chosen.wav(0).isfinite().all()
    again = Recordings(chosen.table.assign(label="a"))  # whoever changes a table has the paths still
    assert again.paths == chosen.paths


def test_tables_without_such_names_stay_as_they_are(tmp_path):
    for name in (b"a/1.wav", b"b/\xc3\xa9 \\xe9.wav"):  # UTF-8, and a backslash that is one
        write(os.path.join(os.fsencode(tmp_path), name))
    recordings = open_recordings(tmp_path)
    assert list(recordings.table) == ["path", "label"] and list(recordings.table["path"]) == recordings.paths
    assert recordings.paths[1].endswith("é \\xe9.wav") and len(recordings.wav(1)) == 8000


def test_two_names_that_look_alike_are_two(tmp_path):
    "The escaped name of one file is the true name of the other."
    for i, name in enumerate((b"caf\\xe9.wav", b"caf\xe9.wav")):
        write(os.path.join(os.fsencode(tmp_path), name), samples=8000 + i)
    recordings = open_recordings(tmp_path)
    assert sorted(len(recordings.wav(i)) for i in range(2)) == [8000, 8001]
    recordings.table.to_parquet(tmp_path / "list.parquet")
    recordings = open_recordings(tmp_path / "list.parquet")
    assert sorted(len(recordings.wav(i)) for i in range(2)) == [8000, 8001]


def test_labels_from_names(tmp_path):
    for name in (b"th\xe9_1.wav", b"th\xe9_2.wav", b"lait_1.wav"):
        write(os.path.join(os.fsencode(tmp_path), name))
    recordings = open_recordings(tmp_path, label_from=r"^([^_]+)_")
    assert recordings.classes == ["lait", r"th\xe9"]


@pytest.mark.parametrize("kind", ["raw csv", "escaped csv", "parquet", "binary parquet"])
def test_manifests(tmp_path, kind):
    "A list made with `ls`, one copied from a table, the table itself, and one that another program wrote."
    at = os.path.join(os.fsencode(tmp_path), b"d\xe9")
    names = [b"caf\xe9.wav", b"ok.wav", b"gone\xe9.wav"]
    for name in names[:2]:
        write(os.path.join(at, name))
    manifest = os.path.join(os.fsdecode(at), "list." + kind.split()[-1])
    labels = ["a", "b", "c"]
    if kind == "raw csv":
        data = b"path,label\n" + b"".join(b"%s,th\xe9\n" % name for name in names)
    elif kind == "escaped csv":
        data = b"path,label\ncaf\\xe9.wav,th\\xe9\nok.wav,th\\xe9\ngone\\xe9.wav,\n"
    elif kind == "parquet":
        shown, raw = [r"caf\xe9.wav", "ok.wav", r"gone\xe9.wav"], [names[0], None, names[2]]
        data = pd.DataFrame(dict(path=shown, path_bytes=raw, label=labels)).to_parquet()
    else:
        data = pd.DataFrame(dict(path=names, label=labels)).to_parquet()
    Path(manifest).write_bytes(data)
    recordings = open_recordings(manifest)
    assert recordings.paths == [os.fsdecode(os.path.join(at, name)) for name in names[:2]]
    assert len(recordings.wav(0)) == 8000 and [why for _, why in recordings.skipped] == ["does not exist"]
    if kind.endswith("csv"):
        assert recordings.classes == [r"th\xe9"]


# ---- a run


def test_a_run_keeps_every_clip(run, sounds):
    facts = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert facts["n_train"] + facts["n_test"] == len(CLASSES) * EACH and facts["skipped"] == 1
    (row,) = rows_of(run / "skipped.csv")
    assert row["path"].endswith(r"so\xfcnds/th\xe9/le\xe8re.wav") and "empty" in row["reason"]


def test_evaluate_and_map(run, capsys):
    cli.main(["map", str(run)])
    capsys.readouterr().out.encode()
    page = (run / "pictures" / "map.html").read_text(encoding="utf-8")
    assert r"caf\\xe9" in page and "path_bytes" not in page
    assert r"so\\xfcnds" not in page, "a page that one may hand on names no folder of this machine"
    for name in ("results.csv", "results.json", "README.md"):
        (run / name).read_text(encoding="utf-8")


def test_finetune(run, tmp_path, capsys):
    cli.main(["finetune", str(run), "--out", str(tmp_path / "tuned"), "--epochs", "1"])
    facts = json.loads((tmp_path / "tuned" / "classifier.json").read_text(encoding="utf-8"))
    assert facts["classes"] == [r"caf\xe9", "plain", r"th\xe9"]


def test_lab(sounds, tmp_path, capsys):
    out = tmp_path / "lab"
    line = ["lab", "--data", sounds, "--out", str(out), "--axis", "mask_ratio=0.5,0.6", "--no-maps", *TINY]
    cli.main(line)
    assert r"le\xe8re.wav" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert r"le\xe8re.wav" in page and r"caf\xe9" in page
    held = pd.read_parquet(out / "held_out.parquet")
    assert set(paths_of(held)) < set(every_path(sounds)), "the clips can be found again"
    cli.main(line)  # reads what is there
    again = page.split("<pre>")[1].split("</pre>")[0]
    data = html.unescape(again).split("--data '")[1].split("'")[0]
    assert open_recordings(data).paths == open_recordings(sounds).paths, "the line opens the same folder"


# ---- embeddings


@pytest.fixture(scope="module")
def table(run, sounds, tmp_path_factory):
    "The folder, embedded through the command; where the file's own name is not UTF-8 either."
    out = os.path.join(tmp_path_factory.mktemp("out"), os.fsdecode(b"v\xe9.parquet"))
    cli.main(["embed", str(run), "--data", sounds, "--out", out])
    return out


def read(path):
    with open(path, "rb") as file:
        return pd.read_parquet(file)


def test_every_file_is_embedded(table, sounds):
    found = read(table)
    assert sorted(paths_of(found)) == every_path(sounds)
    assert found["path"].str.contains(r"so\xfcnds", regex=False).all() and found["path_bytes"].notna().all()
    assert set(found["label"]) == {r"caf\xe9", "plain", r"th\xe9"}
    (row,) = rows_of(table.removesuffix(".parquet") + ".skipped.csv")
    assert row["path"].endswith(r"le\xe8re.wav")


def test_in_memory_it_is_the_same_table(table, run, sounds):
    generator, stored = EmbeddingGenerator(run), read(table)
    found = generator.embed_folder(sounds, quiet=True)
    assert list(found) == list(stored) and paths_of(found) == every_path(sounds)
    ours, theirs = (dict(zip(paths_of(t), t["embedding"], strict=True)) for t in (found, stored))
    assert all(np.allclose(ours[path], theirs[path], atol=1e-5) for path in ours)


def test_a_table_goes_on(table, run, sounds, tmp_path, monkeypatch):
    "Nothing is embedded twice; a new file, and one that changed, are; what was killed on the way counts."
    for path in every_path(sounds)[:5]:
        (tmp_path / "in").mkdir(exist_ok=True)
        os.symlink(path, os.path.join(tmp_path / "in", os.path.basename(path)))
    write(os.path.join(os.fsencode(tmp_path), b"in", b"plain.wav"))
    generator, out, embedded = EmbeddingGenerator(run), tmp_path / "x.parquet", []
    whole = generator.encoder.embed
    monkeypatch.setattr(generator.encoder, "embed", lambda *a: embedded.append(len(a[0])) or whole(*a))
    monkeypatch.setattr("audiomaepp.store.EmbeddingStore.finish", lambda *a: 1 / 0)  # killed before the end
    with pytest.raises(ZeroDivisionError):
        generator.embed_folder(tmp_path / "in", out, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr(generator.encoder, "embed", lambda *a: embedded.append(len(a[0])) or whole(*a))
    before = sum(embedded)
    assert len(generator.embed_folder(tmp_path / "in", out, quiet=True)) == 6 and sum(embedded) == before
    late = write(os.path.join(os.fsencode(tmp_path), b"in", b"n\xe9.wav"), 9)
    found = generator.embed_folder(tmp_path / "in", out, quiet=True)
    assert late in paths_of(found) and len(found) == 7 and sum(embedded) > before


def test_names_that_look_alike_have_their_own_vectors(run, tmp_path):
    for i, name in enumerate((b"caf\\xe9.wav", b"caf\xe9.wav")):
        write(os.path.join(os.fsencode(tmp_path), name), seed=i)
    generator = EmbeddingGenerator(run)
    for out in (None, tmp_path / "x.parquet", tmp_path / "x.parquet"):
        found = generator.embed_folder(tmp_path, out, quiet=True)
        for path, vector in zip(paths_of(found), found["embedding"], strict=True):
            np.testing.assert_allclose(vector, generator.extract_embedding(path), atol=1e-5)
        assert len(set(paths_of(found))) == 2


def test_a_table_without_such_names_has_no_new_column(run, tmp_path):
    write(os.path.join(os.fsencode(tmp_path), b"in", b"a.wav"))
    EmbeddingGenerator(run).embed_folder(tmp_path / "in", tmp_path / "x.parquet", quiet=True)
    assert list(read(tmp_path / "x.parquet")) == ["path", "label", "start", "end", "size", "modified", "embedding"]


def test_search_finds_them(table, sounds, tmp_path, capsys):
    clip = next(path for path in every_path(sounds) if not path.isascii())
    for query in (clip, os.fsencode(clip).decode("utf-8", "backslashreplace")):  # as the shell has it; as it was shown
        cli.main(["search", query, "--in", table, "--k", "17", "--out", str(tmp_path / "hits.csv")])
        assert r"th\xe9" in capsys.readouterr().out
        rows = rows_of(tmp_path / "hits.csv")
        assert len(rows) == 17 and "path_bytes" not in rows[0]
        assert os.fsencode(clip).decode("utf-8", "backslashreplace") not in {row["path"] for row in rows}
    page = SoundIndex(table).search(clip, k=3)._repr_html_()
    assert page.count("<audio") == 3, "the sounds behind the names are found"
    page.encode()


def test_a_table_is_a_manifest(table, sounds):
    again = open_recordings(drop_own(table))
    assert sorted(again.paths) == every_path(sounds)


def drop_own(table):
    "The table without the columns that `embed` added, as another file."
    out = table.removesuffix(".parquet") + "-list.parquet"
    with open(out, "wb") as file:
        read(table).drop(columns=["start", "end", "size", "modified", "embedding"]).to_parquet(file)
    return out


# ---- where a folder's name becomes ours


def test_runs_are_named_in_utf8(sounds, monkeypatch, tmp_path):
    "safetensors opens no other names: a training would end with a folder that nothing can read."
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "--data", sounds, *TINY])
    (made,) = Path("runs").iterdir()
    assert made.name.startswith(r"so\xfcnds-") and (made / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--data", sounds, "--out", os.fsdecode(b"runs/\xe9"), *TINY])
    assert "UTF-8" in str(caught.value) and len(list(Path("runs").iterdir())) == 1
