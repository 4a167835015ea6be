"""The Vision Transformer, and what it takes to train one on one device or a thousand.

Part 1 is the network of the paper (section 3: plain ViTs from base to 6.5B): sizes, patches,
positions, attention, initialisation, schedule. It can be read alone. Part 2, "on one device or a
thousand", is what surrounds the network in a training run: flags, start and stop, DDP and FSDP2,
checkpoints, the log, and `Run`, which every training loop uses. Part 3 reads weight files of other
projects.

Letters in shape comments, the same in every file:
B batch, N patches (in Attention, Block and --plan: all tokens), V visible patches, D width,
d decoder width, h heads, L blocks, p patch side in pixels, P numbers in a patch (p * p * C),
C channels, H W height and width of the image in pixels, T frames, K classes or tags,
k classes or tags of one image, E width of the space of images and texts, n m counts.

Sources of values, named beside them: "paper" is arXiv 2303.13496, "MAE" is arXiv 2111.06377 and its
code, "ours" means that nobody published the value and we chose it.
"""

import argparse
import contextlib
import difflib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend. It is shown as one line, without a traceback."""


# ======================================================================================
# Part 1: the Vision Transformer
# ======================================================================================

# "full / MAE" are billions of multiply-adds of one forward pass at 224 pixels: of the encoder on
# all patches, and of MAE, whose encoder sees a quarter of them and whose decoder is small (in its
# own code; here 1% less). Their ratio is why MAE is cheap enough for billions of images.
SIZES = {
    # name:  width depth heads patch image     parameters, full / MAE,  source
    "nano":  (128,   6,   4,    8,   64),    # 1.2M                     ours, for a laptop
    "tiny":  (192,  12,   3,    8,   96),    # 5.4M                     ours
    "small": (384,  12,   6,   16,  224),    # 22M                      ours
    "base":  (768,  12,  12,   16,  224),    # 86M     17.6 / 9.8       paper, table of models
    "large": (1024, 24,  16,   16,  224),    # 304M    61.6 / 20.8      paper
    "huge":  (1280, 32,  16,   14,  224),    # 632M     167 / 48.6      paper
    "2b":    (2560, 24,  32,   14,  224),    # 1.89B    494 / 131       paper
    "6.5b":  (4096, 32,  32,   14,  224),    # 6.45B   1674 / 428       paper
}


@dataclass
class Config:
    """The shape of an encoder. `image` is given as the side of a square or as (height, width), in
    pixels, and kept as (height, width).

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
            raise UserError(f"an image size is one or two positive numbers; found {sides}")
        for side in sides:
            if side % self.patch:
                below = side // self.patch * self.patch
                near = f"{below} or {below + self.patch}" if below else f"{self.patch}"
                raise UserError(f"image side {side} is not divisible by patch {self.patch}; "
                                f"the nearest that are: {near}")
        if self.width % self.heads or self.width % 4:       # by 4: see sincos_pos_embed
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
        """Rows and columns of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def num_patches(self):
        return self.grid[0] * self.grid[1]


# --------------------------------------------------------------------------------------
# Patches and positions
# --------------------------------------------------------------------------------------

def patchify(images, patch):
    """Cut images [B,C,H,W] into patches [B,N,P] in raster order, each flattened as row, column,
    channel.

    The flattening order is MAE's, so that released decoders predict in it."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)      # [B,C,rows,p,columns,p]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)    # [B,N,P]


def unpatchify(patches, patch, grid, channels=3):
    """Join patches [B,N,P] of a grid (rows, columns) to images [B,C,H,W]: patchify's inverse."""
    rows, columns = grid
    x = patches.reshape(-1, rows, columns, patch, patch, channels)      # [B,rows,columns,p,p,C]
    x = x.permute(0, 5, 1, 3, 2, 4)                                     # [B,C,rows,p,columns,p]
    return x.reshape(-1, channels, rows * patch, columns * patch)           # [B,C,H,W]


def gather_tokens(tokens, index):
    """Pick tokens [B,N,D] by index [B,V], which differs from image to image: [B,V,D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_pos_embed(width, grid):
    """Sine-cosine position embeddings [1,1+N,D] of a grid (rows, columns); the class token's row is
    zero (MAE).

    Each of these takes a quarter of the width: sine and cosine of the column, sine and cosine of
    the row."""
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]  # 2 x [N,D/4]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)  # [N,D]
    return F.pad(table, (0, 0, 1, 0))[None].to(torch.get_default_dtype())   # [1,1+N,D]


def resize_pos_embed(table, old, new):
    """Resize position embeddings [1,1+N,D] from grid `old` to grid `new`, bicubically in 2-D (MAE).

    The class token's row stays as it is. Equal grids return the table itself, bit by bit."""
    if tuple(old) == tuple(new):
        return table
    class_row, patches = table[:, :1], table[:, 1:]
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)                # [1,D,rows,columns]
    image = F.interpolate(image, size=tuple(new), mode="bicubic")
    return torch.cat([class_row, image.permute(0, 2, 3, 1).flatten(1, 2)], 1)   # [1,1+N,D]


# --------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Project patches [B,V,P] to tokens [B,V,D].

    The kernel is stored as a convolution's, as in the released files. It is applied as a linear map
    in patchify's order, so that it can be given any subset of the patches: MAE's encoder never
    touches a masked one."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, patches):
        kernel = self.proj.weight.movedim(1, -1).flatten(1)                 # [D,C,p,p] to [D,P]
        return F.linear(patches, kernel, self.proj.bias)                    # [B,V,D]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation of [...,D] in the type of its input; torch's own refuses fp32 tokens when
    its weights are in half precision."""

    def __init__(self, width, eps=1e-6):
        super().__init__(width, eps)

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)        # [...,D]


def attention(q, k, v, mask=None, scale=None):
    """Scaled dot-product attention (arXiv 1706.03762) of queries, keys, values [B,h,N,D/h]: each
    token gets the mean of all values, weighted by how well its query matches their keys.

    `mask` [B,1,1,N] is False for keys that nobody may attend to, as padding of texts. `scale`
    multiplies the scores; default 1 / sqrt(D/h)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)                              # [B,h,N,N]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)                                            # [B,h,N,N]
    return weights @ v                                                      # [B,h,N,D/h]


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B,N,D]; `mask` as of `attention`.

    With a `grid`, as (rows, columns) or (T, rows, columns), the tokens lie on it in raster order
    and the attention has relative positions, a table `rel_pos` [2n-1,D/h] for each axis."""

    def __init__(self, width, heads, grid=()):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos = nn.ParameterList(
            nn.Parameter(torch.zeros(2 * n - 1, width // heads)) for n in grid)

    def forward(self, x, mask=None):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)     # [B,N,3,h,D/h]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # 3 x [B,h,N,D/h]
        scale = None
        if self.grid:       # for video and detection; skip it at a first reading
            q, k = relative_positions(q, k, self.rel_pos, self.grid)
            # The fast kernels want values as wide as queries and keys.
            v, scale = F.pad(v, (0, q.shape[-1] - v.shape[-1])), 1.0
        # The same, fused. CPUs in half precision are faster without, up to some 1,024 tokens.
        if q.is_cuda or q.dtype == torch.float32 or N > 1024:
            x = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        else:
            x = attention(q, k, v, mask, scale)                             # [B,h,N,D/h]
        x = x[..., :D // self.heads].transpose(1, 2).reshape(B, N, D)
        return self.proj(x)                                                 # [B,N,D]


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-LayerNorm transformer block over tokens [B,N,D]; `grid` as of Attention."""

    def __init__(self, width, heads, grid=()):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, grid)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, scales=None, mask=None):
        """`scales` [B,2] multiply what the two branches add to x (see drop_path_scales); `mask` is
        Attention's."""
        if scales is None:
            x = x + self.attn(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        scales = scales[..., None, None]                                    # [B,2,1,1]
        x = x + self.attn(self.norm1(x), mask) * scales[:, 0]
        return x + self.mlp(self.norm2(x)) * scales[:, 1]


def drop_path_scales(uniforms, rate):
    """Factors [B,L,2] of the two branches of L blocks, from uniform random numbers [B,2L].

    Drop path (stochastic depth, arXiv 1603.09382, its linear rule): an image skips each branch of
    block i = 0 … L-1 with probability rate * i / (L-1). The branches that are kept are scaled up,
    so that the expected value stays the same."""
    uniforms = uniforms.unflatten(1, (-1, 2))                               # [B,L,2]
    skipped = torch.linspace(0, rate, uniforms.shape[1], device=uniforms.device)[:, None]   # [L,1]
    return (uniforms >= skipped) / (1 - skipped)                            # [B,L,2]


def run_block(block, x, recompute, *options):
    """block(x, *options). With `recompute` its activations are not kept for the backward pass but
    computed again (activation checkpointing)."""
    if recompute and torch.is_grad_enabled():
        # Here and not in a wrapper module: wrappers rename the parameters.
        return checkpoint(block, x, *options, use_reentrant=False)
    return block(x, *options)


def run_blocks(blocks, x, recompute=False, scales=None):
    """Send tokens [B,N,D] through blocks; `scales` [B,L,2] are drop_path_scales'."""
    for i, block in enumerate(blocks):
        x = run_block(block, x, recompute, None if scales is None else scales[:, i])
    return x


class ViT(nn.Module):
    """The Vision Transformer as the released MAWS trunks use it: images [B,C,H,W] to logits [B,K].

    pool "cls" reads the class token after `norm`; "mean" averages the patches, then normalises by
    `fc_norm` (MAE's finetuning); "patches" averages them after `norm` (frozen encoders). With
    classes=0 the result is the pooled feature [B,D]. The head starts as N(0, head_std). Parameters
    have the names of the released files and of timm."""

    def __init__(self, config, classes=0, pool="cls", head_std=0.0):
        super().__init__()
        if pool not in ("cls", "mean", "patches"):
            raise UserError(f"pool is 'cls', 'mean' or 'patches'; found {pool!r}")
        self.config, self.pool, self.head_std, self.recompute = config, pool, head_std, False
        D = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, D))
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        if pool == "mean":
            self.fc_norm = LayerNorm(D)
        else:
            self.norm = LayerNorm(D)
        self.head = nn.Linear(D, classes) if classes else nn.Identity()
        self.init_weights()

    def init_weights(self, seed=0):
        init_weights(self, seed, {"head.weight": self.head_std})

    def embed(self, images):
        """Images [B,C,H,W] to the first block's tokens [B,1+N,D], the class token first."""
        x = self.patch_embed(patchify(images, self.config.patch))           # [B,N,D]
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed

    def forward(self, images, scales=None):
        x = run_blocks(self.blocks, self.embed(images), self.recompute, scales)     # [B,1+N,D]
        if self.pool == "cls":
            x = self.norm(x[:, 0])                                          # [B,D]
        elif self.pool == "mean":
            x = self.fc_norm(x[:, 1:].mean(1))                              # [B,D]
        else:
            x = self.norm(x[:, 1:]).mean(1)                                 # [B,D]
        return self.head(x)                                                 # [B,K]


# --------------------------------------------------------------------------------------
# Initialisation
# --------------------------------------------------------------------------------------

def initial_value(name, shape, grid, seed, starts):
    """The initial value of one tensor, a pure function of these arguments.

    | tensor                                | initial value                                       |
    |---------------------------------------|-----------------------------------------------------|
    | pos_embed, decoder_pos_embed          | sine-cosine table on the `grid`                     |
    | rel_pos                               | 0 (ViTDet)                                          |
    | 1-D, in `starts` {name: value}        | that value                                          |
    | other 1-D: LayerNorm weights, biases  | 1, 0                                                |
    | 2-D or more, in `starts` {name: std}  | N(0, std); a std of 0 gives zeros                   |
    | cls_token, mask_token                 | N(0, 0.02)                                          |
    | other weights                         | xavier uniform; the patch kernel as a map [D,P]     |

    Values without a source are MAE's, but for `starts`. A generator per name, not one for the
    model, makes the value independent of the order of construction: every rank and layout starts
    from the same weights."""
    if name.endswith("pos_embed"):
        return sincos_pos_embed(shape[-1], grid)
    if "rel_pos" in name:
        return torch.zeros(shape)
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
def init_weights(model, seed=0, starts={}):
    """Initialise every parameter and buffer of a model in place, by `initial_value`.

    Tensors without content (torch's "meta" device) are passed over."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_meta:
            copy_into(tensor, initial_value(name, tensor.shape, model.config.grid, seed, starts))


# --------------------------------------------------------------------------------------
# Learning rate and weight decay
# --------------------------------------------------------------------------------------

def learning_rate(step, total, peak, warmup, final=0.0):
    """Linear warmup from 0 to `peak`, then half a cosine to `final` (MAE); clamped at both ends.

    `step`, `total` and `warmup` share one unit, steps or epochs."""
    if step < warmup:
        return peak * max(step, 0) / warmup
    progress = min(1.0, (step - warmup) / max(total - warmup, 1e-12))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(model, weight_decay, no_decay=(), layer_decay=1.0):
    """Parameter groups for an optimizer. Weight decay is off for 1-D parameters (norms and biases;
    MAE) and for those named in `no_decay`.

    Each group has an "lr_scale", which multiplies its learning rate: layer_decay to the power of
    the number of layers above. It is 1 for the final norm and the head, and smallest for patches
    and positions (layer-wise learning rate decay, MAE's finetuning; 1.0 switches it off)."""
    groups, last = {}, model.config.depth + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = (int(name.split(".")[1]) + 1 if name.startswith("blocks.") else
                 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else last)
        lr_scale = layer_decay ** (last - layer)
        decays = parameter.dim() > 1 and name not in no_decay
        group = groups.setdefault((lr_scale, decays), {
            "params": [], "weight_decay": weight_decay * decays, "lr_scale": lr_scale})
        group["params"].append(parameter)
    return list(groups.values())


# --------------------------------------------------------------------------------------
# Relative positions, for video and detection
# --------------------------------------------------------------------------------------

def relative_positions(q, k, tables, grid):
    """Queries and keys, [B,h,N,D/h] at first, whose unscaled product is attention's scaled one plus
    decomposed relative positions (ViTDet, arXiv 2203.16527; also MViTv2's, arXiv 2112.01526):

        q_i k_j / sqrt(D/h) + sum over the axes of q_i table[place_i - place_j + n - 1]

    The tokens lie in raster order on `grid`, whose axes (time, row, column) have n places each;
    `tables` holds a table [2n-1,D/h] for each axis. A query is extended by what a key at place
    0 … n-1 would add, a key by a one at its own place: exact, and no N x N mask for each head, with
    which the kernels of attention would need as much memory as the scores."""
    queries, keys = [q * q.shape[-1] ** -0.5], [k]
    token = torch.arange(q.shape[2], device=q.device)                       # [N]
    for axis, (table, n) in enumerate(zip(tables, grid)):
        place = token // math.prod(grid[axis + 1:]) % n                     # [N]: on this axis
        difference = place[:, None] - torch.arange(n, device=q.device) + n - 1      # [N,n]
        by_difference = q @ table.t().to(q.dtype)                           # [B,h,N,2n-1]
        queries.append(by_difference.gather(-1, difference.expand(*q.shape[:2], -1, -1)))
        keys.append(F.one_hot(place, n).to(k.dtype).expand(*k.shape[:2], -1, -1))   # [B,h,N,n]
    return torch.cat(queries, -1), torch.cat(keys, -1)                  # 2 x [B,h,N,D/h + sum of n]


# ======================================================================================
# Part 2: on one device or a thousand
#
# Every function here also works in a single process without torchrun, so that a training
# loop never asks whether it is distributed.
# ======================================================================================

# Flags that change how or where a run is computed, not what it computes (up to rounding): a run
# may be resumed with other values of these.
FREE_FLAGS = {"out", "allow_changed", "index_dir", "micro_batch", "parallel", "device", "workers",
              "activation_checkpoint", "compile", "save_every", "keep", "log_every", "eval_every",
              "max_bad"}

# bf16 / fp16 operations per second without sparsity, from the vendors' data sheets, for `mfu`
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12,
              "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "T4": 65e12,
              "4090": 165e12, "3090": 71e12}

# torch warns about checkpoints of a single process; here they are intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class RankError(UserError):
    """A UserError that one rank may have met alone, so that this rank has to print it."""


class Environment(NamedTuple):
    """What torchrun tells a process: its rank, its rank on its node, the number of ranks in all and
    on its node."""
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def environment():
    """The Environment of this process; that of a single process without torchrun. Raises UserError
    where another launcher has set a part of it."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        return Environment(0, 0, 1, 1)
    if missing:
        raise RankError(f"the environment has {', '.join({*names} - {*missing})} but not "
                        f"{', '.join(missing)}: start with torchrun, or unset them for one process")
    return Environment(*(int(os.environ[name]) for name in names))


def rank0_print(text):
    """Print a line on rank 0, above the progress bar if there is one."""
    if environment().rank == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


# --------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, as everything else here does."""

    def error(self, message):
        flag = message.removeprefix("unrecognized arguments: ").split("=")[0].split()[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, 1)
        raise UserError(message + (f"; did you mean {near[0]}?" if near else ""))


class Join(argparse.Action):
    """What to do with a flag that may be given several times: its values are joined."""

    def __call__(self, parser, args, values, flag=None):
        before = getattr(args, self.dest)
        setattr(args, self.dest, values if before is self.default else before + values)


def number(low, high=math.inf, kind=float):
    """The type of a flag whose value is a number from `low` to `high`."""
    def read(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} is not {what} from {low:g}"
                                         + (f" to {high:g}" if high < math.inf else " on"))
    return read


positive, share = number(1, kind=int), number(0, 1)


def stage_parser(program, doc, recipes=None):
    """A Parser with the flags that every stage shares.

    `recipes` {name: {flag: value}} are the defaults by model, printed at the end of --help. Without
    them (tasks on frozen encoders), the flags of the recipe and of the run are left out."""
    parser = Parser(prog=program, allow_abbrev=False, description=doc,
                    formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("model and data").add_argument
    add("--model", choices=SIZES, help="size; default nano, or that of --init")
    add("--image-size", type=positive, nargs="+", metavar="PIXELS",
        help="side, or height and width; default by model, or that of --init")
    add("--heads", type=positive, help="attention heads; default by model, or those of --init; "
        "files of other projects often do not say it")
    add("--patch-size", type=positive, metavar="PIXELS", help="side of a patch; default that of "
        "--init, else by model")
    add("--channels", type=int, choices=(1, 3, 4),
        help="1 grey, 3 colour, 4 colour and alpha; default that of --init, else 3")
    add("--data", nargs="+", action=Join, default=["world"], metavar="SPEC",
        help="images to train on: world, world:COUNT, a folder, .tar shards ('x-{000..127}.tar', "
        "'dir/*.tar'), a .jsonl or .csv; for video clips, for detect a .json of COCO or LVIS; "
        "several are joined; default: the built-in world (stage 2: 100,000 images of it; stage 3: "
        "what is labelled for the task)")
    add("--val", nargs="+", action=Join, metavar="SPEC",
        help="images to evaluate on; default world-val where --data is the world, else none")
    add("--index-dir", metavar="DIR", help="folder for the indexes of shards; default: beside them")
    add("--init", metavar="FILE", help="start from these weights; default: random weights")
    add("--out", metavar="DIR", help="folder for all results; default runs/ and the name of "
        "the stage or task, with -predict or -eval behind it")

    add = parser.add_argument_group("machine").add_argument
    add("--micro-batch", type=positive, metavar="IMAGES",
        help="most images in one forward pass of a rank; gradients of several are accumulated; "
        "default 64, for video and detect 16; in training on CUDA, but for these, what fills half "
        "of the memory, at most 256 (ours)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; weights and losses are always fp32. auto (default): bf16 on CUDA "
        "of capability 8 or more, fp16 on older CUDA, fp32 on cpu and mps")
    add("--parallel", choices=("auto", "ddp", "fsdp", "hsdp"), default="auto",
        help="auto (default): the first that fits into half of the GPU's memory: ddp, across nodes "
        "hsdp, which shards inside a node and replicates across nodes, fsdp; no effect in a single "
        "process")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile each block with torch.compile; default on CUDA")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="auto (default): the first of them that is available")
    add("--workers", type=number(0, kind=int), metavar="PROCESSES",
        help="processes per rank that decode images; 0: none; default: on CUDA the CPU cores per "
        "rank but two, at most 16; else 1")

    if recipes:
        add_recipe_and_run_flags(parser, recipes)
    else:
        parser.set_defaults(predict=None, eval_only=False, activation_checkpoint=False, seed=0)
    return parser


def add_recipe_and_run_flags(parser, recipes):
    """Add the flags of the recipe and of the run; `recipes` as of stage_parser."""
    rows = {}           # models with equal recipes share a row
    for name, recipe in recipes.items():
        rows.setdefault(" ".join(as_flag(*item) for item in recipe.items()), []).append(name)
    parser.epilog = "\n".join(["defaults (the code has their sources):", *(
        f"  {', '.join(names)}: {flags}" for flags, names in rows.items())])

    group = parser.add_argument_group("recipe (defaults by model: see the end)")
    add = group.add_argument
    add("--batch", type=positive, metavar="IMAGES", help="images per step, summed over all ranks")
    length = group.add_mutually_exclusive_group().add_argument
    length("--epochs", type=number(1e-9), help="length of the run in passes over --data, in stage "
           "2 as resampled")
    length("--samples", type=number(1), help="length of the run in images seen")
    length("--steps", type=positive, help="length of the run in optimizer steps")
    rate = group.add_mutually_exclusive_group().add_argument
    rate("--lr", type=number(0), metavar="RATE", help="peak learning rate")
    rate("--base-lr", type=number(0), metavar="RATE", help="peak learning rate per 256 images of "
         "--batch; the rate does not depend on the number of ranks")
    add("--weight-decay", type=number(0), metavar="FACTOR", help="on parameters of 2 or more "
        "dimensions; in wsp, classify, video and detect not on positions and class token; 0 is off")
    add("--warmup", type=share, metavar="SHARE", help="share of the steps in which the learning "
        "rate rises to its peak; 0 is off")
    add("--clip-grad", type=number(0), metavar="NORM", help="largest gradient norm; 0 is off")
    add("--seed", type=int, default=0, help="seed of weights, order, augmentation and "
        "masks; default 0")

    add = parser.add_argument_group("run").add_argument
    add("--allow-changed", action="store_true",
        help="resume although flags or data have changed; default off")
    add("--max-bad", type=share, default=0.01, metavar="SHARE",
        help="end the run when a larger share of the images cannot be read; default %(default)s; "
        "1 is never")
    add("--save-every", type=number(0), default=15, metavar="MINUTES",
        help="time between checkpoints; default %(default)s; 0: after every step")
    add("--keep", type=positive, default=2, metavar="COUNT",
        help="number of checkpoints that are kept; default %(default)s")
    add("--log-every", type=positive, default=20, metavar="STEPS",
        help="steps between records of log.jsonl; default %(default)s")
    add("--eval-every", type=number(0, kind=int), metavar="STEPS",
        help="steps between evaluations; default a tenth of the run; 0: only at the end")
    add("--eval-only", action="store_true", help="evaluate --init on --val and stop")
    add("--predict", nargs="+", metavar="FILE", help="use --init on these pictures and stop")
    add("--plan", type=positive, nargs="?", const=8, metavar="GPUS",
        help="print memory and time of the run on this number of H100s (8 if not given) and stop")
    add("--activation-checkpoint", action="store_true",
        help="save memory: compute activations again in the backward pass; default off")


def as_flag(name, value):
    """A setting as one writes it on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} " + " ".join(map(str, value if isinstance(value, list) else [value]))


def fill_recipe(args, recipe):
    """Set every flag that the user left open to its value in the recipe {flag: value}."""
    for alternatives in (("epochs", "samples", "steps"), ("lr", "base_lr")):
        if any(getattr(args, flag, None) is not None for flag in alternatives):
            recipe = {flag: value for flag, value in recipe.items() if flag not in alternatives}
    for flag, value in recipe.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def choose_config(args, stage):
    """The model of --model or --init, with --image-size, --patch-size and --channels applied. Also
    sets the default of --out.

    Returns (Config, name of its recipe, what the --init file says of itself: `file_info`). Raises
    UserError where flags contradict each other."""
    if (args.predict or args.eval_only) and not args.init:
        raise UserError("--predict and --eval-only use a trained model: give its file as --init")
    # --predict and --eval-only must not overwrite the results of the training run.
    suffix = "-predict" if args.predict else "-eval" if args.eval_only else ""
    args.out = args.out or f"runs/{stage}{suffix}"
    file_info, name = {}, args.model or "nano"
    config = Config.named(name)
    if args.init:
        config, file_info = config_from(args.init, args.heads)
        if config.channels not in (1, 3, 4):
            raise UserError(f"{args.init} is for images of {config.channels} channels; 1, 3 and 4 "
                            "can be read here")
        shape = (config.width, config.depth)
        name = next((row for row in SIZES if SIZES[row][:2] == shape), None)
        for flag, given, found in (("--model", args.model, name),
                                   ("--heads", args.heads, config.heads),
                                   ("--patch-size", args.patch_size, config.patch),
                                   ("--channels", args.channels, config.channels)):
            if given and given != found:
                raise UserError(f"{flag} {given}, but --init {args.init} has {found} (width "
                                f"{config.width}, depth {config.depth}); leave {flag} out")
    config = Config(config.width, config.depth, args.heads or config.heads,
                    args.patch_size or config.patch, args.image_size or config.image,
                    args.channels or config.channels)
    return config, name or "nano", file_info


class Schedule(NamedTuple):
    """The numbers of a training loop: a step of a rank is `accumulate` micro-batches of
    `micro_batch` images; `lr` is the peak learning rate; an epoch has `images`."""
    steps: int
    micro_batch: int
    accumulate: int
    lr: float
    images: int


def make_schedule(args, images, multiple=1):
    """The Schedule of a run over `images` images, printed as a sentence.

    The micro-batch is the largest divisor of a rank's images within --micro-batch that is a
    multiple of `multiple`. Raises UserError where --batch cannot be divided so."""
    world_size = get_world_size()
    per_rank = args.batch // world_size
    sizes = [size for size in range(multiple, min(per_rank, args.micro_batch) + 1, multiple)
             if per_rank % size == 0]
    if args.micro_batch < multiple:
        raise UserError(f"--micro-batch {args.micro_batch}: give {multiple} or more, since mixup "
                        "and cutmix need pairs")
    if args.batch % world_size or not sizes:
        unit = world_size * multiple
        below, above = args.batch // unit * unit, (args.batch // unit + 1) * unit
        raise UserError(f"--batch {args.batch} cannot be divided among {world_size} ranks, "
                        f"{multiple} or more images at a time within --micro-batch "
                        f"{args.micro_batch}; try {f'{below} or ' if below else ''}{above}")
    micro_batch = max(sizes)
    if 2 * micro_batch < min(per_rank, args.micro_batch):
        rank0_print(f"NOTE: {per_rank} images per rank have no divisor near --micro-batch "
                    f"{args.micro_batch}: {per_rank // micro_batch} micro-batches of {micro_batch} "
                    "will be slow")
    samples = args.samples or (args.epochs * images if args.epochs else args.steps * args.batch)
    steps = max(1, int(samples // args.batch))
    lr = args.lr if args.lr is not None else args.base_lr * args.batch / 256
    if steps < 20 or args.batch > images:
        rank0_print(f"NOTE: {steps} steps of --batch {args.batch} on {images:,} images teach a "
                    "model little: give a smaller --batch or more --epochs")
    rank0_print(f"batch {args.batch} = {world_size} ranks x {micro_batch} x "
                f"{per_rank // micro_batch}; lr {lr:.3g}"
                + (f" = {args.base_lr:.3g} x {args.batch}/256" if args.lr is None else "")
                + f"; {steps:,} steps = {steps * args.batch / images:.3g} epochs of {images:,} "
                "images")
    return Schedule(steps, micro_batch, per_rank // micro_batch, lr, images)


# --------------------------------------------------------------------------------------
# Start and stop
# --------------------------------------------------------------------------------------

stop_signals = []       # signals received since listen_for_signals
gloo_group = None       # the process group for Python objects and CPU tensors; made by start


def choose_device(args, env):
    """The device of this process, by --device. Raises UserError where it is missing."""
    available = {"cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available() and env.world_size == 1, "cpu": True}
    kinds = [kind for kind in available if available[kind]]
    kind = kinds[0] if args.device == "auto" else args.device
    if kind not in kinds:
        raise UserError(f"--device {kind} is not available here; found: {', '.join(kinds)}")
    if kind == "cpu" and args.device == "auto" and os.path.exists("/dev/nvidia0"):
        raise UserError("there is a GPU but torch cannot use it: this torch is built for CUDA "
                        f"{torch.version.cuda or '(no)'}, nvidia-smi says what the driver "
                        "supports; install a torch for it, or give --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    gpus = torch.cuda.device_count()
    if env.local_world_size > gpus:
        raise UserError(f"{env.local_world_size} processes on this node but {gpus} GPUs; start "
                        "torchrun with --nproc-per-node gpu")
    if env.local_world_size < gpus:
        rank0_print(f"{gpus} GPUs visible, {env.local_world_size} used: add --nproc-per-node gpu")
    return torch.device(kind, env.local_rank)


def join_process_group(env, device):
    """Join torchrun's process group, if there are several ranks. Raises UserError where torchrun is
    dead."""
    global gloo_group
    gloo_group = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # If torchrun dies, its ranks get SIGTERM: before the loop it ends them, inside the loop
        # they save and stop (Linux only).
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # If it is dead already, its store does not answer, and init_process_group would wait for it
        # for many minutes.
        try:
            dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False, timeout=timedelta(seconds=10))
        except dist.DistError as error:
            raise RankError("torchrun does not answer: it was ended, or MASTER_ADDR "
                            f"{os.environ['MASTER_ADDR']} cannot be reached") from error
    if env.world_size == 1:
        return
    if not dist.is_initialized():
        # With device_id NCCL connects here and not in the first step. Not run on a GPU.
        dist.init_process_group(**(
            # Longer than data.PATIENCE: a rank without images says so before NCCL gives up.
            {"backend": "nccl", "device_id": device, "timeout": timedelta(minutes=15)}
            if device.type == "cuda" else {"backend": "gloo"}))
    # Patient, since its messages wait for ranks that index data or write a checkpoint.
    gloo_group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))


def start(args, stacks=()):
    """Join torchrun's process group, if there is one, and return the device of this process. Flags
    whose default depends on the machine get their values; `stacks` (as of forward_flops) are what
    will be trained.

    Raises UserError where the device is missing or the ranks were started differently."""
    env = environment()
    device = choose_device(args, env)
    cores = max(1, cpu_cores() // env.local_world_size)
    micro_batch, workers = 64, 1
    if device.type == "cuda":
        workers = min(16, max(1, cores - 2))    # two are left for the process that feeds the GPU
        if cores < 4:
            rank0_print(f"NOTE: {cores} CPU cores per GPU will not decode images fast enough; on "
                        "SLURM give --exclusive or --cpus-per-task")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32 where --precision is fp32
    else:
        torch.set_num_threads(cores)
    join_process_group(env, device)
    if device.type == "cuda" and stacks:
        micro_batch = choose_micro_batch(args, stacks, device_memory(device))
    mine = {**flags_of(args), "device": device.type, "precision": str(autocast_dtype(args, device))}
    fill_recipe(args, {"compile": device.type == "cuda", "micro_batch": micro_batch,
                       "workers": workers})     # the cores of nodes may differ
    if args.parallel in ("auto", "hsdp"):
        mine["ranks on a node"] = env.local_world_size
    for rank, theirs in enumerate(all_gather_objects(mine)):
        for name in mine:
            if theirs[name] != mine[name]:
                raise UserError(f"rank {rank} has {name} {theirs[name]}, this one {mine[name]}: "
                                "start all ranks with the same command and devices")
    return device


def flags_of(args, without=()):
    """Settings by the names of their flags: {"--flag": value}."""
    return {f"--{flag.replace('_', '-')}": value for flag, value in vars(args).items()
            if flag not in without}


def listen_for_signals():
    """From now on, treat SIGTERM, SIGINT and SIGUSR1 as requests to stop after the current step."""
    def note(received, frame):
        if received == signal.SIGINT and received in stop_signals:
            raise KeyboardInterrupt         # a second Ctrl-C: stop at once
        stop_signals.append(received)

    stop_signals.clear()
    for awaited in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(awaited, note)


def cpu_cores():
    """CPU cores that this process may use: SLURM or taskset may allow fewer than exist. Quotas of
    containers are not seen."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def get_rank():
    """This process's number in the process group; 0 where there is no group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """The number of processes in the process group; 1 where there is no group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_objects(value):
    """The values of all ranks as a list, on every rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=gloo_group)
    return values


def objects_in_turn(value):
    """Yield the values of all ranks one after another, on rank 0, which holds one of them at a time
    besides its own; nothing on the others. Every rank has to exhaust it."""
    if get_rank() > 0:
        dist.send_object_list([value], 0, group=gloo_group)
        return
    yield value
    for rank in range(1, get_world_size()):
        received = [None]
        dist.recv_object_list(received, rank, group=gloo_group)
        yield received.pop()


def gather_rows(tensor):
    """The rows of all ranks' CPU tensors [n,…], in the order of ranks, on rank 0; none of them on
    the others. n must be equal on all."""
    if not dist.is_initialized():
        return tensor
    parts = None if get_rank() else [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.gather(tensor.contiguous(), parts, 0, group=gloo_group)
    return torch.cat(parts) if parts else tensor[:0]


def all_reduce_sum(tensor):
    """The sum of a tensor over all ranks, in place, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=gloo_group if tensor.device.type == "cpu" else None)
    return tensor


def all_gather_rows(tensor):
    """The rows of all ranks' tensors [n,…], in the order of ranks; n must be equal on all."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def on_rank_0(action):
    """The result of action(), which rank 0 alone calls. If it raises UserError or OSError, every
    rank raises UserError."""
    outcome = [None, None]              # result, error
    if get_rank() == 0:
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, group=gloo_group)
    result, error = outcome
    if error:
        raise UserError(error)
    return result


def tell_torchrun(error):
    """Leave a message where torchrun looks for it: it ends its report of the failure with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": str(error), "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": content}))


def run(main):
    """Call a stage's main and leave the process: the last line of every stage.

    A user's mistake is one line on stderr and exit code 2. The process leaves by os._exit, since
    gloo's threads sometimes abort a process that has finished its work."""
    code, program = 0, Path(sys.argv[0]).name
    sys.stdout = sys.stdout or open(os.devnull, "w")        # None: it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")       # names of files may be in any encoding
    try:
        main(sys.argv[1:])
    except UserError as error:          # every rank has it: print it once per node
        code = 2
        tell_torchrun(error)
        if isinstance(error, RankError) or environment().local_rank == 0:
            print(f"{program}: {error}", file=sys.stderr)
    except BrokenPipeError:             # as by `| head`
        os._exit(141)
    except OSError as error:
        code = 2
        if error.filename is not None or error.errno == errno.ENOSPC:       # the user can mend it
            tell_torchrun(error)
            print(f"{program}: rank {environment().rank}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
    except SystemExit as leave:
        code = leave.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --------------------------------------------------------------------------------------
# DDP and FSDP
# --------------------------------------------------------------------------------------

def build(make, args, device, methods=(), frozen=False):
    """Make a model on the device(s), initialised by --seed: returns (model, callable for training).

    `make()` constructs it; `methods` are the names of those that are called besides forward. A
    `frozen` model has no gradients, so that it needs no DDP. The model is built on the meta device
    first, so that a rank never holds more than its share of a sharded model and one whole tensor.
    Parameters have the same names in every mode."""
    env = environment()
    with torch.device("meta"):
        model = make()
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        module.recompute = args.activation_checkpoint
    if args.compile:
        try:
            torch.compile(torch.neg)(torch.ones(1, device=device))
        except Exception as error:      # whatever compilers raise
            raise UserError("--compile: torch has no working compiler here "
                            f"({str(error).strip().splitlines()[0]}); install one (gcc) or give "
                            "--no-compile") from error
        torch._dynamo.config.optimize_ddp = False       # True cuts blocks at DDP's buckets
        for block in blocks_of(model):  # in place: torch.compile(model) would rename parameters
            block.compile(dynamic=False)
    mode = choose_parallel(args, count, device_memory(device), env)
    if mode in ("fsdp", "hsdp"):
        shard(model, mode, args, device, env)
        for name in methods:
            register_fsdp_forward_method(model, name)
    model.to_empty(device=device)
    model.init_weights(args.seed)
    dtype = str(autocast_dtype(args, device) or torch.float32).removeprefix("torch.")
    rank0_print(f"model: {count / 1e6:.1f}M parameters; {mode} on {env.world_size} x "
                f"{device.type}, {dtype}")
    if frozen:
        model.requires_grad_(False)
    elif mode == "ddp":
        return model, DistributedDataParallel(model, forward_sync_buffers=False,
                                              gradient_as_bucket_view=True)
    return model, model


def device_memory(device):
    """The bytes of the smallest GPU of all ranks, which have to call it; for other devices 36e9,
    with which auto shards from 1B parameters on."""
    return min(all_gather_objects(torch.cuda.get_device_properties(device).total_memory)) \
        if device.type == "cuda" else 36e9


def choose_parallel(args, count, memory, env):
    """How ranks share a model of `count` parameters, by --parallel; auto is the first of ddp, hsdp
    and fsdp with which a rank's part of weights, gradients and Adam's moments in fp32 and weights
    in bf16 (18 bytes a parameter) fits into half of its memory; hsdp across nodes only."""
    if env.world_size == 1:
        return "one process"
    if args.parallel != "auto":
        return args.parallel
    for mode, shards in (("ddp", 1), ("hsdp", env.local_world_size)):
        if shards < env.world_size and 18 * count / shards < memory / 2:
            return mode
    return "fsdp"


def shard(model, mode, args, device, env):
    """Share out a model's parameters in place: among all ranks (fsdp), or among the ranks of a
    node, replicated across nodes (hsdp)."""
    shape, names = (env.world_size,), ("shard",)
    if mode == "hsdp":
        shape = env.world_size // env.local_world_size, env.local_world_size
        names = "replicate", "shard"
        if 1 in shape:
            raise UserError("--parallel hsdp shards inside a node and replicates across nodes; "
                            f"found {shape[0]} nodes of {shape[1]} ranks: use fsdp")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # The weights of blocks are gathered in half precision. What is outside of blocks (patches,
    # positions, norms, head) is sharded in fp32, and inputs are not cast, so that the residual
    # stream stays fp32.
    policy = MixedPrecisionPolicy(param_dtype=autocast_dtype(args, device),
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Gathered weights are kept for the backward pass: a half of the gathers, for the memory of the
    # weights in half precision.
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def placement(parameter):
        # Tables of one row (positions, class token) are cut along their last dimension. Along the
        # first, as all else is, each rank would hold padding of the table's size.
        if parameter.shape[0] == 1 and parameter.shape[-1] % shape[-1] == 0:
            return Shard(parameter.dim() - 1)

    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def blocks_of(model):
    """The transformer blocks of all parts of a model: they are sharded, compiled and recomputed
    one by one."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList)
            for block in module]


def copy_into(target, value):
    """Copy a full tensor into a parameter; of a sharded parameter, each rank keeps its slice."""
    if isinstance(target, DTensor):
        # src_data_rank=None: all ranks hold the same value, so nothing needs to be sent.
        value = distribute_tensor(value.to(target.dtype), target.device_mesh, target.placements,
                                  src_data_rank=None)
    local(target).copy_(local(value))


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
    """The context of a micro-batch's forward and backward. Only the last micro-batch of a step
    exchanges gradients between ranks."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        wrapped.set_reshard_after_backward(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def clip_gradients(model, limit=0.0, loss_scale=1.0):
    """Divide gradients by `loss_scale`, clip them to norm `limit` (0: do not), and return the norm
    before clipping, over all parameters of all ranks, as a tensor on the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) / loss_scale
    if limit or loss_scale != 1:
        factor = ((limit or math.inf) / (norm + 1e-6)).clamp(max=1) / loss_scale
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm


def local(tensor):
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """A tensor that may be sharded, whole on every rank; every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move the exponential moving average {name: tensor} of weights towards the model's.

    ema = d * ema + (1 - d) * weights, where d = min(decay, (1 + step) / (10 + step)): early in a
    run the average must forget the initial weights faster."""
    torch._foreach_lerp_([local(tensor) for tensor in ema.values()],
                         [local(parameter) for parameter in model.parameters()],
                         1 - min(decay, (1 + step) / (10 + step)))


@contextlib.contextmanager
def ema_weights(model, ema):
    """The context in which the model has its averaged weights; with ema {} nothing changes."""
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
    yield
    swap()


# --------------------------------------------------------------------------------------
# The folder of a run
# --------------------------------------------------------------------------------------

lock_file = None        # open while this process holds the lock of --out


def write_aside(path, write):
    """Let `write(temporary path)` write a file, then rename it: there is never half a file.

    Raises UserError where that fails (a full disk); the previous file is left as it was."""
    # The name is this process's own, since two runs may index the same shard.
    aside = Path(f"{path}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())         # or a crash may keep the new name without the content
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:        # torch.save raises RuntimeError
        raise RankError(f"{path} could not be written, {free_space(aside.parent)}: "
                        f"{error}".split("\n")[0]) from error
    finally:
        aside.unlink(missing_ok=True)


def free_space(folder):
    """How much space the disk of a folder has left, in words."""
    if not os.path.isdir(folder):
        return "its folder is missing"
    free = shutil.disk_usage(folder).free / 1e9
    return f"{free:.3g} GB are free" if free > 0.1 else "the disk is full"


def read_json(path):
    """The content of a JSON file, a dict; {} where it is missing, damaged or no dict."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def file_crc(path):
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def lock(out):
    """Keep other runs from `out` for as long as this process lives. Raises UserError."""
    global lock_file
    if lock_file:
        lock_file.close()
    lock_file = open(out / "lock", "w")
    try:        # the system releases the lock when the process ends, however it ends
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):     # others: no locks on this file system
            raise UserError(f"another run is writing to {out}; choose another --out (or remove "
                            f"{out}/lock, if its node has died)") from error


def open_run(args, stage, model, train, val, fixed=None):
    """Lock --out, write config.json and listen for signals. Returns True if there is work to do,
    False if the run is already finished.

    An interrupted run is resumed if its data (`train` and `val`, as data.Samples) and its flags
    (except FREE_FLAGS) are unchanged, or with --allow-changed; else every rank raises UserError.
    What is in `fixed` {name: value} may never change."""
    out = Path(args.out)
    shapes = repr([(name, list(value.shape)) for name, value in model.state_dict().items()])
    settings = flags_of(args, without=FREE_FLAGS)
    # A checkpoint fits one model and the state of one optimizer, and its step counts batches.
    fixed = {**(fixed or {}), "stage": stage, "weights": f"CRC {zlib.crc32(shapes.encode()):08x}"}
    settings |= {"--data content": train.source.fingerprint(),
                 "--val content": val and val.source.fingerprint(), **fixed}
    settings = json.loads(json.dumps(settings))         # as config.json will have it

    def prepare():
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock(out)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}; choose another "
                            "folder") from error
        for torn in (*out.glob("*.tmp"), *out.glob("checkpoints/*.tmp")):
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        finished = (out / "finished").exists()
        begun = finished or bool(checkpoints(out))
        before = read_json(out / "config.json").get("settings", {})
        if begun and not before:
            raise UserError(f"{out}/config.json is missing or damaged; choose another --out")
        changed = [name for name in settings if before.get(name) != settings[name]]
        changes = ", ".join(f"{name} {before.get(name)} → {settings[name]}" for name in changed)
        never = {*changed} & {*fixed, "--batch", "--optimizer", "--layer-decay", "--freeze",
                              "--unlock"}
        if begun and changed and (never or not args.allow_changed):
            raise UserError(f"{out} holds a run with other flags or data: {changes}; choose "
                            f"another --out (or move {out} away)"
                            + ("" if never else ", or resume it with --allow-changed"))
        if finished and not changed:
            rank0_print(f"the run in {out} is finished; to run it again, choose another --out or "
                        f"move {out} away")
            return False
        (out / "finished").unlink(missing_ok=True)
        content = {"settings": settings, "started": time.time_ns(),
                   "ranks": environment().world_size, "torch": torch.__version__,
                   "python": sys.version.split()[0],
                   **{flag: value for flag, value in vars(args).items() if flag in FREE_FLAGS}}
        write_aside(out / "config.json",
                    lambda path: path.write_text(json.dumps(content, indent=1)))
        return True

    work = on_rank_0(prepare)
    for _ in range(30):             # on NFS a node may see the old file for some seconds
        if len({*all_gather_objects(read_json(out / "config.json").get("started"))}) == 1:
            break
        time.sleep(1)
    else:
        raise UserError(f"--out {out} is not the same folder on every node; use a shared one")
    listen_for_signals()
    return work


def whole_weights(model):
    """All weights of a model, sharded or not: {name: tensor on the CPU}, on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def checkpoints(out):
    """The checkpoints in a run's folder, newest first. An unfinished one is named .tmp."""
    return sorted((path.parent for path in Path(out).glob("checkpoints/step-*/complete.json")
                   if not path.parent.suffix), reverse=True)


def save(args, model, optimizer, state, ema):
    """Write a checkpoint of everything that a run changes: weights, averaged weights `ema`,
    optimizer, and `state` as JSON.

    Each rank writes its own shards. The CRCs of all files go into complete.json; then the folder is
    renamed into place, and checkpoints beyond --keep are deleted. Raises UserError where the disk
    is full: the previous checkpoint stays whole."""
    folder = Path(args.out) / "checkpoints" / f"step-{state['step']:08d}"
    aside = Path(f"{folder}.tmp")

    def complete():
        content = {"state": state, "crc": {name: crc for part in crcs for name, crc in part}}
        write_aside(aside / "complete.json", lambda path: path.write_text(json.dumps(content)))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for old in checkpoints(args.out)[args.keep:]:
            shutil.rmtree(old, ignore_errors=True)

    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments, "ema": ema}, checkpoint_id=aside,
                 process_group=gloo_group)
    except CheckpointException as error:        # torch raises one rank's failure on every rank
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True))
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise UserError(f"{folder} could not be written, {free_space(args.out)}: "
                        f"{(str(cause) or repr(cause)).splitlines()[0]}; the same command resumes "
                        "from the previous checkpoint, if there is one") from error
    rank = get_rank()
    mine = [*aside.glob(f"__{rank}_*"), *(aside.glob(".metadata") if rank == 0 else ())]
    crcs = all_gather_objects([(path.name, file_crc(path)) for path in mine])
    on_rank_0(complete)


def restore(args, model, optimizer, state, ema):
    """Load the newest checkpoint of --out, if there is one, into model, optimizer, `ema` and
    `state`. It may come from any number of ranks and any --parallel.

    Raises UserError where a file of it is damaged, before anything is changed."""
    folder, complete = on_rank_0(lambda: next(
        ((path, read_json(path / "complete.json")) for path in checkpoints(args.out)), (None, {})))
    if not folder:
        return
    crcs = complete.get("crc", {})
    mine = sorted(crcs)[get_rank()::get_world_size()]
    damaged = [name for name in mine
               if not (folder / name).is_file() or file_crc(folder / name) != crcs[name]]
    damaged = sum(all_gather_objects(damaged), [] if crcs else ["complete.json"])
    if damaged:
        raise UserError(f"{folder} is damaged ({', '.join(damaged)}): delete this folder, and the "
                        "same command resumes from the checkpoint before it")
    # The optimizer's settings are this command's, which may differ with --allow-changed.
    groups = [{key: value for key, value in group.items() if key != "params"}
              for group in optimizer.param_groups]
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, "ema": ema}
    dcp.load(content, checkpoint_id=folder, process_group=gloo_group)
    set_state_dict(model, optimizer, model_state_dict=content["model"],
                   optim_state_dict=content["optimizer"])
    for group, values in zip(optimizer.param_groups, groups):
        group.update(values)
    saved = complete["state"]
    if saved["fp16"] != state["fp16"]:          # another --precision: begin with its loss scale
        saved |= {name: state[name] for name in ("fp16", "loss_scale", "steps_without_overflow")}
    state |= saved
    rank0_print(f"resuming from {folder}")


def report(args, metrics):
    """Write OUT/metrics.json and print it as the last line of stdout."""
    if environment().rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        text = json.dumps(metrics)
        write_aside(Path(args.out) / "metrics.json", lambda path: path.write_text(text + "\n"))
        print(text, flush=True)


def list_bad(args, bad, name, mode):
    """Write the images that could not be read on any rank, [(position, where, why)], to the file
    OUT/name, one per line; mode "a" appends, "w" overwrites. Returns the list of all ranks."""
    bad = sorted(sum(all_gather_objects(bad), []))
    path = Path(args.out) / name
    if environment().rank == 0 and (bad or path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{position}\t{where}\t{why}\n" for position, where, why in bad)
    return bad


# --------------------------------------------------------------------------------------
# Run: what surrounds every training step
# --------------------------------------------------------------------------------------

NEXT_STAGE = {"mae": "torchrun wsp.py", "wsp": "torchrun finetune.py classify"}


class Run:
    """What surrounds the training steps of every stage:

        run = vit.Run(args, model, wrapped, optimizer, device, schedule, model_info, flops)
        batches = …                                         # from run.state["step"] on
        for _ in run.steps(draw_and_evaluate):              # until the end, or a request to stop
            for batch in run.micro_batches(batches):
                …                                           # batch to loss
                run.backward(loss)
            run.update()

    A new Run resumes from the newest checkpoint of --out. `model_info` is what model.pt says of
    itself, `flops` the operations of training on one image. `ema` {name: tensor} are averaged
    weights; `state` are further values that a checkpoint has to keep; `constants` are added
    to every training record of the log."""

    def __init__(self, args, model, wrapped, optimizer, device, schedule, model_info, flops,
                 ema=None, state=None, constants=None):
        self.args, self.model, self.wrapped, self.device = args, model, wrapped, device
        self.optimizer, self.schedule, self.model_info = optimizer, schedule, model_info
        self.ema, self.constants, self.rank = ema or {}, constants or {}, get_rank()
        fp16 = autocast_dtype(args, device) == torch.float16
        self.state = {"step": 0, "bad_samples": 0, "skipped": 0, "skipped_in_a_row": 0,
                      "fp16": fp16, "loss_scale": 65536.0 if fp16 else 1.0,
                      "steps_without_overflow": 0, **(state or {})}
        restore(args, model, optimizer, self.state, self.ema)
        self.bad, self.bad_listed = [], self.state["bad_samples"]
        self.eval_every = max(1, schedule.steps // 10) if args.eval_every is None \
            else args.eval_every
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((PEAK_FLOPS[name] for name in PEAK_FLOPS if name in gpu), None)
        # images per second at the hardware's peak, for mfu; None where the peak is not known
        self.peak_speed = peak and peak * get_world_size() / flops
        self.log = Path(args.out) / "log.jsonl"
        if self.rank == 0:      # what came after the checkpoint will be done, and logged, again
            step = self.state["step"]
            kept = [record for record in self.records() if record["step"] < step
                    or record["step"] == step and "loss" in record]
            write_aside(self.log, lambda path: path.write_text(
                "".join(json.dumps(record) + "\n" for record in kept)))
            listed = Path(args.out) / "bad_samples.txt"
            if listed.exists():
                lines = [line for line in listed.read_bytes().splitlines(True)
                         # a file's name may have a second line
                         if int(re.match(rb"\d*", line)[0] or 0) < step * args.batch]
                write_aside(listed, lambda path: path.write_bytes(b"".join(lines)))
        self.bar = tqdm(total=schedule.steps, initial=self.state["step"], unit="step",
                        dynamic_ncols=True, disable=self.rank > 0 or not sys.stderr.isatty())
        self.saved_at, self.stop, self.best_speed = time.monotonic(), False, 0.0
        self.restart_clock()

    # ---- the loop

    def steps(self, evaluate, final_lr=0.0):
        """Yield once per step that is left; the caller runs its micro-batches and update().

        evaluate() draws pictures and returns metrics; it is called every --eval-every steps and at
        the end. A checkpoint is written every --save-every minutes, on a signal, at the end and
        before each evaluation, so that an interrupted evaluation costs no step."""
        args, state, schedule = self.args, self.state, self.schedule
        while state["step"] < schedule.steps:
            if self.evaluation_due() and state["step"]:
                self.log_evaluation(evaluate())
            self.lr = learning_rate(state["step"], schedule.steps, schedule.lr,
                                    args.warmup * schedule.steps, final_lr)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group["lr_scale"]
            yield
            done = state["step"] == schedule.steps
            model_due = done or self.stop or self.evaluation_due()
            # While steps are skipped the weights may be what makes gradients infinite.
            if done or (model_due or self.save_due) and not state["skipped_in_a_row"]:
                if model_due:
                    self.write_model()
                save(args, self.model, self.optimizer, state, self.ema)
                self.saved_at = time.monotonic()
                self.restart_clock()
            if self.stop and not done:
                return rank0_print(f"stopped after step {state['step']} of {schedule.steps}; the "
                                   "same command resumes the run")
        metrics = evaluate()
        self.log_evaluation(metrics)
        if state["bad_samples"]:
            rank0_print(f"{state['bad_samples']} images could not be read, and were replaced: see "
                        f"{args.out}/bad_samples.txt")
        self.bar.close()
        following = NEXT_STAGE.get(self.model_info["stage"])
        rank0_print(f"model.pt, log.jsonl and pictures are in {args.out}"
                    + (f"; next: {following} --init {args.out}/model.pt" if following else ""))
        report(args, {**metrics, "samples": state["step"] * args.batch})
        if self.rank == 0:
            (Path(args.out) / "finished").touch()

    def micro_batches(self, batches):
        """Yield the micro-batches of a step, with tensors on the device."""
        self.loss, self.bad_positions = torch.zeros((), device=self.device), 0
        for i in range(self.schedule.accumulate):
            begun = time.perf_counter()
            self.first_wait = self.first_wait or begun
            batch = next(batches)
            self.waited += time.perf_counter() - begun
            self.bad += batch["bad"]
            self.bad_positions += len({position for position, _, _ in batch["bad"]})
            with accumulating(self.wrapped, last=i == self.schedule.accumulate - 1):
                yield {name: value.to(self.device, non_blocking=True)
                       for name, value in batch.items() if torch.is_tensor(value)}

    def backward(self, loss):
        """Compute the gradients of a micro-batch's mean loss and add them up."""
        loss = loss / self.schedule.accumulate
        (loss * self.state["loss_scale"]).backward()
        self.loss += loss.detach()

    def update(self, counts=None):
        """Make an optimizer step, or skip it if the gradient of any rank is not finite; log it.

        One all-reduce sums everything that a rank knows alone (its loss, a signal, a bad image,
        rank 0's clock), so that all ranks decide alike. A fused optimizer is told on the device to
        skip (found_inf), so that the host need not wait before its step. SGD cannot be told so when
        parameters are sharded: the host waits first.
        `counts` {name: scalar tensor} are summed over ranks and added to the state."""
        state, world_size, counts = self.state, get_world_size(), counts or {}
        norm = clip_gradients(self.model, self.args.clip_grad, state["loss_scale"])
        minutes = (time.monotonic() - self.saved_at) / 60
        on_device = torch.stack([self.loss / world_size, norm / world_size, *counts.values()])
        on_host = torch.tensor([len(stop_signals), self.bad_positions,
                                self.rank == 0 and minutes >= self.args.save_every])
        sums = torch.cat([on_device.float(), on_host.to(self.device, non_blocking=True).float()])
        all_reduce_sum(sums)
        finite, fused = sums[1].isfinite(), self.optimizer.defaults["fused"]
        if fused:
            self.optimizer.found_inf = 1 - finite.float()
        if fused or finite:                                             # SGD waits here
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, norm, *counted, stop, bad, save_due = sums.tolist()       # waits for the device
        self.stop, self.save_due = stop > 0, save_due > 0
        finite = math.isfinite(norm)
        if finite and self.ema:
            update_ema(self.ema, self.model, self.args.ema, state["step"])
        state["step"] += 1
        self.note_finite(finite)
        state["bad_samples"] += int(bad)
        self.note_bad()
        for name, value in zip(counts, counted):
            state[name] += int(value)
        self.log_step({"loss": loss, **self.constants, "lr": self.lr, "grad_norm": norm,
                       "bad_samples": state["bad_samples"],
                       **{name: state[name] for name in counts}})

    def record_due(self):
        step = self.state["step"]
        return step % self.args.log_every == 0 or step == self.schedule.steps

    def evaluation_due(self):
        return self.eval_every > 0 and self.state["step"] % self.eval_every == 0

    def write_model(self, name="model.pt"):
        """Write all weights under the released names, averaged ones where there are any, and
        `model_info` to the file OUT/name."""
        with ema_weights(self.model, self.ema):
            content = {"model": whole_weights(self.model), **self.model_info,
                       "samples": self.state["step"] * self.args.batch}
            on_rank_0(lambda: write_aside(Path(self.args.out) / name,
                                          lambda path: torch.save(content, path)))

    # ---- faults

    def note_finite(self, finite):
        """Keep account of steps whose gradient was not finite; all ranks have skipped them.

        In fp16 an overflow is no fault: the loss scale is halved, and doubled after 2,000 steps
        without one (the values of torch's GradScaler). Raises UserError after ten faults in a row:
        the run ends with its last good checkpoint."""
        state = self.state
        overflow = state["fp16"] and not finite and state["loss_scale"] > 1
        if state["fp16"] and not finite:
            state["loss_scale"] = max(state["loss_scale"] / 2, 1.0)
            state["steps_without_overflow"] = 0
        elif state["fp16"]:
            state["steps_without_overflow"] = (state["steps_without_overflow"] + 1) % 2000
            state["loss_scale"] *= 1 if state["steps_without_overflow"] else 2
        if finite or overflow:
            state["skipped_in_a_row"] = 0
            return
        state["skipped"] += 1
        state["skipped_in_a_row"] += 1
        last = state["step"] * self.args.batch
        rank0_print(f"step {state['step']} skipped: its gradient is not finite; positions "
                    f"{last - self.args.batch} to {last - 1}")
        if state["skipped_in_a_row"] == 10:
            raise UserError("ten steps in a row had gradients that are not finite; the checkpoints "
                            "are from before the first: try a lower --lr, --clip-grad 1 or "
                            "--precision fp32")

    def note_bad(self):
        """List the images that could not be read in bad_samples.txt, where a record is due or the
        run may stop: between ranks, such a list takes longer than a small model's step.

        Raises UserError when more than --max-bad of the images seen were bad (of 1,000 or an epoch,
        where fewer have been seen)."""
        args, state, step = self.args, self.state, self.state["step"]
        count, seen = state["bad_samples"], step * args.batch
        many = count > args.max_bad * max(seen, min(1000, self.schedule.images))
        if count == self.bad_listed or not (many or self.stop or self.save_due or self.record_due()
                                            or self.evaluation_due()):
            return
        bad, self.bad, self.bad_listed = list_bad(args, self.bad, "bad_samples.txt", "a"), [], count
        if many:
            raise UserError(f"{count} of {seen} images cannot be read, more than --max-bad "
                            f"{args.max_bad}; see {args.out}/bad_samples.txt; the last: "
                            f"{bad[-1][1]}: {bad[-1][2]}")

    # ---- log

    def restart_clock(self):
        """Measure speed from the next batch on: saves and evaluations do not count."""
        self.timed_from, self.first_wait, self.waited = self.state["step"], None, 0.0

    def records(self):
        """The records of log.jsonl; a line torn by a crash is left out."""
        records = []
        for line in self.log.read_bytes().splitlines() if self.log.is_file() else ():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def write_record(self, values):
        """Append a record to log.jsonl; numbers that are not finite become null."""
        if self.rank == 0:
            step = self.state["step"]
            record = {"step": step, "samples": step * self.args.batch, **values}
            record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in record.items()}
            with open(self.log, "a") as file:
                file.write(json.dumps(record) + "\n")

    def log_step(self, values):
        """Every --log-every steps and at the last: write a record and show progress."""
        step, steps = self.state["step"], self.schedule.steps
        self.bar.update(1)
        if self.rank or not self.record_due():
            return
        seconds = time.perf_counter() - self.first_wait
        speed = (step - self.timed_from) * self.args.batch / seconds
        self.write_record({**values, "images_per_second": round(speed, 1),
                           "data_wait": round(self.waited / seconds, 4),
                           "mfu": self.peak_speed and round(speed / self.peak_speed, 4)})
        self.best_speed = max(self.best_speed, speed)
        if self.device.type == "cpu" and speed < self.best_speed / 4:
            rank0_print(f"NOTE: {speed:.0f} images/s, after {self.best_speed:.0f}: do others use "
                        "the CPU? Threads that wait for each other cost most of the time then; "
                        "with GOMP_SPINCOUNT=0 in the environment, less")
            self.best_speed = speed
        text = (f"loss {values['loss']:.4f}, {speed:.0f} images/s, "
                f"{100 * self.waited / seconds:.0f}% waiting for data")
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = (steps - step) * self.args.batch / speed / 60
            print(f"step {step}/{steps}: {text}, {left:.1f} min left", file=sys.stderr, flush=True)
        self.restart_clock()

    def log_evaluation(self, metrics):
        """Write the metrics of an evaluation and draw curves.png."""
        if metrics:
            values = {f"val_{name}": value for name, value in metrics.items()
                      if not isinstance(value, dict)}
            self.write_record(values)
            rank0_print(f"step {self.state['step']}: " + ", ".join(
                f"{name} {value:.4g}" for name, value in values.items()))
        if self.rank == 0:
            draw_curves(self.records(), self.log.with_name("curves.png"))
        self.restart_clock()


def draw_curves(records, path):
    """Draw the log over the number of images seen, a panel per quantity: training in blue,
    validation in red, and in grey and orange the losses of a constant prediction for the two."""
    width, height, left, top = 480, 300, 70, 40
    hidden = {"val_loss", "val_best", "val_count", "val_bad", "val_entropy", "val_captions"}
    metrics = [name[4:] for name in dict.fromkeys(itertools.chain(*records))
               if name.startswith("val_") and name not in hidden]
    fields = ["loss", *metrics, "lr", "grad_norm", "images_per_second"]
    sheet = Image.new("RGB", (2 * width, (len(fields) + 1) // 2 * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, field in enumerate(fields):
        x0, y0 = i % 2 * width + left, i // 2 * height + top
        x1, y1 = x0 + width - left - 20, y0 + height - top - 40
        draw.rectangle((x0, y0, x1, y1), outline="#999999")
        draw.text((x0, y0 - 32), field.replace("_", " "), "black", font_size=14)
        series = [("training", field, "#1f5fb4"), ("validation", f"val_{field}", "#c03028")]
        if field == "loss":
            series += [("constant, training", "entropy", "#909090"),
                       ("constant, validation", "val_entropy", "#e09020")]
        lines = [(label, colour, [(record["samples"], record[name]) for record in records
                                  if record.get(name) is not None])
                 for label, name, colour in series]
        points = [point for _, _, line in lines for point in line]
        if not points:
            continue
        right, ys = max(x for x, _ in points), sorted(y for _, y in points)
        # The first values, before anything is learned, would hide the rest: they may be cut off.
        low, high = ys[0], ys[-1] if len(ys) < 20 else ys[int(0.98 * len(ys))]
        high = high if high > low else low + (abs(low) or 1)
        for n, (label, colour, line) in enumerate(lines):
            places = [(x0 + (x1 - x0) * x / right,
                       y1 - (y1 - y0) * min(1, (y - low) / (high - low))) for x, y in line]
            draw.text((x0 + 110 * n, y0 - 14), label if line else "", colour)
            draw.line(places, colour, 2)
            for x, y in places if len(places) < 30 else ():
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        for k in range(5):
            y, x = y1 + (y0 - y1) * k / 4, x0 + (x1 - x0) * k / 4
            draw.line((x0 - 4, y, x0, y), "#999999")
            draw.line((x, y1, x, y1 + 4), "#999999")
            draw.text((x0 - 6, y), f"{low + (high - low) * k / 4:.3g}", "black", anchor="rm")
            draw.text((x, y1 + 12), f"{right * k / 4:,.0f}", "black", anchor="mm")
        draw.text(((x0 + x1) / 2, y1 + 26), "images seen", "black", anchor="mm")
    write_aside(path, lambda aside: sheet.save(aside, "PNG"))


# --------------------------------------------------------------------------------------
# --plan
# --------------------------------------------------------------------------------------

def forward_flops(stacks):
    """Floating-point operations of one image's forward pass, two per multiply-add.

    `stacks` of blocks are (depth L, width D, tokens N) each. Per token a block multiplies by
    12 D^2 weights (qkv 3, projection 1, MLP 8) and by 2 N D numbers in attention."""
    return sum(2 * L * N * (12 * D ** 2 + 2 * N * D) for L, D, N in stacks)


def training_flops(stacks):
    """Operations of forward and backward: the backward pass costs two forwards."""
    return 3 * forward_flops(stacks)


def activation_bytes(stacks, number_bytes, recompute):
    """Bytes that the forward pass of one image keeps for the backward pass.

    Per token a block keeps the residual stream before each of its two branches, in fp32 (2 D
    numbers of 4 bytes), and 14 D numbers of `number_bytes`: two normalised inputs (2), query, key
    and value (3), the result of attention (1), the MLP before and after the GELU (8). With
    `recompute` only the input of each block is kept; while one block is computed again, its
    activations and about half as much for their gradients are needed too."""
    per_block = [N * D * (8 + 14 * number_bytes) for _, D, N in stacks]
    if recompute:
        return sum(4 * L * N * D for L, D, N in stacks) + 1.5 * max(per_block)
    return sum(L * size for (L, _, _), size in zip(stacks, per_block))


def choose_micro_batch(args, stacks, memory):
    """The number of images whose activations fill half of the memory, at most 256 (ours)."""
    number_bytes = 4 if args.precision == "fp32" else 2
    image = activation_bytes(stacks, number_bytes, args.activation_checkpoint)
    return max(1, min(256, int(memory / 2 / image)))


# Of an H100; the share of its peak that a run reaches is a guess (ours).
GPU_MEMORY, MFU = 80e9, 0.4


def plan(args, make, stacks, flops=None):
    """--plan: print memory and time of a run on args.plan H100s, in nodes of 8, by formulas: as a
    table and as one line of JSON. Opens no data and uses no device.

    Weights and Adam's two moments take 12 bytes per parameter and gradients 4, divided among the
    ranks that shard. Gradients that are accumulated are whole on every rank and exist beside all
    activations; otherwise they appear as activations are freed. "copies" are weights in half
    precision, where they are sharded also the whole gradient of a block in transfer. `flops` per
    image are given where they are not three forwards."""
    with torch.device("meta"):
        model = make()
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    largest_block = max(sum(p.numel() for p in block.parameters()) for block in blocks_of(model))
    number_bytes = 4 if args.precision == "fp32" else 2
    per_rank = max(1, args.batch // args.plan)
    micro = min(args.micro_batch or choose_micro_batch(args, stacks, GPU_MEMORY), per_rank)
    rows = []
    for mode, shards in (("ddp", 1), ("hsdp", min(8, args.plan)), ("fsdp", args.plan)):
        states = (4 * count + 8 * trained) / shards
        gradients = 4 * trained / (shards if micro == per_rank else 1)
        copies = (2 * count * (number_bytes == 2) if mode == "ddp"
                  else number_bytes * count + 2 * 4 * largest_block)
        for recompute in (False, True):
            image = activation_bytes(stacks, number_bytes, recompute)
            combine = max if micro == per_rank else sum
            total = states + copies + combine([gradients, micro * image])
            free = GPU_MEMORY - states - copies - gradients * (micro < per_rank)
            sizes = {"states": states, "gradients": gradients, "copies": copies,
                     "activations": micro * image, "total": total}
            rows.append({"parallel": mode, "recompute": recompute,
                         **{name: round(size / 1e9, 3) for name, size in sizes.items()},
                         "largest": max(0, int(free / image))})
    flops = flops or training_flops(stacks)
    flops += forward_flops(stacks) * args.activation_checkpoint
    seconds = args.batch * flops / (args.plan * MFU * PEAK_FLOPS["H100"])
    million = seconds / args.batch * 1e6 / 3600
    samples = args.samples or (args.steps or 0) * args.batch
    rank0_print(f"{count / 1e6:,.1f}M parameters, {flops / 1e9:.4g} GFLOP per image; {args.plan} x "
                f"H100 at {100 * MFU:g}% of the peak: {seconds:.3g} s per step of {args.batch} "
                f"images, {million:.3g} h per million images"
                + (f", {million * samples / 1e6:.3g} h for the run" if samples else ""))
    rank0_print(f"GB per GPU with micro-batches of {micro}; total is what exists at one time, "
                f"largest the largest micro-batch in {GPU_MEMORY / 1e9:g} GB:")
    for row in (rows[0].keys(), *(row.values() for row in rows)):
        rank0_print("".join(f"{str(value):>12}" for value in row))
    if not any(row["largest"] for row in rows):
        rank0_print(f"this model does not fit on {args.plan} such GPUs: give --plan more of them")
    rank0_print(json.dumps({"parameters": count, "flops_per_image": flops, "micro_batch": micro,
                            "seconds_per_step": seconds, "hours_per_million_images": million,
                            "memory_gb": rows}))


# ======================================================================================
# Part 3: weights from files: ours, MAE, MAWS, timm, Hugging Face ViT and ViTMAE
# ======================================================================================

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Read a .safetensors file: {name: tensor}, mapped into memory.

    The format: 8 bytes with the length of the header, a JSON header, the bytes of the tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    content = torch.from_file(str(path), shared=False, size=os.path.getsize(path),
                              dtype=torch.uint8)[start:]
    # Cloned, since a tensor may begin at any byte. Offsets that do not fit a shape raise an error.
    return {name: content[slice(*entry["data_offsets"])].clone()
            .view(SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


# Where files keep their weights. Averaged ones and the teacher of self-distillation come first.
WEIGHTS_IN = ("state_dict_ema", "model_ema", "teacher", "model", "state_dict", "model_state",
              "module", "student")


def read_weights(path):
    """Read a weights file without running code from it: ({name in the file: tensor}, file_info).

    Takes .pt .pth .bin (torch.load with weights_only) and .safetensors. `file_info` is everything
    else in the file. Raises UserError."""
    path, file_info = Path(path), {}
    if not path.is_file():
        raise UserError(f"no weights file {path}; give the path of a .pt .pth .bin or .safetensors")
    try:
        if path.suffix == ".safetensors":
            content = read_safetensors(path)
        else:
            # MAE's files contain their argparse.Namespace. It is allowed: it holds plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True,
                                     mmap=zipfile.is_zipfile(path))
    except Exception as error:          # the errors of torch.load have no common class
        reason = str(error).strip().split("\n")[0][:200]
        if forbidden := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            reason = f"it holds a {forbidden[1]}, which could run code; save its weights alone"
        elif "Weights only load failed" in reason:
            reason = "it is no file of torch.save"
        raise UserError(f"{path} cannot be read as weights ({reason}); "
                        "is it complete, and a .pt .pth .bin or .safetensors?") from error
    while isinstance(content, dict) and (inside := [
            key for key in WEIGHTS_IN if isinstance(content.get(key), dict)]):
        file_info |= {key: value for key, value in content.items() if key not in inside}
        if len(inside) > 1:
            file_info["chosen"] = f" ({inside[0]}; it also has {', '.join(inside[1:])})"
        content = content[inside[0]]
    tensors = {str(name): value for name, value in content.items() if torch.is_tensor(value)} \
        if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors; give a file of model weights")
    config = file_info.get("config")
    if not isinstance(config, dict) or not Config.__dataclass_fields__.keys() <= config.keys():
        file_info.pop("config", None)           # not one of ours
    return tensors, file_info


def config_in(file_info):
    """The Config that one of our files contains."""
    return Config(**{name: file_info["config"][name] for name in Config.__dataclass_fields__})


# Regular expressions, applied in this order: Hugging Face's ViT and ViTMAE (names of transformers 4
# and 5) and wrappers of other projects
RENAMES = (
    (r"_orig_mod\.|_checkpoint_wrapped_module\.", ""),
    (r"^((module|model|vision_encoder|vision_model|vit|encoder|trunk|backbone)\.)+", ""),
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
    (r"^classifier\.", "head."))


def our_names(tensors, renames=RENAMES):
    """The tensors of a file under the names of ViT and MAE, with query, key and value joined."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for query in [name for name in renamed if ".attn.q." in name]:
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[query.replace(".attn.q.", ".attn.qkv.")] = joined
    return renamed


def grid_in_file(pos_embed, file_info):
    """The grid (rows, columns) of a file's pos_embed [1,1+N,D]: from its config, else a square."""
    if "config" in file_info:
        return config_in(file_info).grid
    patches = pos_embed.shape[1] - 1
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise UserError(f"the file's positions {list(pos_embed.shape)} are not a class token and a "
                        "square grid, and the file does not say which grid they are")
    return side, side


def find_heads(path, width, depth, sizes):
    """The number of heads of a weights file of another project, which does not say it itself: from
    a config.json beside it, as Hugging Face has, or, with a NOTE, from the row of `sizes` {name:
    (width, depth, heads, …)}. Raises UserError where neither is there."""
    beside = read_json(Path(path).with_name("config.json"))
    if beside.get("hidden_size") == width and "num_attention_heads" in beside:
        return beside["num_attention_heads"]
    for name, row in sizes.items():
        if row[:2] == (width, depth):
            rank0_print(f"NOTE: {path} does not say its number of heads; {row[2]} is taken, as "
                        f"{name} has; with a wrong number results are wrong: see --heads")
            return row[2]
    raise UserError(f"{path} has width {width} and depth {depth}, which none of {', '.join(sizes)} "
                    "has, so its number of heads is unknown: give it as --heads")


def config_from(path, heads=None):
    """The Config of a weights file, and its file_info with "shapes" {name: shape} added. `heads` is
    for files that do not say it.

    Raises UserError where it is not a Vision Transformer as SIZES has."""
    tensors, file_info = read_weights(path)
    tensors = our_names(tensors)
    file_info["shapes"] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "config" in file_info:
        return config_in(file_info), file_info
    try:
        width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        rows, columns = grid_in_file(tensors["pos_embed"], file_info)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no Vision Transformer that is known here ({error}); it has "
                        f"{', '.join(list(tensors)[:3])}, …") from error
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads = heads or find_heads(path, width, depth, SIZES)
    return Config(width, depth, heads, patch, (rows * patch, columns * patch), channels), file_info


# Tensors that a file may contain and a model need not use: heads, decoders and text towers
OPTIONAL = ("cls_token", "decoder_*", "mask_token", "embeddings.mask_token", "head.*", "norm.*",
            "fc_norm.*", "pooler.*", "text_encoder.*", "text_projection", "vision_projection",
            "logit_scale")


def matches(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


def summary(names, others):
    """Names of tensors as short patterns, each once: the first part of a name where all tensors
    that begin so are meant; else the name with * for numbers. `others` are not meant."""
    mixed = {name.split(".")[0] for name in others}
    patterns = []
    for name in names:
        first = name.split(".")[0]
        if first in mixed:
            patterns.append(re.sub(r"\.\d+", ".*", name))
        else:
            patterns.append(name if name == first else f"{first}.*")
    return ", ".join(dict.fromkeys(patterns)) or "none"


@torch.no_grad()
def load_weights(model, path, new=(), renew=(), log=rank0_print, rename=our_names):
    """Fill a model from a file of any of these projects, and print in one line what was done.

    `new` are patterns of tensors that the file may lack ("decoder_*"); they keep their values. So
    do those of `renew`, even if the file has them. `rename` gives the file's tensors the model's
    names. Position embeddings are resized to the model's grid. Where the model's patches are of
    several frames, an image kernel is inflated: each frame gets an equal share of it, so that a
    still clip has the tokens of its image.
    Returns {"loaded", "new", "unused"}: lists of names.
    Raises UserError, before anything is changed, where a tensor outside of `new` is missing or has
    another shape, or where the file has more layers than the model: weights that match nothing, or
    half of a network, must never count as loaded."""
    tensors, file_info = read_weights(path)
    tensors = rename(tensors)
    targets = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    values = {name: tensors[name] for name in targets
              if name in tensors and not matches(name, renew)}
    inflated = ""
    for name, value in values.items():
        if name.endswith("pos_embed") and value.shape[2:] == targets[name].shape[2:]:
            values[name] = resize_pos_embed(value, grid_in_file(value, file_info),
                                            model.config.grid)
        if value.dim() == 4 and targets[name].dim() == 5:
            frames = targets[name].shape[2]
            values[name] = (value / frames)[:, :, None].expand(-1, -1, frames, -1, -1)
            inflated = f"; inflated over {frames} frames: {name}"
    fresh = [name for name in targets if name not in values]
    unused = [name for name in tensors if name not in values]
    missing = [name for name in fresh if not matches(name, (*new, *renew))]
    if "norm.weight" in missing and "fc_norm.weight" in tensors:
        raise UserError(f"{path} was finetuned on the mean of its patches (it has fc_norm, not "
                        "norm), so its class token cannot be used: classify, features, knn and "
                        "linear take it with --pool mean; else give the file that it was finetuned "
                        "from")
    wrong = [f"{name} {list(value.shape)} instead of {list(targets[name].shape)}"
             for name, value in values.items() if value.shape != targets[name].shape]
    unknown = [name for name in unused if name not in targets and not matches(name, OPTIONAL)]
    problems = [f"{what}: {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                for what, names in (("missing", missing), ("other shapes", wrong),
                                    ("unknown tensors in the file", unknown)) if names]
    if problems:
        raise UserError(f"{path} does not fit this model; {'; '.join(problems)}")
    for name, value in values.items():
        copy_into(targets[name], value)
    filled = sum(targets[name].numel() for name in values)
    total = sum(target.numel() for target in targets.values())
    log(f"loaded {len(values)} of {len(targets)} tensors ({100 * filled / total:.1f}% of "
        f"parameters) from {path}{file_info.get('chosen', '')}; new: {summary(fresh, values)}; "
        f"unused: {summary(unused, values)}{inflated}")
    return {"loaded": list(values), "new": fresh, "unused": unused}
