"""The Vision Transformer, and what it takes to train it on one device or a thousand.

Part 1 is the network of the paper (section 3: plain ViTs, base to 6.5B): sizes, patches, positions,
attention, initialisation, schedule. It knows nothing of devices, ranks or files. Part 2, "on one
device or a thousand", is everything a training loop needs around it: flags, start and stop, DDP and
FSDP2, one agreement a step, saving and restoring, the log. Part 3 reads everybody's weight files.

Letters in shape comments, the same in every file:
B batch, N patches, V visible patches, D width, h heads, P patch pixels (patch * patch * C),
C channels, H W image or grid, T frames, K classes.

Sources of values, named beside them: "paper" is arXiv 2303.13496, "MAE" is arXiv 2111.06377 and its
code, "ours" means that nobody published the value and we chose it.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend: shown as its one line, without a traceback."""


class RankError(UserError):
    """One that a rank may have met alone, so that it has to show it itself."""


# ======================================================================================
# Part 1: the Vision Transformer
# ======================================================================================

SIZES = {
    # name:  width depth heads patch image     parameters, forward GMAC at 224 full / MAE, source
    "nano":  (128,   6,   4,    8,   64),    # 1.2M                      ours, for a laptop
    "tiny":  (192,  12,   3,    8,   96),    # 5.4M                      ours
    "small": (384,  12,   6,   16,  224),    # 22M                       ours
    "base":  (768,  12,  12,   16,  224),    # 86M     17.6 / 9.8        paper, table of models
    "large": (1024, 24,  16,   16,  224),    # 304M    61.6 / 20.8       paper
    "huge":  (1280, 32,  16,   14,  224),    # 632M     167 / 48.6       paper
    "2b":    (2560, 24,  32,   14,  224),    # 1.89B    494 / 131        paper
    "6.5b":  (4096, 32,  32,   14,  224),    # 6.45B   1674 / 428        paper
}


@dataclass
class Config:
    """The shape of an encoder; `image` is the side of a square, or (height, width), in pixels.

    Raises UserError where the sizes do not fit together."""
    width: int
    depth: int
    heads: int
    patch: int = 16
    image: int | tuple[int, int] = 224
    channels: int = 3

    def __post_init__(self):
        sides = [self.image] if isinstance(self.image, int) else list(self.image)
        if len(sides) not in (1, 2) or min(sides) < 1 or self.patch < 1:
            raise UserError(f"an image size is one or two positive numbers; found {self.image}")
        for side in sides:
            if side % self.patch:
                below = side // self.patch * self.patch
                near = f"{below} or {below + self.patch}" if below else f"{self.patch}"
                raise UserError(f"image side {side} is not divisible by patch {self.patch}; "
                                f"the nearest that are: {near}")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"width {self.width} must be divisible by heads {self.heads} and by 4")
        self.image = (sides[0], sides[-1])

    @staticmethod
    def named(name):
        """The Config of a row of SIZES."""
        if name not in SIZES:
            raise UserError(f"there is no model {name!r}; choose from: {' '.join(SIZES)}")
        return Config(*SIZES[name])

    @property
    def grid(self):
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self):
        return self.grid[0] * self.grid[1]


# --------------------------------------------------------------------------------------
# Patches and positions
# --------------------------------------------------------------------------------------

def patchify(images, patch):
    """Cut images [B,C,H,W] into patches [B,N,P], raster order, each flattened row, column, channel.

    The flattening order is MAE's: predictions of released decoders come out in it."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)          # [B,C,H,p,W,p]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)    # [B,N,P]


def unpatchify(patches, patch, grid, channels=3):
    """Put patches [B,N,P] together to images [B,C,H,W]: the inverse of patchify."""
    x = patches.reshape(-1, *grid, patch, patch, channels)                  # [B,H,W,p,p,C]
    x = x.permute(0, 5, 1, 3, 2, 4)                                         # [B,C,H,p,W,p]
    return x.reshape(-1, channels, grid[0] * patch, grid[1] * patch)        # [B,C,H,W]


def gather_tokens(tokens, index):
    """Pick tokens [B or 1, N, D] by index [B,V] along the second dimension: [B,V,D]."""
    tokens = tokens.expand(len(index), -1, -1)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_pos_embed(width, grid):
    """Sine-cosine positions [1, 1+N, D] of a grid (H, W); the class token's row is zero (MAE).

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row."""
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [at.reshape(-1, 1) * frequency for at in (column, row)]        # 2 x [N,D/4]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)  # [N,D]
    return F.pad(table, (0, 0, 1, 0))[None].to(torch.get_default_dtype())   # [1,1+N,D]


def resize_pos_embed(table, old, new, antialias=False):
    """Resize positions [1, 1+N, D] from grid `old` to grid `new`, bicubically in 2-D.

    The class token's row is not touched; equal grids return the table itself, bit by bit.
    Plain bicubic is what MAE does; timm adds antialiasing."""
    if tuple(old) == tuple(new):
        return table
    first, patches = table[:, :1], table[:, 1:]
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)                # [1,D,H,W]
    image = F.interpolate(image, size=tuple(new), mode="bicubic", antialias=antialias)
    return torch.cat([first, image.permute(0, 2, 3, 1).flatten(1, 2)], 1)   # [1,1+N,D]


# --------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Project patches [B,V,P] to tokens [B,V,D].

    The kernel has the released files' shape, that of a convolution. Applied as a linear map it can
    be given any subset of the patches, which is how MAE's encoder never touches a masked one."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, patches):
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)            # [D,P]
        return F.linear(patches, kernel, self.proj.bias)                    # [B,V,D]


class LayerNorm(nn.Module):
    """Layer normalisation of [...,D], computed in the type of its input.

    nn.LayerNorm refuses half-precision weights, which a sharded block has, for fp32 tokens."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)        # [...,D]


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B,N,D]; `mask` [B,1,1,N], if any, is True for the
    tokens that may be attended to."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)     # [B,N,3,h,D/h]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # 3 x [B,h,N,D/h]
        x = F.scaled_dot_product_attention(q, k, v, mask)                   # [B,h,N,D/h]
        return self.proj(x.transpose(1, 2).reshape(B, N, D))                # [B,N,D]


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-LayerNorm transformer block over tokens [B,N,D]."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, keep=None):
        """`keep` [B,2] multiplies what the two branches add, for drop path; None: they stay."""
        a, b = (None, None) if keep is None else keep.to(x.dtype)[..., None, None].unbind(1)
        x = x + times(self.attn(self.norm1(x)), a)
        return x + times(self.mlp(self.norm2(x)), b)


def times(branch, keep):
    return branch if keep is None else branch * keep


def drop_path(numbers, rate):
    """What multiplies the two branches of each block, [B,L,2], for uniform numbers [B,L,2].

    An image skips a branch of block i = 0 … L-1 with probability rate * i / (L-1), and the others
    are scaled up so that the mean stays (stochastic depth, arXiv 1603.09382, its linear rule)."""
    skipped = torch.linspace(0, rate, numbers.shape[1], device=numbers.device)[:, None]     # [L,1]
    return (numbers >= skipped) / (1 - skipped)                             # [B,L,2]


def run_blocks(blocks, x, recompute=False, keep=None):
    """Send tokens [B,N,D] through blocks; `recompute` trades a second forward for memory.

    `keep` [B,L,2] is drop_path's; None drops nothing."""
    for i, block in enumerate(blocks):
        block_keep = None if keep is None else keep[:, i]                   # [B,2]
        if recompute and torch.is_grad_enabled():
            # Here and not in a wrapper module: wrappers rename the parameters.
            x = checkpoint(block, x, block_keep, use_reentrant=False)
        else:
            x = block(x, block_keep)
    return x


class ViT(nn.Module):
    """The Vision Transformer as the released MAWS trunks use it: images [B,C,H,W] to logits [B,K].

    pool "cls" reads the class token after `norm`; "mean" averages the patches, then `fc_norm`
    (MAE's finetuning); "patches" averages them after `norm`, "none" leaves all tokens [B,1+N,D]
    (frozen encoders). With classes=0 the result is the pooled feature [B,D]. The head starts as
    N(0, head_std). Parameters have the names of the released files and of timm."""

    def __init__(self, config, classes=0, pool="cls", head_std=0.0):
        super().__init__()
        if pool not in ("cls", "mean", "patches", "none"):
            raise UserError(f"pool is 'cls', 'mean', 'patches' or 'none'; found {pool!r}")
        self.config, self.pool, self.recompute = config, pool, False
        D = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.patches, D))
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        norm = LayerNorm(D)
        if pool == "mean":
            self.fc_norm = norm
        else:
            self.norm = norm
        self.head = nn.Linear(D, classes) if classes else nn.Identity()
        self.starts = {"head.weight": head_std}
        init_weights(self)

    def embed(self, images):
        """Images [B,C,H,W] to the first block's tokens [B,1+N,D], class token first."""
        x = self.patch_embed(patchify(images, self.config.patch))           # [B,N,D]
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed

    def tokens(self, images, keep=None):
        """Images [B,C,H,W] to the last block's tokens [B,1+N,D], no norm yet; keep: drop_path's."""
        return run_blocks(self.blocks, self.embed(images), self.recompute, keep)

    def forward(self, images, keep=None):
        x = self.tokens(images, keep)                                       # [B,1+N,D]
        x = {"cls": lambda: self.norm(x[:, 0]), "mean": lambda: self.fc_norm(x[:, 1:].mean(1)),
             "patches": lambda: self.norm(x[:, 1:]).mean(1), "none": lambda: self.norm(x)
             }[self.pool]()                                                 # [B,D]
        return self.head(x)                                                 # [B,K]


# --------------------------------------------------------------------------------------
# Initialisation
# --------------------------------------------------------------------------------------

def initial_value(name, shape, grid, seed, starts={}):
    """The start value of one tensor, on the CPU: a pure function of its name, its shape and `seed`.

    | what                              | value                                                   |
    |-----------------------------------|---------------------------------------------------------|
    | pos_embed, decoder_pos_embed      | sine-cosine table                                       |
    | cls_token, mask_token             | N(0, 0.02)                                              |
    | LayerNorm weights, all biases     | 1, 0                                                    |
    | what `starts` names: head.weight  | N(0, that value); 0 for stage 2 (SWAG); 1-D: the value  |
    | other weights                     | xavier uniform; the patch kernel as a linear map [D,P]  |

    The others are MAE's. A generator for each name (not one for the model) makes the value
    independent of the order of construction: every rank and layout starts from the same weights."""
    if name.endswith("pos_embed"):
        return sincos_pos_embed(shape[-1], grid)
    if len(shape) == 1:
        return torch.full(shape, starts.get(name, 1.0 if name.endswith("weight") else 0.0))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    std = starts.get(name, 0.02 if name.endswith("token") else None)
    if std is not None:
        return torch.empty(shape).normal_(0, std, generator=generator)
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def init_weights(model, seed=0):
    """Initialise every parameter and buffer of a model in place, by `initial_value`.

    A model on the meta device has nothing to fill and is left alone: `build` comes back to it."""
    starts = getattr(model, "starts", {})
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_meta:
            copy_into(tensor, initial_value(name, tensor.shape, model.config.grid, seed, starts))


# --------------------------------------------------------------------------------------
# Arithmetic
# --------------------------------------------------------------------------------------

def learning_rate(at, total, peak, warmup, final=0.0):
    """Linear warmup from 0 to `peak`, then half a cosine to `final` (MAE); clamped at both ends.

    `at`, `total` and `warmup` share one unit, steps or epochs."""
    if at < warmup:
        return peak * max(at, 0) / warmup
    share = min(1.0, (at - warmup) / max(total - warmup, 1e-12))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


def decay_groups(model, weight_decay, exempt=(), layer_decay=1.0):
    """Parameter groups for an optimizer: no weight decay on 1-D parameters (norms, biases; MAE) and
    on those that are named in `exempt`.

    A group's "scale" is what its learning rate is multiplied with: layer_decay to the power of how
    many layers come after, 1 for the final norm and the head, the least for patches and positions
    (MAE's finetuning; 1.0: all alike)."""
    groups, last = {}, model.config.depth + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = (int(name.split(".")[1]) + 1 if name.startswith("blocks.") else
                 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else last)
        scale, decays = layer_decay ** (last - layer), parameter.dim() > 1 and name not in exempt
        groups.setdefault((scale, decays), {
            "params": [], "weight_decay": weight_decay * decays, "scale": scale,
        })["params"].append(parameter)
    return list(groups.values())


# ======================================================================================
# Part 2: on one device or a thousand
#
# Every function here does the obvious thing without torchrun too, in one process, so that a
# training loop never asks whether it is distributed.
# ======================================================================================

# Flags that change how or where a run is computed, not what it computes (up to rounding): a run
# may be resumed with other values of these.
FREE_FLAGS = {"out", "resume", "allow_changed", "index_dir", "micro_batch", "parallel",
              "activation_checkpoint", "compile", "device", "workers", "save_every", "keep",
              "log_every", "eval_every"}

# A checkpoint of one process is meant to be one.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

# bf16 / fp16 multiply-adds without sparsity, FLOP/s, from the vendors' data sheets: for `mfu`.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12,
         "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "T4": 65e12,
         "4090": 165e12, "3090": 71e12}


class Environment(NamedTuple):
    """A process's place in the run: `neighbours` is the number of ranks on its node."""
    rank: int
    local: int
    world: int
    neighbours: int


def environment():
    """What torchrun told this process; the only one, where there is no torchrun."""
    return Environment(*(int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))))


def rank0_print(text):
    """Print a line, once for all ranks."""
    if environment().rank == 0:
        print(text, flush=True)


def positive(text):
    """The type of flags that take a whole number of 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def table(columns, rows):
    """Rows of a recipe, {name: (value, …)}, as {name: {flag: value}}; "base … 6.5b" is all of these
    sizes, and a length, {flag: value}, a flag of its own."""
    recipes, sizes = {}, list(SIZES)
    for name, values in rows.items():
        first, last = (sizes.index(end) for end in (name.split()[0], name.split()[-1]))
        for size in sizes[first:last + 1]:
            recipes[size] = dict(zip(columns.split(), values))
            recipes[size] |= recipes[size].pop("length", {})
    return recipes


def stage_parser(program, doc, recipes=None):
    """A stage's parser, with the flags that every stage shares; `recipes`, {name: {flag: value}},
    are their defaults and told at the end of --help. Without any: of something that trains nothing
    and only leaves results in --out."""
    lines = [f"  {name:6} " + " ".join(f"--{flag.replace('_', '-')} "
                                       f"{value:g}" if isinstance(value, (int, float)) else
                                       f"--{flag.replace('_', '-')} {value}"
                                       for flag, value in recipe.items())
             for name, recipe in (recipes or {}).items()]
    parser = argparse.ArgumentParser(
        prog=program, allow_abbrev=False, description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"defaults by model (sources: in {program.split()[0]}):\n" + "\n".join(lines)
        if recipes else None)
    add_model_flags(parser.add_argument_group("model and data").add_argument)
    if recipes:
        add_recipe_flags(parser.add_argument_group("recipe (defaults by model: at the end)"))
        add_folder_flags(parser.add_argument_group("run").add_argument)
        add_plan_flags(parser.add_argument_group("plan").add_argument)
    else:
        parser.set_defaults(predict=None, eval_only=False, activation_checkpoint=False)
        parser.add_argument("--out", metavar="DIR", help="where results are kept; default runs/ "
                            "and the task's name")
    add_machine_flags(parser.add_argument_group("machine").add_argument, training=bool(recipes))
    return parser


def add_model_flags(add):
    add("--model", choices=SIZES, help="size; default nano, or what --init holds")
    add("--image-size", type=positive, nargs="+", metavar="PIXELS",
        help="side, or height and width; default by model, or what --init holds")
    add("--patch-size", type=positive, metavar="PIXELS", help="side of a patch; default by model")
    add("--channels", type=int, choices=(1, 3, 4), help="grey, colour, colour and alpha; default 3")
    add("--data", nargs="+", default=["world"], metavar="SPEC",
        help="images to train on: world, world:COUNT, a folder, .tar shards ('x-{000..127}.tar', "
        "'dir/*.tar'), a .jsonl or .csv; several are joined; default world (stage 2: 100,000 of "
        "it, since tags are counted first; stage 3: its labelled part)")
    add("--val", nargs="+", metavar="SPEC",
        help="images to evaluate on; default world-val where --data is the world, else none")
    add("--index-dir", metavar="DIR", help="where indexes of shards are kept; default: beside the "
        "shards, or in index/ of --out where one may not write")
    add("--init", metavar="FILE", help="start from these weights; default: random weights")
    add("--max-pixels", type=positive, default=178_956_970, metavar="COUNT",
        help="an image with more is bad, not decoded; default 178,956,970 (Pillow's)")
    add("--max-bad", type=float, default=0.01, metavar="SHARE",
        help="end the run when more of the images than this are bad; default 0.01; 1 is never")


def add_recipe_flags(group):
    add = group.add_argument
    add("--batch", type=positive, metavar="IMAGES", help="images a step over all ranks")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="length of the run in passes over --data, "
                        "in stage 2 as resampled")
    length.add_argument("--samples", type=float, help="length of the run in images seen")
    length.add_argument("--steps", type=positive, help="length of the run in optimizer steps")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--lr", type=float, help="peak learning rate")
    rate.add_argument("--base-lr", type=float, help="peak learning rate for a batch of 256: the "
                      "rate grows with --batch and does not depend on the number of ranks")
    add("--weight-decay", type=float, help="on parameters of 2 or more dimensions; after stage "
        "1 not on positions and class token; 0 off")
    add("--warmup", type=float, metavar="SHARE", help="share of the steps; 0 is off")
    add("--clip-grad", type=float, metavar="NORM", help="largest gradient norm; 0 is off")
    add("--seed", type=int, default=0, help="of weights, order and augmentation; default 0")


def add_folder_flags(add):
    add("--out", metavar="DIR",
        help="where everything of the run is kept; default runs/ and the stage's name")
    add("--resume", choices=("auto", "none"), default="auto",
        help="auto (default): go on with an interrupted run in --out; none: move it aside")
    add("--allow-changed", action="store_true", help="resume although flags differ; default off")
    add("--save-every", type=float, default=15, metavar="MINUTES",
        help="between checkpoints, by rank 0's clock; default 15; 0 is after each step")
    add("--keep", type=positive, default=2, help="checkpoints kept; default 2")
    add("--log-every", type=positive, default=20, metavar="STEPS",
        help="between records of log.jsonl and lines on the screen; default 20")
    add("--eval-every", type=int, metavar="STEPS",
        help="between evaluations, with pictures; default a tenth of the run; 0 is at the end only")
    add("--eval-only", action="store_true", help="evaluate --init on --val and stop")
    add("--predict", nargs="+", metavar="FILE", help="use --init on these pictures and stop")


def add_machine_flags(add, training=True):
    add("--micro-batch", type=positive, default=64, metavar="IMAGES",
        help="the most that one rank holds at once; the rest is accumulated; default 64 (ours)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; weights and losses stay fp32. auto (default): bf16 on CUDA of "
        "capability 8 or more, fp16 on older CUDA, fp32 on cpu and mps")
    add("--parallel", choices=("auto", "ddp", "fsdp", "hsdp"), default="auto",
        help="auto (default): ddp below 1B parameters, fsdp above; hsdp shards inside a node and "
        "replicates across; nothing for one process")
    if training:
        add("--activation-checkpoint", action="store_true",
            help="compute each block's activations again in the backward pass; default off")
    add("--compile", action="store_true", help="compile each block; default off")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="auto (default): the first of them that is there")
    add("--workers", type=int, metavar="PROCESSES",
        help="that decode images, a rank; 0: none; default: the CPU cores of the rank, at most 8 "
        "on a GPU, 1 on a CPU")


def add_plan_flags(add):
    add("--plan", action="store_true",
        help="print what the run would need (memory, time) and stop; needs neither data nor GPU")
    add("--ranks", type=positive, default=8, help="of the planned run; default 8")
    add("--ranks-per-node", type=positive, default=8, help="of the planned run; default 8")
    add("--memory", type=float, default=80, metavar="GB", help="of one GPU; default 80")
    add("--gpu", choices=PEAKS, default="H100", help="whose peak --mfu is of; default H100")
    add("--mfu", type=float, default=0.4, metavar="SHARE",
        help="of the peak that is used; default 0.4 (a guess; log.jsonl has what a run reaches)")


# --------------------------------------------------------------------------------------
# Start and stop
# --------------------------------------------------------------------------------------

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
stop_requests = []      # signals received
PARENT = os.getppid()
gloo_group = None            # the process group of on_rank_0 and from_all_ranks; made by start


def start(args):
    """Begin the process's part of a run: returns (device, rank, world).

    Joins the process group of torchrun, if there is one. Raises UserError where the device is not
    there."""
    rank, local, world, neighbours = environment()
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("srun has started several processes that know nothing of each other; let "
                        "it start one torchrun a node (--ntasks-per-node 1)")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(
            os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        # Restarted ranks would look for each other where the dead ones were (pytorch issue 135712).
        raise UserError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
                        "environment, or its restarted ranks never meet: set it, on all nodes")
    here = [kind for kind, there in (("cuda", torch.cuda.is_available()),
                                     ("mps", torch.backends.mps.is_available() and world == 1),
                                     ("cpu", True)) if there]
    kind = here[0] if args.device == "auto" else args.device
    if kind not in here:
        raise UserError(f"--device {kind} is not available here; found: {', '.join(here)}")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if neighbours > torch.cuda.device_count():
            raise UserError(f"{neighbours} processes on this node but {torch.cuda.device_count()} "
                            "GPUs; give torchrun --nproc-per-node gpu")
        torch.cuda.set_device(device)
        if neighbours < torch.cuda.device_count():
            rank0_print(f"{torch.cuda.device_count()} GPUs visible, {neighbours} used: "
                        "add --nproc-per-node gpu")
    else:
        torch.set_num_threads(max(1, cpu_cores() // neighbours))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        threading.Thread(target=watch_torchrun, daemon=True).start()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    global gloo_group
    # For what ranks tell each other as Python objects. It is patient: some wait while others index
    # their part of the data or write a checkpoint, longer than one waits for lost gradients.
    gloo_group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world > 1 else None
    same = {f"--{flag.replace('_', '-')}": value for flag, value in vars(args).items()}
    same |= {"device": kind, "precision": str(autocast_dtype(args, device)),
             "a file for --init of": args.init and file_fingerprint(args.init),
             "ranks on its node": args.parallel == "hsdp" and neighbours}
    require_same(same)
    if args.workers is None:
        args.workers = 1 if kind != "cuda" else min(8, max(1, cpu_cores() // neighbours))
    return device, rank, world


def listen_for_signals():
    """From now on, take the signals of a preemption and Ctrl-C as requests to stop after a step."""
    def note(number, frame):
        if number == signal.SIGINT and number in stop_requests:
            raise KeyboardInterrupt         # Ctrl-C again: the user will not wait
        stop_requests.append(number)

    stop_requests.clear()
    for name in STOP_SIGNALS:
        signal.signal(name, note)


def stop_requested():
    """Whether this process got a signal, or torchrun was killed and left it behind."""
    return bool(stop_requests) or left_behind()


def left_behind():
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT


def watch_torchrun():
    """End this process if torchrun dies before the loop begins, which looks for itself: ranks that
    have not found each other yet would wait for the store that torchrun kept."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    for seconds in (1, 2, 4, 8, None):
        try:
            socket.create_connection(where, timeout=10).close()
            break
        except OSError as error:
            if seconds is None:
                print(f"torchrun at {where[0]}:{where[1]} is gone: {error}", file=sys.stderr)
                os._exit(1)
            time.sleep(seconds)
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:       # no loop listens
        if left_behind():
            os._exit(1)
        time.sleep(1)


def file_fingerprint(path):
    """Size and CRC of both ends of a file: a zip, as torch writes, has CRCs of all of it there."""
    with open(path, "rb") as file:
        size, ends = os.fstat(file.fileno()).st_size, file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        return f"{size:,} bytes (CRC {zlib.crc32(ends + file.read()):08x})"


def cpu_cores():
    """CPU cores that this process may use (a container or SLURM may allow fewer than exist)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def all_gather_objects(value):
    """Every rank's value, in a list, on every rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=gloo_group)
    return values


def gather_objects(value):
    """Every rank's value, in a list, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size() if get_rank() == 0 else None
    dist.gather_object(value, values, group=gloo_group)
    return values


def all_reduce_sum(tensor):
    """The sum of a tensor over all ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=gloo_group if tensor.device.type == "cpu" else None)
    return tensor


def all_gather_rows(tensor):
    """The rows of all ranks' tensors [n,…], rank after rank, on every rank; n is alike on all."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def average_gradients(parameters):
    """Make gradients the mean of those of all ranks, of what is trained without DDP or FSDP."""
    for parameter in parameters if dist.is_initialized() else ():
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(get_world_size())


def get_rank():
    """This process's number in the process group; 0 where there is no group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """The number of processes in the process group; 1 where there is no group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def require_same(values):
    """Raise UserError, on every rank, unless all ranks have the same {name: value}."""
    for rank, theirs in enumerate(all_gather_objects(values)):
        for name, value in values.items():
            if theirs[name] != value:
                raise UserError(f"rank {rank} has {name} {theirs[name]}, this one {value}: start "
                                "all with the same command, files and devices")


def on_rank_0(action):
    """The result of action(), called by rank 0 alone; what it raises, every rank raises."""
    told = [None, None]
    if get_rank() == 0:
        try:
            told[0] = action()
        except (UserError, OSError) as error:
            told[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(told, group=gloo_group)
    result, problem = told
    if problem:
        raise UserError(problem)
    return result


def run(main):
    """Call a stage's main and leave: the last line of every stage.

    Mistakes of the user are one line on stderr and exit code 2. Leaving by os._exit, since gloo's
    threads now and then abort a process that has already done everything right."""
    code, name = 0, Path(sys.argv[0]).name
    sys.stdout.reconfigure(errors="backslashreplace")       # names of files may be in any encoding
    try:
        main(sys.argv[1:])
    except UserError as error:          # met by every rank: told once a node
        code = 2
        if environment().local == 0 or isinstance(error, RankError):
            print(f"{name}: {error}", file=sys.stderr)
    except BrokenPipeError:             # as by `| head`
        os._exit(141)
    except OSError as error:            # of this rank's files
        code = 2
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
                                                          errno.EIO):
            traceback.print_exc()       # not about a file that the user could mend
        else:
            print(f"{name}: rank {environment().rank}: {error}", file=sys.stderr)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --------------------------------------------------------------------------------------
# From flags to numbers
# --------------------------------------------------------------------------------------

def choose_config(args, stage):
    """The model of --model or --init, with --image-size, --patch-size and --channels applied.

    Also gives --out its default. Returns (Config, name of the recipe's row, what --init's file says
    of itself). Raises UserError where flags contradict each other."""
    if (args.predict or args.eval_only) and not args.init:
        raise UserError("--predict and --eval-only use a trained model: give its file as --init")
    # A training run's pictures and numbers are not overwritten by a use of it.
    use = "-predict" if args.predict else "-eval" if args.eval_only else ""
    args.out = args.out or f"runs/{stage}{use}"
    if args.image_size and len(args.image_size) > 2:
        raise UserError(f"--image-size takes one or two numbers; found {args.image_size}")
    about, name = {}, args.model or "nano"
    config = Config.named(name)
    if args.init:
        named, (config, about) = config, config_from(args.init)
        shape = (config.width, config.depth, config.heads)
        if args.model and shape != (named.width, named.depth, named.heads):
            raise UserError(f"--model {name} is {named.width} wide and {named.depth} deep, --init "
                            f"{args.init} is {config.width} and {config.depth}; leave --model out")
        name = next((row for row in SIZES if SIZES[row][:3] == shape), "nano")
        for flag, new, old in (("--patch-size", args.patch_size, config.patch),
                               ("--channels", args.channels, config.channels)):
            if new and new != old:
                raise UserError(f"{flag} {new}, but --init {args.init} has {old}; leave it out")
    size = tuple(args.image_size) if args.image_size else config.image
    return Config(config.width, config.depth, config.heads, args.patch_size or config.patch,
                  size, args.channels or config.channels), name, about


def fill_recipe(args, recipe):
    """Give every flag that the user left open its value of the recipe {flag: value}."""
    lengths, rates = ("epochs", "samples", "steps"), ("lr", "base_lr")
    for one_of in (lengths, rates):
        if any(getattr(args, flag) is not None for flag in one_of):
            recipe = {flag: value for flag, value in recipe.items() if flag not in one_of}
    for flag, value in recipe.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    below_1 = math.nextafter(1, 0)
    for flag, low, high in (("warmup", 0, 1), ("max_bad", 0, 1), ("weight_decay", 0, math.inf),
                            ("clip_grad", 0, math.inf), ("save_every", 0, math.inf),
                            ("lr", 0, math.inf), ("base_lr", 0, math.inf),
                            ("epochs", 1e-9, math.inf), ("samples", 1, math.inf),
                            ("workers", 0, math.inf), ("eval_every", 0, math.inf),
                            ("mask_ratio", 0, below_1), ("drop_path", 0, below_1),
                            ("smoothing", 0, below_1), ("ema", 0, below_1), ("erasing", 0, 1),
                            ("mixup", 0, 1), ("cutmix", 0, 1), ("randaugment", 0, 10),
                            ("smallest_crop", 1e-9, 1), ("layer_decay", 1e-9, 1),
                            ("final_lr", 0, math.inf)):
        value = getattr(args, flag, None)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            first = "above 0" if low == 1e-9 else f"from {low}"
            last = {math.inf: "on", below_1: "to below 1"}.get(high, f"to {high}")
            raise UserError(f"--{flag.replace('_', '-')} {value} is not a number {first} {last}")


def micro_batch(args, world, together=1):
    """The images of one rank in a step, and the largest part of them to hold at once; a multiple of
    `together`, where so many belong together."""
    if args.batch % world:
        below = args.batch // world * world
        raise UserError(f"--batch {args.batch} is not divisible by {world} ranks; the nearest that "
                        f"are: {f'{below} and ' if below else ''}{below + world}")
    share = args.batch // world
    sizes = [size for size in range(together, min(share, args.micro_batch) + 1, together)
             if share % size == 0]
    if not sizes:
        raise UserError(f"{share} images a rank cannot be taken {together} at a time within "
                        f"--micro-batch {args.micro_batch}; give a --batch that is a multiple of "
                        f"{together * world}")
    return share, max(sizes)


def derive(args, images, world, together=1):
    """The numbers of the loop: (steps, micro-batch, accumulation, peak learning rate), printed.

    `images` is the length of the data; micro-batches are multiples of `together`. Raises UserError
    where the batch does not divide."""
    share, micro = micro_batch(args, world, together)
    samples = args.samples or (args.epochs * images if args.epochs else args.steps * args.batch)
    steps = max(1, int(samples // args.batch))
    lr = args.lr if args.lr is not None else args.base_lr * args.batch / 256
    if 2 * micro < min(share, args.micro_batch):
        rank0_print(f"NOTE: {share} images a rank have no divisor near --micro-batch {args.micro_batch}: "
                    f"{share // micro} parts of {micro} will be slow")
    rank0_print(f"batch {args.batch} = {world} ranks x {micro} x {share // micro}; lr {lr:.3g}"
                + (f" = {args.base_lr:.3g} x {args.batch}/256" if args.lr is None else "")
                + f"; {steps:,} steps = {steps * args.batch / images:.3g} epochs of {images:,} images")
    return steps, micro, share // micro, lr


# --------------------------------------------------------------------------------------
# Parallel
# --------------------------------------------------------------------------------------

def build(make, args, device, methods=(), frozen=False):
    """Make a model on its device(s), initialised by --seed: returns (model, callable for training).

    `make()` constructs it; `methods` are those that are called besides forward; a `frozen` one has
    no gradients, and is not wrapped where every rank holds all of it. Built on the meta
    device first, so that a rank never holds more than its part of a sharded model. The names of
    parameters are the same in every mode."""
    _, _, world, neighbours = environment()
    with torch.device("meta"):
        model = make()
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        module.recompute = args.activation_checkpoint
    blocks = blocks_of(model)
    if args.compile:
        for block in blocks:
            block.compile()             # in place: torch.compile(model) would rename parameters
    how = args.parallel if args.parallel != "auto" else "ddp" if count < 1e9 else "fsdp"
    if world == 1:
        how = "one process"
    if how in ("fsdp", "hsdp"):
        shape, names = (world,), ("shard",)
        if how == "hsdp":
            if neighbours == world:
                raise UserError("--parallel hsdp shards inside a node and replicates across nodes, "
                                "but there is one node; use fsdp")
            shape, names = (world // neighbours, neighbours), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        # Blocks are gathered in half precision. The rest stays fp32, since sums of tokens and
        # positions are the residual stream, and so do inputs: noise in bf16 would have ties.
        policy = MixedPrecisionPolicy(param_dtype=autocast_dtype(args, device),
                                      reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        for name in methods:
            register_fsdp_forward_method(model, name)
    model.to_empty(device=device)
    init_weights(model, getattr(args, "seed", 0))
    rank0_print(f"model: {count / 1e6:.1f}M parameters; {how} on {world} x {device.type}, "
                f"{str(autocast_dtype(args, device) or torch.float32).removeprefix('torch.')}")
    if frozen:
        model.requires_grad_(False)
    elif how == "ddp":
        return model, DistributedDataParallel(model, forward_sync_buffers=False,
                                              gradient_as_bucket_view=True)
    return model, model


def blocks_of(model):
    """The parts that a model consists of many of, of all its towers: what is sharded, compiled and
    recomputed one by one."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList)
            for block in module]


def copy_into(target, value):
    """Copy a full tensor into a parameter; of a sharded one, every rank keeps its own slice."""
    if isinstance(target, DTensor):
        # src_data_rank=None: all ranks hold the same value, so nothing needs to be sent.
        value = distribute_tensor(value.to(target.dtype), target.device_mesh, target.placements,
                                  src_data_rank=None)
        target, value = target.to_local(), value.to_local()
    target.copy_(value)


def autocast_dtype(args, device):
    """The type of matrix products: torch.bfloat16, torch.float16, or None for fp32."""
    auto = "fp32"
    if device.type == "cuda":
        auto = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    name = auto if args.precision == "auto" else args.precision
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(args, device):
    """The context in which forward passes are computed in --precision."""
    dtype = autocast_dtype(args, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def accumulating(wrapped, last):
    """The context of a micro-batch's forward and backward: only the last exchanges gradients."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def clip_gradients(model, limit=0.0, scale=1.0):
    """Divide gradients by `scale`, clip them to norm `limit` (0: do not), return the norm before.

    The norm is over all parameters of all ranks, a tensor on the device: it is not finite on any
    rank unless it is finite on every one."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / scale
    if limit or scale != 1:
        factor = ((limit or math.inf) / (norm + 1e-6)).clamp(max=1) / scale
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(parts, factor)
    return norm


@torch.no_grad()
def average(ema, model, decay, step):
    """Move the running average {name: tensor} towards the model's weights after a step.

    ema = d * ema + (1 - d) * weights; d is `decay`, and less at the start of a run: at most
    (1 + step) / (10 + step), so that the average forgets what the weights were initialised with."""
    parts = [[t.to_local() if isinstance(t, DTensor) else t for t in tensors]
             for tensors in (ema.values(), model.parameters())]
    if ema:
        torch._foreach_lerp_(*parts, 1 - min(decay, (1 + step) / (10 + step)))


@contextlib.contextmanager
def averaged(model, ema):
    """The context in which the model has its running average as weights; `ema` {}: its own."""
    def swap():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()        # an evaluation leaves some weights gathered
        with torch.no_grad():
            for name, parameter in model.named_parameters() if ema else ():
                own = parameter.detach().clone()
                parameter.copy_(ema[name])
                ema[name].copy_(own)

    swap()
    try:
        yield
    finally:
        swap()


def all_reduce_floats(tensors, numbers):
    """Sum scalar tensors on the device and plain numbers over all ranks: returns floats.

    The one host wait of a step. What one rank alone knows (a signal, a bad image, its loss, rank
    0's clock) is decided by all from the same sums, so no rank ever leaves the loop or enters a
    save by itself."""
    told = torch.tensor([float(number) for number in numbers])
    word = torch.cat([torch.stack(tensors).float(), told.to(tensors[0].device, non_blocking=True)])
    if dist.is_initialized():
        dist.all_reduce(word)
    return word.tolist()


def fresh_state(args, device):
    """Everything of a run that changes besides weights and optimizer; "half": it is in fp16."""
    half = autocast_dtype(args, device) == torch.float16
    return {"step": 0, "bad_samples": 0, "skipped": 0, "skipped_in_a_row": 0,
            "half": half, "scale": 65536.0 if half else 1.0, "calm": 0}


def note_step(state, finite, batch):
    """Count a step in the run's state; one whose gradient is not finite was skipped by all ranks.

    With fp16 the loss scale is halved by an overflow, which is no fault, and doubled after 2,000
    steps without (the values of torch's GradScaler; ours, to be decided alike by all ranks). Raises
    UserError after ten faults in a row: the run ends with its last good checkpoint."""
    overflow = state["half"] and not finite and state["scale"] > 1
    if state["half"] and not finite:
        state["scale"], state["calm"] = max(state["scale"] / 2, 1.0), 0
    elif state["half"]:
        state["calm"] = (state["calm"] + 1) % 2000
        state["scale"] *= 1 if state["calm"] else 2
    state["step"] += 1
    if finite or overflow:
        state["skipped_in_a_row"] = 0
        return
    state["skipped"] += 1
    state["skipped_in_a_row"] += 1
    first = (state["step"] - 1) * batch
    rank0_print(f"step {state['step']} skipped: its gradient is not finite; "
                f"positions {first} to {first + batch - 1}")
    if state["skipped_in_a_row"] == 10:
        raise UserError("ten steps in a row had gradients that are not finite; the last checkpoint "
                        "is good: try a lower --lr, --clip-grad 1 or --precision fp32")


# --------------------------------------------------------------------------------------
# The run's folder
# --------------------------------------------------------------------------------------

locked = None       # the file by which this process holds --out


def write_aside(path, write):
    """Have `write(temporary path)` write a file, then move it into place: never half a file.

    Raises UserError where that fails (a full disk); what was there before is left as it was."""
    # Its name is this process's own: two runs may write the same index of a shard.
    aside = Path(f"{path}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())         # or a crash may keep the new name and not the content
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:        # torch.save's is a RuntimeError
        raise RankError(f"{path} could not be written: {error}".split("\n")[0]) from error
    finally:
        aside.unlink(missing_ok=True)


def open_run(args, stage, found, model):
    """Prepare --out: True where there is a run to do, False where it is finished already.

    `found` tells what the data are, {name: fingerprint}. An interrupted run goes on if its flags
    and data are those of now (FREE_FLAGS aside); with --resume none the folder is moved to NAME.1
    first. Raises UserError on every rank."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {**found, "weights": f"{len(shapes)} (CRC {zlib.crc32(repr(shapes).encode()):08x})"}
    work = on_rank_0(lambda: prepare_folder(args, stage, found))
    if len(set(all_gather_objects(read_json(Path(args.out) / "config.json").get("started")))) > 1:
        raise UserError(f"--out {args.out} is not the same folder on every node; use a shared one")
    listen_for_signals()
    return work


def lock(out):
    """Keep other runs from --out for as long as this process lives. Raises UserError."""
    global locked
    if locked:
        locked.close()
    locked = open(out / "lock", "w")
    try:        # the system takes the lock away with the process: a killed one leaves none behind
        fcntl.lockf(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"another run is writing to {out}; choose another --out") from error


def fixed(flags, found):
    """What has to stay as it is within a run, by the names that users know."""
    return {f"--{flag.replace('_', '-')}": value for flag, value in flags.items()
            if flag not in FREE_FLAGS} | found


def prepare_folder(args, stage, found):
    """Rank 0's part of open_run."""
    out, flags = Path(args.out), json.loads(json.dumps(vars(args)))
    if not out.name:
        raise UserError(f"--out {out} is no folder of its own; give it a name")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if out.exists():
        lock(out)
    if args.resume == "none" and out.exists() and {*os.listdir(out)} - {"index", "lock"}:
        moved = next(name for i in itertools.count(1)
                     if not (name := out.with_name(f"{out.name}.{i}")).exists())
        out.rename(moved)
        rank0_print(f"moved the earlier run to {moved}")
        if (moved / "index").is_dir():          # of the data, not of the run
            out.mkdir()
            (moved / "index").rename(out / "index")
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    for torn in (*out.glob("*.[0-9]*.tmp"), *out.glob("*-[0-9]*.tmp"),
                 *out.glob("checkpoints/step-*.tmp")):
        shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
    config, finished = out / "config.json", out / "finished"
    if config.is_file() or finished.exists() or checkpoints(out):
        old = read_json(config)
        if "started" not in old:
            raise UserError(f"{config} is missing, damaged or not of a run; --resume none moves "
                            f"{out} aside")
        before, now = fixed(old["flags"], old["found"]), fixed(flags, found)
        changed = [f"{name} {before.get(name)} → {now[name]}" for name in now
                   if before.get(name) != now[name]]
        if old["stage"] != stage:
            raise UserError(f"--out {out} holds a run of {old['stage']}, not of {stage}; choose "
                            "another --out")
        begun = finished.exists() or checkpoints(out)
        # Steps count batches, and a checkpoint fits one model: these cannot change within a run.
        for name in ("--batch", "weights", "vocabulary", "classes", "averaged weights"):
            if begun and before.get(name) != now.get(name):
                raise UserError(f"the run in {out} has {name} {before[name]}, not {now[name]}; "
                                "start another from its weights, by --init")
        if begun and changed and not args.allow_changed:
            raise UserError(f"the run in {out} has other flags: {', '.join(changed)}; give the old "
                            "ones, another --out, --resume none or --allow-changed")
        if finished.exists() and not changed:
            rank0_print(f"the run in {out} is finished; --resume none starts it again")
            return False
        finished.unlink(missing_ok=True)
    content = {"stage": stage, "flags": flags, "found": found, "ranks": environment().world,
               "started": time.time_ns(), "torch": torch.__version__,
               "python": sys.version.split()[0]}
    write_aside(config, lambda path: path.write_text(json.dumps(content, indent=1)))
    return True


def checkpoints(out):
    """The complete checkpoints of a run's folder, newest first."""
    return sorted((path.parent for path in Path(out).glob("checkpoints/step-*/complete.json")
                   if not path.parent.suffix), reverse=True)


def crc(path):
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def whole_weights(model):
    """All weights of a model, however it is spread over the ranks: {name: tensor on the CPU}, on
    rank 0. On one CPU they are the model's own, no copies."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def export(args, model, about, ema, name="model.pt"):
    """Write all weights, averaged where they are, under released names, and `about` (config,
    stage, …) into the file OUT/name. A "model" in `about` is written instead."""
    with averaged(model, ema):
        content = {"model": whole_weights(model), **about}
        on_rank_0(lambda: write_aside(Path(args.out) / name,
                                      lambda path: torch.save(content, path)))


def save(args, model, optimizer, state, about, ema=None):
    """Write OUT/model.pt and a checkpoint of everything a run changes; `ema` are running averages.

    Of the checkpoint (weights, averages, optimizer, and `state` as json) every rank writes its own
    part aside; the parts' CRCs go into complete.json, last; then the folder is renamed into place
    and those beyond --keep are deleted. Raises UserError where the disk is full: the checkpoint
    before is whole."""
    export(args, model, about, ema or {})
    rank = environment().rank
    folder = Path(args.out) / "checkpoints" / f"step-{state['step']:08d}"
    aside = folder.with_name(folder.name + ".tmp")

    def begin():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def complete():
        content = {"state": state,
                   "crc": {name: value for part in sums for name, value in part.items()}}
        write_aside(aside / "complete.json", lambda path: path.write_text(json.dumps(content)))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for old in checkpoints(args.out)[args.keep:]:
            shutil.rmtree(old, ignore_errors=True)

    on_rank_0(begin)
    fresh = not optimizer.state
    weights, moments = get_state_dict(model, optimizer)
    for values in optimizer.state.values() if fresh else ():
        if "step" in values:
            values["step"].zero_()      # to have something to save, torch has made an empty step
    try:
        dcp.save({"model": weights, "optimizer": moments, **({"ema": ema} if ema else {})},
                 checkpoint_id=aside)
    except CheckpointException as error:        # torch raises one rank's failure on every rank
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
        reason = str(next(iter(error.failures.values()))[0]).split("\n")[0]
        free = shutil.disk_usage(args.out).free / 1e9
        raise UserError(f"{folder} could not be written, {free:.3g} GB are free: {reason}; the "
                        "checkpoint before is whole, and the same command goes on from it"
                        ) from error
    mine = [*aside.glob(f"__{rank}_*"), *(aside.glob(".metadata") if rank == 0 else ())]
    sums = all_gather_objects({path.name: crc(path) for path in mine})
    on_rank_0(complete)


def restore(args, model, optimizer, state, ema=None):
    """Put the newest sound checkpoint of --out into model, optimizer and the running averages
    `ema`: returns its `state`.

    Where there is none, returns `state` as given. Sound is one whose every part has its CRC,
    checked before anything is touched; the parts may come from any number of ranks and any mode. A
    damaged one is set aside, so that it does not count as one of --keep. Raises UserError where all
    are damaged: a run never starts again without being told to."""
    rank, _, world, _ = environment()
    damaged = []
    for folder in on_rank_0(lambda: checkpoints(args.out)):
        complete = on_rank_0(lambda folder=folder: read_json(folder / "complete.json"))
        sums = complete.get("crc", {})
        broken = [name for name in sorted(sums)[rank::world]
                  if not (folder / name).is_file() or crc(folder / name) != sums[name]]
        broken = [name for part in all_gather_objects(broken) for name in part]
        if broken or not sums:
            rank0_print(f"{folder} is damaged ({', '.join(broken) or 'complete.json'}): going back to the "
                        "one before")
            damaged.append(folder)
            continue
        # The optimizer's numbers are this command's, which may have been allowed to change.
        numbers = [{key: value for key, value in group.items() if key != "params"}
                   for group in optimizer.param_groups]
        weights, moments = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": moments, **({"ema": ema} if ema else {})}
        dcp.load(content, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=content["model"],
                       optim_state_dict=content["optimizer"])
        for group, values in zip(optimizer.param_groups, numbers):
            group.update(values)
        on_rank_0(lambda: set_aside(damaged))
        rank0_print(f"going on from {folder}")
        old = {**complete["state"], "skipped_in_a_row": 0}
        return old if old["half"] == state["half"] else {
            **old, **{key: state[key] for key in ("half", "scale", "calm")}}
    if damaged:
        raise UserError(f"every checkpoint in {args.out} is damaged; --resume none starts again")
    return state


def set_aside(damaged):
    """Rename damaged checkpoints, so that they do not count among those to --keep."""
    for folder in damaged:
        shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
        folder.rename(folder.with_suffix(".damaged"))


def read_json(path):
    """What a JSON file of ours holds, a dict; an empty one where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def finish(args):
    """Mark the run in --out as finished."""
    if environment().rank == 0:
        (Path(args.out) / "finished").touch()


def report(args, metrics):
    """Write OUT/metrics.json and print it, the last line of a run's or an evaluation's stdout."""
    if environment().rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        text = json.dumps(metrics)
        write_aside(Path(args.out) / "metrics.json", lambda path: path.write_text(text + "\n"))
        print(text, flush=True)


# --------------------------------------------------------------------------------------
# Log
# --------------------------------------------------------------------------------------

class Log:
    """Progress of a run: log.jsonl, curves.png, a bar on a terminal or lines elsewhere.

    A record every --log-every steps and at the last, written by rank 0. `flops` is what training
    on one image costs, for the share of the hardware's peak that is used (mfu; null where the peak
    is not known). Saves and evaluations are not timed."""

    def __init__(self, args, device, step, steps, flops):
        self.rank, _, self.world, _ = environment()
        self.args, self.steps, self.flops = args, steps, flops
        self.every = max(1, steps // 10) if args.eval_every is None else args.eval_every
        self.path, self.done = Path(args.out) / "log.jsonl", step
        self.saved_at = time.monotonic()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((PEAKS[key] for key in PEAKS if key in name), None)
        if self.rank == 0:      # what came after the checkpoint is done, and written, again
            kept = [line for line in self.records() if line["step"] < step
                    or line["step"] == step and "loss" in line]
            write_aside(self.path, lambda path: path.write_text(
                "".join(json.dumps(line) + "\n" for line in kept)))
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True,
                        disable=self.rank > 0 or not sys.stderr.isatty())
        self.restart()

    def restart(self):
        """Begin to time afresh, from the next batch on."""
        self.timed_from, self.waited, self.since = self.done, 0.0, None

    def records(self):
        """The lines of log.jsonl; one torn by a crash is left out."""
        lines = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and "step" in line]

    def write(self, record):
        """Append a line; a number that is not finite becomes null, since JSON has no NaN."""
        if self.rank == 0:
            record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in record.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def wait(self, batches):
        """The next batch; the time it took counts as waiting for data."""
        begun = time.perf_counter()
        self.since = self.since or begun
        batch = next(batches)
        self.waited += time.perf_counter() - begun
        return batch

    def step(self, step, values):
        """Note that `step` steps are done; write `values` where a record is due."""
        self.done = step
        self.bar.update(1)
        if self.rank or step % self.args.log_every and step != self.steps:
            return
        seconds = time.perf_counter() - self.since
        speed = (step - self.timed_from) * self.args.batch / seconds
        used = self.peak and round(speed * self.flops / self.peak / self.world, 4)
        self.write({"step": step, "samples": step * self.args.batch, **values,
                    "images_per_second": round(speed, 1),
                    "data_wait": round(self.waited / seconds, 4), "mfu": used})
        text = (f"loss {values['loss']:.4f}, {speed:.0f} images/s, "
                f"{100 * self.waited / seconds:.0f}% waiting for data")
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = (self.steps - step) * self.args.batch / speed / 60
            print(f"step {step}/{self.steps}: {text}, {left:.1f} min left", file=sys.stderr,
                  flush=True)
        self.restart()

    def save_due(self):
        """Whether --save-every minutes have passed, by rank 0's clock; False on other ranks."""
        return self.rank == 0 and time.monotonic() - self.saved_at >= self.args.save_every * 60

    def evaluation_due(self, step):
        """Whether one evaluates after `step` steps, by --eval-every."""
        return bool(self.every and step and step % self.every == 0)

    def saved(self):
        self.saved_at = time.monotonic()
        self.restart()

    def evaluated(self, metrics):
        """Write the numbers of an evaluation and draw the curves."""
        if metrics:
            values = {f"val_{name}": value for name, value in metrics.items()}
            self.write({"step": self.done, "samples": self.done * self.args.batch, **values})
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.bar.clear()
            rank0_print(f"step {self.done}: {text}")
        if self.rank == 0:
            draw_curves(self.records(), self.path.with_name("curves.png"))
        self.restart()


def draw_curves(records, path):
    """Draw the log's numbers over images seen into a PNG: one panel each, validation in red, and in
    grey what knowing nothing scores."""
    width, height, left, top = 480, 300, 60, 30
    fields = ["loss", "lr", "grad_norm", "images_per_second"]
    fields += dict.fromkeys(name[4:] for record in records for name in record if name[:4] == "val_"
                            and name not in ("val_loss", "val_count", "val_bad", "val_entropy",
                                             "val_captions"))
    sheet = Image.new("RGB", (2 * width, (len(fields) + 1) // 2 * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, field in enumerate(fields):
        lines = [[(record["samples"], record[name]) for record in records
                  if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])]
                 for name in (field, f"val_{field}", *(["entropy"] if field == "loss" else []))]
        x0, y0 = i % 2 * width + left, i // 2 * height + top
        x1, y1 = x0 + width - left - 20, y0 + height - top - 30
        draw.rectangle((x0, y0, x1, y1), outline="#999999")
        draw.text((x0, y0 - 18), field, "black")
        if not any(lines):
            continue
        xs, ys = zip(*itertools.chain(*lines))
        low, high = min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1e-9
        for line, colour in zip(lines, ("#1f5fb4", "#c03028", "#909090")):
            draw.line([(x0 + (x1 - x0) * x / max(xs), y1 - (y1 - y0) * (y - low) / (high - low))
                       for x, y in line], colour, 2)
        for y, value in ((y1, low), (y0, high)):
            draw.text((x0 - 6, y), f"{value:.3g}", "black", anchor="rm")
        draw.text((x1, y1 + 12), f"{max(xs):,} images", "black", anchor="rm")
    write_aside(path, lambda aside: sheet.save(aside, "PNG"))


# --------------------------------------------------------------------------------------
# Plan
# --------------------------------------------------------------------------------------

def forward_flops(make, example):
    """Floating-point operations, 2 a multiply-add, of one image's forward, as torch counts them.

    `make()` makes the model, `example(batch)` the arguments of its forward; on the meta device, so
    that nothing is computed."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), counter:
        make()(*example(1))
    return counter.get_total_flops()


def kept_bytes(make, example, batch, dtype):
    """What a forward keeps for its backward, in bytes: (all of it, the most at any time with
    --activation-checkpoint), with what the backward of the largest block needs besides.

    Found with tensors that have no content. Parameters themselves do not count, their copies in
    half precision do."""
    with FakeTensorMode():
        model = make()
        own = {tensor.untyped_storage()._cdata
               for tensor in itertools.chain(model.parameters(), model.buffers())}
        kept, inputs, starts, ends = {}, [], [], []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        def begin(block, args):
            inputs.append(args[0].nbytes)
            starts.append(sum(kept.values()))

        trained = lambda block: any(p.requires_grad for p in block.parameters())
        for block in filter(trained, blocks_of(model)):
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(lambda *_: ends.append(sum(kept.values())))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
                torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(*example(batch))       # as long as it lives, what it keeps does
    total = sum(kept.values())
    starts, ends, inputs = map(np.array, (starts, ends, inputs))
    dropped = np.cumsum(ends - starts - inputs)     # when a block is done, its input is left
    recomputed = max((ends - dropped + ends - starts - inputs).max(), total - dropped[-1])
    del loss
    # Gradients of what the MLP keeps, twice 4D of about 15D a token, are alive at one time.
    return np.array([total, recomputed]) + (ends - starts).max() / 2


def plan(args, make, example, training=None):
    """--plan: print what a run needs, as a table and as one line of JSON.

    Memory of a rank: weights, gradients and Adam's two moments in fp32, split over the ranks that
    shard; what is gathered; and what the forward keeps. Gradients come as that goes, unless they
    are accumulated. Time: three forwards, or the FLOPs `training` an image where a part is frozen
    (and a forward more with --activation-checkpoint), at --mfu."""
    with torch.device("meta"):
        model = make()
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    dtype = {"fp32": None, "fp16": torch.float16}.get(args.precision, torch.bfloat16)
    half = 4 if dtype is None else 2
    share, micro = micro_batch(args, args.ranks)
    one, two = (kept_bytes(make, example, batch, dtype) for batch in (1, 2))
    image, fixed = two - one, 2 * one - two         # a batch of b keeps fixed + b * image
    rows = []
    for how, shards in (("ddp", 1), ("fsdp", args.ranks),
                        ("hsdp", min(args.ranks_per_node, args.ranks))):
        weights, gradients, adam = 4 * count / shards, 4 * trained / shards, 8 * trained / shards
        # ddp: autocast's copies of the weights. Sharded: two blocks and what is in none, with its
        # gradients, and a block's gradients before and after they are turned to fp32
        all_gather_rows = fixed[0] if how == "ddp" else (
            (2 * half + half + 4) * max(blocks) + 8 * (count - sum(blocks)))
        for recompute in (False, True):
            kept = micro * image[int(recompute)]
            total = weights + adam + all_gather_rows + (
                kept + gradients if micro < share else max(kept, gradients))
            room = args.memory * 1e9 - weights - gradients - adam - all_gather_rows
            rows.append({"parallel": how, "checkpoint": recompute, **{
                name: round(value / 1e9, 3) for name, value in (
                    ("weights", weights), ("gradients", gradients), ("adam", adam),
                    ("gathered", all_gather_rows), ("activations", kept), ("total", total))},
                "largest": max(0, int(room / image[int(recompute)]))})
    flops = forward_flops(make, example)
    step = args.batch * ((training or 3 * flops) + flops * args.activation_checkpoint)
    seconds = step / (args.ranks * PEAKS[args.gpu] * args.mfu)
    samples = args.samples or (args.steps or 0) * args.batch
    million, hours = seconds / args.batch * 1e6 / 3600, seconds / args.batch * samples / 3600
    rank0_print(f"{count / 1e6:,.1f}M parameters; forward {flops / 1e9:.4g} GFLOP an image, a step of "
                f"{args.batch} images {step / 1e15:.4g} PFLOP: {seconds:.3g} s on {args.ranks} {args.gpu} "
                f"at {100 * args.mfu:g}% of their peak; a million images {million:.4g} h"
                + (f", the run of {samples:,.0f} {hours:.4g} h" if samples else ""))
    rank0_print(f"GB a rank with micro-batches of {micro}; largest: the largest micro-batch in "
                f"{args.memory:g} GB")
    for row in (rows[0].keys(), *(row.values() for row in rows)):
        rank0_print("".join(f"{str(value):>12}" for value in row))
    rank0_print(json.dumps({"parameters": count, "flops_per_image": flops, "flops_per_step": step,
                            "micro_batch": micro, "seconds_per_step": seconds,
                            "hours": hours if samples else None, "hours_per_million_images": million,
                            "memory_gb": rows}))


# ======================================================================================
# Part 3: weights from files: ours, MAE, MAWS, timm, Hugging Face ViT and ViTMAE
# ======================================================================================

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Read a .safetensors file: {name: tensor}, mapped into memory and read when touched.

    The format: 8 bytes with the header's length, a JSON header, the tensors' bytes."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        start, end = 8 + length, size
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        dtype, count = SAFETENSORS_DTYPES[entry["dtype"]], math.prod(entry["shape"])
        if not 0 <= first <= last <= end - start or last - first != count * dtype.itemsize:
            raise ValueError(f"the offsets of {name} do not fit the file")
        flat = (torch.frombuffer(content, dtype=dtype, count=count, offset=start + first)
                if count else torch.empty(0, dtype=dtype))
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_weights(path):
    """Read a weights file without pickle: ({name in the file: tensor}, what else the file says).

    Takes .pt .pth .bin (torch.load, weights only) and .safetensors. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {path}; give the path of a .pt .pth .bin or .safetensors")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path), {}
        # MAE's files carry their argparse.Namespace: allowed, since it holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True,
                                 mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path} cannot be read as weights ({reason}); "
                        "is it complete, and a .pt .pth .bin or .safetensors?") from error
    about = {}
    while isinstance(content, dict):
        inner = next((content[key] for key in ("model", "state_dict", "model_state", "module")
                      if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        about.update({key: value for key, value in content.items() if value is not inner})
        content = inner
    tensors = {name: value for name, value in content.items() if torch.is_tensor(value)} \
        if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors; give a file of model weights")
    told = about.get("config")
    if not isinstance(told, dict) or not Config.__dataclass_fields__.keys() <= told.keys():
        about.pop("config", None)           # somebody else's
    return tensors, about


def told_config(about):
    """The Config that a file of ours says of itself, None for a file from elsewhere."""
    told = about.get("config")
    return told and Config(**{key: told[key] for key in Config.__dataclass_fields__})


PREFIXES = re.compile(r"^(module|model|vision_encoder|vision_model|vit|encoder|trunk|backbone)\.")
RENAMES = [(re.compile(pattern), new) for pattern, new in (
    # Hugging Face's ViT and ViTMAE, under the names of versions 4 and 5
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"^decoder_(layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^layers?\.(?=\d)", "blocks."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."))]


def our_names(tensors, renames=RENAMES):
    """Rename the tensors of a file by a table, by default to the names of ViT and MAE; join query,
    key and value."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
        while PREFIXES.match(name):
            name = PREFIXES.sub("", name)
        for pattern, new in renames:
            name = pattern.sub(new, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return renamed


def file_grid(table, about):
    """The grid (H, W) of a file's positions [1, 1+N, D]: as its config says, else a square."""
    if "config" in about:
        return told_config(about).grid
    patches = table.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise UserError(f"the file's positions {list(table.shape)} are not a square grid and a "
                        "class token, and it says nothing of its grid")
    return side, side


def config_from(path):
    """The Config of a weights file, and what else the file says of itself, with "shapes".

    Files from elsewhere do not say how many heads they have: it is taken from a config.json beside
    them, as Hugging Face's have, or else from the row of SIZES of their width and depth. Raises
    UserError where that does not tell."""
    tensors, about = read_weights(path)
    tensors = our_names(tensors)
    about["shapes"] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "config" in about:
        return told_config(about), about
    dimensions = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.norm1.weight": 1}
    for name, count in dimensions.items():
        if name not in tensors or tensors[name].dim() != count:
            raise UserError(f"{path} is no Vision Transformer that is known here: it lacks {name} "
                            f"of {count} dimensions, and has {', '.join(list(tensors)[:3])}, …")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    grid = file_grid(tensors["pos_embed"], about)
    said = read_json(Path(path).with_name("config.json"))
    heads = said.get("num_attention_heads") if said.get("hidden_size") == width else \
        {row[:2]: row[2] for row in SIZES.values()}.get((width, depth))
    if heads is None:
        raise UserError(f"{path} is {width} wide and {depth} deep, which no --model is, so its "
                        "number of heads is unknown; load it in Python with vit.load_weights")
    return Config(width, depth, heads, patch, (grid[0] * patch, grid[1] * patch), channels), about


def summary(names):
    """Names of tensors as short patterns: the first part of each, once."""
    heads = dict.fromkeys(name.split(".")[0] for name in names)
    return ", ".join(head if head in names else f"{head}.*" for head in heads) or "none"


# What a file may hold besides what a model takes: heads, decoders and text towers
IGNORED_TENSORS = ("decoder_*", "mask_token", "embeddings.mask_token", "head.*", "norm.*", "fc_norm.*",
          "pooler.*", "text_encoder.*", "text_projection", "vision_projection", "logit_scale")


@torch.no_grad()
def load_weights(model, path, new=(), renew=(), log=rank0_print, rename=our_names):
    """Fill a model from a file, whoever wrote it, and print what was done in one line.

    `new` lists patterns of tensors that the file may lack ("decoder_*"); they keep their values, as
    do those of `renew`, whether the file has them or not; `rename` gives the file's tensors the
    model's names. Positions are resized to the model's grid.
    Returns {"loaded", "new", "unused"}: lists of names.
    Raises UserError, before anything is changed, where a tensor outside `new` is missing, has
    another shape, or is left over and none of EXTRAS: weights that match nothing, or half of a
    network, must never pass for loaded."""
    tensors, about = read_weights(path)
    tensors = rename(tensors)
    targets = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    values, missing, wrong = {}, [], []
    for name, target in targets.items():
        value = tensors.get(name)
        if any(fnmatch(name, pattern) for pattern in renew):
            continue
        if value is None:
            if not any(fnmatch(name, pattern) for pattern in new):
                missing.append(name)
            continue
        if name.endswith("pos_embed") and value.dim() == 3 and value.shape[2] == target.shape[2]:
            value = resize_pos_embed(value, file_grid(value, about), model.config.grid)
        if value.shape != target.shape:
            wrong.append(f"{name} {list(value.shape)} instead of {list(target.shape)}")
        values[name] = value
    left = [name for name in tensors if name not in targets
            and not any(fnmatch(name, pattern) for pattern in IGNORED_TENSORS)]
    if missing or wrong or left:
        more = lambda names: ", ".join(names[:3]) + (
            f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{path} does not fit this model; " + "; ".join(
            part for part in (missing and f"missing: {summary(missing)}",
                              wrong and f"another shape: {more(wrong)}",
                              left and f"unknown here: {more(left)}") if part))
    for name, value in values.items():
        copy_into(targets[name], value)
    fresh = [name for name in targets if name not in values]
    unused = [name for name in tensors if name not in values]
    filled = sum(targets[name].numel() for name in values)
    total = sum(target.numel() for target in targets.values())
    rank0_print(f"loaded {len(values)} of {len(targets)} tensors ({100 * filled / total:.1f}% of "
                f"parameters) from {path}; new: {summary(fresh)}; unused: {summary(unused)}")
    return {"loaded": list(values), "new": fresh, "unused": unused}


# --------------------------------------------------------------------------------------
# python vit.py --convert: to other people's names, and to ours
# --------------------------------------------------------------------------------------

HUGGING_FACE = (("blocks.", "encoder.layer."), (".attn.q.", ".attention.attention.query."),
                (".attn.k.", ".attention.attention.key."),
                (".attn.v.", ".attention.attention.value."),
                (".attn.proj.", ".attention.output.dense."),
                (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
                (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."))


def hugging_face_name(name):
    """One of our tensors' names as Hugging Face's ViT and ViTMAE have it."""
    if name.startswith("head."):
        return name.replace("head.", "classifier.")
    decoder = name.startswith(("decoder_", "mask_token"))
    name = name.replace("decoder_blocks.", "decoder_layers.")
    for ours, theirs in HUGGING_FACE:
        name = name.replace(ours, theirs)
    if decoder:
        return f"decoder.{name}"
    for ours, theirs in (("cls_token", "embeddings.cls_token"), ("norm.", "layernorm."),
                         ("pos_embed", "embeddings.position_embeddings"),
                         ("patch_embed.proj.", "embeddings.patch_embeddings.projection.")):
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return f"vit.{name}"


def write_safetensors(path, tensors):
    """Write {name: tensor} as a .safetensors file: the inverse of read_safetensors."""
    header, at = {}, 0
    kinds = {dtype: kind for kind, dtype in SAFETENSORS_DTYPES.items()}
    for name, tensor in tensors.items():
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())


def to_hugging_face(tensors, config, about, out):
    """Write tensors of our names as a folder that transformers' from_pretrained takes: a
    ViTForImageClassification, a ViTModel where there is no head, a ViTMAEForPreTraining where there
    is a decoder. Raises UserError for what they have no class for."""
    if "fc_norm.weight" in tensors:
        raise UserError("Hugging Face's ViT reads the class token: a model that averages patches "
                        "(fc_norm) has no counterpart there")
    told, mae = about.get("config", {}), "decoder_pred.weight" in tensors
    if mae and "decoder_heads" not in told:
        raise UserError("the file does not say how many heads its decoder has: give one of ours")
    settings = {"hidden_size": config.width, "num_hidden_layers": config.depth,
                "num_attention_heads": config.heads, "intermediate_size": 4 * config.width,
                "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                "image_size": config.image[0] if len({*config.image}) == 1 else config.image,
                "patch_size": config.patch, "num_channels": config.channels}
    if mae:
        settings |= {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"],
                     "decoder_hidden_size": told["decoder_width"],
                     "decoder_num_hidden_layers": told["decoder_depth"],
                     "decoder_num_attention_heads": told["decoder_heads"],
                     "decoder_intermediate_size": 4 * told["decoder_width"],
                     "mask_ratio": told["mask_ratio"], "norm_pix_loss": told["norm_pix"]}
    else:
        settings |= {"model_type": "vit", "architectures": [
            "ViTForImageClassification" if "head.weight" in tensors else "ViTModel"]}
    names = about.get("classes") or about.get("vocabulary") or range(
        len(tensors.get("head.bias", ())))
    settings["id2label"] = {str(i): str(name) for i, name in enumerate(names)}
    settings["label2id"] = {name: int(i) for i, name in settings["id2label"].items()}
    parts = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            thirds = zip("qkv", tensor.chunk(3))
            parts |= {name.replace(".qkv.", f".{part}."): third for part, third in thirds}
        else:
            parts[name] = tensor
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / "model.safetensors", lambda path: write_safetensors(
        path, {hugging_face_name(name): tensor for name, tensor in parts.items()}))
    write_aside(out / "config.json", lambda path: path.write_text(json.dumps(settings, indent=1)))


def main(argv):
    """python vit.py --convert IN OUT --to …: a weights file under other names."""
    parser = argparse.ArgumentParser(prog="vit.py", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--convert", nargs=2, metavar=("IN", "OUT"), required=True,
                        help="a weights file, ours or any that --init takes, and what to make")
    parser.add_argument("--to", choices=("huggingface", "ours"), required=True,
                        help="huggingface: a folder for from_pretrained (ViT, ViTMAE); ours: a .pt "
                        "with the names of MAE, MAWS and timm")
    args = parser.parse_args(argv)
    source, out = args.convert[0], Path(args.convert[1])
    config, about = config_from(source)
    tensors = our_names(read_weights(source)[0])
    if args.to == "huggingface":
        to_hugging_face(tensors, config, about, out)
    else:
        del about["shapes"]
        about["config"] = {**vars(config), **about.get("config", {})}
        write_aside(out, lambda path: torch.save(
            {"model": {name: tensor.clone() for name, tensor in tensors.items()}, **about}, path))
    rank0_print(f"wrote {len(tensors)} tensors of {source} to {out}")


if __name__ == "__main__":
    run(main)
