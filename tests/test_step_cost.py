"""What a training step costs, in kernels: a copy, a cast or a second pass that slips in slows every step of a run."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiomaepp.config import Config
from audiomaepp.train import Trainer


class Kernels(TorchDispatchMode):
    "Counts the operations that run, by name."

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernels_of_a_step(**changes):
    "The operations of one training step, forward, backward and optimizer."
    small = dict(embed_dim=32, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=4)
    cfg = Config.preset("nano", **small, fused_optimizer=True, **changes)
    trainer, batch = Trainer(cfg, quiet=True), {"spec": torch.randn(4, 1, *cfg.img_size), "label": torch.arange(4) // 2}
    trainer.engine.step([batch], 0, cfg.lr)  # makes the optimizer's state
    with Kernels() as kernels:
        trainer.engine.step([batch], 1, cfg.lr)
    return kernels.counts


def kernels_of_a_block(**changes):
    "What one more block of the encoder adds to a step."
    return kernels_of_a_step(depth=3, **changes) - kernels_of_a_step(depth=2, **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_block_is_its_products_and_little_else(precision):
    block = kernels_of_a_block(precision=precision)
    # two layers of the MLP, two of the attention, three of the SwiGLU; each has a gradient of its input and its weight
    assert block["addmm"] == 7 and block["mm"] == 14
    assert block["native_layer_norm"] == block["native_layer_norm_backward"] == 4
    assert block["copy_"] == 0 and block["cat"] == 0


def test_in_float32_a_block_copies_once_and_casts_nothing():
    """The copy puts the heads of the attention side by side."""
    block = kernels_of_a_block(precision="fp32")
    assert block["clone"] <= 1 and block["_to_copy"] == 0
    assert sum(block.values()) <= 159


def test_in_bf16_a_block_casts_weights_and_gradients_once():
    """Seven weights and biases, their gradients, and what the normalizations return in float32, on a GPU also take."""
    assert kernels_of_a_block(precision="bf16")["_to_copy"] <= (43 if torch.cuda.is_available() else 39)


def test_a_second_view_is_encoded_in_the_same_pass():
    one, two = (kernels_of_a_step(use_labels=not views, precision="fp32", views=1 + views) for views in (0, 1))
    assert two["addmm"] == one["addmm"] and two["mm"] == one["mm"]
