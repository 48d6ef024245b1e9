"""Tracing a torch module gives its values in JAX, sharded as planned, and leaves torch as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from comfyui_tpu.runtime import bridge, skeleton
from comfyui_tpu.runtime.plan import mesh_of, spread


class Attention(torch.nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(48, 48 * 3)
        self.norm = torch.nn.LayerNorm(48)

    def forward(self, x, context=None, mask=None):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        if context is not None:
            k = v = context
        out = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2)


class Stack(torch.nn.Module):
    def __init__(self, heads=4, layers=3):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Attention(heads) for _ in range(layers))

    def forward(self, x, context=None, mask=None):
        for block in self.blocks:
            x = block(x, context, mask)
        return x


def context(chips, smooth_keys=False, **changes):
    plan = dataclasses.replace(spread(chips), min_sharded_elements=1, **changes)
    return bridge.TraceContext(plan, mesh_of(plan, tuple(jax.devices()[:chips])), smooth_keys)


def run(model, chips, *inputs, **options):
    """The model's forward through a scanned skeleton, under jit."""
    built = skeleton.build(lambda: Stack(model.blocks[0].heads, len(model.blocks)), stacked=["blocks"])
    state = model.state_dict()
    params = {
        name: np.stack([state[source].numpy() for (source,) in weight.sources])
        for name, weight in built.weights.items()
    }
    ctx = context(chips, **options)
    function = jax.jit(lambda p, xs: bridge.trace(lambda m, *a: m(*a), built.module, ctx, p, *xs))
    return bridge.to_torch(function(params, [x if x is None else bridge.to_numpy(x) for x in inputs]))


@pytest.mark.parametrize("chips", [1, 2, 8])
@pytest.mark.parametrize("heads", [4, 3], ids=["4-heads", "3-heads"])
@pytest.mark.parametrize("tokens", [16, 21], ids=["16-tokens", "21-tokens"])
@torch.no_grad()
def test_scanned_sharded_attention_agrees_with_torch(chips, heads, tokens):
    model = Stack(heads).eval()
    x = torch.randn(2, tokens, 48)
    torch.testing.assert_close(run(model, chips, x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chips", [1, 8])
@torch.no_grad()
def test_cross_attention_and_masks_agree_with_torch(chips):
    model, x = Stack(), torch.randn(1, 19, 48)
    text = torch.randn(1, 4, 7, 12)
    torch.testing.assert_close(run(model, chips, x, text), model(x, text), atol=1e-5, rtol=1e-5)
    mask = torch.rand(1, 1, 19, 19) > 0.3
    torch.testing.assert_close(run(model, chips, x, None, mask), model(x, None, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"attention": "ring"}, {"ring_chips": 2}, {"attention": "replicated"}], ids=str)
@torch.no_grad()
def test_every_way_of_attention_that_a_plan_may_name_agrees_with_torch(changes):
    model = Stack().eval()
    x = torch.randn(2, 21, 48)
    torch.testing.assert_close(run(model, 4, x, **changes), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_smooth_keys_reaches_the_operator():
    model, x = Stack(), torch.randn(1, 19, 48)
    plain, smooth = run(model, 1, x), run(model, 1, x, smooth_keys=True)
    assert not torch.equal(plain, smooth)
    torch.testing.assert_close(smooth, plain, atol=1e-5, rtol=1e-5)


def test_tracing_leaves_no_global_state():
    import torchax

    fastpath = torch.backends.mha.get_fastpath_enabled()
    before = (torch.get_default_dtype(), torch.get_default_device(), jax.config.jax_enable_x64, torch.get_rng_state())
    with torch.inference_mode():
        run(Stack().requires_grad_(False), 1, torch.zeros(1, 4, 48))
        assert type(torch.zeros(1) + 1) is torch.Tensor
        assert torch.is_inference_mode_enabled()
    assert torchax._env is None or not torchax._env.enabled
    after = (torch.get_default_dtype(), torch.get_default_device(), jax.config.jax_enable_x64)
    assert after == before[:3]
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    with pytest.raises(LookupError):
        bridge.current_trace()


def test_importing_torchax_keeps_torchs_encoder_fast_path():
    import subprocess
    import sys

    code = (
        "import torch; assert torch.backends.mha.get_fastpath_enabled();"
        "from comfyui_tpu.runtime import bridge; bridge.environment();"
        "assert torch.backends.mha.get_fastpath_enabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int32])
def test_values_cross_and_come_back(dtype):
    tensor = (torch.randn(3, 5) * 3).to(dtype)
    array = jnp.asarray(bridge.to_numpy(tensor))
    back = bridge.to_torch(array)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    back.zero_()  # owned: the device array must not notice
    assert torch.equal(bridge.to_torch(array), tensor)


def test_64_bit_values_become_32_bit():
    assert bridge.to_numpy(torch.tensor([3, -1])).dtype == np.int32
    assert bridge.to_numpy(torch.tensor([0.5], dtype=torch.float64)).dtype == np.float32


class TwoStreams(torch.nn.Module):
    """Blocks that are called by name and return two activations in another order than they take them."""

    def __init__(self, layers=3):
        super().__init__()
        self.pairs = torch.nn.ModuleList(TwoStreamBlock() for _ in range(layers))
        self.singles = torch.nn.ModuleList(OneStreamBlock() for _ in range(layers))

    def forward(self, image, text, shift):
        for block in self.pairs:
            text, image = block(image=image, text=text, shift=shift)
        for block in self.singles:
            image = block(image=image, text=None, shift=shift)
        return image + text.mean(1, keepdim=True)


class TwoStreamBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image_to_text = torch.nn.Linear(48, 48)
        self.text_to_image = torch.nn.Linear(48, 48)

    def forward(self, image, text, shift):
        mean = image.mean(1, keepdim=True)
        return text + torch.tanh(self.image_to_text(mean) + shift), image * self.text_to_image(text).mean(1, True)


class OneStreamBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(48, 48)

    def forward(self, image, text, shift):
        assert text is None
        return image + torch.tanh(self.linear(image)) * shift


SCANS = [skeleton.Scan("pairs", carry=("text", "image")), skeleton.Scan("singles", carry=("image",))]


def traced(call, model, stacked, chips, *inputs):
    built = skeleton.build(lambda: type(model)(), stacked=stacked)
    state = model.state_dict()
    params = {n: np.stack([state[source].numpy() for (source,) in w.sources]) for n, w in built.weights.items()}
    ctx = context(chips)
    function = jax.jit(lambda p, xs: bridge.trace(call, built.module, ctx, p, *xs))
    return jax.tree.map(bridge.to_torch, function(params, [bridge.to_numpy(x) for x in inputs]))


@pytest.mark.parametrize("chips", [1, 8])
def test_scanned_blocks_hand_on_several_activations_by_name(chips):
    model = TwoStreams().requires_grad_(False)
    inputs = (torch.randn(2, 21, 48), torch.randn(2, 16, 48), torch.randn(2, 1, 48))
    ours = traced(lambda m, *a: m(*a), model, SCANS, chips, *inputs)
    torch.testing.assert_close(ours, model(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chips", [1, 8])
def test_scanned_blocks_record_what_every_block_returned(chips):
    model = Stack().requires_grad_(False)
    expected, x = [], torch.randn(2, 21, 48)
    for block in model.blocks:
        expected.append(block(expected[-1] if expected else x))

    def call(module, x):
        (blocks,) = module.blocks
        with blocks.recording() as recorded:
            module(x)
        return recorded[0]

    torch.testing.assert_close(traced(call, model, ["blocks"], chips, x), torch.stack(expected), atol=1e-5, rtol=1e-5)
