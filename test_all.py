"""What the other files promise, checked. Reads as a specification, one property a test.

    python test_all.py                 # everything quick, a few minutes on two CPU cores
    python test_all.py -k resume       # the tests with "resume" in their name
    python test_all.py --claims        # also the measured claims of the README (slow, noisy)

Plain functions with asserts; pytest collects them too. What needs several ranks runs in one pool
of four processes that join a gloo group for each task.
"""

import argparse
import ast
import atexit
import contextlib
import faulthandler
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune
import mae
import vit
import wsp
from mae import MAE
from vit import Config, UserError, ViT

HERE = Path(__file__).parent
SMALL = Config(width=64, depth=2, heads=4, patch=8, image=32)


# ======================================================================================
# Helpers
# ======================================================================================

def folder():
    """A fresh temporary folder, removed when the tests end."""
    return Path(tempfile.mkdtemp(dir=scratch()))


@functools.lru_cache
def scratch():
    place = tempfile.TemporaryDirectory(prefix="maws-test-")
    scratch.keep = place
    return place.name


def refused(text, call, *args):
    """Assert that a call raises UserError, in one line, saying `text`."""
    try:
        call(*args)
    except UserError as error:
        assert text in str(error) and "\n" not in str(error), f"{error!s} does not say {text!r}"
        return
    raise AssertionError(f"not refused: {args}")


def close(a, b, tolerance=1e-6):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fill(model):
    """The weights of the reference values: 0.1 sin(0.37 i + j), norms + 1, in order of names."""
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for j, (name, p) in enumerate(trained):
        value = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + j)
        p.data = value.reshape(p.shape) + (1 if "norm" in name and name.endswith("weight") else 0)
    return model


def wave(*shape, step=0.01, start=0, f=torch.sin):
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return f(step * count + start).reshape(shape)


def rank_loop(rank, pipe):
    """A process of the pool: run functions that arrive, in a group of as many ranks as asked."""
    while task := pipe.recv():
        function, args, world, node, port = task
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % node), WORLD_SIZE=str(world),
                          LOCAL_WORLD_SIZE=str(node), MASTER_ADDR="localhost",
                          MASTER_PORT=str(port))
        said, problem, result = io.StringIO(), None, None
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                result = function(*args)
        except UserError as error:
            problem = ("refused", str(error))
        except BaseException:
            problem = ("failed", traceback.format_exc())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        pipe.send((result, said.getvalue(), problem))


@functools.lru_cache
def pool():
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(4):
        ours, theirs = context.Pipe()
        context.Process(target=rank_loop, args=(rank, theirs)).start()
        theirs.close()
        pipes.append(ours)
    atexit.register(lambda: [pipe.send(None) for pipe in pipes])
    return pipes


def on_ranks(world, function, *args, node=None):
    """Run a function on `world` ranks, `node` on each node (they believe): [(its result, what it
    printed)], a rank each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for pipe in pool()[:world]:
        pipe.send((function, args, world, node or world, port))
    assert all(pipe.poll(500) for pipe in pool()[:world]), "a rank waits for ever"
    answers = [pipe.recv() for pipe in pool()[:world]]
    for _, _, problem in answers:
        if problem:
            raise UserError(problem[1]) if problem[0] == "refused" else AssertionError(problem[1])
    return [answer[:2] for answer in answers]


QUICK = ("--image-size", "32", "--batch", "12", "--steps", "10", "--lr", "1e-3", "--workers", "0",
         "--eval-every", "0", "--log-every", "1", "--device", "cpu")


def train(out, *flags, world=1, node=None, stage=mae):
    """A short run of a stage: (loss of every step, weights, what it printed)."""
    flags = [*QUICK, "--out", str(out), *map(str, flags)]
    if "--val" not in flags:
        flags += ["--val", "world-val:13"]
    said = on_ranks(world, stage.main, flags, node=node)[0][1]
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    weights = torch.load(Path(out) / "model.pt", weights_only=True)["model"]
    return [record["loss"] for record in records if "loss" in record], weights, said


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@functools.lru_cache
def photos():
    """A folder of 20 photograph-like JPEGs of several sizes in two classes."""
    root = folder()
    for i in range(20):
        picture = Image.fromarray(data.draw(data.scene(i, "val"), 90 + i, 120))
        path = root / ("cat" if i % 2 else "dog") / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.save(path, quality=90)
    return root


@functools.lru_cache
def undisturbed():
    """The run that others are compared with: 10 steps over 20 photos, epochs end inside steps."""
    return train(folder() / "run", "--data", photos())


# ======================================================================================
# The network
# ======================================================================================

def test_mae_agrees_with_the_original():
    for norm_pix, loss, gradient in ((False, 1.557070632129285, 8.395671273041902),
                                     (True, 2.048877845360605, 8.393493490376168)):
        with float64():
            model = fill(MAE(SMALL, 48, 1, 4, norm_pix))
        images, noise = wave(2, 3, 32, 32), wave(2, 16, step=1.7, f=torch.cos)
        found = model(images, noise=noise)
        found.mean().backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        predicted = model.predict(images, noise=noise)
        assert close(found.mean().item(), loss) and close(norm.item(), gradient)
        assert close(predicted.sum().item(), -53.62193331569428)
        assert close(predicted.flatten()[:3].detach(),
                     [-0.4480011851110583, -1.2120246387687186, -0.7214477199803504])


def test_mask_keeps_the_smallest_noise():
    keep, masked = mae.random_masking(wave(2, 16, step=1.7, f=torch.cos), 0.75)
    mask = torch.zeros(2, 16, dtype=torch.int).scatter(1, masked, 1)
    assert ["".join(map(str, row)) for row in mask.tolist()] == ["1101110110111011",
                                                                 "1011011101110111"]
    assert keep.shape == (2, 4) and not (keep[:, 1:] <= keep[:, :-1]).any()     # raster order


def test_positions_agree_with_the_original():
    table = vit.sincos_pos_embed(64, (4, 4))[0].double()
    assert close(table.sum(), 525.9784436438931) and not table[0].any()
    assert close(table[5, [0, 1, 16, 17, 32, 33, 48, 49]],
                 [0, 0, 1, 1, 0.84147096, 0.53316844, 0.54030228, 0.84600914])


def test_vit_agrees_with_the_original():
    config, images = Config(64, 3, 4, 8, 32), wave(2, 3, 32, 32)
    with float64():
        model, mean = fill(ViT(config, classes=5)), fill(ViT(config, classes=5, pool="mean"))
    expected = [[0.47357998494366585, 1.176301488415437, -0.2491406024811098,
                 -1.2283303769049125, 0.024862299081640213],
                [0.4734252851409804, 1.1756921615614977, -0.24912943731203535,
                 -1.227718419959927, 0.024995287796034507]]
    assert close(model(images).detach(), expected)
    tokens = model.norm(vit.run_blocks(model.blocks, model.embed(images))).detach()
    assert close(tokens.sum(), -36.40376551812171)
    assert close(tokens[0, 0, :3], [-1.653883217770327, -0.6555549559603934, -0.5670226760623621])
    assert close(mean(images)[0].detach(), [-1.1467776181820941, -0.3199093303071593,
                 1.2335129877439517, 0.755716231727003, -0.9467701280829799])


def test_positions_are_resized_in_two_dimensions():
    table = wave(1, 17, 64, step=0.37)
    plain = vit.resize_pos_embed(table, (4, 4), (6, 5))
    assert close(plain[:, 1:].sum(), -5.411830383103756)
    assert close(plain[0, 7, :3], [-0.7029451452417349, -0.8745811351979863, -0.927846671350764])
    assert torch.equal(plain[:, 0], table[:, 0])                    # the class token's row
    assert vit.resize_pos_embed(table, (4, 4), (4, 4)) is table     # equal grid: bit-equal


def test_patchify_is_what_a_loop_does_and_can_be_undone():
    for channels, (height, width), patch in itertools.product(
            (1, 3, 4), ((8, 24), (16, 16)), (4, 8)):
        images = torch.randn(2, channels, height, width)
        patches = vit.patchify(images, patch)
        across = width // patch
        for n in range(patches.shape[1]):
            top, left = n // across * patch, n % across * patch
            piece = images[:, :, top:top + patch, left:left + patch]
            assert torch.equal(patches[:, n], piece.permute(0, 2, 3, 1).flatten(1))
        grid = height // patch, across
        assert torch.equal(vit.unpatchify(patches, patch, grid, channels), images)


def test_any_size_channels_and_mask_ratio():
    for channels, image in ((1, (16, 40)), (3, (24, 8)), (4, (8, 8))):
        config = Config(32, 1, 2, 8, image, channels)
        images, noise = torch.randn(2, channels, *image), torch.rand(2, config.num_patches)
        for ratio in (0.0, 0.3, 0.75, 0.999):
            model = MAE(config, 32, 1, 2, mask_ratio=ratio)
            loss = model(images, noise=noise).mean()
            loss.backward()
            assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
            assert (loss == 0) == (ratio == 0 or config.num_patches == 1)
            keep, _ = mae.random_masking(noise, ratio)
            assert keep.shape[1] == max(1, int(config.num_patches * (1 - ratio)))
            if ratio == 0:
                assert (keep == torch.arange(config.num_patches)).all()     # raster order
            shape = model.predict(images, noise=noise).shape
            assert shape == (2, config.num_patches, 64 * channels)


def test_prediction_is_in_raster_order():
    """The loss is that of the masked rows of the prediction."""
    model = MAE(SMALL, 48, 1, 4)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    _, masked = mae.random_masking(noise, 0.75)
    target = mae.pixel_targets(vit.patchify(images, 8), True)
    error = (model.predict(images, noise=noise) - target).square().mean(-1)
    expected = error.gather(1, masked).mean(1).detach()
    assert close(model(images, noise).detach(), expected, 1e-5)


def test_nothing_is_computed_for_nothing():
    """The encoder gets kept patches only, the decoder's head masked ones only; no `.item()`."""
    model, seen = MAE(SMALL, 48, 1, 4), {}
    for name in ("patch_embed", "blocks.0", "decoder_blocks.0", "decoder_pred"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: args[0].shape[1]}))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    class Waits(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Waits() as waits:
        model(torch.randn(2, 3, 32, 32), noise=torch.rand(2, 16)).mean().backward()
        vit.clip_gradients(model, limit=1.0)
        optimizer.step()
    assert seen == {"patch_embed": 4, "blocks.0": 5, "decoder_blocks.0": 17, "decoder_pred": 12}
    assert waits.count == 0, "a step waits for the device by itself"
    images, noise = torch.randn(2, 3, 32, 32, requires_grad=True), torch.rand(2, 16)
    keep, masked = mae.random_masking(noise, 0.75)
    model.encode(vit.patchify(images, 8), keep).sum().backward()
    touched = vit.patchify(images.grad, 8).abs().sum(-1) > 0
    assert touched.gather(1, keep).all() and not touched.gather(1, masked).any()


def test_block_is_torchs_own_layer():
    block = vit.Block(32, 4).double()
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, 1e-6, True, True).double()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2."}
    state = {}
    for name in layer.state_dict():
        ours = name
        for theirs, new in names.items():
            ours = ours.replace(theirs, new)
        state[name] = block.state_dict()[ours]
    layer.load_state_dict(state)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    assert close(block(x).detach(), layer(x).detach(), 1e-12)


def test_attention_written_out_is_torchs_own():
    q, k, v = torch.randn(3, 2, 4, 17, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert close(vit.attention(q, k, v), expected, 1e-12)
    layer, x = vit.Attention(64, 4), torch.randn(2, 17, 64)
    fused = layer(x)                                        # fp32: torch's kernel
    written_out = layer.double()(x.double())                # fp64: ours
    assert close(fused.detach(), written_out.detach(), 1e-5)


def test_recompute_changes_nothing():
    model, images = MAE(SMALL, 48, 1, 4), torch.randn(2, 3, 32, 32)
    noise, gradients = torch.rand(2, 16), []
    for model.recompute in (False, True):
        model.zero_grad()
        model(images, noise=noise).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_sizes_have_the_published_parameters():
    published = {"base": 86e6, "large": 304e6, "huge": 632e6, "2b": 1.89e9, "6.5b": 6.45e9}
    for name, count in published.items():
        with torch.device("meta"):
            model = ViT(Config.named(name))
        assert abs(sum(p.numel() for p in model.parameters()) / count - 1) < 0.015, name
    macs = {"base": (17.6, 9.8), "large": (61.6, 20.8), "huge": (167, 48.6), "2b": (494, 131),
            "6.5b": (1674, 428)}
    for name, (full, masked) in macs.items():
        config = Config.named(name)
        D, N, visible = config.width, 1 + config.num_patches, 1 + config.num_patches // 4
        assert abs(vit.forward_flops([(config.depth, D, N)]) / 2e9 / full - 1) < 0.02, name
        towers = [(config.depth, D, visible), (8, 512, N)]
        assert abs(vit.forward_flops(towers) / 2e9 / masked - 1) < 0.03, name


def test_initialisation_is_a_function_of_seed_and_name():
    model = MAE(SMALL, 48, 1, 4)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.fill_(math.nan)
    model.init_weights()
    assert equal(first, model.state_dict())                 # nothing is left as it was found
    model.init_weights(seed=1)
    assert not torch.equal(first["cls_token"], model.cls_token)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], first["blocks.1.mlp.fc1.weight"])
    deeper = MAE(Config(64, 3, 4, 8, 32), 48, 2, 4).state_dict()
    assert all(torch.equal(first[name], deeper[name]) for name in first)
    kernel, bound = first["patch_embed.proj.weight"], math.sqrt(6 / (64 + 192))
    assert 0.98 * bound < kernel.abs().max() <= bound       # xavier of the linear map [64, 192]
    assert abs(first["cls_token"].std() / 0.02 - 1) < 0.25
    assert torch.equal(first["norm.weight"], torch.ones(64)) and not first["norm.bias"].any()


def test_learning_rate_and_decay_groups():
    rate = functools.partial(vit.learning_rate, total=100, peak=2.0, warmup=10, final=0.5)
    assert rate(0) == 0 and rate(5) == 1 and rate(10) == 2
    assert rate(55) == 1.25 and abs(rate(100) - 0.5) < 1e-12 and rate(1000) == rate(100)
    assert vit.learning_rate(0, 10, 3.0, 0) == 3.0          # no warmup: begins at the peak
    model = MAE(SMALL, 48, 1, 4)
    decayed, free = vit.decay_groups(model, 0.05)
    assert {p.dim() for p in free["params"]} == {1} and free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# ======================================================================================
# Weights from files
# ======================================================================================

def write_safetensors(path, tensors):
    """Write {name: tensor} as a .safetensors file."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        dtype = {torch.float32: "F32", torch.float64: "F64"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape),
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(
        tensor.contiguous().numpy().tobytes() for tensor in tensors.values()))


def save_tensors(path, content):
    write_safetensors(path, content) if path.suffix == ".safetensors" else torch.save(content, path)


def hugging_face_vitmae(version):
    """The tensors of a ViTMAEForPreTraining with the reference weights, under its own names."""
    D, d, P = 64, 48, 192
    shapes = {"vit.embeddings.cls_token": (1, 1, D),
              "vit.embeddings.patch_embeddings.projection.weight": (D, 3, 8, 8),
              "vit.embeddings.patch_embeddings.projection.bias": (D,),
              "vit.layernorm.weight": (D,), "vit.layernorm.bias": (D,),
              "decoder.mask_token": (1, 1, d), "decoder.decoder_embed.weight": (d, D),
              "decoder.decoder_embed.bias": (d,), "decoder.decoder_norm.weight": (d,),
              "decoder.decoder_norm.bias": (d,), "decoder.decoder_pred.weight": (P, d),
              "decoder.decoder_pred.bias": (P,)}
    for stem, width, depth in (("vit.layers", D, 2), ("decoder.decoder_layers", d, 1)):
        for i in range(depth):
            for part in "qkvo":
                shapes[f"{stem}.{i}.attention.{part}_proj.weight"] = (width, width)
                shapes[f"{stem}.{i}.attention.{part}_proj.bias"] = (width,)
            for part in ("layernorm_before", "layernorm_after"):
                shapes[f"{stem}.{i}.{part}.weight"] = shapes[f"{stem}.{i}.{part}.bias"] = (width,)
            for part, (a, b) in (("fc1", (4 * width, width)), ("fc2", (width, 4 * width))):
                shapes[f"{stem}.{i}.mlp.{part}.weight"] = (a, b)
                shapes[f"{stem}.{i}.mlp.{part}.bias"] = (a,)
    tensors = {}
    for j, (name, shape) in enumerate(sorted(shapes.items())):
        value = 0.1 * torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + j)
        norm = "norm" in name and name.endswith("weight")
        # transformers makes its models in float32, and the reference was filled there
        tensors[name] = (value.reshape(shape) + (1 if norm else 0)).float().double()
    tensors["vit.embeddings.position_embeddings"] = vit.sincos_pos_embed(D, (4, 4)).double()
    tensors["decoder.decoder_pos_embed"] = vit.sincos_pos_embed(d, (4, 4)).double()
    if version == 5:
        return tensors
    older = (("vit.layers", "vit.encoder.layer"), ("q_proj", "attention.query"),
             ("k_proj", "attention.key"), ("v_proj", "attention.value"),
             ("o_proj", "output.dense"), ("mlp.fc1", "intermediate.dense"),
             ("mlp.fc2", "output.dense"))
    return {functools.reduce(lambda text, pair: text.replace(*pair), older, name): tensor
            for name, tensor in tensors.items()}


def test_hugging_face_vitmae_gives_its_own_loss():
    """1.3166285490526304 is what transformers 5.23 computes for these weights, image and noise."""
    for version, ending in ((4, ".safetensors"), (5, ".bin")):
        path, tensors = folder() / f"model{ending}", hugging_face_vitmae(version)
        save_tensors(path, tensors)
        with float64():
            model = MAE(SMALL, 48, 1, 4)
        done = vit.load_weights(model, path, log=str)
        assert not done["new"] and not done["unused"]
        loss = model(wave(2, 3, 32, 32), noise=wave(2, 16, step=1.7, f=torch.cos)).mean()
        assert close(loss.item(), 1.3166285490526304)


def test_weights_load_whatever_wraps_them():
    model, said = MAE(SMALL, 48, 1, 4), []
    model.init_weights(seed=3)
    state = model.state_dict()
    wrapped = {f"module._orig_mod.model.{name}": value for name, value in state.items()}
    for content, ending in (
            ({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, ".pth"),
            ({"state_dict": {"model": wrapped}}, ".pt"), (wrapped, ".safetensors")):
        path, other = folder() / f"file{ending}", MAE(SMALL, 48, 1, 4)
        save_tensors(path, content)
        vit.load_weights(other, path, log=said.append)
        assert equal(state, other.state_dict())
        assert "(100.0% of parameters)" in said[-1] and "new: none; unused: none" in said[-1]
    foreign = folder() / "foreign.pt"
    torch.save({"model": state, "config": {"hidden_size": 64}}, foreign)
    refused("has width 64 and depth 2, which none of nano, tiny,", vit.config_from, foreign)
    flat = {**state, "patch_embed.proj.weight": torch.zeros(64, 192)}
    torch.save(flat, foreign)
    refused("is no Vision Transformer that is known here", vit.config_from, foreign)
    done = vit.load_weights(ViT(SMALL), path, log=said.append)       # an encoder takes its part
    assert "unused: mask_token, decoder_pos_embed, dec" in said[-1] and not done["new"]


def test_weights_that_do_not_fit_are_refused_and_change_nothing():
    encoder, model, path = ViT(SMALL), MAE(SMALL, 48, 1, 4), folder() / "vit.pt"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(encoder.state_dict(), path)
    refused("missing: mask_token, decoder_embed.weight, decoder_embed.bias and 17 more",
            vit.load_weights, model, path)
    torch.save({f"other.{name}": value for name, value in before.items()}, path)
    refused("missing: cls_token", vit.load_weights, model, path)
    torch.save(MAE(Config(32, 2, 4, 8, 32), 48, 1, 4).state_dict(), path)
    refused("other shapes: cls_token [1, 1, 32] instead of [1, 1, 64]",
            vit.load_weights, model, path)
    assert equal(before, model.state_dict())
    refused("no weights file", vit.load_weights, model, "nowhere.pt")
    (folder() / "x").touch()
    for name, content in (("a.pt", b""), ("b.pth", b"not a file of weights"),
                          ("c.safetensors", b"\xff" * 20), ("d.safetensors", b"")):
        bad = folder() / name
        bad.write_bytes(content)
        refused("cannot be read as weights", vit.load_weights, model, bad)
    good = folder() / "cut.safetensors"
    write_safetensors(good, before)
    good.write_bytes(good.read_bytes()[:-9])
    refused("cannot be read as weights", vit.load_weights, model, good)


def test_weights_that_are_half_a_network_are_refused():
    path = folder() / "x.pth"
    torch.save({**ViT(SMALL).state_dict(), "blocks.0.ls1.gamma": torch.ones(64)}, path)
    refused("unknown tensors in the file: blocks.0.ls1.gamma", vit.load_weights, ViT(SMALL), path)
    torch.save(ViT(Config(64, 3, 4, 8, 32)).state_dict(), path)
    refused("unknown tensors in the file: blocks.2.norm1.weight", vit.load_weights, ViT(SMALL),
            path)


def test_weights_never_run_code():
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    trap, path = folder() / "trap", folder() / "evil.pt"
    torch.save({"model": Evil()}, path)
    refused("cannot be read as weights", vit.read_weights, path)
    assert not trap.exists()


def test_weights_of_another_grid_are_resized():
    small, path = MAE(SMALL, 48, 1, 4), folder() / "model.pt"
    torch.save(small.state_dict(), path)
    wide = MAE(Config(64, 2, 4, 8, (16, 64)), 48, 1, 4)
    vit.load_weights(wide, path, log=str)
    for name in ("pos_embed", "decoder_pos_embed"):
        table = getattr(small, name)
        assert torch.equal(getattr(wide, name), vit.resize_pos_embed(table, (4, 4), (2, 8)))


# ======================================================================================
# Order and randomness
# ======================================================================================

def test_uniform_is_uniform_and_the_same_in_numpy_and_torch():
    position = np.arange(100_000) * 7919
    numbers = data.uniform(0, position, "crop", 4)
    assert np.array_equal(numbers, data.uniform(0, torch.from_numpy(position), "crop", 4).numpy())
    assert numbers.dtype == np.float32 and 0 <= numbers.min() and numbers.max() < 1
    counts = np.histogram(numbers, 64, (0, 1))[0] / numbers.size * 64
    assert abs(counts - 1).max() < 0.05
    others = [data.uniform(1, position, "crop", 4), data.uniform(0, position, "flip", 4),
              data.uniform(0, position + 1, "crop", 4)]
    columns = np.concatenate([numbers, *others], 1)
    assert abs(np.corrcoef(columns.T) - np.eye(16)).max() < 0.02
    assert np.array_equal(numbers[5], data.uniform(0, position[5:6], "crop", 4)[0])


def test_order_visits_every_sample_once_an_epoch():
    for size in (1, 2, 3, 20, 1000, 4097):
        epochs = data.Order([size], seed=0)(np.arange(3 * size)).reshape(3, size)
        assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in epochs)
        if size >= 20:
            assert not np.array_equal(epochs[0], epochs[1])
            assert not np.array_equal(epochs[0], data.Order([size], seed=1)(np.arange(size)))
            assert abs(np.corrcoef(np.arange(size), epochs[0])[0, 1]) < 4 / math.sqrt(size)
    far = data.Order([3 * 10**9], seed=0)(np.arange(10**12, 10**12 + 50))
    assert far.min() >= 0 and far.max() < 3 * 10**9 and len(set(far)) == 50


def test_order_reads_in_windows_of_shards():
    """Each epoch deals the shards anew to windows of a million samples and 64 shards or more."""
    sizes = np.random.default_rng(0).integers(0, 40_000, 200)
    order, total = data.Order(sizes, seed=0), int(sizes.sum())
    assert order.windows == 3
    shard = lambda samples: np.unique(np.searchsorted(np.cumsum(sizes), samples, "right"))
    first, second = (order(np.arange(epoch * total, (epoch + 1) * total)) for epoch in (0, 1))
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch), np.arange(total))
    begin = [shard(epoch[:total // 4]) for epoch in (first, second)]
    assert all(60 < len(shards) <= 67 for shards in begin) and len(np.intersect1d(*begin)) < 40
    assert len(shard(first[:1000])) > 55                # a batch is from all shards of the window
    again = data.Order(sizes, seed=0)(np.array([5 * total + 3, 7, total - 1]))
    assert np.array_equal(again, [order(np.array([5 * total + 3]))[0], first[7], first[-1]])
    for cut in ([20], [5, 12, 3], [1] * 20, [0, 20]):   # one window: however it is cut
        assert np.array_equal(data.Order(cut, 0)(np.arange(60)), data.Order([20], 0)(np.arange(60)))


def test_positions_are_dealt_to_ranks_without_gap():
    for world, micro in ((1, 12), (2, 3), (3, 4)):
        ranks = [list(data.training_positions(5, 8, 12, micro, rank, world))
                 for rank in range(world)]
        flat = np.sort(np.concatenate([part for rank in ranks for part in rank]))
        assert np.array_equal(flat, np.arange(60, 96))
        step = np.concatenate([part for rank in ranks for part in rank[:12 // world // micro]])
        assert np.array_equal(np.sort(step), np.arange(60, 72))
    for count, world in itertools.product((1, 5, 13, 64), (1, 2, 3, 4)):
        ranks = [list(data.validation_positions(count, 4, rank, world)) for rank in range(world)]
        assert len({len(rank) for rank in ranks}) == 1, "ranks would wait for each other for ever"
        flat = np.sort(np.concatenate([part for rank in ranks for part in rank]))
        assert np.array_equal(flat[:count], np.arange(count)) and len(set(flat)) == len(flat)


# ======================================================================================
# From files to pixels
# ======================================================================================

def test_random_resized_crop_is_distributed_as_it_should():
    """Share of the area and aspect as of boxes drawn at random until one fits."""
    shares, aspects = [], []
    for row in data.uniform(0, np.arange(4000), "crop", 22).tolist():
        left, top, right, bottom = data.random_resized_crop(400, 300, row, (224, 224))
        assert 0 <= left < right <= 400 + 1e-3 and 0 <= top < bottom <= 300 + 1e-3
        shares.append((right - left) * (bottom - top) / 120_000)
        aspects.append((right - left) / (bottom - top))
    assert 0.2 <= min(shares) < 0.21 and 0.75 <= min(aspects) and max(aspects) <= 4 / 3 + 1e-6
    random = np.random.default_rng(0)
    share, aspect = random.uniform(0.2, 1, 10**5), np.exp(random.uniform(
        math.log(3 / 4), math.log(4 / 3), 10**5))
    w, h = np.sqrt(share * 120_000 * aspect), np.sqrt(share * 120_000 / aspect)
    fits = (w <= 400) & (h <= 300)
    for found, expected in ((shares, share[fits]), (aspects, aspect[fits])):
        for q in (10, 50, 90):
            assert abs(np.percentile(found, q) / np.percentile(expected, q) - 1) < 0.03
    wide = data.random_resized_crop(1000, 10, [0.5] * 22, (32, 32))
    assert wide == (1000 / 2 - 20 / 3, 0, 1000 / 2 + 20 / 3, 10)   # nothing fits: centre
    assert data.centre_crop(400, 200, None, (32, 64), share=1) == (0, 0, 400, 200)


def corners(image):
    """The four corner colours of pixels [H,W,C], as rounded tuples."""
    H, W, _ = image.shape
    return [tuple(int(v) for v in image[y, x]) for y in (H // 4, 3 * H // 4)
            for x in (W // 4, 3 * W // 4)]


def read(path, channels=3, size=(32, 32)):
    return data.read_pixels(path, lambda width, height: (0, 0, width, height), size, channels)


def quarters(mode="RGB", size=(64, 48), colours=("red", "lime", "blue", "white")):
    image = Image.new("RGB", size)
    for i, colour in enumerate(colours):
        x, y = i % 2 * size[0] // 2, i // 2 * size[1] // 2
        ImageDraw.Draw(image).rectangle((x, y, x + size[0] // 2, y + size[1] // 2), colour)
    return image.convert(mode)


def test_every_mode_of_picture_comes_out_right():
    rgb = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    place = folder()
    for mode, ending in (("RGB", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"),
                         ("RGB", "webp"), ("CMYK", "jpg"), ("RGB", "jpg")):
        path = place / f"{mode}.{ending}"
        quarters(mode).save(path, **({"lossless": True} if ending == "webp" else
                                     {"quality": 100} if ending == "jpg" else {}))
        found = np.array(corners(read(path)))
        assert abs(found - rgb).max() <= (8 if ending == "jpg" else 0), (mode, ending, found)
        grey = read(path, channels=1)
        assert grey.shape == (32, 32, 1) and abs(int(grey[24, 24, 0]) - 255) <= 2
        assert read(path, channels=4).shape == (32, 32, 4)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(place / "16.png")
    assert set(corners(read(place / "16.png"))) == {(128, 128, 128)}
    quarters("1", colours=("black", "white", "white", "black")).save(place / "1.png")
    assert corners(read(place / "1.png"))[:2] == [(0, 0, 0), (255, 255, 255)]
    clear = Image.new("LA", (8, 8), (0, 0))
    clear.save(place / "LA.png")
    assert set(corners(read(place / "LA.png"))) == {(255, 255, 255)}    # transparent is white
    glass = quarters().convert("P")
    glass.save(place / "glass.png", transparency=glass.getpixel((0, 0)))
    assert corners(read(place / "glass.png"))[:2] == [(255, 255, 255), (0, 255, 0)]


def test_rotated_photographs_are_read_upright():
    upright, place = quarters(), folder()
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}     # what each tag undoes
    for tag, turn in turns.items():
        image = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = tag
        for ending in ("jpg", "png", "tif", "webp"):
            path, seen = place / f"turned.{ending}", []
            image.resize((image.width * 8, image.height * 8)).save(path, exif=exif, quality=95)
            for box, expected in ((None, (254, 0, 0)), ((0, 192, 256, 384), (0, 0, 254))):
                def choose(w, h, box=box, seen=seen):
                    seen.append((w, h))
                    return box or (0, 0, w / 2, h / 2)

                pixels = data.read_pixels(path, choose, (16, 16))
                assert abs(pixels.astype(int).mean((0, 1)) - expected).max() < 8, (tag, box, ending)
            assert set(seen) == {(512, 384)}, (tag, ending)


def test_draft_decoding_shows_the_same_picture():
    place = folder()
    image = Image.fromarray(data.draw(data.scene(3), 1024, 1024)).crop((0, 0, 1024, 683))
    image.save(place / "photo.jpg", quality=92)
    for box in ((0, 0, 1024, 683), (300.5, 100.25, 900, 683), (500, 300, 600, 380)):
        ours = data.read_pixels(place / "photo.jpg", lambda w, h, box=box: box, (128, 128))
        full = Image.open(place / "photo.jpg").resize((128, 128), Image.Resampling.BICUBIC, box)
        difference = abs(ours.astype(float) - np.asarray(full))
        assert difference.mean() < 2, (box, difference.mean())


def test_normalise_is_imagenets_and_can_be_undone():
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    images = data.normalise(pixels)
    expected = (pixels[1, 2, 3] / 255 - torch.tensor(data.IMAGENET_MEAN)) / \
        torch.tensor(data.IMAGENET_STD)
    assert images.shape == (2, 3, 5, 7) and close(images[1, :, 2, 3], expected, 1e-6)
    for channels in (1, 3, 4):
        pixels = torch.randint(0, 256, (2, 5, 7, channels), dtype=torch.uint8)
        assert torch.equal(data.denormalise(data.normalise(pixels)), pixels)


def test_flip_mirrors_about_half():
    images = torch.randn(1000, 2, 3, 3)
    numbers = data.uniform(0, torch.arange(1000), "flip", 1)
    flipped = data.flip(images, numbers)
    mirrored = numbers[:, 0] < 0.5
    assert 440 < mirrored.sum() < 560
    assert torch.equal(flipped[mirrored], images[mirrored].flip(2))
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_workers_change_no_pixel_and_share_no_crop():
    samples = data.Samples(data.open_data(photos()), (32, 32), 3, data.random_resized_crop)
    batches = [list(data.load(samples, data.training_positions(0, 4, 8, 8, 0, 1), workers,
                              torch.device("cpu"))) for workers in (0, 3)]
    for ours, theirs in zip(*batches):
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["position"], theirs["position"])
    assert len(batches[0]) == 4
    single = data.Samples(data.open_data("world:1"), (32, 32), 3, data.random_resized_crop)
    crops = single.__getitems__(range(16))["images"]
    assert len(torch.unique(crops, dim=0)) == 16           # one picture, never the same crop


def damaged():
    """A folder of 12 good pictures and 6 bad ones."""
    root = folder()
    for path in list(sorted(photos().glob("*/*.jpg")))[:12]:
        shutil.copy(path, root)
    good = next(root.glob("*.jpg")).read_bytes()
    Image.new("L", (8, 8)).save(root / "bomb.bmp")
    small = (root / "bomb.bmp").read_bytes()            # now it claims to be 65,535 pixels wide
    (root / "bomb.bmp").write_bytes(small[:18] + b"\xff\xff\0\0" * 2 + small[26:])
    for name, content in (("empty.jpg", b""), ("cut.jpg", good[:len(good) // 3]),
                          ("text.png", b"<html>404</html>"), ("zero.webp", bytes(500)),
                          ("noise.jpg", good[:100] + bytes(900))):
        (root / name).write_bytes(content)
    return root


def test_bad_images_are_replaced_counted_and_listed():
    root = damaged()
    samples = data.Samples(data.open_data(root), (32, 32), 3, data.random_resized_crop)
    batch, again = (samples.__getitems__(range(36)) for _ in range(2))
    assert torch.equal(batch["images"], again["images"]) and batch["weight"].all()
    assert (batch["images"].flatten(1).float().std(1) > 0).all()
    names = {Path(where).name for _, where, _ in batch["bad"]}
    assert names == {"empty.jpg", "cut.jpg", "text.png", "zero.webp", "bomb.bmp", "noise.jpg"}
    assert any("could be decompression bomb" in why for _, _, why in batch["bad"])


def test_bad_images_do_not_end_a_run_and_validation_counts_them():
    root, out = damaged(), folder() / "run"
    losses, _, _ = train(out, "--data", root, "--val", root, "--max-bad", "1")
    listed = (out / "bad_samples.txt").read_text().splitlines()
    assert len((out / "bad_val_samples.txt").read_text().splitlines()) == 6
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(losses) == 10 and metrics["count"] == 12 and metrics["bad"] == 6
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    positions = {line.split("\t")[0] for line in listed}        # some met several bad images
    assert [r["bad_samples"] for r in records if "loss" in r][-1] == len(positions) > 30
    refused("images cannot be read, more than --max-bad 0.01; see", train, folder() / "run",
            "--data", root)
    nothing = folder()
    (nothing / "1.jpg").write_bytes(b"nothing")
    refused("eleven images in a row cannot be read", train, folder() / "run", "--data", nothing,
            "--max-bad", 1)
    refused("none of 1 images can be read", train, folder() / "run", "--val", nothing,
            "--steps", 1)


def test_folder_is_sorted_and_labelled_by_its_first_level():
    source = data.open_data(photos())
    (photos() / "again").symlink_to(photos())           # a loop of links counts nothing twice
    assert len(data.open_data(photos())) == 20
    (photos() / "again").unlink()
    assert source.classes == ["cat", "dog"] and len(source) == 20
    assert not data.is_world("worldcup") and data.is_world("world:7")
    assert [source[i]["label"] for i in range(20)] == [0] * 10 + [1] * 10
    assert [Path(source[i]["where"]).name for i in range(3)] == ["01.jpg", "03.jpg", "05.jpg"]
    both = data.open_data(photos(), "world:5")
    assert len(both) == 25 and both[24]["where"] == "world train 4"
    assert both.classes[both[0]["label"]] == "cat"
    refused("no image below", data.open_data, folder())
    refused("no data at", data.open_data, "nowhere")
    refused("after the colon comes a number", data.open_data, "world:many")


# ======================================================================================
# Shards and manifests
# ======================================================================================

def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def make_tar(path, names, **fields):
    """A shard of photos by number, with class, tags and caption in .json."""
    source = data.open_data(photos())
    with tarfile.open(path, "w") as tar:
        for i in names:
            image = Path(source[i]["image"])
            record = {"label": image.parent.name, "tags": [f"#{image.parent.name}", "#pet"],
                      "caption": f"picture {i}"}
            add(tar, f"{i:03}.jpg", image.read_bytes(), **fields)
            add(tar, f"{i:03}.json", json.dumps(record).encode(), **fields)
    return path


@functools.lru_cache
def sharded():
    """photos() as shards and manifests: {name: spec}, all in one listing order."""
    root, source = folder(), data.open_data(photos())
    (root / "one").mkdir()
    (root / "three").mkdir()
    make_tar(root / "one/x.tar", range(20))
    for k, part in enumerate((range(5), range(5, 17), range(17, 20))):
        make_tar(root / f"three/x-{k:02}.tar", part)
    paths = [source[i]["image"] for i in range(20)]
    with open(root / "all.jsonl", "w") as lines, open(root / "all.csv", "w") as table:
        table.write("caption,image,label,tags\n")
        for i, path in enumerate(paths):
            name = Path(path).parent.name
            lines.write(json.dumps({"image": path, "label": name, "tags": [f"#{name}", "#pet"],
                                    "caption": f"picture {i}"}) + "\n\n")
            table.write(f'"picture {i}",{path},{name},"#{name}, #pet"\n')
    return {"one": str(root / "one/x.tar"), "three": str(root / "three/x-{00..02}.tar"),
            "glob": str(root / "three/*.tar"), "folder": str(root / "three"),
            "jsonl": str(root / "all.jsonl"), "csv": str(root / "all.csv")}


def test_shards_and_manifests_hold_the_same_as_a_folder():
    plain = data.open_data(photos())
    for name, spec in sharded().items():
        source = data.open_data(spec)
        assert len(source) == 20 and source.classes == ["cat", "dog"], name
        for i in (0, 4, 5, 16, 19):
            assert np.array_equal(read(source[i]["image"]), read(plain[i]["image"])), (name, i)
            assert source[i]["label"] == plain[i]["label"], (name, i)
            assert source[i]["caption"] == f"picture {i}"
            assert source[i]["tags"] == [f"#{source.classes[source[i]['label']]}", "#pet"]
    for what, own in (("labels", ["dog"]), ("tags", ["#dog", "#pet"])):     # of the last sample
        words, codes, ends = data.open_data(sharded()["three"]).words(2, what)
        assert [words[code] for code in codes[ends[-2]:]] == own
        columns = source.sources[0].columns
        words, codes, ends = data.words_of(columns, 18, 20, what)           # of a later chunk
        assert [words[code] for code in codes] == 2 * own
        assert ends.tolist() == [len(own), 2 * len(own)]


def test_shards_train_as_a_folder_does():
    losses, weights, _ = undisturbed()
    for name in ("one", "three", "jsonl"):
        again, saved, _ = train(folder() / "run", "--data", sharded()[name])
        assert again == losses and equal(saved, weights), name
    flags = ("--data", sharded()["one"])                        # one shard for four ranks
    again = train(folder() / "run", *flags, "--val", sharded()["three"], world=4)
    assert close(again[0], losses, 1e-4) and '"count": 20' in again[2]
    flags += ("--workers", 1)
    out = folder() / "run"
    train(out, *flags, "--save-every", 0, "--keep", 99)
    again, saved, said, _ = resumed(out, flags, at=4)           # inside the third epoch
    assert again == losses and equal(saved, weights) and "resuming from" in said


def test_labels_of_shards():
    path = folder() / "x.tar"
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(("7", "10", "2")):
            add(tar, f"{i}.png", b"png")
            add(tar, f"{i}.cls", label.encode())
        add(tar, "3.png", b"png")
        add(tar, "4.json", b'{"label": 3, "tags": "#a #b"}')
        add(tar, "4.png", b"png")
        add(tar, "4.txt", "a caption, über all".encode())
    source = data.open_data(path)       # whole numbers are their own labels
    assert [source[i].get("label") for i in range(5)] == [7, 10, 2, None, 3]
    assert len(source.classes) == 11 and source.classes[7] == "7"
    assert source[4]["tags"] == ["#a", "#b"] and source[4]["caption"] == "a caption, über all"
    assert "caption" not in source[3]
    both = data.open_data(path, sharded()["one"])
    assert both.classes[both[5]["label"]] == "cat" and both.classes[both[1]["label"]] == "10"


def test_labels_and_tags_as_people_write_them():
    path = folder() / "x.jsonl"
    labels = [3, "10", 2.0, None, "", math.nan, 1.0]
    tags = [["#a", None, ""], "#a, #b, ", " ", None, '["#c"]', math.nan, ["\ud83d"]]
    path.write_text("".join(json.dumps({"image": "x.jpg", "label": label, "tags": tag}) + "\n"
                            for label, tag in zip(labels, tags)))
    source = data.open_data(path)
    assert [source[i].get("label") for i in range(7)] == [3, 10, 2, None, None, None, 1]
    assert [source[i]["tags"] for i in range(7)] == [
        ["#a"], ["#a", "#b"], [], [], ["#c"], [], ["?"]]
    before = source.fingerprint()
    path.write_text(path.read_text().replace(": 3", ": 4"))     # as long as before
    assert data.open_data(path).fingerprint() != before
    assert len(data.class_names_of({"20231105", "7"})) == 2     # no twenty million classes


def test_manifests_are_read_as_python_reads_them_and_end_with_a_line_at_a_bad_record():
    path = folder() / "x.csv"
    rows = ['5" pipe', "plain", '"quoted, ""twice""\nover lines"', "", "last"]
    path.write_bytes(b"\xef\xbb\xbfcaption,image\r\n" + "\r\n".join(
        f"{text},cat.jpg" for text in rows).encode())
    shutil.copy(photos() / "cat/01.jpg", path.parent / "cat.jpg")   # paths are beside the manifest
    source = data.open_data(path)
    assert [source[i].get("caption") for i in range(5)] == [
        rows[0], rows[1], 'quoted, "twice"\nover lines', None, "last"]
    assert data.Samples(source, (8, 8), 3, data.centre_crop).__getitems__([0])["weight"] == 1
    path.write_text("file;label\ncat.jpg;3\n")
    refused("has no column named image; its first line has: file;label", data.open_data, path)
    path.write_text("image\ncat.jpg\n" + "x" * 200_000 + "\n")     # more than csv takes
    refused("cannot be read: Error: field larger", data.open_data, path)
    lines = path.with_suffix(".jsonl")
    for bad in ("not json", '{"label": 2}', '["list"]', '{"image": ""}', '{"image": {}}',
                '{"image": "x.jpg", "tags": [{"name": "cat"}]}', '{"image": "x.jpg", "tags": 7}'):
        lines.write_text('{"image": "x.jpg"}\n\n' + bad)
        refused(f"{lines}, record 2, cannot be read", data.open_data, lines)


def test_folders_of_shards_and_of_both():
    root = folder()
    make_tar(root / "A.TAR", range(3))
    assert len(data.open_data(root)) == 3
    shutil.copy(photos() / "cat/01.jpg", root)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert len(data.open_data(root)) == 1
    assert ", 1 .tar" in said.getvalue()
    name = os.fsencode(root) + b"/caf\xe9.jpg"              # latin-1, not UTF-8, and damaged
    with open(name, "wb") as file:
        file.write(b"nothing")
    train(folder() / "run", "--data", root, "--max-bad", 1, "--steps", 1)
    assert command("verify", root)[0] == 1


def good():
    return (photos() / "cat/01.jpg").read_bytes()


def test_members_of_a_tar_are_grouped_as_in_webdataset_and_nothing_is_extracted():
    root = folder()
    path, photo = root / "x.tar", good()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a", type=tarfile.DIRTYPE)
        for name in ("a/1.jpg", "../above.JPG", "x" * 300 + ".jpg", "caf\udce9.jpg", "日本.jpg"):
            add(tar, name, photo)
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(tar, "alone.json", b"{}")                       # a key with no image
        add(tar, "b/1.jpg", photo)                          # another key: folders count
        add(tar, "b/1.json", b"{not json")
        add(tar, "b/1.jpg", photo)                          # a name that repeats: another sample
        add(tar, "two.seg.png", photo)                      # another part of the next
        add(tar, "two.jpg", photo)
        add(tar, "IMG.2020.01.jpg", photo)                  # dots, and nobody else has their key
        add(tar, "IMG.2020.02.jpg", photo)
        add(tar, "IMG.2020.02.json", b'{"label": "two"}')
        add(tar, "._a.jpg", b"finder")
        add(tar, "readme.md", b"hello")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        source = data.open_data(path)
    names = [source[i]["where"].removeprefix(f"{path}: ") for i in range(len(source))]
    assert names == ["a/1", "../above", "x" * 300, "caf\udce9", "日本", "b/1", "b/1", "two",
                     "IMG.2020.01", "IMG.2020.02"]
    assert [source[i].get("label") for i in range(10)] == [None] * 9 + [0]
    assert all(source[i]["image"]() == photo for i in range(10))
    for count in ("5 other files", "1 keys without an image", "1 unreadable records"):
        assert count in said.getvalue(), said.getvalue()
    assert {one.name for one in root.iterdir()} == {"x.tar", "x.tar.index.npz"} | {
        one.name for one in root.glob("*.catalogue.npz")}


def opened(content):
    """A shard of this content, read: ({name: (label, weight)}, why some are bad, what was said)."""
    path = folder() / "x.tar"
    path.write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        source = data.open_data(path)
    samples = data.Samples(source, (8, 8), 3, data.centre_crop, shuffle=False)
    batch = samples.__getitems__(range(len(source)))
    labels = [source.classes[label] if label >= 0 else None for label in batch["label"].tolist()]
    names = [source[i]["where"][-3:] for i in range(len(source))]
    return (dict(zip(names, zip(labels, batch["weight"].tolist()))),
            [why for _, _, why in batch["bad"]], said.getvalue().rpartition(f"{path}: images")[0])


def test_damaged_tars_lose_what_is_damaged_and_say_so():
    whole = Path(sharded()["one"]).read_bytes()
    with tarfile.open(sharded()["one"]) as tar:
        members = tar.getmembers()
    at = members[20].offset                             # the eleventh image
    assert len(opened(whole)[0]) == 20 and opened(whole)[1:] == ([], "")
    found, bad, said = opened(whole[:at + 700])         # cut short inside it
    assert len(found) == 11 and bad == ["ValueError: the tar is cut short"]
    assert "1 shards cut short" in said
    assert len(opened(whole[:at])[0]) == 10             # cut between two: nobody can tell
    found, bad, said = opened(whole[:at] + bytes(512) + whole[at + 512:])   # its header is zeros
    assert len(found) == 19 and "1 damaged places" in said
    found, bad, said = opened(whole[:at] + b"\x7f" * 512 + whole[at:])
    assert len(found) == 20 and "1 damaged places" in said
    with contextlib.redirect_stdout(io.StringIO()) as said:     # cat a.tar a.tar > b.tar
        path = folder() / "b.tar"
        path.write_bytes(whole + whole)
        assert len(data.open_data(path)) == 40
    assert said.getvalue() == f"{path}: images: 40; classes: cat, dog\n"
    for content in (b"", bytes(10240), b"\x7f" * 5000):
        refused("no image in", opened, content)
    refused("is compressed", opened, gzip.compress(whole))
    backwards = tarfile.TarInfo("2.jpg")
    backwards.size = -20_480                            # to the same header again and again
    found, bad, said = opened(whole[:at] + backwards.tobuf(tarfile.GNU_FORMAT))
    assert len(found) >= 10 and "1 shards cut short" in said
    enormous = tarfile.TarInfo("2.jpg")
    enormous.size = 8 << 30                             # it is neither there nor read
    found, bad, said = opened(whole[:at] + enormous.tobuf())
    assert len(found) == 10 and "1 other files" in said


def test_whatever_is_damaged_in_a_tar_nothing_hangs_crashes_or_gets_a_wrong_label():
    plain, random_ = Path(sharded()["one"]).read_bytes(), random.Random(0)
    long = make_tar(folder() / "x.tar", range(20), pax_headers={"mtime": "1.5"}).read_bytes()
    right = {name: label for name, (label, _) in opened(plain)[0].items()}
    begun = time.monotonic()
    for trial in range(60):
        whole = (plain, long)[trial % 2]
        at, size = 512 * random_.randrange(len(whole) // 512), 512 * random_.randrange(1, 12)
        hole = (bytes(size), b"\x7f" * size, random_.randbytes(size), b"")[trial % 4]
        try:
            found, bad, said = opened(whole[:at] + hole + whole[at + size:])
        except UserError as error:
            assert "no image in" in str(error)
            continue
        assert all(label in (None, right.get(name)) for name, (label, _) in found.items()), trial
    assert time.monotonic() - begun < 60


def test_an_index_is_never_wrong():
    root = folder()
    path = make_tar(root / "x.tar", range(5))
    assert len(data.open_data(path)) == 5
    make_tar(path, range(9))                            # replaced: indexed again
    source = data.open_data(path)
    Path(f"{path}.index.npz").unlink()                  # deleted: made again when it is needed
    assert len(source) == 9 and source[8]["caption"] == "picture 8"
    Path(f"{path}.index.npz").write_bytes(b"PK torn")
    assert data.open_data(path)[8]["caption"] == "picture 8"
    for one in root.glob("*.catalogue.npz"):
        one.write_bytes(b"")
    source = data.open_data(path)
    make_tar(path, range(8))                            # replaced under a run
    samples = data.Samples(source, (32, 32), 3, data.random_resized_crop)
    data.Shards.shard.cache_clear()
    for workers in (0, 1):
        batches = data.load(samples, [np.arange(4)], workers, torch.device("cpu"))
        refused("x.tar is not the file that was indexed", next, batches)
    source = data.open_data(path)
    path.unlink()
    refused("No such file", next, data.load(data.Samples(source, (8, 8), 3, data.whole),
                                            [np.arange(4)], 0, torch.device("cpu")))
    usual, path = data.find_samples, make_tar(root / "y.tar", range(5))

    def growing(*args):
        with open(path, "ab") as file:
            file.write(bytes(512))
        return usual(*args)

    data.find_samples = growing
    try:
        refused("y.tar is still being written", data.open_data, path)
    finally:
        data.find_samples = usual
    assert not list(root.glob("*.tmp")) and not Path(f"{path}.index.npz").exists()


def index_alone(spec):
    """A run of its own: a process that believes in no other."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    source = data.open_data(spec)
    return [source[i]["caption"] for i in range(len(source))]


def index_together(spec):
    vit.start(mae.parse_flags(["--device", "cpu"])[0])
    source = data.open_data(spec)
    return [source[i]["caption"] for i in range(len(source))]


def test_many_ranks_and_runs_index_at_once():
    for function in (index_alone, index_together):
        root = folder()
        for k in range(6):
            make_tar(root / f"{k}.tar", range(k, k + 3))
        expected = [f"picture {k + i}" for k in range(6) for i in range(3)]
        assert all(found == expected for found, _ in on_ranks(4, function, str(root)))
        assert len(list(root.glob("*.tar.index.npz"))) == 6 and not list(root.glob("*.tmp"))
    bad = folder()
    for name in ("a.tar", "b.tar"):
        make_tar(bad / name, range(3))
    (bad / "b.tar").write_bytes(gzip.compress(b""))
    refused("b.tar is compressed", on_ranks, 4, index_together, str(bad))   # said by every rank


def test_indexes_are_beside_the_shards_or_in_index_dir():
    root, aside = folder(), folder()
    path = make_tar(root / "x.tar", range(5))
    assert len(data.open_data(path, index_dir=aside / "deep")) == 5
    assert len(list((aside / "deep").iterdir())) == 2 and len(list(root.iterdir())) == 1
    (root / "file").write_text("not a folder")          # where not even root may write
    refused("give a folder where you may write", functools.partial(
        data.open_data, index_dir=root / "file"), path)


def test_specs_of_shards():
    root = Path(sharded()["folder"])
    assert data.expand_braces("a{08..11}{x,y}.tar")[3:6] == ["a09y.tar", "a10x.tar", "a10y.tar"]
    refused("no shard", data.open_data, f"{root}/x-{{00..03}}.tar")
    refused("no data at", data.open_data, f"{root}/nothing-*.tar")
    refused("no shard", data.open_data, f"{root}/nothing.tar")
    refused("unpack compressed ones", data.open_data, f"{root}/x-{{0..1}}.tar.gz")
    refused("no data at", data.open_data, __file__)
    joined = data.open_data(sharded()["three"], photos(), "world:7")
    assert len(joined) == 47 and joined[20]["label"] == joined[0]["label"]
    assert joined.fingerprint() != data.open_data(sharded()["three"]).fingerprint()


def command(*flags):
    """data.py with these flags, in a process: (code, its last line as JSON, what it printed)."""
    run = subprocess.run([sys.executable, HERE / "data.py", *map(str, flags)],
                         capture_output=True, text=True, timeout=120)
    assert "Traceback" not in run.stderr, run.stderr[-3000:]
    last = (run.stdout.splitlines() or ["null"])[-1]
    return run.returncode, json.loads(last if last[0] in "{n" else "null"), run.stdout + run.stderr


def test_pack_writes_shards_of_any_source_and_goes_on():
    out = folder() / "packed"
    code, told, _ = command("pack", sharded()["three"], out, "--shard-size", 8)
    assert code == 0 and told["samples"] == 20 and told["shards"] == 3 and told["left_out"] == 0
    source, before = data.open_data(out), data.open_data(sharded()["three"])
    for i in (0, 9, 19):
        assert source[i]["image"]() == before[i]["image"]()     # the same bytes
        assert all(source[i][key] == before[i][key] for key in ("label", "tags", "caption"))
    first = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    (out / "00001.tar").unlink()                        # as if it had been stopped
    assert command("pack", sharded()["three"], out, "--shard-size", 8)[0] == 0
    assert first == {path.name: path.read_bytes() for path in out.glob("*.tar")}
    code, _, said = command("pack", sharded()["three"], out, "--shard-size", 9)
    assert code == 2 and "holds shards of something else" in said
    code, _, said = command("pack", photos(), photos() / "cat" / "out")
    assert code == 2 and "is inside" in said
    small = folder() / "small"
    code, told, said = command("pack", damaged(), "world:3", small, "--resize", 48)
    assert told["samples"] == 15 and told["left_out"] == 6 and said.count("left out: ") == 6
    source = data.open_data(small)
    assert [min(data.open_image(source[i]["image"]).size) for i in (0, 5, 14)] == [48] * 3
    assert source[0]["where"].endswith("000000000") and "caption" in source[14]


# ======================================================================================
# Data as users have them
# ======================================================================================

def shown(image):
    """The mean colours of an image's quarters."""
    pixels = read(image).astype(float).reshape(2, 16, 2, 16, 3).mean((1, 3))
    return pixels.reshape(4, 3)


def test_orientation_is_undone_once_in_any_container():
    upright, place, expected = quarters(size=(640, 480)), folder(), None
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}     # what each tag undoes
    for tag, turn in turns.items():
        image = upright if turn is None else upright.transpose(turn)
        for kind, flags in (("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("AVIF", {}), ("TIFF", {}),
                            ("MPO", {"save_all": True, "append_images": [image]})):
            exif = Image.Exif()
            exif[0x0112] = tag
            image.save(place / "turned", kind, exif=exif, **flags)
            expected = shown(place / "turned") if expected is None else expected
            assert abs(shown(place / "turned") - expected).max() < 12, (tag, kind)
            for short in (None, 96):                    # as `pack` writes it
                _, content = data.encode(place / "turned", short)
                assert abs(shown(lambda content=content: content) - expected).max() < 12, (
                    tag, kind, short)


def test_what_other_decoders_read_is_read():
    def chunk(kind, content, damage=0):
        return (len(content).to_bytes(4, "big") + kind + content
                + (zlib.crc32(kind + content) ^ damage).to_bytes(4, "big"))

    whole = io.BytesIO()
    quarters().save(whole, "PNG", icc_profile=bytes(2_000_000))
    whole = whole.getvalue()
    expected = shown(lambda: whole)
    for extra in (chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000))),
                  chunk(b"tEXt", b"a\0b", damage=1), chunk(b"pHYs", b"a"), chunk(b"eXIf", b"a"),
                  chunk(b"eXIf", b"a", damage=1)):
        for at in (33, len(whole) - 12):                # behind the header, before the end
            content = whole[:at] + extra + whole[at:]
            assert np.array_equal(shown(lambda content=content: content), expected), extra[:20]
    cut = lambda: whole[:-500]
    assert data.Samples([{"image": cut, "where": "x"}], (8, 8), 3, data.whole, shuffle=False,
                        rows=np.arange(1)).__getitems__([0])["bad"]
    place, ramp = folder(), np.linspace(0, 1, 32)[None].repeat(32, 0)
    for name, values, kind in (("f", ramp, np.float32), ("low", 50 - 100 * ramp, np.float32),
                               ("i", ramp * (2 ** 31 - 1), np.int32)):
        Image.fromarray(values.astype(kind)).save(place / f"{name}.tif")
        found = read(place / f"{name}.tif")[0, :, 0].astype(float) / 255
        assert abs(found - (1 - ramp[0] if name == "low" else ramp[0])).max() < 0.02, name
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(place / "nan.tif")
    try:
        read(place / "nan.tif")
    except ValueError as error:
        assert "not finite" in str(error)
    else:
        raise AssertionError("nan.tif was read")


def test_folders_are_read_whole_or_say_what_they_pass_over():
    root = folder()
    for name, kind in (("cat/1.jfif", "JPEG"), ("dog/1.PPM", "PPM"), ("ant/1.avif", "AVIF")):
        (root / name).parent.mkdir()
        quarters().save(root / name, kind)
    (root / "pets").symlink_to("cat")                   # a class of its own, as in torchvision
    (root / "cat" / "loop").symlink_to(root)
    for name in (b"caf\xe8", b"caf\xe9"):               # not UTF-8, and not the same
        os.mkdir(os.fsencode(root) + b"/" + name)
        quarters().save(os.fsdecode(os.fsencode(root) + b"/" + name + b"/1.png"))
    (root / "cat" / "IMG_1.HEIC").write_bytes(b"x")
    (root / "run").mkdir()
    for name in ("config.json", "log.jsonl"):
        (root / "run" / name).write_text("{}")
    quarters().save(root / "run" / "curves.png")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        source = data.open_data(root)
    assert len(source) == 6
    assert source.classes == ["ant", "caf\\udce8", "caf\\udce9", "cat", "dog", "pets"]
    said = said.getvalue()
    assert "are passed over: 2 .heic" in said and f"{root / 'run'} is passed over" in said
    assert "images: 6; classes: ant, caf" in said
    packed = folder() / "out[1]"
    assert command("pack", root, packed)[1]["samples"] == 6
    assert data.open_data(packed).classes == source.classes
    assert len(list(packed.glob("*.tar.index.npz"))) == 1
    assert not list(packed.glob("*.tmp"))
    parts = folder()
    for name in ("train", "val"):
        shutil.copytree(photos() / "cat", parts / name / "cat")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        data.open_data(parts)
    assert "NOTE: these classes look like parts of a data set" in said.getvalue()
    heic = folder()
    (heic / "1.HEIC").write_bytes(b"x")
    refused("found: 1 .heic; looked for", data.open_data, heic)


def test_labels_and_captions_as_tables_and_web_data_have_them():
    path = folder() / "x.csv"
    path.write_text("image, label, caption\n" + "".join(
        f"{i}.png, {label}, {caption}\n" for i, (label, caption) in enumerate((
            ("3.0", "a"), ("nan", "NaN"), ("NaN", ""), ("N/A", "None"), ("1", "b"), ("", "c")))))
    source = data.open_data(path)
    assert [source[i].get("label") for i in range(6)] == [3, None, None, None, 1, None]
    assert [source[i].get("caption") for i in range(6)] == ["a", None, None, None, "b", "c"]
    path.write_text('image,label\n0.png,"[""red"", ""big""]"\n1.png,"[\'blue\', \'red\']"\n')
    source = data.open_data(path)
    assert [source[i]["tags"] for i in range(2)] == [["red", "big"], ["blue", "red"]]
    path.write_text('image,caption\n0.png,x\n1.png,"5 inch\n2.png,x\n3.png,x\n')
    refused("record 2, cannot be read: Error: unexpected end", data.open_data, path)
    path.write_text("image,caption\n0.png,red, and big\n")
    refused("record 1, cannot be read: ValueError: it has more fields", data.open_data, path)
    lines = path.with_suffix(".jsonl")
    captions = [["a cat", "a feline"], [], math.nan, {"en": "a dog"}, "half \ud83d", "[sic] a cat"]
    lines.write_text("".join(json.dumps({"image": "0.png", "caption": caption}) + "\n"
                             for caption in captions))
    source = data.open_data(lines)
    assert [source[i].get("caption") for i in range(6)] == [
        "a cat", None, None, None, "half ?", "[sic] a cat"]
    tar_path = path.with_suffix(".tar")
    with tarfile.open(tar_path, "w") as tar:
        for i, mark in enumerate((b"", b"\xef\xbb\xbf")):       # a byte order mark
            for end, content in (("png", b"x"), ("cls", mark + b"3\n"), ("txt", mark + b"a cat")):
                add(tar, f"{i}.{end}", content)
    source = data.open_data(tar_path)
    assert [(source[i]["label"], source[i]["caption"]) for i in range(2)] == [(3, "a cat")] * 2


class Broken(data.Samples):
    """Samples whose workers end, stand still, or find no shared memory."""

    def batch(self, positions):
        if self.seed == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == "silent":
            time.sleep(8)
        raise RuntimeError("unable to allocate shared memory(shm) for file")


def test_workers_that_end_or_stand_still_end_the_run_with_one_line():
    usual = data.POLL, data.PATIENCE
    data.POLL, data.PATIENCE = 1, 2
    try:
        for seed, text in (("killed", "a process that reads images has ended"),
                           ("silent", "no images came for 2 seconds"),
                           ("memory", "start the container with --shm-size")):
            samples = Broken(data.open_data(photos()), (8, 8), 3, data.whole, seed, shuffle=False)
            batches = data.load(samples, [np.arange(4)] * 9, 1, torch.device("cpu"))
            refused(text, next, batches)
        samples.seed, data.PATIENCE = "silent", 600
        vit.stop_signals.append(signal.SIGTERM)
        refused("no images came for 4 seconds; the same command resumes", next, data.load(
            samples, [np.arange(4)], 1, torch.device("cpu")))
    finally:
        data.POLL, data.PATIENCE = usual
        vit.stop_signals.clear()


def rounds(counts):
    """What this rank gets of evaluations of so many images: [[(position, weight, targets)]]."""
    vit.start(mae.parse_flags(["--device", "cpu"])[0])
    args, found = argparse.Namespace(micro_batch=4, workers=0, out=str(folder())), []
    with contextlib.redirect_stdout(io.StringIO()):
        for count in counts:
            val = data.Samples(data.open_data(f"world-val:{count}"), (8, 8), 3, data.whole,
                               shuffle=False, targets_of=lambda sample: [sample["label"]])
            batches = [batch for _, batch in data.validate(val, args, torch.device("cpu"))]
            assert all(batch["targets"].shape == (len(batch["position"]), 1) for batch in batches)
            found.append([list(zip(batch["position"].tolist(), batch["weight"].tolist()))
                          for batch in batches])
    return found


def test_every_rank_takes_part_in_every_round_of_an_evaluation():
    counts = range(1, 41)
    for count, ranks in zip(counts, zip(*(found for found, _ in on_ranks(3, rounds, counts)))):
        assert len({len(batches) for batches in ranks}) == 1, count
        rows = sorted(row for batches in ranks for batch in batches for row in batch)
        assert [position for position, weight in rows if weight] == list(range(count)), count


def test_bad_images_are_counted_right_and_never_silent():
    root = folder()
    for path in sorted(photos().glob("*/*.jpg")):
        shutil.copy(path, root)
    (root / "bad.jpg").write_bytes(b"nothing")          # 1 of 21: more than 1%
    refused("images cannot be read, more than --max-bad 0.01; see", train, folder() / "run",
            "--data", root)
    out = folder() / "run"
    flags = "--data", root, "--val", root, "--max-bad", 0.2
    _, _, said = train(out, *flags, "--log-every", 4, world=3)
    lines = (out / "bad_samples.txt").read_text().splitlines()
    listed = {line.split("\t")[0] for line in lines}       # one may have met it twice
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["bad_samples"] for r in records if "loss" in r][-1] == len(listed) > 3
    assert f"{len(listed)} images could not be read, and were replaced: see" in said
    assert "NOTE: 1 of 21 images cannot be read: see" in said
    assert "max_bad" in vit.FREE_FLAGS                  # or a run that it ended could not go on


def test_predictions_are_drawn_in_two_columns_without_a_margin():
    out, names = folder(), ["cat", "a dog"]
    samples = data.Samples(data.open_data(photos()), (64, 64), 3, data.whole, shuffle=False,
                           targets_of=lambda sample: [sample["label"]])
    data.draw_predictions(argparse.Namespace(out=out), data.examples(samples, torch.device("cpu")),
                          torch.rand(8, 2).softmax(1), names)
    pixels = np.asarray(Image.open(out / "predictions.png"))
    drawn = np.flatnonzero((pixels < 255).any((0, 2)))
    assert pixels.shape[0] == 4 * 120 and pixels.shape[1] < 480
    assert drawn[0] < 8 and pixels.shape[1] - drawn[-1] < 30


def test_a_flag_given_twice_is_joined():
    parse = lambda *flags: mae.parse_flags([*flags, "--out", "x"])[0]
    assert parse("--data", "a", "b", "--data", "c").data == ["a", "b", "c"]
    assert parse().data == ["world"] and parse("--data", "a").data == ["a"]


# ======================================================================================
# The built-in world
# ======================================================================================

def test_world_is_a_function_of_the_number():
    first = [data.draw(data.scene(i), 32, 32) for i in range(3)]
    assert all(np.array_equal(data.draw(data.scene(i), 32, 32), first[i]) for i in (2, 0, 1))
    assert not np.array_equal(first[0], data.draw(data.scene(0, "val"), 32, 32))
    source = data.open_data("world-val:80")
    assert sorted(source[i]["label"] for i in range(80)) == sorted([*range(40)] * 2)


def test_world_is_fixed():
    """Numbers quoted anywhere were measured on this world; what changes it has to say so."""
    marks = []
    for split in ("train", "val", "test", "novel", "labelled"):
        scenes = [data.scene(i, split) for i in range(10)]
        said = [(one["label"], one["caption"], one["tags"]) for one in scenes]
        small = [data.draw(one, 16, 16).astype(float).mean((0, 1)).round() for one in scenes]
        marks.append((data.crc(json.dumps(said)), int(np.sum(small))))
    assert marks == WORLD_MARKS, marks


WORLD_MARKS = [(2645172215, 4083), (1850868010, 4176), (2221323267, 4070),
               (2341552395, 3895), (729296710, 3951)]


def test_world_never_shows_a_novel_pair_in_training():
    novel = set(data.class_names("novel"))
    assert len(novel) == 8 and not novel & set(data.class_names("seen"))
    for split in ("train", "val", "test", "labelled"):
        for i in range(1000):
            content = data.scene(i, split)
            pairs = {f"{one['texture']} {one['shape']}" for one in content["objects"]}
            assert not pairs & novel, (split, i)
    assert all(f"{o['texture']} {o['shape']}" in novel
               for i in range(50) for o in data.scene(i, "novel")["objects"][:1])


def test_world_is_drawn_at_any_size_and_window():
    content = data.scene(5)
    large = data.draw(content, 256, 256)[64:128, 128:192].astype(float)
    part = data.draw(content, 64, 64, (0.5, 0.25, 0.75, 0.5)).astype(float)
    assert abs(large - part).mean() < 12 and np.corrcoef(large.ravel(), part.ravel())[0, 1] > 0.9
    assert data.draw(content, 24, 40).shape == (24, 40, 3)


def test_worlds_classes_are_not_read_off_colours_or_places():
    """Ridge regression on 16 x 16 pixels and on a colour histogram stays near chance, 1 in 40."""
    def features(split, count):
        scenes = [data.scene(i, split) for i in range(count)]
        pixels = np.stack([data.draw(one, 16, 16) for one in scenes])
        bins = (pixels // 43).astype(int) @ (36, 6, 1)
        colours = np.stack([np.bincount(one.ravel(), minlength=216) for one in bins])
        labels = np.array([one["label"] for one in scenes])
        return pixels.reshape(count, -1) / 255, colours / 256, labels

    train, val = features("labelled", 4000), features("val", 1000)
    for x, y in zip(train[:2], val[:2]):
        x, y = np.c_[x, np.ones(len(x))], np.c_[y, np.ones(len(y))]
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ np.eye(40)[train[2]])
        correct = ((y @ weights).argmax(1) == val[2]).mean()
        assert correct < 0.12, correct


# ======================================================================================
# One training, however it is run
# ======================================================================================

def test_same_run_twice_and_with_workers_is_bit_equal():
    losses, weights, _ = undisturbed()
    for workers in (0, 3):
        again = train(folder() / "run", "--data", photos(), "--workers", workers)
        assert again[0] == losses and equal(again[1], weights)
    assert train(folder() / "run", "--data", photos(), "--seed", 1)[0] != losses


def test_ranks_layouts_and_accumulation_train_the_same():
    losses, weights, _ = undisturbed()
    for world, flags in ((2, ("--parallel", "ddp")), (3, ("--parallel", "ddp")),
                         (2, ("--parallel", "fsdp")), (3, ("--parallel", "fsdp")),
                         (1, ("--micro-batch", 4)), (2, ("--parallel", "ddp", "--micro-batch", 3)),
                         (2, ("--parallel", "fsdp", "--micro-batch", 2)),
                         (2, ("--parallel", "fsdp", "--activation-checkpoint")),
                         (4, ("--parallel", "hsdp"))):
        other, saved, said = train(folder() / "run", "--data", photos(), *flags, world=world,
                                   node=2 if "hsdp" in flags else None)
        assert close(other, losses, 1e-4), (world, flags, other, losses)
        assert saved.keys() == weights.keys()
        for name in weights:        # a key's bias has no effect: its gradient is rounding alone
            assert name.endswith("qkv.bias") or close(saved[name], weights[name], 1e-2), name
        assert f"{world} ranks" in said


def resumed(begun, flags, world=1, at=5, stage=mae):
    """Copy a finished run that saved after each step, cut it back to step `at`, and go on."""
    out = folder() / "run"
    shutil.copytree(begun, out)
    (out / "finished").unlink()
    for path in out.glob("checkpoints/step-*"):
        if int(path.name[5:]) > at:
            shutil.rmtree(path)
    return (*train(out, *flags, world=world, stage=stage), out)


@functools.lru_cache
def stepwise():
    """The undisturbed run again, with a checkpoint after every step."""
    out = folder() / "run"
    train(out, "--data", photos(), "--save-every", 0, "--keep", 99)
    return out


def test_resumed_run_is_bit_equal_at_the_same_ranks():
    losses, weights, _ = undisturbed()
    for at in (4, 9, 10):                               # inside an epoch, near and at the end
        again, saved, said, out = resumed(stepwise(), ("--data", photos()), at=at)
        assert again == losses and equal(saved, weights) and f"step-{at:08d}" in said
        assert (out / "finished").exists()


def test_resumed_run_may_change_ranks_and_layout():
    losses, _, _ = undisturbed()
    for world, flags in ((3, ("--parallel", "ddp")), (2, ("--parallel", "fsdp"))):
        again, _, _, out = resumed(stepwise(), ("--data", photos(), *flags), world)
        assert close(again, losses, 1e-4)
    for path in out.glob("checkpoints/*"):              # saved by two fsdp ranks, read by one
        assert (path / "complete.json").exists()
    fsdp = folder() / "run"
    train(fsdp, "--data", photos(), "--parallel", "fsdp", "--save-every", 0, "--keep", 99, world=2)
    assert close(resumed(fsdp, ("--data", photos()))[0], losses, 1e-4)


def test_damaged_checkpoint_is_refused_until_it_is_deleted():
    out = folder() / "run"
    shutil.copytree(stepwise(), out)
    part = next(out.glob("checkpoints/step-00000005/__0_0.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    refused("step-00000005 is damaged (__0_0.distcp): delete this folder", resumed, out,
            ("--data", photos()))
    (out / "checkpoints/step-00000004/complete.json").write_text("")
    refused("step-00000004 is damaged (complete.json)", resumed, out, ("--data", photos()), 1, 4)
    shutil.rmtree(out / "checkpoints/step-00000005")
    shutil.rmtree(out / "checkpoints/step-00000004")
    again, weights, said, _ = resumed(out, ("--data", photos()))
    assert "resuming from" in said and "step-00000003" in said
    assert again == undisturbed()[0] and equal(weights, undisturbed()[1])


def fewer_photos():
    """The same photos at the same place, less one: as a path that says photos() to the run."""
    root = folder() / "photos"
    shutil.copytree(photos(), root)
    next(root.glob("*/*.jpg")).unlink()
    return root


def test_resume_rules():
    out = folder() / "run"
    shutil.copytree(stepwise(), out)
    assert "is finished; to run it again, choose another --out" in train(
        out, "--data", photos())[2]
    train(out, "--data", photos(), "--workers", 1, "--log-every", 2)        # cannot change results
    refused("--weight-decay 0.05 → 0.1, --seed 0 → 2", train, out, "--data", photos(),
            "--weight-decay", "0.1", "--seed", "2")
    heavy = resumed(stepwise(), ("--data", photos(), "--weight-decay", 500, "--allow-changed"))[1]
    norm = lambda weights: weights["blocks.0.mlp.fc1.weight"].norm()
    assert norm(heavy) < 0.9 * norm(undisturbed()[1])       # the optimizer has the new value
    _, _, _, half = resumed(stepwise(), ("--data", photos(), "--precision", "fp16",
                                         "--allow-changed"))
    state = vit.read_json(vit.checkpoints(half)[0] / "complete.json")["state"]
    assert state["fp16"] and state["loss_scale"] > 1
    for flags in (("--decoder-depth", 1), ("--batch", 6)):  # never, even if allowed
        refused("holds a run with other flags or data", resumed, stepwise(),
                ("--data", photos(), *flags, "--allow-changed"))
    refused("--data content 20 images (CRC", resumed, stepwise(), ("--data", fewer_photos()))


def test_init_takes_weights_and_nothing_else():
    first = stepwise() / "model.pt"
    out = folder() / "run"
    losses, _, said = train(out, "--data", photos(), "--init", first)
    assert "loaded 110 of 110 tensors (100.0% of parameters)" in said and len(losses) == 10
    assert losses[0] < undisturbed()[0][0]
    assert "loaded" not in on_ranks(2, mae.main, [*QUICK, "--out", str(folder() / "run"), "--init",
                                    str(first), "--steps", "1", "--val", "world-val:2"])[1][1]
    refused("has nano (width 128, depth 6); leave --model out", train, out, "--init", first,
            "--model", "tiny")
    refused("--patch-size 4", train, out, "--init", first, "--patch-size", "4")
    train(folder() / "run", "--init", first, "--image-size", "16", "40")    # resized positions


def test_half_precision_keeps_fp32_weights_in_every_layout():
    expected = undisturbed()[0]
    for precision, world, how in (("bf16", 1, "ddp"), ("bf16", 2, "fsdp"), ("fp16", 2, "fsdp"),
                                  ("fp16", 2, "ddp")):
        losses, weights, said = train(folder() / "run", "--data", photos(), "--parallel", how,
                                      "--precision", precision, world=world)
        assert all(w.dtype == torch.float32 for w in weights.values())
        assert close(losses, expected, 0.05) and losses != expected
        assert f"{world} x cpu, {'bfloat16' if precision == 'bf16' else 'float16'}" in said


def fake_step(how, ranks, node, micro, recompute=False):
    """A training step of the 2B model as one of many ranks, with tensors that have no content:
    (shares of weights, gradients and Adam's state, collectives, bytes sent, peak of memory)."""
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(node))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    args = argparse.Namespace(activation_checkpoint=recompute, compile=False, parallel=how,
                              precision="bf16", seed=0)
    usual, fill, sent = vit.init_device_mesh, vit.init_weights, Counter()

    def real_mesh(*args, **options):
        with _disable_current_modes():
            return usual(*args, **options)

    class Sent(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                name = func._schema.name.split("::")[1].strip("_")
                tensors = [one for arg in args for one in (arg if isinstance(arg, list) else [arg])
                           if torch.is_tensor(one)]
                sent[name] += 1
                sent[f"{name} bytes"] += max((one.nbytes for one in tensors), default=0)
            return func(*args, **(kwargs or {}))

    vit.init_device_mesh, vit.init_weights = real_mesh, lambda *_: None
    local = lambda tensors: sum(getattr(one, "_local_tensor", one).numel() for one in tensors)
    try:
        with FakeTensorMode():
            model, wrapped = vit.build(lambda: MAE(Config.named("2b")), args, torch.device("cpu"),
                                       methods=("predict",))
            optimizer = torch.optim.AdamW(vit.decay_groups(model, 0.05), lr=1e-4, fused=True)
            images, noise = torch.empty(micro, 3, 224, 224), torch.empty(micro, 256)
            tracker = MemTracker()
            tracker.track_external(model, optimizer, images, noise)
            with tracker, Sent():
                with vit.autocast(args, torch.device("cpu")):
                    loss = wrapped(images, noise=noise).mean()
                loss.backward()
            weights = list(model.parameters())
            shares = [local(weights), local([one.grad for one in weights])]
            optimizer.step()
            shares.append(local([one for state in optimizer.state.values()
                                 for name, one in state.items() if name != "step"]) / 2)
    finally:
        vit.init_device_mesh, vit.init_weights = usual, fill
    total = sum(one.numel() for one in weights)
    peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    return [share / total for share in shares], dict(sent), peak + 8 * shares[2]


def test_the_2b_model_is_shared_out_evenly():
    """64 ranks of fsdp and 512 of hsdp (8 to a node), a step each, without content."""
    with torch.device("meta"):
        count = sum(p.numel() for p in MAE(Config.named("2b")).parameters())
    for how, ranks, shards in (("fsdp", 64, 64), ("hsdp", 512, 8)):
        shares, sent, peak = on_ranks(1, fake_step, how, ranks, 8, 64)[0][0]
        assert all(abs(share * shards - 1) < 0.01 for share in shares), shares
        # 24 + 8 blocks and what is in none: gathered for the forward and again for the backward
        # (the root is kept), summed once; hsdp then sums each part over the nodes
        assert sent["allgather_base"] == 65 and sent["reduce_scatter_base"] == 33, sent
        assert sent.get("allreduce", 0) == (33 if how == "hsdp" else 0)
        assert abs(sent["allgather_base bytes"] / (2 * 2 * count) - 1) < 0.03, sent
        assert abs(sent["reduce_scatter_base bytes"] / (4 * count) - 1) < 0.03, sent
        with contextlib.redirect_stdout(io.StringIO()) as said:
            mae.main(["--model", "2b", "--plan", str(ranks), "--batch", str(64 * ranks)])
        row = next(row for row in json.loads(said.getvalue().splitlines()[-1])["memory_gb"]
                   if row["parallel"] == how and not row["recompute"])
        assert abs(row["total"] * 1e9 / peak - 1) < 0.15, (row, peak)


def test_plan_agrees_with_what_torch_counts():
    """Operations and activations by the formulas, against torch's counter and saved tensors."""
    vit_towers = [(12, 768, 197)]
    for make, inputs, towers in (
            (lambda: ViT(Config.named("base")), [(1, 3, 224, 224)], vit_towers),
            (lambda: MAE(Config.named("base")), [(1, 3, 224, 224), (1, 196)],
             [(12, 768, 50), (8, 512, 197)])):
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), \
                FlopCounterMode(display=False) as counter:
            make()(*(torch.empty(shape) for shape in inputs))
        assert abs(vit.forward_flops(towers) / counter.get_total_flops() - 1) < 0.02
        with FakeTensorMode():
            model, kept = make(), {}
            storages = [tensor.untyped_storage() for tensor in (*model.parameters(),
                                                                *model.buffers())]
            own = {storage._cdata for storage in storages}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(*(torch.empty(shape) for shape in inputs))
        assert 0.9 < vit.activation_bytes(towers, 4, False) / sum(kept.values()) < 1.05, loss
    recomputed = vit.activation_bytes(vit_towers, 4, True)      # block inputs and one block
    assert 12 * 197 * 768 * 4 < recomputed < vit.activation_bytes(vit_towers, 4, False) / 4


def test_training_learns():
    losses, _, _ = train(folder() / "run", "--steps", "40", "--batch", "24", "--seed", "3")
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:3])


def test_run_leaves_what_others_rely_on():
    out = stepwise()
    content = torch.load(out / "model.pt", weights_only=True)
    assert content["stage"] == "mae" and content["samples"] == 120
    for key, value in {"width": 128, "depth": 6, "heads": 4, "patch": 8, "image": (32, 32),
                       "norm_pix": True}.items():
        assert content["config"][key] == value
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"step", "samples", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "mfu",
            "bad_samples"} == lines[0].keys()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert lines[4]["samples"] == 60 and 0 <= lines[4]["data_wait"] <= 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["count"] == 13 and lines[-1]["val_loss"] == metrics["loss"]
    assert json.loads((out / "config.json").read_text())["settings"]["--batch"] == 12
    for name in ("curves.png", "reconstruction.png"):
        Image.open(out / name).load()


def test_validation_does_not_depend_on_ranks():
    first = str(stepwise() / "model.pt")
    found = []
    for world, micro in ((1, 64), (1, 2), (2, 64), (3, 2)):
        out = folder()
        said = on_ranks(world, mae.main, ["--init", first, "--eval-only", "--val", "world-val:13",
                                          "--out", str(out), "--device", "cpu", "--workers", "0",
                                          "--micro-batch", str(micro)])[0][1]
        found.append(json.loads(said.splitlines()[-1]))
        assert found[-1] == json.loads((out / "metrics.json").read_text())
    assert [(one["count"], one["bad"]) for one in found] == [(13, 0)] * 4
    assert close([one["loss"] for one in found], found[0]["loss"], 1e-6)


def test_predict_reconstructs_ones_own_pictures():
    first, out = stepwise() / "model.pt", folder()
    pictures = [str(path) for path in list(photos().glob("*/*.jpg"))[:3]]
    flags = ["--init", str(first), "--out", str(out), "--device", "cpu"]
    said = on_ranks(1, mae.main, [*flags, "--predict", *pictures])[0][1]
    assert "3 pictures, 75% masked" in said
    with Image.open(out / "reconstruction.png") as sheet:
        assert sheet.size == (3 * 132, 4 * 148)
    assert mae.parse_flags(["--init", str(first), "--predict", "x"])[0].out == "runs/mae-predict"
    refused("nowhere.jpg cannot be read", on_ranks, 1, mae.main,
            [*flags, "--predict", "nowhere.jpg"])
    encoder = folder() / "encoder.pt"
    content = torch.load(first, weights_only=True)
    torch.save({"model": {name: value for name, value in content["model"].items()
                          if "decoder" not in name and name != "mask_token"},
                "config": content["config"]}, encoder)
    refused("holds an encoder only", on_ranks, 1, mae.main,
            ["--init", str(encoder), "--out", str(out), "--predict", pictures[0]])


class Oracle(torch.nn.Module):
    """Predicts the truth, in the space that the decoder is asked for, or zeros."""
    config, mask_ratio = SMALL, 0.75

    def __init__(self, norm_pix, perfect):
        super().__init__()
        self.norm_pix, self.perfect = norm_pix, perfect

    def predict(self, images, noise):
        return mae.pixel_targets(vit.patchify(images, 8), self.norm_pix) * self.perfect


def test_reconstruction_shows_what_the_true_means_alone_show():
    """A perfect prediction is the original; a prediction of zeros is the row of true means."""
    pixels = torch.from_numpy(np.stack([data.draw(data.scene(i), 32, 32) for i in range(2)]))
    args = argparse.Namespace(seed=0, precision="fp32", micro_batch=2)
    for norm_pix, perfect in ((True, True), (True, False), (False, True)):
        path = folder() / "out.png"
        mae.draw_reconstruction(Oracle(norm_pix, perfect), pixels, torch.arange(2), args,
                                torch.device("cpu"), path)
        sheet = np.asarray(Image.open(path)).astype(int)
        rows = [sheet[20 + 148 * i:148 + 148 * i, :264] for i in range(4 if norm_pix else 3)]
        visible, prediction, original = rows[0], rows[-2], rows[-1]
        assert abs(visible - original).mean() > 10
        assert np.array_equal(original[::4, :128:4], pixels[0].numpy())
        if norm_pix:
            means = rows[1]
            assert abs(means - original).mean() > 2 and abs(means - visible).mean() > 2
        assert abs(prediction - (original if perfect else means)).max() <= 1


# ======================================================================================
# Faults
# ======================================================================================

def test_gradients_are_scaled_clipped_and_checked():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    assert vit.clip_gradients(model, loss_scale=10).item() == 5 and model.weight.grad[0, 1] == 4
    assert abs(vit.clip_gradients(model, limit=1.0).item() - 5) < 1e-6
    assert close(model.weight.grad, [[0.6, 0.8]], 1e-5)
    model.weight.grad[0, 0] = math.nan
    assert not math.isfinite(vit.clip_gradients(model, limit=1.0))


def small_run(precision="fp32"):
    """A vit.Run of a linear layer: batches of 8 rows."""
    args = argparse.Namespace(
        batch=8, precision=precision, warmup=0.0, clip_grad=0.0, eval_every=0, log_every=1000,
        save_every=15, out=folder(), keep=2, max_bad=0.01)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW([{"params": [*model.parameters()], "lr_scale": 1.0}], fused=True)
    return vit.Run(args, model, model, optimizer, torch.device("cpu"),
                   vit.Schedule(10_000, 8, 1, 0.1, 64), {}, 1)


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run():
    run = small_run()
    for finite in [False] * 9 + [True] + [False] * 9:
        run.note_finite(finite)
    assert run.state["skipped"] == 18 and run.state["skipped_in_a_row"] == 9
    refused("ten steps in a row", run.note_finite, False)
    half = small_run("fp16")
    for _ in range(12):
        half.note_finite(False)             # fp16 finding its scale is no fault
    assert half.state["loss_scale"] == 16 and half.state["skipped"] == 0
    for _ in range(2000):
        half.note_finite(True)
    assert half.state["loss_scale"] == 32 and half.state["steps_without_overflow"] == 0


def test_a_step_waits_for_the_device_once_after_the_optimizer():
    """A step that is not finite is skipped without a wait: no weight and no moment changes."""
    run, events = small_run(), []
    step, tolist = run.optimizer.step, torch.Tensor.tolist
    run.optimizer.step = lambda: (events.append("step"), step())
    rows = iter([{"x": torch.ones(8, 4), "bad": []}, {"x": torch.full((8, 4), math.nan), "bad": []},
                 {"x": torch.ones(8, 4), "bad": []}])
    torch.Tensor.tolist = lambda tensor: (events.append("wait"), tolist(tensor))[1]
    try:
        weights = []
        for _, (_) in zip(range(3), run.steps(dict)):
            for batch in run.micro_batches(rows):
                run.backward(run.wrapped(batch["x"]).mean())
            run.update()
            weights.append(run.model.weight.detach().clone())
    finally:
        torch.Tensor.tolist = tolist
    assert events == ["step", "wait"] * 3
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert run.state["skipped"] == 1 and run.optimizer.state[run.model.weight]["step"] == 2


def counted_writes(flags):
    """Run stage 1 and count how often it writes model.pt and a checkpoint."""
    counts, write_model, save = Counter(), vit.Run.write_model, vit.save
    vit.Run.write_model = lambda *args: (counts.update(["model"]), write_model(*args))
    vit.save = lambda *args: (counts.update(["checkpoint"]), save(*args))
    try:
        mae.main(flags)
    finally:
        vit.Run.write_model, vit.save = write_model, save
    return counts


def test_model_is_written_at_evaluations_and_the_end_only():
    flags = [*QUICK, "--out", str(folder() / "run"), "--data", str(photos()), "--save-every", "0",
             "--eval-every", "4"]
    assert on_ranks(1, counted_writes, flags)[0][0] == {"model": 3, "checkpoint": 10}


def poisoned(flags, step=3):
    """Stage 1 with pictures that turn a step's gradient on the last rank to NaN."""
    usual, rank = data.normalise, int(os.environ["RANK"])
    calls = itertools.count()

    def normalise(images):
        last = rank == int(os.environ["WORLD_SIZE"]) - 1
        return usual(images) * (math.nan if last and next(calls) == step else 1)

    data.normalise = normalise
    try:
        return mae.main(flags)
    finally:
        data.normalise = usual


def test_nan_on_one_rank_skips_the_step_on_all():
    for world, how in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = folder() / "run"
        flags = [*QUICK, "--out", str(out), "--data", str(photos()), "--parallel", how]
        said = on_ranks(world, poisoned, flags)[0][1]
        assert "step 4 skipped: its gradient is not finite; positions 36 to 47" in said
        weights = torch.load(out / "model.pt", weights_only=True)["model"]
        assert all(value.isfinite().all() for value in weights.values())
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [line["loss"] is None for line in lines] == [i == 3 for i in range(10)]


def started(*flags, launcher=(sys.executable,)):
    """A real process, as a user starts it."""
    return subprocess.Popen([*launcher, str(HERE / "mae.py"), *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_a_save_changes_nothing_even_before_the_first_sound_step():
    runs = []
    for minutes in (15, 0):
        out = folder() / "run"
        flags = [*QUICK, "--out", str(out), "--data", str(photos()), "--save-every", str(minutes)]
        on_ranks(1, poisoned, flags, 0)
        lines = (out / "log.jsonl").read_text().splitlines()
        runs.append([json.loads(line)["loss"] for line in lines])
    assert runs[0] == runs[1] and runs[0][0] is None and None not in runs[0][1:]


def test_an_interrupted_evaluation_is_made_up_for():
    out = folder() / "run"
    flags = ("--data", photos(), "--eval-every", 5, "--save-every", 0, "--keep", 99)
    train(out, *flags)
    first = (out / "log.jsonl").read_text()
    evaluated = lambda text: [json.loads(line) for line in text.splitlines() if "val_loss" in line]
    again = resumed(out, flags, at=5)[3]
    assert evaluated((again / "log.jsonl").read_text()) == evaluated(first)
    assert [line["step"] for line in evaluated(first)] == [5, 10]


def test_signal_saves_and_the_same_command_goes_on():
    """Two ranks of torchrun, one told to stop: both save the same step and leave with 0."""
    out = folder() / "run"
    flags = [*QUICK, "--out", out, "--data", photos(), "--steps", 100000, "--workers", 1]
    run = started(*flags, launcher=TORCHRUN)
    wait_for(lambda: (out / "log.jsonl").exists() and "loss" in (out / "log.jsonl").read_text())
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGUSR1)
    said, problems = run.communicate(timeout=120)
    assert run.returncode == 0, problems[-2000:]
    assert "the same command resumes the run" in said and not (out / "finished").exists()
    saved = vit.checkpoints(out)
    state = json.loads((saved[0] / "complete.json").read_text())["state"]
    assert len(saved) == 1 and state["step"] > 0
    again = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert again == list(range(1, state["step"] + 1))
    longer = state["step"] + 2
    _, _, said = train(out, "--data", photos(), "--steps", longer, "--allow-changed")
    assert f"resuming from {saved[0]}" in said


def test_ranks_that_torchrun_leaves_behind_save_and_stop():
    out = folder() / "run"
    run = started(*QUICK, "--out", out, "--data", photos(), "--steps", 100000, launcher=TORCHRUN)
    wait_for(lambda: (out / "log.jsonl").exists() and "loss" in (out / "log.jsonl").read_text())
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    run.kill()
    run.communicate(timeout=120)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.stdout.split()))
    assert len(vit.checkpoints(out)) == 1
    run = started(*QUICK, "--out", out, launcher=TORCHRUN)      # and while they start
    wait_for(lambda: subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True).stdout)
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    run.kill()
    run.communicate(timeout=120)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.stdout.split()))


def test_one_run_at_a_time_in_a_folder():
    out = folder() / "run"
    run = started(*QUICK, "--out", out, "--data", photos(), "--steps", 100000)
    wait_for(lambda: (out / "log.jsonl").exists() and "loss" in (out / "log.jsonl").read_text())
    refused("another run is writing to", train, out, "--data", photos())
    run.kill()
    run.communicate(timeout=120)
    train(out, "--data", photos(), "--steps", 2)        # no lock is left behind


def test_full_disk_is_told_in_one_line_and_leaves_nothing_half():
    """A limit on the size of files stands for the disk: the model fits, the optimizer does not."""
    out = folder() / "run"
    flags = [*QUICK, "--out", out, "--data", photos(), "--steps", 2]
    train(folder() / "run", "--data", photos(), "--steps", 1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
    run = subprocess.run([sys.executable, str(HERE / "mae.py"), *map(str, flags)], timeout=120,
                         capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-3000:]
    assert "could not be written" in run.stderr.splitlines()[-1]
    assert (out / "model.pt").exists() and not list(out.rglob("*.tmp"))

    def half(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (out / "whole").write_text("whole")
    refused("whole could not be written", vit.write_aside, out / "whole", half)
    assert (out / "whole").read_text() == "whole" and not list(out.rglob("*.tmp"))


# ======================================================================================
# As a user sees it
# ======================================================================================

def disagree(flag, *values):
    mae.main([*QUICK, "--out", str(HERE / "never"), flag, values[int(os.environ["RANK"])]])


def test_mistakes_get_one_line():
    def tell(text, *flags):
        refused(text, on_ranks, 1, mae.main, [*QUICK, "--out", str(folder() / "x"), *flags])

    tell("no data at nowhere", "--data", "nowhere")
    tell("no image below", "--data", str(folder()))
    tell("image side 30 is not divisible by patch 8; the nearest that are: 24 or 32",
         "--image-size", "30")
    tell("image side 5 is not divisible by patch 8; the nearest that are: 8", "--image-size", "5")
    tell("--predict and --eval-only use a trained model", "--predict", "x.jpg")
    tell("argument --mask-ratio: 1 is not a number from 0 to 0.999", "--mask-ratio", "1")
    tell("--decoder-width 30 must be divisible", "--decoder-width", "30")
    tell("argument --warmup: 2 is not a number from 0 to 1", "--warmup", "2")
    tell("argument --workers: -1 is not a whole number from 0 on", "--workers", "-1")
    tell("argument --batch: many is not a whole number from 1 on", "--batch", "many")
    tell("unrecognized arguments: --modle base", "--modle", "base")
    tell("argument --samples: not allowed with argument --steps", "--samples", "9")
    tell("no weights file nowhere.pt", "--init", "nowhere.pt")
    tell("--image-size takes one or two numbers", "--image-size", "8", "8", "8")
    refused("--samples: inf is not a number from 1 on", on_ranks, 1, mae.main,
            ["--samples", "inf", "--out", str(folder() / "x")])
    if not torch.cuda.is_available():
        tell("--device cuda is not available here; found: ", "--device", "cuda")
    refused("--val: the images to evaluate on", on_ranks, 1, mae.main, [
        "--init", str(stepwise() / "model.pt"), "--eval-only", "--data", str(photos())])
    broken = folder()
    (broken / "finished").touch()
    (broken / "config.json").write_text("{")
    refused("config.json is missing or damaged", on_ranks, 1, mae.main,
            [*QUICK, "--out", str(broken)])
    refused("rank 1 has --batch 24, this one 12: start all ranks with the same", on_ranks, 2,
            disagree, "--batch", "12", "24")
    two = functools.partial(train, folder() / "x", world=2)
    refused("--batch 13 cannot be divided among 2 ranks, 1 or more images at a time within "
            "--micro-batch 64; try 12 or 14", two, "--batch", "13")
    refused("but there is one node; use fsdp", two, "--parallel", "hsdp")
    refused("there is no model 'giant'", Config.named, "giant")


def test_a_mistake_ends_a_real_process_with_one_line_and_code_2():
    run = started("--data", "nowhere", "--out", folder() / "x")
    said, problem = run.communicate(timeout=60)
    assert run.returncode == 2 and "Traceback" not in problem
    assert problem.strip().splitlines()[-1].startswith("mae.py: no data at nowhere")
    run = started("--out", __file__)
    said, problem = run.communicate(timeout=60)
    assert run.returncode == 2 and "Traceback" not in problem and "File exists" in problem
    run = started("--decoder-heads", "0")
    assert run.wait(60) == 2 and run.stderr.read().strip() == (
        "mae.py: argument --decoder-heads: 0 is not a whole number from 1 on")
    run = subprocess.run([sys.executable, HERE / "data.py", "world", "--image-size", "0"],
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "0 is not a whole number" in run.stderr


def test_every_flag_is_explained():
    for command in (["mae.py"], ["wsp.py"], ["finetune.py", "classify"], ["finetune.py", "knn"],
                    ["finetune.py", "linear"], ["data.py", "info"],
                    ["data.py", "verify"], ["data.py", "pack"], ["data.py", "bench"],
                    ["data.py", "world"]):
        text = subprocess.run([sys.executable, HERE / command[0], *command[1:], "--help"],
                              capture_output=True, text=True, check=True, timeout=120).stdout
        for flag in re.findall(r"^  (--[a-z-]+[^\n]*(?:\n {10,}[^\n]*)*)", text, re.M):
            # what comes after the flag's own names and two spaces, or on the lines below
            help_text = re.split(r" {2,}|\n", flag, maxsplit=1)
            assert len(help_text) == 2 and help_text[1].strip(), f"{command}: no help for {flag}"


def test_data_commands_end_in_one_line_of_json():
    code, told, _ = command("info", photos())
    assert code == 0 and told["samples"] == 20 and told["classes"] == 2
    code, told, text = command("info", sharded()["three"])
    assert told["tags_per_image"] == 2 and told["head"][0] == ["#pet", 20]
    code, told, text = command("verify", damaged(), "--workers", 2)
    assert code == 1 and told["samples"] == 18 and told["bad"] == 6 and text.count("bad: ") == 6
    code, told, _ = command("bench", photos(), "--image-size", 32, "--seconds", 1, "--workers", 1)
    assert code == 0 and told["images_per_second"] > 0
    place = folder() / "world.png"
    assert command("world", "--out", place)[0] == 0
    Image.open(place).load()


def test_only_four_packages_and_readable_files():
    allowed = {"torch", "numpy", "PIL", "tqdm", "vit", "data", "mae", "wsp", "finetune"}
    for path in HERE.glob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name}: {name}"
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        assert not long, f"{path.name}: lines over 100 columns: {long}"


def test_evening_path_is_short():
    """vit.py part 1, mae.py, wsp.py, and finetune.py up to the details of its first task."""
    text = {path.name: path.read_text() for path in HERE.glob("*.py")}
    part_1 = text["vit.py"].split("# Part 1:")[1].split("# Part 2:")[0]
    first = text["finetune.py"].split("# Details of classify")[0]
    lines = [len(part.splitlines()) for part in (part_1, text["mae.py"], text["wsp.py"], first)]
    assert sum(lines) < 1600, lines


# ======================================================================================
# Stage 2: hashtags
# ======================================================================================

def test_hashtags_have_one_canonical_form():
    for written, form in (
            ("#Beach_Life", "beachlife"), ("beach-life ", "beachlife"), ("＃ＢＥＡＣＨ", "beach"),
            ("#NoFilter", "nofilter"), ("##", ""), ("", ""), ("#", ""), ("#été", "été"),
            ("#e\u0301te\u0301", "été"), ("#STRASSE", "strasse"), ("#straße", "strasse"),
            ("#夕日", "夕日"), ("#🌅", "🌅"), ("#❤️", "❤"), ("#c++", "c++"), ("#2023", "2023"),
            ("#हिन्दी", "हिन्दी"), ("\u200b#a\u0000b", "ab")):
        assert wsp.canonical(written) == form, (written, wsp.canonical(written))
        assert wsp.canonical(form) == form


def test_hashtags_are_found_in_captions():
    find = lambda caption: data.read_record({"caption": caption})[1]
    assert find("At the sea #sunset #Beach_Life, #no-filter.#été!") == [
        "sunset", "Beach_Life", "no-filter", "été"]
    assert find("#🌅#夕日、＃海") == ["🌅", "夕日", "海"] and find("# nothing ## here") == []
    assert data.read_record({"tags": ["a"], "caption": "#b"})[1] == ["a"]
    assert data.read_record({"tags": "#a b,c", "caption": "#d"})[1] == ["#a", "b", "c"]
    root = folder()
    with tarfile.open(root / "x.tar", "w") as tar:
        add(tar, "1.jpg", good())
        add(tar, "1.txt", "my #Cat".encode())
    assert data.open_data(root / "x.tar")[0]["tags"] == ["Cat"]


def test_synonyms_are_followed_to_the_end():
    path = folder() / "words.tsv"
    path.write_text("#Kitty\tcat\nCAT\tfelis catus\n\n# a comment\nfelis_catus\tFelis Catus\n")
    assert wsp.read_synonyms(path) == {"kitty": "feliscatus", "cat": "feliscatus"}
    for text, problem in (("a\tb\nb\tc\nc\ta\n", "a cycle: a → b → c → a"),
                          ("a\tb\na\tc\n", "line 2: a means b and c"),
                          ("a b\n", "line 1: not an alias, a TAB and a tag"),
                          ("##\tb\n", "line 1: not an alias"), (b"\xff\xfe", "UTF-8")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(problem, wsp.read_synonyms, path)
    refused("cannot be read", wsp.read_synonyms, folder() / "none")


@functools.lru_cache
def tagged_photos():
    """A manifest of the 20 photos: 18 have 1 to 3 tags, cat or dog among them, two have none."""
    path = folder() / "photos.jsonl"
    tags = [["#Cat" if i % 2 else "dogs", *(["nice"] if i % 3 == 0 else []),
             *(["#rare", "RARE"] if i in (5, 6) else [])] if i < 18 else [] for i in range(20)]
    path.write_text("".join(json.dumps(
        {"image": str(photos() / ("cat" if i % 2 else "dog") / f"{i:02}.jpg"), "tags": some}) + "\n"
        for i, some in enumerate(tags)))
    (path.parent / "words.tsv").write_text("dogs\tdog\n")
    return path, ["--data", path, "--synonyms", path.parent / "words.tsv", "--min-count", 2,
                  "--val", path]


def counted(spec, out, min_count=2, extra=()):
    """What open_tags finds on this rank: (how often each sample is shown, what is known)."""
    args, _, _ = wsp.parse_flags(["--data", str(spec), "--min-count", str(min_count),
                                  "--out", str(out), *extra])
    vit.start(args)
    source = data.open_data(*args.data)
    rows, _, about = wsp.open_tags(args, source)
    again, _, _ = wsp.open_tags(args, source)
    assert np.array_equal(rows.chunks, again.chunks)        # from what was kept
    shown = np.bincount([rows[i] for i in range(len(rows))], minlength=len(source))
    return shown, about


def test_images_of_rare_tags_are_shown_more_often():
    """By clip(sqrt(t / f), 1, max) of the rarest tag, 5/3 on the mean; alike on any ranks."""
    path, frequencies = folder() / "x.jsonl", (2000, 1200, 500, 200, 80, 20)
    rarest = np.random.default_rng(0).permutation(np.repeat(np.arange(6), frequencies))
    path.write_text("".join(json.dumps({"image": "x.jpg", "tags": [f"t{k}" for k in range(r + 1)]})
                            + "\n" for r in rarest.tolist()))
    (stands, about), _ = on_ranks(1, counted, path, folder())[0]
    counts = np.array([sum(frequencies[k:]) for k in range(6)])
    assert about["vocabulary"] == [f"t{k}" for k in range(6)] and about["counts"] == counts.tolist()
    t = wsp.solve_t(counts, np.array(frequencies), 10)
    expected = np.clip(np.sqrt(t / counts), 1, 10)
    assert close((expected * frequencies).sum() / 4000, 5 / 3, 1e-6) and expected[-1] > 5
    for k in range(6):
        shown = stands[rarest == k]
        assert set(shown) <= {math.floor(expected[k]), math.ceil(expected[k])}
        assert abs(shown.mean() - expected[k]) < 4 * 0.5 / math.sqrt(frequencies[k])
    mass = [sum(s / (r + 1) for s, r in zip(stands, rarest) if r >= k) for k in range(6)]
    assert close(about["softmax"], -sum(m / sum(mass) * math.log(m / sum(mass)) for m in mass))
    share = [stands[rarest >= k].sum() / stands.sum() for k in range(1, 6)]     # all have t0
    assert close(about["bce"], -sum(s * math.log(s) + (1 - s) * math.log(1 - s)
                                    for s in share) / 6)
    for (other, theirs), _ in on_ranks(3, counted, path, folder()):
        assert np.array_equal(other, stands) and theirs == about
    (once, _), _ = on_ranks(1, counted, path, folder(), 2, ("--resample", "none"))[0]
    assert (once == 1).all()


def test_an_image_has_each_of_its_tags_once():
    source = data.open_data(tagged_photos()[0])
    targets_of = functools.partial(wsp.tag_targets, number_of=wsp.number_in(
        ["cat", "dog", "nice", "rare"], {"dogs": "dog"}))
    assert [targets_of(source[i]) for i in (0, 1, 5, 6, 19)] == [
        [1, 2], [0], [0, 3], [1, 2, 3], []]
    batch = data.Samples(source, (32, 32), 3, data.centre_crop, shuffle=False,
                         rows=np.array([0, 1]), targets_of=targets_of).__getitems__([0, 1, 2])
    assert batch["targets"].tolist() == [[1, 2], [0, -1], [-1, -1]]


def test_many_shards_are_counted_together():
    root = folder()
    for shard in range(5):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(4 * (shard != 2)):
                add(tar, f"{i}.jpg", good())
                add(tar, f"{i}.json", json.dumps({"tags": ["a", f"b{shard}"][:i]}).encode())
        if shard == 2:
            with tarfile.open(root / "2.tar", "w") as tar:
                add(tar, "1.jpg", good())                   # no image of it has a tag
    (stands, about), _ = on_ranks(1, counted, root / "*.tar", folder(), 1)[0]
    assert about["counts"] == [12, 2, 2, 2, 2]
    assert np.array_equal(stands > 0, [0, 1, 1, 1] * 2 + [0] + [0, 1, 1, 1] * 2)
    for (other, theirs), _ in on_ranks(4, counted, root / "*.tar", folder(), 1):
        assert np.array_equal(other, stands) and theirs == about
    one, three = (on_ranks(1, counted, sharded()[name], folder(), 1)[0][0][0]
                  for name in ("one", "three"))             # an image is shown as often
    assert np.array_equal(one, three) and {*one} == {1, 2}


def test_tag_loss_is_the_formula():
    for k, kind in itertools.product(range(1, 11), ("softmax", "bce")):
        logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
        tags = torch.stack([torch.randperm(12)[:10] for _ in range(3)])
        tags[0, k:], tags[1, 1:] = -1, -1                   # k, 1 and 10 tags
        hot = torch.zeros(3, 12, dtype=torch.float64)
        for row, some in zip(hot, tags):
            row[some[some >= 0]] = 1
        with_log = -(hot / hot.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
        expected = with_log if kind == "softmax" else F.binary_cross_entropy_with_logits(
            logits, hot, reduction="none").mean(1)
        found = wsp.tag_losses(logits, tags, kind)
        assert close(found.detach(), expected.detach(), 1e-5)
        ours, theirs = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
                        for loss in (found, expected))
        assert close(ours, theirs, 1e-5)
    nothing = wsp.tag_losses(torch.zeros(2, 7), torch.tensor([[1, -1], [2, 3]]))
    assert close(nothing, [math.log(7)] * 2)


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    scales = vit.drop_path_scales(data.uniform(0, torch.arange(20000), "drop path", 8), 0.3)
    assert (scales[:, 0] == 1).all() and ((scales.mean(0) - 1).abs() < 0.02).all()
    assert close((scales == 0).float().mean((0, 2)), [0, 0.1, 0.2, 0.3], 0.03)
    model, images = ViT(SMALL), torch.randn(2, 3, 32, 32)
    assert close(model(images, torch.ones(2, 2, 2)).detach(), model(images).detach())
    scales = torch.tensor([[[1.0, 1], [0, 0]], [[1, 1], [2, 2]]])   # the first skips the last block
    x = vit.run_blocks(model.blocks, model.embed(images), scales=scales)
    short = vit.run_blocks(model.blocks[:1], model.embed(images))
    assert torch.equal(x[0], short[0]) and not close(x[1].detach(), short[1].detach(), 1e-3)


WSP = ("--drop-path", 0.2, "--smallest-crop", 0.3, "--clip-grad", 0.5)


@functools.lru_cache
def tagging():
    """A run of stage 2 with a checkpoint after every step: (its folder, losses, weights, text)."""
    out = folder() / "run"
    flags = *tagged_photos()[1], *WSP, "--save-every", 0, "--keep", 99
    return (out, *train(out, *flags, stage=wsp))


def test_stage_2_trains_the_same_however_it_is_run():
    out, losses, weights, said = tagging()
    flags = *tagged_photos()[1], *WSP
    assert close(losses[0], math.log(4)) and weights["head.weight"].abs().sum() > 0
    again = train(folder() / "run", *flags, "--workers", 2, stage=wsp)
    assert again[0] == losses and equal(again[1], weights)
    for world, more in ((2, ()), (3, ("--parallel", "fsdp")), (1, ("--micro-batch", 4)),
                        (2, ("--parallel", "fsdp", "--activation-checkpoint"))):
        other, saved, _ = train(folder() / "run", *flags, *more, world=world, stage=wsp)
        assert close(other, losses, 1e-4), (world, more)
    again, saved, _, _ = resumed(out, flags, at=6, stage=wsp)
    assert again == losses and equal(saved, weights)
    again, *_ = resumed(out, (*flags, "--parallel", "fsdp"), world=2, at=3, stage=wsp)
    assert close(again, losses, 1e-4)


def test_stage_2_leaves_its_vocabulary_and_tags():
    out, _, weights, said = tagging()
    content = torch.load(out / "model.pt", weights_only=True)
    assert content["vocabulary"] == ["cat", "dog", "nice", "rare"] and content["stage"] == "wsp"
    assert content["counts"] == [9, 9, 6, 2] and "4 tags on 18 of 20 images" in said
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[0]["entropy"] == lines[5]["entropy"] and 0 < lines[0]["entropy"] < math.log(4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["count"] == 18 and metrics["recall5"] == 1 and metrics["recall1"] < 1
    assert "cat\t9\t9\t1.000" in (out / "tags.txt").read_text()
    for name in ("curves.png", "predictions.png"):
        Image.open(out / name).load()
    model = ViT(Config.named("nano"), 4)            # and stage 3, or anybody, reads the weights
    assert vit.load_weights(model, out / "model.pt")["new"] == []
    said = on_ranks(1, wsp.main, ["--init", str(out / "model.pt"), "--predict",
                                  str(photos() / "cat" / "01.jpg"), "--device", "cpu"])[0][1]
    chances = re.findall(r"(cat|dog|nice|rare) (0\.\d+)", said)
    assert len(chances) == 4 and abs(sum(float(chance) for _, chance in chances) - 1) < 0.01
    found = []
    for world in (1, 3):
        place = folder()
        on_ranks(world, wsp.main, [
            "--init", str(out / "model.pt"), "--eval-only", "--val", str(tagged_photos()[0]),
            "--device", "cpu", "--out", str(place), "--workers", "0", "--micro-batch", "4"])
        found.append(json.loads((place / "metrics.json").read_text()))
        assert all(close(found[-1][name], metrics[name], 1e-5) for name in metrics
                   if name != "samples")


def test_tags_are_written_in_any_locale():
    path = folder() / "tags.txt"
    code = ("import sys, pathlib, wsp; wsp.write_tags(pathlib.Path(sys.argv[1]), "
            "{'vocabulary': ['\\u6d77'], 'counts': [1]}, [1], [1])")
    subprocess.run([sys.executable, "-c", code, path], cwd=HERE, check=True, timeout=120, env={
        **os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})
    assert "海\t1\t1\t1.000" in path.read_text(encoding="utf-8")


def test_both_arms_of_stage_2_share_every_value():
    """From MAE or from nothing: the same positions, head, order; only the encoder differs."""
    first = stepwise() / "model.pt"
    flags = *tagged_photos()[1], "--steps", 1
    _, scratch_weights, _ = train(folder() / "run", *flags, "--lr", 0, stage=wsp)
    losses, weights, said = train(folder() / "run", *flags, "--lr", 0, "--init", first, stage=wsp)
    assert "unused: mask_token, decoder_" in said and "new: head.*" in said
    assert torch.equal(weights["pos_embed"], scratch_weights["pos_embed"])
    assert close(losses[0], math.log(4)) and not weights["head.weight"].any()
    _, other, _ = train(folder() / "run", *flags, "--steps", 2, "--lr", 0.1, "--weight-decay", 1,
                        stage=wsp)
    _, third, _ = train(folder() / "run", *flags, "--steps", 2, "--lr", 0.1, "--weight-decay", 0,
                        stage=wsp)
    moved = {name for name in other if not torch.equal(other[name], third[name])}
    assert "blocks.0.mlp.fc1.weight" in moved and not moved & {"pos_embed", "cls_token"}
    mae_weights = torch.load(first, weights_only=True)["model"]
    assert torch.equal(weights["blocks.3.attn.qkv.weight"], mae_weights["blocks.3.attn.qkv.weight"])
    _, _, said = train(folder() / "run", *flags, "--init", tagging()[0] / "model.pt", stage=wsp)
    assert "(100.0% of parameters)" in said         # the same vocabulary: with its head
    _, _, said = train(folder() / "run", *flags, "--min-count", 3, "--init",
                       tagging()[0] / "model.pt", stage=wsp)
    assert "new: head.*" in said


def test_mistakes_of_stage_2_get_one_line():
    def tell(text, *flags):
        refused(text, on_ranks, 1, wsp.main, [*QUICK, "--out", str(folder() / "x"),
                                              *map(str, flags)])
    manifest = ("--data", tagged_photos()[0])
    tell("the vocabulary is empty: the most frequent tag, cat, is on 9 images", *manifest,
         "--min-count", 10)
    tell("no image of --data has a hashtag", "--data", photos())
    tell("no image of --val has a tag of the vocabulary", *manifest, "--val", photos())
    tell("--patch-size 16, but --init", *manifest, "--init", stepwise() / "model.pt",
         "--patch-size", 16)
    tell("--model tiny, but --init", *manifest, "--init", stepwise() / "model.pt", "--model",
         "tiny")
    tell("has no vocabulary", "--init", stepwise() / "model.pt", "--predict", "x.jpg")
    tell("--predict nowhere.jpg cannot be read", "--init", tagging()[0] / "model.pt", "--predict",
         "nowhere.jpg")
    tell("argument --drop-path: 1 is not a number from 0 to 0.999", *manifest, "--drop-path", 1)
    path, flags = tagged_photos()
    refused("vocabulary 4 tags (CRC", resumed, tagging()[0],
            (*flags, *WSP, "--min-count", 1, "--vocabulary-size", 4, "--synonyms",
             folder_with(path.parent / "words.tsv", "dogs\thund\n"), "--allow-changed"), 1, 5, wsp)


def folder_with(path, text):
    """A new file of the same name with this text."""
    new = folder() / path.name
    new.write_text(text)
    return new


# ======================================================================================
# Stage 3: full finetuning
# ======================================================================================

def test_layer_decay_follows_the_formula():
    """d^(L+1) for patches and positions, d^(L-i) for block i, 1 for the last norm and the head."""
    for size, pool in itertools.product(vit.SIZES, ("cls", "mean")):
        with torch.device("meta"):
            model = ViT(Config.named(size), 10, pool)
        L, names = model.config.depth, {p: name for name, p in model.named_parameters()}
        groups, seen = vit.decay_groups(model, 0.05, finetune.NO_DECAY, 0.65), 0
        for group in groups:
            for p in group["params"]:
                first, *rest = names[p].split(".")
                layer = int(rest[0]) + 1 if first == "blocks" else \
                    0 if first in ("patch_embed", "cls_token", "pos_embed") else L + 1
                assert close(group["lr_scale"], 0.65 ** (L + 1 - layer))
                free = p.dim() == 1 or first in ("cls_token", "pos_embed")
                assert group["weight_decay"] == (0 if free else 0.05)
                seen += 1
        assert seen == len(names) and len(groups) == 2 * (L + 2)
        assert {group["lr_scale"] for group in vit.decay_groups(model, 0.05)} == {1.0}


def test_targets_are_smoothed_and_shared():
    logits, classes = torch.randn(4, 6), torch.tensor([[0], [5], [2], [2]])
    for smoothing in (0.0, 0.1):
        wanted = finetune.soft_targets(classes, 6, smoothing, "ce")
        assert close(finetune.class_losses(logits, wanted, "ce"), F.cross_entropy(
            logits, classes[:, 0], label_smoothing=smoothing, reduction="none"), 1e-5)
    several = torch.tensor([[0, 3, -1], [5, -1, -1]])
    shared = finetune.soft_targets(several, 6, 0.0, "softmax")
    assert shared.tolist() == [[0.5, 0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert close(finetune.class_losses(logits[:2], shared, "softmax"),
                 wsp.tag_losses(logits[:2], several), 1e-5)
    each = finetune.soft_targets(several, 6, 0.0, "bce")
    assert each.tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert close(finetune.class_losses(logits[:2], each, "bce"),
                 wsp.tag_losses(logits[:2], several, "bce"), 1e-5)


def test_mixing_weighs_targets_as_it_weighs_pixels():
    images = torch.arange(40.0)[:, None, None, None].expand(-1, 3, 24, 16)     # image i is i
    wanted, positions = torch.eye(40), torch.arange(0, 40, 2)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        numbers = data.uniform(0, positions, "mix", 35)
        mixed, shares = finetune.mix(images, wanted, numbers, mixup, cutmix)
        for i in range(40):
            partner = i ^ 1
            assert close(shares[i].sum(), 1) and shares[i].nonzero().numel() <= 2
            mean = shares[i, i] * i + shares[i, partner] * partner      # by area, exactly
            assert close(mixed[i].mean(), mean, 1e-4)
            assert close(shares[i, i], shares[partner, partner], 1e-5)
            values = set(mixed[i].unique().tolist())
            assert values <= {i, partner} or mixup and len(values) == 1
        pasted = sum(len(image.unique()) == 2 for image in mixed)
        assert (pasted == 0) == (cutmix == 0) and (mixup == 0 or pasted < 30)
    # Cutmix against loops: a rectangle around a point, cut at the edges
    numbers = data.uniform(0, positions, "mix", 35)
    mixed, _ = finetune.mix(images, wanted, numbers, 0.0, 1.0)
    share = finetune.beta(numbers[:, 3:].reshape(20, 2, 16), 1.0)
    for pair in range(20):
        h, w = (int(side * math.sqrt(1 - share[pair])) // 2 for side in (24, 16))
        y, x = int(24 * numbers[pair, 1]), int(16 * numbers[pair, 2])
        expected = torch.full((24, 16), 2.0 * pair)
        expected[max(0, y - h):y + h, max(0, x - w):x + w] = 2 * pair + 1
        assert torch.equal(mixed[2 * pair, 0], expected)


def test_beta_numbers_are_distributed_so():
    for alpha in (0.1, 0.8, 1.0):
        found = finetune.beta(data.uniform(0, torch.arange(20000), "x", 32).reshape(-1, 2, 16),
                              alpha)
        theirs = torch.distributions.Beta(alpha, alpha).sample((20000,))
        for level in (0.001, 0.05, 0.25, 0.5, 0.9):
            assert abs((found < level).double().mean() - (theirs < level).double().mean()) < 0.02
        assert found.min() >= 0 and found.max() <= 1 and found.isfinite().all()


def test_randaugment_does_what_its_levels_say():
    """Against Pillow and tables, at timm's magnitudes; two of fifteen, each half of the time."""
    image = Image.fromarray(data.draw(data.scene(1, "val"), 40, 60))
    do = lambda name, level, sign=1, image=image: np.asarray(
        finetune.OPERATIONS[name](image, level, sign)).astype(int)
    plain = np.asarray(image).astype(int)
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "colour",
                 "contrast", "brightness", "sharpness", "solarize", "solarize_add"):
        assert (do(name, 0.0) == plain).all(), name
    assert abs(do("brightness", 1.0) - (plain * 1.9).clip(0, 255)).max() <= 1
    assert abs(do("brightness", 1.0, -1) - plain * 0.1).max() <= 1
    assert abs(do("brightness", 0.5, -1) - plain * 0.55).max() <= 1
    assert (do("invert", 0.3) == 255 - plain).all()
    assert (do("posterize", 0.9) == (plain & 0x80)).all()       # 4 - int(3.6) = 1 bit
    assert (do("posterize", 0.3) == (plain & 0xE0)).all()
    assert (do("solarize", 0.5) == np.where(plain < 128, plain, 255 - plain)).all()
    assert (do("solarize_add", 1.0) == np.where(plain < 128, plain + 110, plain)).all()
    moved = do("translate_x", 0.5)                              # 0.225 of 60: 13.5 to the left
    twice = do("translate_x", 20 / 60 / 0.45)
    assert abs(twice[:, :40] - plain[:, 20:]).max() <= 1
    assert (twice[:, 41:] == [124, 116, 104]).all()
    assert (moved[:, -12:] == [124, 116, 104]).all()
    grid = np.zeros((41, 41, 3), np.uint8)
    grid[20, 40] = 255                                          # to the right of the centre
    up = do("rotate", 1.0, image=Image.fromarray(grid))[..., 0]     # 30 degrees, counter-clockwise
    y, x = np.unravel_index(up.argmax(), up.shape)
    assert (20 - y, x - 20) == (10, 17) and do(
        "rotate", 1.0, -1, Image.fromarray(grid))[30, 37, 0] > 100
    used, calls = Counter(), 3000
    kept = dict(finetune.OPERATIONS)
    try:
        for name in kept:
            finetune.OPERATIONS[name] = lambda image, level, sign, name=name: (
                used.update([(name, sign, round(level, 1))]), image)[1]
        for position in range(calls):
            finetune.rand_augment(np.zeros((4, 4, 3), np.uint8), 0, position, 9.0)
    finally:
        finetune.OPERATIONS.update(kept)
    names = Counter(name for name, _, _ in used.elements())
    assert len(names) == 15 and all(abs(n - calls / 15) < 5 * math.sqrt(calls / 15)
                                    for n in names.values())
    levels = [level for _, _, level in used.elements()]
    assert abs(sum(levels) / len(levels) - 0.9) < 0.01 and max(levels) == 1 and min(levels) < 0.8
    pixels = np.asarray(image)
    once, again = (finetune.rand_augment(pixels, 0, 5, 9.0) for _ in range(2))
    assert (once == again).all()
    for position in range(200):                                 # grey too, and level 10
        finetune.rand_augment(pixels[..., :1], 0, position, 10.0)


def test_erasing_takes_a_rectangle_of_noise():
    images, positions = torch.full((400, 3, 32, 48), 7.0), torch.arange(400)
    erased = finetune.erase(images, positions, 0, 0.25)
    gone = (erased != 7).any(1)                                             # [B,H,W]
    some = gone.flatten(1).any(1)
    assert abs(some.float().mean() - 0.25) < 0.07
    areas = []
    for mask in gone[some]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        h, w = (int(index.max() - index.min()) + 1 for index in (rows, columns))
        assert mask.sum() == h * w and 0.25 < h / w < 4
        areas.append(h * w / (32 * 48))
    assert 0.015 < min(areas) and max(areas) < 0.35 and abs(np.mean(areas) - 0.17) < 0.03
    noise = erased.permute(0, 2, 3, 1)[gone]
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert torch.equal(erased, finetune.erase(images, positions, 0, 0.25))
    assert torch.equal(finetune.erase(images, positions, 0, 0.0), images)
    assert torch.equal(erased[7:9], finetune.erase(images[7:9], positions[7:9], 0, 0.25))


def test_average_is_the_formula():
    model = ViT(SMALL, 3)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected, name = ema["blocks.0.mlp.fc1.weight"].clone(), "blocks.0.mlp.fc1.weight"
    for step in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        vit.update_ema(ema, model, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * dict(model.named_parameters())[name]
    assert close(ema[name], expected.detach(), 1e-5)
    own = model.head.weight.clone()
    with vit.ema_weights(model, ema):
        assert close(model.blocks[0].mlp.fc1.weight.detach(), expected.detach(), 1e-5)
    assert torch.equal(model.head.weight, own) and close(ema[name], expected.detach(), 1e-5)


def test_average_precision_is_the_formula():
    scores, right = torch.randn(50), torch.rand(50) < 0.3
    ranked = right[scores.argsort(descending=True)].tolist()
    hits = [sum(ranked[:i + 1]) / (i + 1) for i in range(50) if ranked[i]]
    assert close(finetune.average_precision(scores, right), sum(hits) / len(hits))


# Everything on: mixing, erasing, RandAugment, drop path, layer decay, averaging
FINE = ("--mixup", 0.8, "--cutmix", 1.0, "--erasing", 0.5, "--randaugment", 9, "--drop-path", 0.2,
        "--ema", 0.8, "--layer-decay", 0.7, "--smoothing", 0.1, "--pool", "mean")


@functools.lru_cache
def finetuned():
    """A run of `classify` with a checkpoint after every step: (folder, losses, weights, text)."""
    out = folder() / "run"
    flags = "--data", photos(), "--val", photos(), *FINE, "--save-every", 0, "--keep", 99
    return (out, *train(out, *flags, stage=Task))


class Task:
    """`finetune.py classify` as the helpers for stages take it."""
    @staticmethod
    def main(argv):
        finetune.main(["classify", *argv])


def test_finetuning_trains_the_same_however_it_is_run():
    out, losses, weights, said = finetuned()
    flags = "--data", photos(), "--val", photos(), *FINE
    assert abs(losses[0] - math.log(2)) < 1e-3
    again = train(folder() / "run", *flags, "--workers", 2, stage=Task)
    assert again[0] == losses and equal(again[1], weights)
    for world, more in ((2, ()), (3, ("--parallel", "fsdp")), (1, ("--micro-batch", 5)),
                        (2, ("--parallel", "fsdp", "--activation-checkpoint"))):
        other, saved, _ = train(folder() / "run", *flags, *more, world=world, stage=Task)
        assert close(other, losses, 1e-4), (world, more)
        for name in ("head.weight", "fc_norm.weight"):
            assert close(saved[name], weights[name], 2e-3), (world, more, name)
    again, saved, _, _ = resumed(out, flags, at=6, stage=Task)
    assert again == losses and equal(saved, weights)
    again, saved, *_ = resumed(out, (*flags, "--parallel", "fsdp"), world=2, at=3, stage=Task)
    assert close(again, losses, 1e-4) and close(saved["head.weight"], weights["head.weight"], 2e-3)
    flags = "--data", photos(), "--val", photos(), "--recipe", "maws", "--lr", 0.1
    losses, weights, _ = train(folder() / "run", *flags, stage=Task)        # SGD
    for world, more in ((2, ()), (2, ("--parallel", "fsdp"))):
        other, *_ = train(folder() / "run", *flags, *more, world=world, stage=Task)
        assert close(other, losses, 1e-4)


def test_finetuning_leaves_what_others_rely_on():
    out, _, weights, said = finetuned()
    content = torch.load(out / "model.pt", weights_only=True)
    assert content["classes"] == ["cat", "dog"] and content["stage"] == "classify"
    assert content["config"]["pool"] == "mean" and "fc_norm.weight" in weights
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["classes"] == ["cat", "dog"] and best["model"].keys() == weights.keys()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["count"] == 20 and metrics["top5"] == 1 and metrics["best"] >= metrics["top1"]
    assert "cat\t10\t" in (out / "classes.txt").read_text()
    for name in ("curves.png", "predictions.png"):
        Image.open(out / name).load()
    said = on_ranks(1, Task.main, ["--init", str(out / "model.pt"), "--predict",
                                   str(photos() / "cat" / "01.jpg"), "--device", "cpu"])[0][1]
    chances = re.findall(r"(cat|dog) (0\.\d+)", said)
    assert len(chances) == 2 and abs(sum(float(chance) for _, chance in chances) - 1) < 0.01
    _, _, said = train(folder() / "run", "--data", photos(), "--init", out / "model.pt", "--val",
                       photos(), stage=Task)
    assert "(100.0% of parameters)" in said and "a new head" not in said
    _, _, said = train(folder() / "run", "--data", photos(), "--init", tagging()[0] / "model.pt",
                       "--val", photos(), stage=Task)
    assert "a new head for 2 classes: --init has one for 4 hashtags" in said


def test_a_change_that_the_optimizer_cannot_take_is_refused_and_changes_nothing():
    out = folder() / "run"
    flags = "--data", photos(), "--val", photos(), "--steps", 2
    train(out, *flags, stage=Task)
    before = (out / "config.json").read_text()
    for change in (("--optimizer", "sgd"), ("--layer-decay", 0.5)):
        refused("holds a run with other flags", functools.partial(train, stage=Task), out, *flags,
                *change, "--allow-changed")
        assert (out / "finished").exists() and (out / "config.json").read_text() == before


def test_a_head_that_was_fitted_to_another_pooling_is_new():
    out = finetuned()[0]                                        # of the mean of the patches
    flags = "--data", photos(), "--val", photos(), "--steps", 1, "--lr", 0, "--init"
    _, weights, said = train(folder() / "run", *flags, out / "model.pt", stage=Task)
    assert "a new head" not in said
    path, content = folder() / "x.pt", torch.load(out / "model.pt", weights_only=True)
    content["config"]["pool"] = "cls"
    torch.save(content, path)
    _, other, said = train(folder() / "run", *flags, path, "--pool", "mean", stage=Task)
    assert "other classes or pooling" in said
    assert not torch.equal(other["head.weight"], weights["head.weight"])


def evaluated(*flags, world=1):
    out = folder()
    said = on_ranks(world, Task.main, ["--eval-only", "--device", "cpu", "--out", str(out),
                                       "--workers", "0", "--micro-batch", "3",
                                       *map(str, flags)])[0][1]
    return json.loads((out / "metrics.json").read_text()), said, out


@functools.lru_cache
def thirteen():
    """13 of the photos as a manifest of one class each, and of several; some have none."""
    lines, files = [], sorted(photos().glob("*/*.jpg"))[3:16]
    for i, path in enumerate(files):
        name = path.parent.name
        lines.append({"image": str(path), "label": name, "several": [name, "bird"] if i % 3 else
                      [] if i % 2 else ["dog"]})
    one, several = folder() / "one.jsonl", folder() / "several.jsonl"
    one.write_text("".join(json.dumps(line) + "\n" for line in lines))
    several.write_text("".join(json.dumps({"image": line["image"], "label": line["several"]}) + "\n"
                               for line in lines))
    return one, several


def test_evaluation_does_not_depend_on_ranks():
    model = finetuned()[0] / "model.pt"
    for spec in thirteen()[:1]:
        found, _, out = evaluated("--init", model, "--val", spec)
        assert found["count"] == 13 and found["bad"] == 0
        other, _, place = evaluated("--init", model, "--val", spec, world=4)
        assert other["top1"] == found["top1"] and close(other["loss"], found["loss"], 1e-5)
        assert (out / "classes.txt").read_text() == (place / "classes.txt").read_text()


def test_images_with_several_classes_and_classes_of_others():
    one, several = thirteen()
    model = finetuned()[0] / "model.pt"
    refused("--val has 1 classes that the model lacks: bird; the model has 2: cat, dog",
            evaluated, "--init", model, "--val", several)
    words = folder_with(one.parent / "map.tsv", "cat\tcat\ndog\tdog\n")
    found, said, _ = evaluated("--init", model, "--val", several, "--class-map", words)
    assert found["count"] == 11 and "2 of 13 images have no known class and are left out" in said
    # Whatever is predicted is right where a class of the data stands for all of the model's
    words = folder_with(one.parent / "map.tsv", "cat\tbird\ndog\tbird\ncat\tcat\ndog\tdog\n")
    found, _, _ = evaluated("--init", model, "--val", several, "--class-map", words)
    rows = [json.loads(line)["label"] for line in several.read_text().splitlines()]
    assert found["top1"] >= sum("bird" in row for row in rows) / found["count"]
    birds = folder_with(one, one.read_text().replace('"dog"', '"bird"').replace('"cat"', '"bird"'))
    words = folder_with(one.parent / "map.tsv", "cat\tbird\ndog\tbird\n")
    found, _, _ = evaluated("--init", model, "--val", birds, "--class-map", words)
    assert found["top1"] == 1 and found["count"] == 13
    words = folder_with(one.parent / "map.tsv", "cat\tdog\n")
    found, _, _ = evaluated("--init", model, "--val", one, "--class-map", words)
    assert found["count"] == one.read_text().count('"label": "dog"')
    for loss in ("bce", "softmax"):
        out = folder() / "run"
        train(out, "--data", several, "--val", several, "--loss", loss, "--ema", 0.9, stage=Task)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["count"] == 11 and 0 < metrics["map"] <= 1
        assert torch.load(out / "model.pt", weights_only=True)["classes"] == ["bird", "cat", "dog"]
        again, _, _ = evaluated("--init", out / "model.pt", "--val", several, world=3)
        assert close(again["map"], metrics["map"], 1e-5)
    model = finetuned()[0] / "model.pt"                         # of ce: --loss is not ignored
    assert "map" in evaluated("--init", model, "--val", one, "--loss", "bce")[0]


def test_released_files_are_evaluated_by_number_order_and_name():
    path, model = folder() / "vit_ft.pth", ViT(Config.named("nano"), 2)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"model": model.state_dict()}, path)
    first, said, _ = evaluated("--init", path, "--val", photos(), "--crop", "squash")
    assert "does not name its 2 outputs: taken as the 2 classes of --val, in alph" in said
    names = folder_with(folder() / "names.txt", "felis, cat\ndog, hound\n")
    second, _, _ = evaluated("--init", path, "--val", photos(), "--crop", "squash", "--classes",
                             names)
    third, _, _ = evaluated("--init", path, "--val", photos(), "--crop", "centre", "--classes",
                            names)
    assert first["top1"] == second["top1"] and first["loss"] == second["loss"] != third["loss"]
    swapped = folder_with(folder() / "names.txt", "dog, hound\nfelis, cat\n")
    other, _, _ = evaluated("--init", path, "--val", photos(), "--crop", "squash", "--classes",
                            swapped)
    assert close(other["top1"], 1 - first["top1"])
    numbered = folder_with(folder() / "x.jsonl", "".join(
        json.dumps({"image": str(file), "label": int("dog" in str(file))}) + "\n"
        for file in sorted(photos().glob("*/*.jpg"))))
    by_number, _, _ = evaluated("--init", path, "--val", numbered, "--crop", "squash")
    assert by_number["top1"] == first["top1"]
    picture = photos() / "cat" / "01.jpg"
    pixels, = data.read_pictures(argparse.Namespace(predict=[picture]), Config.named("nano"),
                                 data.whole)
    whole = Image.open(picture).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(pixels.numpy().astype(int) - np.asarray(whole)).mean() < 3


def test_mistakes_of_finetuning_get_one_line():
    def tell(text, *flags):
        refused(text, on_ranks, 1, finetune.main, ["classify", *QUICK, "--out", str(
            folder() / "x"), *map(str, flags)])
    tell("no weights file", "--init", "nowhere.pt")
    fish = folder()
    for name in ("cat", "fish"):
        shutil.copytree(photos() / "cat", fish / name)
    tell("--val has 1 classes that the model lacks: fish", "--data", photos(), "--val", fish)
    one = folder()
    shutil.copytree(photos() / "cat", one / "cat")
    tell("there is nothing to tell apart", "--data", one)
    tell("there is nothing to tell apart", "--data", photos() / "cat")      # no class at all
    manifest = folder_with(folder() / "x.jsonl", json.dumps(
        {"image": str(photos() / "cat" / "01.jpg"), "label": 7}) + "\n")
    tell("--val has", "--data", photos(), "--val", manifest)
    model = finetuned()[0] / "model.pt"
    refused("--val has 6 classes that the model lacks: 2, 3, 4, 5, 6 and 1 more; the model has 2",
            evaluated, "--init", model, "--val", manifest)
    tell("image side 4 is not divisible by patch 8; the nearest that are: 8", "--data", photos(),
         "--image-size", 4)
    tell("labels of --data are lists", "--data", thirteen()[1])
    tell("argument --mixup: 2 is not a number from 0 to 1", "--data", photos(), "--mixup", 2)
    tell("--batch 3 cannot be divided among 1 ranks, 2 or more images at a time", "--data",
         photos(), "--batch", 3, "--mixup", 1)
    tell("no alpha channel", "--data", photos(), "--channels", 4, "--randaugment", 9)
    tell("has no head", "--init", stepwise() / "model.pt", "--eval-only", "--val", photos())
    empty = folder_with(folder() / "names.txt", "\n\n")
    tell("is empty", "--data", photos(), "--classes", empty)
    twice = folder_with(folder() / "names.txt", "cat\ndog\ncat\n")
    tell("'cat', a class of --data, is the name of 2 classes of the model", "--data", photos(),
         "--classes", twice)
    three = folder_with(folder() / "names.txt", "cat\ndog\ncow\n")
    refused("has 3 lines, but", evaluated, "--init", model, "--val", photos(), "--classes", three)
    wrong = folder_with(folder() / "map.tsv", "cow\tcat\n")
    refused("line 1: not one of the model's classes", evaluated, "--init", model, "--val", photos(),
            "--class-map", wrong)
    refused("the first word is the task, one of: classify", finetune.main, ["clasify"])
    refused("leave --val out", finetune.main, ["features", "--init", str(model), "--val", "x"])
    refused("predicts hashtags, not classes", evaluated, "--init", tagging()[0] / "model.pt",
            "--val", photos())
    out = finetuned()[0]
    other = folder_with(folder() / "names.txt", "dog\ncat\n")
    flags = "--data", photos(), "--val", photos(), *FINE, "--classes", other, "--allow-changed"
    refused("classes ['cat', 'dog'] → ['dog', 'cat']", resumed, out, flags, 1, 5, Task)


# ======================================================================================
# Stage 3: frozen encoders
# ======================================================================================

def asked(task, *flags, world=1):
    """A task of stage 3 on its own: (its metrics, its folder, what it printed)."""
    out = folder()
    if "--features" not in flags and task != "zeroshot":
        flags = *flags, "--features", folder()
    said = on_ranks(world, finetune.main, [
        task, "--device", "cpu", "--workers", "0", "--micro-batch", "3", "--out", str(out),
        *map(str, flags)])[0][1]
    return json.loads((out / "metrics.json").read_text()), out, said


def test_features_are_what_the_encoder_makes_of_whole_images():
    """The file that other programs read: images in order, unmasked, not augmented."""
    init = stepwise() / "model.pt"
    flags = "--init", init, "--data", photos(), "--image-size", 32
    config, _ = vit.config_from(init)
    model = ViT(Config(config.width, config.depth, config.heads, config.patch, 32))
    vit.load_weights(model, init, log=lambda text: None)
    source = data.open_data(photos())
    samples = data.Samples(source, (32, 32), 3, data.centre_crop, shuffle=False)
    batch = samples.__getitems__(range(20))
    images = data.normalise(batch["images"])
    tokens = model.norm(vit.run_blocks(model.blocks, model.embed(images)))
    cls, mean = model(images), tokens[:, 1:].mean(1)
    for world, more, expected in ((1, (), cls), (3, (), cls), (2, ("--parallel", "fsdp"), cls),
                                  (1, ("--pool", "mean"), mean)):
        _, out, _ = asked("features", *flags, *more, world=world)
        with np.load(out / "features.npz") as file:
            assert file["features"].dtype == np.float32
            assert close(file["features"], expected.detach(), 1e-4), (world, more)
            assert file["labels"].tolist() == batch["label"].tolist()
            assert file["names"][3].decode() == source[3]["where"]
            assert file["classes"].tolist() == ["cat", "dog"] and len(file["names"]) == 20


def test_images_that_cannot_be_read_have_no_features():
    names = [*sorted(photos().glob("cat/*"))[:2], damaged() / "empty.jpg",
             *sorted(photos().glob("cat/*"))[2:4]]
    manifest = folder_with(folder() / "x.jsonl", "".join(
        json.dumps({"image": str(name)}) + "\n" for name in names))
    for world in (1, 3):
        metrics, out, _ = asked("features", "--init", stepwise() / "model.pt", "--data", manifest,
                                world=world)
        assert metrics["count"] == 4 and metrics["bad"] == 1
        assert "empty.jpg" in (out / "bad_val_samples.txt").read_text()
        with np.load(out / "features.npz") as file:
            assert file["index"].tolist() == [0, 1, 3, 4] and file["labels"].tolist() == [-1] * 4
            assert file["features"].shape == (4, 128) and (file["features"] != 0).any(1).all()


def test_kept_features_are_never_of_other_images_or_weights():
    """Names, sizes and times of change may be equal: what a file holds counts."""
    root, args = folder(), dict(init=str(folder() / "x.pt"), pool="cls", crop="centre",
                                precision="fp32")
    Path(args["init"]).write_bytes(bytes(3 << 20))

    def paint(part, colour):
        (root / part / "cat").mkdir(parents=True, exist_ok=True)
        path = root / part / "cat" / "1.bmp"
        Image.new("RGB", (200, 200), (90, 90, colour)).save(path)
        os.utime(path, (1e9, 1e9))

    def mark(*specs, config=SMALL, **changed):
        return finetune.fingerprint(argparse.Namespace(**args | changed), config,
                                    data.open_data(*specs), torch.device("cpu"))

    def everything():
        manifests = [root / f"{part}.jsonl" for part in "ab"]
        for part, path in zip("ab", manifests):
            path.write_text(json.dumps({"image": f"{part}/cat/1.bmp", "label": "cat"}) + "\n")
        tars = [root / f"{part}.tar" for part in "ab"]
        for part, path in zip("ab", tars):
            with tarfile.open(path, "w") as tar:
                add(tar, "1.bmp", (root / part / "cat" / "1.bmp").read_bytes())
            os.utime(path, (1e9, 1e9))
        return [mark(spec) for spec in (root / "a", root / "b", *manifests, *tars)]

    for part, colour in ("a", 0), ("b", 1):
        paint(part, colour)
    first = everything()
    assert len(set(first)) == 6 and first == everything()
    paint("a", 2)                                       # in its place: the same name, size and time
    again = everything()
    assert [old != new for old, new in zip(first, again)] == [True, False] * 3
    (root / "b.jsonl").write_text((root / "b.jsonl").read_text().replace('"cat"', '"dog"'))
    assert mark(root / "b.jsonl") != again[3]           # labels are kept with the features
    settings = [mark(root / "a", **more) for more in (
        {}, {"pool": "mean"}, {"crop": "squash"}, {"precision": "bf16"},
        {"config": Config(64, 2, 4, 8, 64)})]
    Path(args["init"]).write_bytes(bytes(3 << 19) + b"x" + bytes((3 << 19) - 1))    # in its middle
    assert len({*settings, mark(root / "a")}) == 6


def test_nearest_neighbours_are_found_in_any_chunks():
    features, queries = torch.randn(100, 8).numpy(), torch.randn(7, 8)
    features[50] = features[3]                          # a tie: the first stays first
    similarity = F.normalize(queries, dim=1) @ F.normalize(torch.tensor(features), dim=1).T
    for chunk in (7, 33, 1000):
        best, index = finetune.nearest(queries, features, 20, chunk)
        expected, order = similarity.sort(descending=True, stable=True)
        assert close(best, expected[:, :20], 1e-5)
        assert close(similarity.gather(1, index), expected[:, :20], 1e-5)
        assert [len(set(row)) for row in index.tolist()] == [20] * 7
    labels = torch.randint(0, 4, (7, 20))
    votes = torch.zeros(7, 4)
    for row in range(7):
        for near, label in zip(best[row], labels[row]):
            votes[row, label] += math.exp(near / 0.07)
    assert torch.equal(finetune.vote(best, labels, 4), votes.argmax(1))


def test_the_encoder_runs_once_for_all_tasks():
    init, kept = stepwise() / "model.pt", folder()
    flags = "--init", init, "--data", photos(), "--val", photos(), "--features", kept
    first, _, said = asked("knn", *flags)
    assert first["knn1"] == 1 and first["count"] == first["train"] == 20    # each finds itself
    assert "model: " in said and len(list(kept.iterdir())) == 1             # --data and --val: one
    again, _, said = asked("knn", *flags, world=3)
    assert again == first and "model: " not in said
    for task, more in (("features", (*flags[:4], *flags[6:])), ("linear", flags)):
        assert "are kept in" in asked(task, *more)[2] and len(list(kept.iterdir())) == 1
    found, *_ = asked("knn", *flags[:4], "--val", thirteen()[0], *flags[6:])
    assert found["knn1"] == 1 and found["count"] == 13      # classes are compared by name
    refused("knn needs an encoder", asked, "knn", "--data", photos(), "--val", photos())
    refused("linear needs --val", asked, "linear", *flags[:4])
    refused("there is nothing to tell apart", asked, "knn", *flags[:2], "--data", photos() / "cat",
            "--val", photos())
    refused("linear holds back a tenth of --data, but it has 4 images", asked, "linear", *flags[:2],
            "--data", "world-labelled:4")


def test_linear_fit_is_at_its_minimum():
    """The penalty is on the weight of standardised features, which is folded into the head."""
    features = torch.randn(60, 8) * torch.linspace(0.1, 10, 8) + 5
    labels = torch.randint(0, 3, (60,))
    weight, bias = (p.requires_grad_() for p in finetune.fit_linear(features, labels, 3, 0.01))
    scale = features.std(0, correction=0)
    loss = F.cross_entropy(F.linear(features, weight, bias), labels) \
        + 0.005 * (weight * scale).square().sum()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert (slopes[0] / scale).norm() < 1e-2 and slopes[1].norm() < 1e-2


def part_of_fit(features, labels, parts):
    """A rank's part of a fit: rows parts[rank] … parts[rank + 1] are its own."""
    vit.start(argparse.Namespace(device="cpu", precision="fp32", parallel="ddp", workers=0))
    mine = slice(parts[vit.get_rank()], parts[vit.get_rank() + 1])
    return finetune.fit_linear(features[mine], labels[mine], 3, 0.01, vit.all_reduce_sum)


def test_linear_fit_is_that_of_all_ranks_rows():
    features, labels = torch.randn(60, 8), torch.randint(0, 3, (60,))
    expected = finetune.fit_linear(features, labels, 3, 0.01)
    found = on_ranks(3, part_of_fit, features, labels, (0, 10, 10, 60))     # one has none
    for head, _ in found:
        assert all(torch.equal(*pair) for pair in zip(head, found[0][0]))
        assert all(close(*pair, 1e-2) for pair in zip(head, expected))


def test_linear_chooses_on_held_back_images_and_leaves_a_classifier():
    """The heads to choose from have not seen a tenth of --data; the last one has seen all of it."""
    init, spec = stepwise() / "model.pt", "world-labelled:60"       # in 40 classes
    flags = "--init", init, "--data", spec, "--val", spec, "--features", folder()
    found, out, _ = asked("linear", *flags)
    assert found["train"] == 60 and found["held_back"] < 0.5 and found["top1"] > 0.9
    other, place, _ = asked("linear", *flags, world=3)
    content, theirs = (torch.load(path / "model.pt", weights_only=True) for path in (out, place))
    weights, before = content["model"], torch.load(init, weights_only=True)["model"]
    assert other == found and close(theirs["model"]["head.weight"], weights["head.weight"], 1e-2)
    assert content["stage"] == "linear" and len(content["classes"]) == 40
    assert all(torch.equal(weights[name], before[name]) for name in weights.keys() & before.keys())
    again, *_ = evaluated("--init", out / "model.pt", "--val", spec)
    assert again["top1"] == found["top1"] and again["count"] == 60


def test_freeze_trains_only_the_head_however_it_is_run():
    init = stepwise() / "model.pt"
    flags = "--data", photos(), "--val", photos(), "--init", init, "--freeze", "--pool"
    before = torch.load(init, weights_only=True)["model"]
    for pool in ("cls", "mean"):
        out = folder() / "run"
        losses, weights, _ = train(out, *flags, pool, "--save-every", 0, "--keep", 99, stage=Task)
        new = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"}
                                              if pool == "mean" else set())
        assert weights.keys() - before.keys() == new
        assert all(torch.equal(weights[name], before[name]) for name in weights.keys() - new)
        assert all((weights[name] != float(name == "fc_norm.weight")).any() for name in new)
    for world, more in ((2, ()), (2, ("--parallel", "fsdp", "--activation-checkpoint")),
                        (1, ("--micro-batch", 5))):
        other, theirs, _ = train(folder() / "run", *flags, pool, *more, world=world, stage=Task)
        assert close(other, losses, 1e-4), (world, more)
        assert close(theirs["head.weight"], weights["head.weight"], 2e-3), (world, more)
    again, saved, *_ = resumed(out, (*flags, pool), at=6, stage=Task)
    assert again == losses and equal(saved, weights)
    again, saved, *_ = resumed(out, (*flags, pool, "--parallel", "fsdp"), world=2, at=3, stage=Task)
    assert close(again, losses, 1e-4) and close(saved["head.weight"], weights["head.weight"], 2e-3)
    refused("--freeze trains a head on a pretrained encoder", on_ranks, 1, Task.main,
            [*QUICK, "--freeze"])


def test_prompts_are_only_what_is_learned():
    encoder = ViT(SMALL).requires_grad_(False)
    images = torch.randn(2, 3, 32, 32)
    model = finetune.Prompted(encoder, 3, 4, seed=0)
    torch.nn.init.normal_(model.head.weight)
    bound = math.sqrt(6 / (3 * 8 * 8 + 64))
    assert model.prompts.shape == (2, 4, 64) and 0.95 * bound < model.prompts.abs().max() <= bound
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model(images).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "prompts", "head.weight", "head.bias"} and equal(before, encoder.state_dict())
    assert all(model.prompts.grad[layer].abs().sum() > 0 for layer in range(2))
    # None change nothing; those of a block are dropped after it
    none = finetune.Prompted(encoder, 3, 0, seed=0)
    none.head.load_state_dict(model.head.state_dict())
    assert close(none(images).detach(), model.head(encoder(images)).detach(), 1e-5)
    x = encoder.embed(images)
    for block, prompts in zip(encoder.blocks, model.prompts):
        x = block(torch.cat([x, prompts.expand(2, -1, -1)], 1))[:, :17]     # wherever they stand
    assert close(model(images).detach(), model.head(encoder.norm(x[:, 0])).detach(), 1e-4)


def test_few_images_of_each_class_are_chosen_by_chance():
    labels = np.array([0] * 30 + [1] * 3 + [-1] * 5 + [2] * 30)
    for shots, expected in ((1, [1, 1, 1]), (5, [5, 3, 5])):
        chosen = finetune.few_of_each(labels, shots, 0)
        assert np.bincount(labels[chosen]).tolist() == expected
        assert np.array_equal(chosen, finetune.few_of_each(labels, shots, 0))
        assert not np.array_equal(chosen, finetune.few_of_each(labels, shots, 1))
    assert set(finetune.few_of_each(labels, 1, 0)) <= set(finetune.few_of_each(labels, 5, 0))
    often = Counter(i for split in range(600) for i in finetune.few_of_each(labels, 5, split))
    assert all(abs(often[i] - 100) < 50 for i in (*range(30), *range(38, 68)))


def test_low_shot_is_the_same_on_any_ranks():
    flags = ("--init", stepwise() / "model.pt", "--data", photos(), "--val", photos(),
             "--image-size", 32, "--shots", 1, 30, "--splits", 2, "--epochs", 2, "--features",
             folder())
    first, *_ = asked("lowshot", *flags)
    assert first["count"] == 20 and first["linear30"] > first["linear1"] - 0.3
    assert first["linear30_deviation"] == 0            # all images, whatever the split
    again, *_ = asked("lowshot", *flags, world=3)
    assert again.keys() == first.keys()
    assert all(abs(again[name] - value) < 1e-6 for name, value in first.items())
    refused("leave --parallel out", asked, "lowshot", *flags, "--parallel", "fsdp")




# ======================================================================================
# Claims, measured (--claims)
# ======================================================================================

def obvious_pipeline(path, uniforms, size):
    """What one writes first: decode all of it, crop, resize, to float, normalise: [C,H,W]."""
    with Image.open(path) as opened:
        box = data.random_resized_crop(*opened.size, uniforms, size)
        pixels = opened.convert("RGB").crop([round(side) for side in box])
    pixels = pixels.resize(size[::-1], Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy()).float() / 255
    return (values - torch.tensor(data.IMAGENET_MEAN).reshape(3, 1, 1)) \
        / torch.tensor(data.IMAGENET_STD).reshape(3, 1, 1)


def claim_decoding_is_faster_than_the_obvious_pipeline():
    """By less for small photographs and for finely detailed ones: see the README's range."""
    torch.set_num_threads(1)
    for size, least in (((500, 333), 1.0), ((1024, 683), 1.4), ((3000, 2000), 3.0)):
        root, ratios, seconds = folder(), [], 20
        for i in range(8):
            picture = Image.fromarray(data.draw(data.scene(i), size[1], size[0]))
            picture.save(root / f"{i}.jpg", quality=90)
        samples = data.Samples(data.open_data(root), (224, 224), 3, data.random_resized_crop)
        begun, position = time.perf_counter(), 0
        while time.perf_counter() < begun + seconds:
            positions, times = np.arange(position, position + 32), [time.perf_counter()]
            data.normalise(samples.__getitems__(positions)["images"])
            times.append(time.perf_counter())
            uniforms = data.uniform(0, positions, "crop", 22).tolist()
            torch.stack([obvious_pipeline(samples.sample(i)["image"], row, (224, 224))
                         for i, row in zip(samples.order(positions).tolist(), uniforms)])
            times.append(time.perf_counter())
            ratios.append((times[2] - times[1]) / (times[1] - times[0]))
            position += 32
        print(f"    {size}: {np.median(ratios):.2f} times as fast")
        assert np.median(ratios) > least, (size, np.median(ratios))


def claim_fifty_kills_change_no_bit():
    """One run of 1 rank and one of 2, each killed 25 times at random moments, or a rank of it."""
    chance, steps = random.Random(0), 700
    for launcher, world in (((sys.executable,), 1), (TORCHRUN, 2)):
        flags = [*QUICK, "--data", photos(), "--save-every", 0.002, "--steps", steps]
        expected = train(folder() / "run", *flags, world=world)
        out, moments = folder() / "run", Counter()
        for kill in range(25):
            run = started(*flags, "--val", "world-val:13", "--out", out, launcher=launcher)
            time.sleep(chance.uniform(1, 8))
            ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
            victims = [run.pid, *map(int, ranks.stdout.split())]
            moments["in a save" if list(out.glob("checkpoints/*.tmp")) else
                    "in model.pt" if list(out.glob("model.pt*.tmp")) else
                    "in a step" if run.poll() is None else "finished"] += 1
            for pid in [chance.choice(victims)] if world > 1 else victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.communicate(timeout=120)
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in victims))
        again = train(out, *flags, world=world)
        print(f"    {world} ranks: {dict(moments)}")
        assert again[0] == expected[0] and equal(again[1], expected[1])
        assert not list(out.rglob("*.tmp"))


def claim_torchrun_restarts_a_killed_rank():
    out = folder() / "run"
    flags = [*QUICK, "--data", photos(), "--save-every", 0.01, "--steps", 400, "--log-every", 100]
    expected = train(folder() / "run", *flags, world=2)
    launcher = (*TORCHRUN, "--max-restarts", "3")
    launcher = ("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", *launcher)
    run = started(*flags, "--val", "world-val:13", "--out", out, launcher=launcher)
    for kill in range(3):
        wait_for(lambda: len(vit.checkpoints(out)) and int(
            vit.checkpoints(out)[0].name[5:]) > 100 * kill)
        ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
        os.kill(int(ranks.stdout.split()[kill % 2]), signal.SIGKILL)
        time.sleep(1)
    run.communicate(timeout=300)
    assert run.returncode == 0 and (out / "finished").exists()
    assert equal(torch.load(out / "model.pt", weights_only=True)["model"], expected[1])


def claim_world_is_drawn_fast():
    for side, least in ((32, 1500), (64, 1000), (128, 600), (224, 300)):
        times = []
        for i in range(400):
            begun = time.perf_counter()
            data.draw(data.scene(i), side, side)
            times.append(time.perf_counter() - begun)
        print(f"    {side}: {1 / np.median(times):.0f} images/s")
        assert 1 / np.median(times) > least, side


# ======================================================================================
# Stage 3: zero-shot
# ======================================================================================

# A vocabulary of ten pieces, and what the sentencepiece library (0.2.3, with the normaliser that
# XLM-R's file has) makes of texts with it, numbered as in tokenizer.json.
PIECES = {"▁": -1.5, "▁a": -2.25, "▁cat": -3.1, "a": -2.4, "c": -3.3, "t": -2.9, "at": -3.6,
          "é": -4.1, "ガ": -5.2, "aa": -4.7}
PIECE_IDS = {
    "": [],
    " \u200b ": [],
    "  a\tcat\u3000at\n": [5, 6, 4, 10],
    "c\x00t c\u0001at \u200d\ufeffcat\u00ad": [4, 8, 3, 9, 6, 6, 3],
    "cafe\u0301 e\u0323\u0301": [4, 8, 7, 3, 11, 4, 3],
    "ｃａｔ ﾞｶﾞ": [6, 4, 3, 12],
    "catt <s></s><unk><mask>": [6, 9, 4, 3, 7, 3],
    "🐈🐈\u200d⬛ a猫猫": [4, 3, 4, 3, 5, 3],
    "▁a▁▁cat▁": [5, 6],
    "aaaaaaaa": [5, 13, 13, 13, 7],
}


@functools.lru_cache
def tokenizer_file():
    special = [[piece, 0.0] for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary = [*special, *(list(item) for item in PIECES.items()), ["<mask>", 0.0]]
    return folder_with(folder() / "tokenizer.json", json.dumps(
        {"model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary}}))


def test_pieces_are_those_of_the_sentencepiece_library():
    tokenizer = finetune.Tokenizer(tokenizer_file())
    assert tokenizer.size == 15
    for text, ids in PIECE_IDS.items():
        assert tokenizer.encode(text) == ids, (text, tokenizer.encode(text), ids)
    # Sums of 64 bits choose other pieces somewhere in this text.
    ids = tokenizer.encode("".join(random.Random(0).choices("aact ", k=3000)))
    assert len(ids) == 2220 and zlib.crc32(json.dumps(ids).encode()) == 2489828908
    begun = time.perf_counter()
    tokenizer.encode("a cafe\u0301 cat 🐈 " * 5000)
    assert time.perf_counter() - begun < 20             # linear: 0.4 s on an idle machine


def test_normalised_text_is_that_of_the_sentencepiece_library():
    """NFKC of characters and of those that compose as they stand: marks are not sorted."""
    for text, expected in {
            "\u0634\u0651\u064e": "\u0634\u0651\u064e", "a\u0302\u0323": "\u00e2\u0323",
            "\u01a1\u0323": "\u01a1\u0323", "o\u031b\u0323": "\u1ee3", "e\u0001\u0301": "e\u0301",
            "\u1112\u1161\u11ab": "\ud55c", "\u314e\u314f": "\ud558", "\uff76\uff9e": "\u30ac",
            "\uff21\uff5e": "A\uff5e", "\ufb01 \u00bd \u2122": "fi 1\u20442 TM",
            "x\u200by\u200dz\u00adw": "x y z\u00adw",
            "\u0e19\u0e49\u0e33": "\u0e19\u0e49\u0e4d\u0e32",
    }.items():
        assert finetune.normalise(text) == expected, ascii((text, finetune.normalise(text)))


def test_a_file_that_is_no_tokenizer_is_one_clear_line():
    whole = tokenizer_file().read_bytes()
    path = folder() / "broken.json"
    for content in (b"", b"\x0a\x0e\x0a\x05<unk>", whole[:-1], b"{}", b"[]", b'{"model": 3}',
                    whole.replace(b"Unigram", b"BPE"), whole.replace(b"unk_id", b"unknown"),
                    whole.replace(b'"aa"', b'"a\\u2581a"'),
                    b'{"model": {"type": "Unigram", "unk_id": 3, "vocab": []}}'):
        path.write_bytes(content)
        refused("give XLM-R's tokenizer.json", finetune.Tokenizer, path)
    refused("give XLM-R's tokenizer.json", finetune.Tokenizer, folder() / "missing")


def towers(locked=True):
    """Towers of the size of the reference values, where MLPs are twice as wide as the text."""
    model = finetune.Towers(vit.Config(64, 3, 4, 8, 32), finetune.TextConfig(100, 32, 2, 4, 20),
                            24, locked=locked)
    for block in model.text_encoder.blocks:
        block.mlp.fc1, block.mlp.fc2 = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
    return model


# Names in ours, in the released layout, in the older one, at Hugging Face
TEXT_LAYOUTS = [row.split() for row in """
norm. embedding_layer_norm. embedding_layer_norm. embeddings.LayerNorm.
token_embed. token_embedding. token_embedding. embeddings.word_embeddings.
position_embed. positional_embedding.embedding. positional_embedding.embedding. \
embeddings.position_embeddings.
blocks. layers.layers. layers. encoder.layer.
.attn.qkv. .self_attn.in_proj_ .attention.input_projection. .attention.self.
.attn.proj. .self_attn.out_proj. .attention.output_projection. .attention.output.dense.
.mlp.fc1. .linear1. .residual_mlp.mlp.0. .intermediate.dense.
.mlp.fc2. .linear2. .residual_mlp.mlp.3. .output.dense.
.norm1. .norm1. .attention_layer_norm. .attention.output.LayerNorm.
.norm2. .norm2. .final_layer_norm. .output.LayerNorm.""".strip().split("\n")]


def their_name(name, layout):
    """The name that a tensor of TextTransformer has in a layout, a column of TEXT_LAYOUTS."""
    for row in TEXT_LAYOUTS:
        name = name.replace(row[0], row[layout])
    return name


REFERENCE_TOKENS = torch.tensor([[0, 5, 6, 7, 2, 1, 1], [0, 9, 11, 13, 15, 17, 2]])


def test_zero_shot_model_agrees_with_the_original():
    """REFERENCE_VALUES 4, from a file in either layout of the released ones."""
    def name_in(name, layout):
        start, _, rest = name.partition("text_encoder.")
        return start or f"text_encoder.encoder.transformer.{their_name(rest, layout)}"

    shapes = {name: value.shape for name, value in towers().state_dict().items()}
    filled = {}
    for j, name in enumerate(sorted(shapes, key=lambda name: name_in(name, 1))):
        one = "norm" in name and name.endswith("weight")
        filled[name] = 0.1 * wave(*shapes[name], step=0.37, start=j) + one
    filled["logit_scale"] = filled["logit_scale"].reshape(())
    for layout, prefix in ((1, ""), (2, "module.")):
        path = folder() / "released.pt"
        torch.save({prefix + name_in(name, layout): value for name, value in filled.items()}, path)
        model = towers().double()
        vit.load_weights(model, path, rename=finetune.tower_names)
        images, texts, scale = model(wave(2, 3, 32, 32), REFERENCE_TOKENS)
        assert close(images[:, :3].detach(), torch.tensor([
            [0.015300908590245892, 0.11641300238990626, 0.20176914243421348],
            [0.015248234983592929, 0.11636571603595204, 0.20173364331913535]]))
        assert close(texts[:, :3].detach(), torch.tensor([
            [-0.10046555497443768, -0.18839200722624408, -0.2508204850868459],
            [-0.08526665484251188, -0.17623288077798951, -0.2433468130459958]]))
        assert close((scale * images @ texts.T).softmax(1).detach(), torch.tensor([
            [0.5036151732084871, 0.4963848267915129], [0.503617522053939, 0.496382477946061]]))
        assert scale.item() == 1
    refused("MLPs of 64 for a width of 32", finetune.read_text_config, path)


def test_xlm_r_from_hugging_face_is_folded_in():
    """Its names, its query, key and value apart, its one token type, which is added to all."""
    config = finetune.TextConfig(9, 8, 2, 2, 12)
    text, other, theirs = finetune.TextTransformer(config), finetune.TextTransformer(config), {}
    for name, value in text.state_dict().items():
        theirs[f"roberta.{their_name(name, 3)}"] = value.normal_().clone()
    for name in [name for name in theirs if ".attention.self." in name]:
        for part, third in zip(("query", "key", "value"), theirs.pop(name).chunk(3)):
            theirs[name.replace(".self.", f".self.{part}.")] = third
    kind = torch.randn(1, 8)
    theirs["roberta.embeddings.position_embeddings.weight"] -= kind
    theirs |= {"roberta.embeddings.token_type_embeddings.weight": kind,
               "lm_head.bias": torch.zeros(9), "roberta.pooler.dense.weight": torch.zeros(8, 8)}
    path = folder() / "xlm-r.bin"
    torch.save(theirs, path)
    vit.load_weights(other, path, rename=finetune.text_part)
    tokens = torch.tensor([[0, 4, 5, 2, 1]])
    assert close(other(tokens).detach(), text(tokens).detach(), 1e-5)
    refused("so its number of heads is unknown", finetune.read_text_config, path)
    path.with_name("config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2}')
    assert finetune.read_text_config(path)[0] == config


def test_contrastive_loss_is_that_of_all_pairs():
    """Loss and derivatives of every rank together are those of one matrix of B x B logits."""
    images, texts = (F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1).requires_grad_()
                     for _ in range(2))
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    logits = scale * images @ texts.T
    right = torch.arange(6)
    loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    loss.backward()
    for world in (1, 3):
        found = [answer for answer, _ in on_ranks(world, part_of_loss, images.detach(),
                                                  texts.detach(), scale.detach())]
        for rank, (theirs, by_images, by_texts, by_scale) in enumerate(found):
            mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
            assert close(theirs, loss.detach(), 1e-9) and close(by_scale, scale.grad, 1e-9)
            assert close(by_images, images.grad[mine], 1e-9)
            assert close(by_texts, texts.grad[mine], 1e-9)


def part_of_loss(images, texts, scale):
    """global_loss on this rank's share of the pairs."""
    vit.start(argparse.Namespace(device="cpu", precision="fp32", parallel="ddp", workers=0))
    rank, world = vit.get_rank(), vit.get_world_size()
    mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
    return finetune.global_loss(images[mine], texts[mine], scale)


class Zeroshot:
    @staticmethod
    def main(argv):
        finetune.main(["zeroshot", *argv])


@functools.lru_cache
def paired():
    """A run of `zeroshot` with a checkpoint after every step: (folder, flags, losses, weights)."""
    out = folder() / "run"
    flags = ("--data", "world:40", "--init", stepwise() / "model.pt")
    losses, weights, _ = train(out, *flags, "--save-every", 0, "--keep", 99, stage=Zeroshot)
    return out, flags, losses, weights


def test_text_tower_trains_the_same_however_it_is_run():
    """The loss compares all pairs of the batch, wherever they are; the image tower stays."""
    out, flags, losses, weights = paired()
    for world, more in ((3, ()), (2, ("--micro-batch", 3, "--activation-checkpoint")),
                        (2, ("--parallel", "fsdp"))):
        other, theirs, _ = train(folder() / "run", *flags, *more, world=world, stage=Zeroshot)
        assert close(other, losses, 1e-4), (world, more)
        for name in ("text_projection", "vision_projection", "logit_scale"):
            assert close(theirs[name], weights[name], 1e-3), (world, more, name)
    trunk = torch.load(stepwise() / "model.pt", weights_only=True)["model"]
    assert torch.equal(weights["vision_encoder.blocks.0.attn.qkv.weight"],
                       trunk["blocks.0.attn.qkv.weight"])
    again, saved, _, _ = resumed(out, flags, at=6, stage=Zeroshot)
    assert again == losses and equal(saved, weights)


def test_unlocked_both_towers_are_trained():
    _, flags, locked, weights = paired()
    runs = [train(folder() / "run", *flags, "--unlock", *more, world=world, stage=Zeroshot)
            for world, more in ((1, ()), (2, ("--micro-batch", 2, "--parallel", "fsdp")))]
    assert close(runs[0][0], runs[1][0], 1e-4)
    assert runs[0][0][0] == locked[0] and runs[0][0][-1] != locked[-1]
    name = "vision_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(runs[0][1][name], weights[name])
    assert close(runs[0][1][name], runs[1][1][name], 1e-3)


def test_kept_features_train_the_same_on_any_number_of_ranks():
    """--cache-features: computed once, by all ranks, from whole images."""
    _, flags, losses, _ = paired()
    kept = folder()
    runs = [train(folder() / "run", *flags, "--cache-features", kept, world=world, stage=Zeroshot)
            for world in (3, 1)]
    assert close(runs[0][0], runs[1][0], 1e-4) and len([*kept.iterdir()]) == 1
    assert runs[0][0] != losses


def test_zero_shot_classes_are_means_over_names_and_templates():
    """Class vectors, top-1 and top-5, and retrieval, by plain loops."""
    out, flags, _, _ = paired()
    names = folder_with(folder() / "names.txt", "".join(
        f"{name}, a {name}\n" for name in data.class_names()))
    templates = folder_with(folder() / "templates.txt", "a {}.\n\nsee {} {}\n")
    given = ("--init", out / "model.pt", "--eval-only", "--val", "world-val:50", "--classes", names,
             "--templates", templates, "--image-size", 32)
    found, *_ = asked("zeroshot", *given)
    both, *_ = asked("zeroshot", *given, world=3)
    assert {name: value for name, value in found.items() if "loss" not in name} == {
        name: value for name, value in both.items() if "loss" not in name}
    model, source = trained_towers(out), data.open_data("world-val:50")
    one = lambda text: model.embed_texts(torch.tensor([[0, *finetune.encode_bytes(text), 2]]))[0]
    vectors = [F.normalize(sum(one(line.replace("{}", name)) for line in ("a {}.", "see {} {}")
                               for name in (word, f"a {word}")), dim=0)
               for word in data.class_names()]
    samples = data.evaluation_samples(source, model.config, data.WHOLE_WIDTH)
    batch = samples.__getitems__(range(50))
    images = model.embed_images(data.normalise(batch["images"]))
    logits = model.logit_scale.exp() * images @ torch.stack(vectors).T      # [n,K]
    assert close(found["loss"], F.cross_entropy(logits, batch["label"]), 1e-4)
    right = logits.argsort(1, descending=True) == batch["label"][:, None]
    assert close(found["top1"], right[:, 0].float().mean())
    assert close(found["top5"], right[:, :5].any(1).float().mean())
    captions = [source[i]["caption"] for i in range(50)]
    texts = sorted({*captions})
    table = images @ torch.stack([one(text) for text in texts]).T           # [n,m]
    for k in (1, 5, 10):
        hits = [captions[i] in [texts[j] for j in table[i].argsort(descending=True)[:k]]
                for i in range(50)]
        assert close(found[f"image_to_text_recall{k}"], sum(hits) / 50)
        hits = [text in [captions[i] for i in table[:, j].argsort(descending=True)[:k]]
                for j, text in enumerate(texts)]
        assert close(found[f"text_to_image_recall{k}"], sum(hits) / len(texts))
    assert found["captions"] == len(texts) and found["count"] == 50


def test_lines_of_classes_name_the_folders_in_sorted_order():
    """Where no folder has such a name (ImageNet); lines may be equal, empty names are dropped."""
    out, pictures, folders = paired()[0], folder(), ["n01440764", "n03773504", "n04008634"]
    val = argparse.Namespace(classes=folders)
    assert finetune.classes_of_val([["tench"], ["rocket"], ["rocket"]], val) == [
        [name] for name in folders]
    by_name = [["n04008634", "rocket"], ["n01440764"], ["n03773504"]]
    assert finetune.classes_of_val(by_name, val) == by_name
    for name in folders:
        (pictures / name).mkdir()
        Image.new("RGB", (32, 32)).save(pictures / name / "0.png")
    ask = lambda text: asked("zeroshot", "--init", out / "model.pt", "--eval-only", "--val",
                             pictures, "--classes", folder_with(folder() / "names.txt", text))[0]
    assert ask("tench, ,\nrocket\nmissile,\n") == ask("tench\nrocket\nmissile\n")
    alike = ask("missile\nmissile\nmissile\n")
    assert close(alike["top1"], 1 / 3) and close(alike["loss"], math.log(3))
    refused("has 2 classes that the model lacks", ask, "n01440764\nrocket\nmissile\n")
    refused("has no name", ask, "tench\n,\nmissile\n")


def trained_towers(out):
    """The Towers of a run's model.pt."""
    content = torch.load(out / "model.pt", weights_only=True)
    config = content["config"]
    model = finetune.Towers(vit.config_in(content), finetune.TextConfig(**config["text"]), 128)
    model.load_state_dict(content["model"])
    return model.requires_grad_(False)


def test_zero_shot_answers_in_the_words_of_the_user():
    """--predict by --texts; and the trunk is one like any other."""
    out, picture = paired()[0], str(next(photos().glob("cat/*.jpg")))
    given = ["zeroshot", "--device", "cpu", "--init", str(out / "model.pt"), "--out",
             str(folder()), "--predict", picture]
    said = on_ranks(1, finetune.main, [*given, "--texts", "ein Herz", "звезда"])[0][1]
    line = next(line for line in said.splitlines() if line.startswith(picture))
    answers = dict(re.findall(r"[:,] ([^,:]+) (\d\.\d+)(?=,|$)", line))
    assert answers.keys() == {"ein Herz", "звезда"}
    assert abs(sum(map(float, answers.values())) - 1) < 0.01
    features, *_ = asked("features", "--init", out / "model.pt", "--data", photos())
    assert features["width"] == trained_towers(out).config.width
    refused("--predict needs something to choose from", finetune.main, given)


def test_zero_shot_with_a_tokenizer_takes_it_along():
    """A run with --tokenizer: the model needs none to be used; a text tower takes no other."""
    _, flags, _, _ = paired()
    out = folder() / "run"
    train(out, *flags, "--steps", 2, "--tokenizer", tokenizer_file(), stage=Zeroshot)
    given = ("--eval-only", "--val", "world-val:13", "--init", out / "model.pt")
    trained = json.loads((out / "metrics.json").read_text())
    for name, value in asked("zeroshot", *given)[0].items():
        assert close(value, trained[name], 1e-4), name
    content = torch.load(out / "model.pt", weights_only=True)
    assert content["tokenizer"].numpy().tobytes() == tokenizer_file().read_bytes()
    content.pop("tokenizer")
    torch.save(content, out / "bare.pt")
    refused("ids, the tokenizer has 260", asked, "zeroshot", *given[:-1], out / "bare.pt")
    long = folder_with(folder() / "long.txt", "word " * 300 + "\nring\n")
    said = on_ranks(1, finetune.main, [
        "zeroshot", "--device", "cpu", "--init", str(out / "model.pt"), "--classes", str(long),
        "--tokenizer", str(tokenizer_file()), "--out", str(folder()),
        "--predict", str(next(photos().glob("cat/*.jpg")))])[0][1]
    assert f"{len(finetune.TEMPLATES)} of {2 * len(finetune.TEMPLATES)} texts are cut" in said


def test_zero_shot_mistakes_are_one_clear_line():
    out, flags, _, _ = paired()
    trunk = ("--init", stepwise() / "model.pt")
    evaluate = ("--init", out / "model.pt", "--eval-only", "--val", photos())
    lines = lambda text: folder_with(folder() / "x.txt", text)
    for message, *given in (
            ("--data has no captions", *trunk, "--data", photos()),
            ("has no text tower", *trunk, "--eval-only", "--val", photos()),
            ("give its file as --init, or --unlock", "--data", "world:40"),
            ("is empty", *evaluate, "--classes", lines("\n")),
            ("'cat', a class of --val, is the name of 2 classes", *evaluate, "--classes",
             lines("cat\ncat, dog\n")),
            ("has a line without {}", *evaluate, "--templates", lines("a {}\na picture\n")),
            ("has neither classes nor captions", *evaluate[:-1], photos() / "cat"),
            ("give XLM-R's tokenizer.json", *evaluate, "--tokenizer", out / "config.json"),
            ("holds no text tower", *trunk, "--text-init", stepwise() / "model.pt"),
            ("leave --unlock out", *flags, "--unlock", "--cache-features", folder())):
        refused(message, asked, "zeroshot", *given)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("-k", default="", metavar="NAME", help="only tests with this in their name")
    parser.add_argument("--claims", action="store_true", help="also measure the README's claims")
    args = parser.parse_args()
    kinds = ("test_", "claim_") if args.claims else ("test_",)
    tests = [(name, test) for name, test in globals().items()
             if name.startswith(kinds) and args.k in name and callable(test)]
    failed = 0
    for name, test in tests:
        begun = time.perf_counter()
        faulthandler.dump_traceback_later(1200, exit=True)       # says where a test hangs
        try:
            test()
            print(f"ok    {name}  {time.perf_counter() - begun:.1f} s", flush=True)
        except Exception:
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed", flush=True)
    return int(failed > 0 or not tests)


if __name__ == "__main__":
    sys.exit(main())
