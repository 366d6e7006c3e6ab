"""AudioMAE++: masked autoencoders that learn from sounds. `import audiomaepp` is cheap: a name loads what it needs."""

__version__ = "0.1.0"

from importlib import import_module

_WHERE = {  # the public names, and the module of each
    "Config": "config",
    "info_nce_loss": "losses",
    "uniformity_loss": "losses",
    "extract_embeddings": "pooling",
    "AudioMAEPlusPlus": "model",
    "AudioMAEOutput": "model",
    "Trainer": "train",
    "open_recordings": "data",
    "synthesize": "data",
    "EmbeddingGenerator": "embed",
    "load_official": "pretrained",
    "compare_losses": "lab",
    "Comparison": "lab",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_WHERE})
