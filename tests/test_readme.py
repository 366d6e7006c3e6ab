"""README's code does what it says, in an empty folder, pasted as it stands."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audiomaepp import Config, Run, cli
from audiomaepp.synthetic import synthesize

README = Path(__file__).parents[1] / "README.md"
TINY = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=6, epochs=1,
            warmup_epochs=0, precision="fp32")  # fmt: skip


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder with sounds in ESC-50's layout, other sounds and a dog; presets of a second."
    made = synthesize(n=5, classes=3, seconds=1)
    rows = []
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        for folder in ("sounds/audio", "more_sounds"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / folder / f"{i}.wav", np.asarray(wave), 16000)
        rows.append(dict(filename=f"{i}.wav", fold=1 + i % 5, category=label))
    (tmp_path / "sounds/meta").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "sounds/meta/esc50.csv", index=False)
    soundfile.write(tmp_path / "dog.wav", np.asarray(made.waves[0]), 16000)
    preset = Config.preset
    monkeypatch.setattr(Config, "preset", lambda name, **changes: preset(name, **TINY | changes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_folder_to_a_map(home, capsys):
    (code,) = [block for block in blocks("python") if "Run.train" in block]
    lines = [line for line in code.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) <= 6, "about six lines"
    names = {}
    exec(code, names)
    said = capsys.readouterr().out
    assert "fold 5 held out: 12 train / 3 test" in said and "chance" in said and "similarity" in said
    page = (home / "map.html").read_text(encoding="utf-8")
    assert "Sounds are previews" in page and "this model" in page and len(names["table"]) == 15
    assert isinstance(names["run"], Run) and (home / "runs/c/model.safetensors").exists()


def test_the_commands_without_a_training_run(home, capsys):
    text = next(block for block in blocks("sh") if "--init starter" in block)
    lines = [shlex.split(line, comments=True)[1:] for line in text.splitlines()]
    assert [line[0] for line in lines] == ["map", "search", "embed", "train", "embed"]
    for line in lines:
        cli.main([*line, "--epochs", "1"] if line[0] == "train" else line)
    assert "generated sounds alone" in capsys.readouterr().out and len(pd.read_parquet("embeddings.parquet")) == 15
    assert len(pd.read_parquet("words.parquet")) == 15


def test_every_shell_command_parses_and_runs(home, capsys):
    text = next(block for block in blocks("sh") if "audiomaepp predict" in block)
    lines = [shlex.split(line, comments=True)[1:] for line in text.splitlines()]
    assert [line[0] for line in lines] == [
        "train", "evaluate", "map", "search", "embed", "search", "shard", "finetune", "predict"]
    for line in lines:
        cli.main([*line, "--epochs", "1"] if line[0] == "finetune" else line)
    assert "accuracy" in capsys.readouterr().out


def test_its_losses_are_those_of_its_code(capsys):
    """A reader who pasted the example got other numbers each time, and could not tell whether it worked."""
    (code,) = [block for block in blocks("python") if "AudioMAEPlusPlus(cfg)" in block]
    (imports,) = [block for block in blocks("python") if "import torch" in block]
    names = {}
    exec(imports + code, names)
    losses = {name: round(loss.item(), 3) for name, loss in names["out"].losses.items()}
    assert str(losses) in README.read_text(encoding="utf-8")


def test_what_it_says_of_masking():
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert "`nano` and `words` hide half of the patches; `semantic` and `Config()` hide three quarters" in text
    assert {Config.preset(name).mask_ratio for name in ("nano", "words")} == {0.5}
    assert {Config.preset("semantic").mask_ratio, Config().mask_ratio} == {0.75}


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
