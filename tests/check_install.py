"""Does the package work beside this torch and this torchaudio?

    python tests/check_install.py torch==2.13.0 torchaudio
    python tests/check_install.py torch torchaudio

The words are pip requirements. They are installed into a fresh environment in a temporary folder, with the package
itself and no other of its requirements than the front end needs; then features and resampling are computed and compared
with stored numbers.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FIXTURE = TESTS / "fixtures" / "frontend_oracle.safetensors"
PACKAGE = ("audiomaepp", "setup.py", "settings.ini", "pyproject.toml", "README.md")


def check(fixture: str):
    "Runs inside the fresh environment."
    import math
    import time

    import soundfile
    import torch

    plainly = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True, text=True)
    print("torch", torch.__version__, "| CUDA", torch.version.cuda, "| Python", sys.version.split()[0])
    print("import torchaudio:", (plainly.stderr.strip().splitlines() or ["works as it is"])[-1])

    began = time.perf_counter()
    import audiomaepp
    from audiomaepp.audio import load_audio, resample
    from audiomaepp.features import Fbank, LogMel

    print(f"audiomaepp {audiomaepp.__version__} imported in {time.perf_counter() - began:.3f} s beyond torch")
    assert "torchaudio" not in sys.modules, "importing the package must not import torchaudio"

    from safetensors.torch import load_file

    io = load_file(fixture)
    logmel, fbank = LogMel(), Fbank(198, 128)
    lengths = torch.full((len(io["wav"]),), io["wav"].shape[1])
    found = {
        "log-mel": (logmel.log_spectrum(io["wav"], lengths)[:, :200] - io["logmel_raw"]).abs().max(),
        "standardized": (logmel(io["wav"])[:, 0] - io["spec"]).abs().max(),
        "filter bank": (fbank.log_spectrum(io["wav"], lengths)[:, ::2] - io["kaldi_fbank"]).abs().max(),
    }
    for rate in (8_000, 44_100, 44_101, 48_000):
        tone = torch.sin(2 * math.pi * 440 * torch.arange(rate, dtype=torch.float64) / rate).float()
        wanted = torch.sin(2 * math.pi * 440 * torch.arange(16_000, dtype=torch.float64) / 16_000).float()
        found[f"{rate} Hz → 16000 Hz"] = (resample(tone, rate, 16_000) - wanted)[200:-200].abs().max()
    for name, difference in found.items():
        print(f"  {name}: largest difference {difference:.1e}")
        assert difference < (2e-3 if "Hz" in name else 1e-3), name

    soundfile.write("tone.flac", tone.numpy(), 48_000)
    assert load_audio("tone.flac").shape == (16_000,)

    import torchaudio  # whoever imports it now gets it

    # what needs no compiled code computes, also outside of what this package uses
    assert torchaudio.transforms.MFCC(melkwargs={"n_mels": 64})(io["wav"]).isfinite().all()
    print(f"torchaudio {torchaudio.__version__} works: all is well")


def main(requirements: list[str]):
    "Makes the environment, runs `check` in it, and removes it."
    with tempfile.TemporaryDirectory(prefix="check-install-") as folder:
        home = Path(folder)
        (home / "src").mkdir()
        for name in PACKAGE:  # a copy, for building leaves traces in its folder
            copy = shutil.copytree if (TESTS.parent / name).is_dir() else shutil.copy2
            copy(TESTS.parent / name, home / "src" / name)
        venv.create(home / "venv", with_pip=True)
        python = home / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        subprocess.run([*pip, *requirements, "numpy", "soundfile", "safetensors"], check=True)
        subprocess.run([*pip, "--no-deps", home / "src"], check=True)
        # -I: neither this folder nor the working tree can be imported by chance
        inside = [python, "-I", TESTS / Path(__file__).name, "--inside", FIXTURE]
        return subprocess.run(inside, cwd=home).returncode


if __name__ == "__main__":
    words = sys.argv[1:]
    if not words:
        sys.exit(__doc__)
    sys.exit(check(words[1]) if words[0] == "--inside" else main(words))
