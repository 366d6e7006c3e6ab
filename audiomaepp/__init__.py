"""AudioMAE++: masked autoencoders that learn from sounds. `import audiomaepp` is cheap: a name loads what it needs."""

__version__ = "0.1.0"

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors see; `_WHERE` says the same to `__getattr__`, and a test compares the two
    from audiomaepp.config import Config
    from audiomaepp.data import open_recordings, split
    from audiomaepp.embed import EmbeddingGenerator
    from audiomaepp.explorer import explore
    from audiomaepp.lab import Comparison, compare_losses
    from audiomaepp.losses import info_nce_loss, uniformity_loss
    from audiomaepp.model import AudioMAEOutput, AudioMAEPlusPlus
    from audiomaepp.pooling import extract_embeddings
    from audiomaepp.pretrained import load_official
    from audiomaepp.run import Run
    from audiomaepp.synthetic import synthesize
    from audiomaepp.train import Trainer

_WHERE = {  # the public names, and the module of each
    "Config": "config",
    "info_nce_loss": "losses",
    "uniformity_loss": "losses",
    "extract_embeddings": "pooling",
    "AudioMAEPlusPlus": "model",
    "AudioMAEOutput": "model",
    "Trainer": "train",
    "open_recordings": "data",
    "split": "data",
    "synthesize": "synthetic",
    "EmbeddingGenerator": "embed",
    "explore": "explorer",
    "load_official": "pretrained",
    "compare_losses": "lab",
    "Comparison": "lab",
    "Run": "run",
}
_MODULES = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")}  # audiomaepp.train works without its import
__all__ = ["__version__", *_WHERE]


# In Jupyter without ipywidgets tqdm draws its bars as text. It warns about that when it is first imported, by us or by a
# library that we use; the warning would be the first thing that a new user sees.
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name):
    if name in _WHERE:
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_WHERE, *_MODULES})
