"""Images: where they come from, in what order, how they are decoded and augmented.

A position p = 0, 1, 2, … counts the images of a run over all its epochs. Two pure functions of it
are the heart of this file: `Order` says which sample stands at p, `uniform` gives all its random
numbers. So neither the number of ranks and workers nor an interruption changes what is trained on,
and no generator state is kept anywhere.

    python data.py info SPEC…                     what is there: samples, classes, tags, sizes
    python data.py verify SPEC…                   decode everything, list what is bad
    python data.py pack SPEC… OUT                 write tar shards of 10,000 samples
    python data.py bench SPEC… --image-size 224   images a second, beside the obvious pipeline
    python data.py world --out world.png          look at the built-in world

A SPEC is one of
    world, world:COUNT, world-val, …              the built-in world: drawn, not downloaded
    photos/                                       a folder: every image below it; the class is the
                                                  first folder level. If it holds only tars: those
    x.tar  'x-{000..127}.tar'  'dir/*.tar'        shards in WebDataset's layout: 7.jpg with 7.json
                                                  (label, tags, caption), 7.cls, 7.txt (caption)
    x.jsonl  x.csv                                a manifest: image (a path), label, tags, caption
"""

import argparse
import contextlib
import csv
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import tarfile
import tempfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from array import array
from bisect import bisect
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vit import (
    RankError, UserError, all_gather_objects, all_reduce_sum, autocast, cpu_cores, environment,
    gather_objects, get_rank, get_world_size, list_bad, on_rank_0, positive, rank0_print, read_json,
    run, write_aside)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ======================================================================================
# Order and randomness: pure functions of the position
# ======================================================================================

def signed(number):
    """A 64-bit constant as the int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


# The constants of splitmix64 (Steele, Lea, Flood 2014)
MIX_A, MIX_B, GOLDEN = (signed(number) for number in (
    0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def mix(x):
    """splitmix64's finalizer, elementwise on int64: a bijection; every bit depends on all bits."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed, position, stream, n):
    """Random numbers in [0, 1), float32 [..., n], for int64 positions [...]: a pure function.

    `position` is a numpy array or a tensor on any device, with equal results; `stream` is a word
    that names the use ("crop", "mask"), so that uses do not share numbers."""
    key = zlib.crc32(f"{seed}/{stream}".encode())
    count = torch.arange(n, device=position.device) if torch.is_tensor(position) else np.arange(n)
    bits = (mix(mix(mix(position) + key)[..., None] + count * GOLDEN) >> 40) & 0xFFFFFF
    return (bits if torch.is_tensor(bits) else bits.astype(np.float32)) * 2.0 ** -24


def permute(index, size, key):
    """A pseudorandom permutation of 0 … size-1, evaluated at int64 `index` [n]; no table.

    A Feistel network permutes the next power of 4; what lands outside 0 … size-1 is sent through
    again until it lands inside (cycle walking; under four rounds on average). `key` broadcasts."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    result, todo = np.array(index, dtype=np.int64), np.arange(len(index))
    key = np.broadcast_to(np.asarray(key, dtype=np.int64), result.shape)
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for i in range(6):
            left, right = right, left ^ (mix(mix(right + (i << 40)) ^ key[todo]) >> 20) & mask
        result[todo] = left << half | right
        todo = todo[result[todo] >= size]
    return result


class Order:
    """Which sample, 0 … n-1, stands at a position of a run: a pure function.

    `chunks` are the numbers of samples that stand together on disk: the shards. Every epoch is a
    permutation of its own of all samples: the chunks are permuted and dealt to windows of about a
    million samples and at least 64 chunks, and the samples of each window are permuted. So reading
    stays near, and nothing longer than the list of chunks is ever in memory. What fits into one
    window is in an order that does not depend on how it is cut into chunks."""

    def __init__(self, chunks, seed):
        self.chunks, self.key = np.asarray(chunks, np.int64), zlib.crc32(f"{seed}/order".encode())
        self.starts, self.total = np.cumsum(self.chunks) - self.chunks, int(np.sum(chunks))
        self.windows = max(1, min(self.total >> 20, len(self.chunks) // 64))
        self.epochs = OrderedDict()

    def epoch(self, number):
        """(chunks, where the samples of each end, where each window begins) of an epoch."""
        if number not in self.epochs:
            count = len(self.chunks)
            key = mix(mix(np.array([number])) + ~self.key)
            chunks = permute(np.arange(count), count, key)
            bounds = np.arange(self.windows + 1) * count // self.windows
            window = np.searchsorted(bounds, np.arange(count), "right")
            chunks = chunks[np.lexsort((chunks, window))]
            ends = np.cumsum(self.chunks[chunks])
            self.epochs[number] = chunks, ends, np.append(0, ends)[bounds]
            if len(self.epochs) > 12:       # of a batch, and of what replaces bad samples
                self.epochs.popitem(last=False)
        return self.epochs[number]

    def __call__(self, positions):
        """The samples at int64 `positions` [n]: int64 [n]."""
        epochs, place = np.divmod(positions, self.total)
        samples = np.empty_like(place)
        for number in np.unique(epochs).tolist():
            chunks, ends, starts = self.epoch(number)
            window = np.searchsorted(starts, place, "right") - 1
            for w in np.unique(window[epochs == number]).tolist():
                rows = np.flatnonzero((epochs == number) & (window == w))
                key = mix(mix(np.array([number])) + self.key + w)
                at = starts[w] + permute(place[rows] - starts[w], int(starts[w + 1] - starts[w]),
                                         key)
                which = np.searchsorted(ends, at, "right")
                chunk = chunks[which]
                samples[rows] = self.starts[chunk] + at - (ends[which] - self.chunks[chunk])
        return samples


# ======================================================================================
# The built-in world: pictures of one large patterned shape, made from a number
#
# scene() says what is in picture i, draw() paints it at any size and crop, so that every stage runs
# without a download. Lengths are fractions of the image's side. All of it is ours.
# ======================================================================================

SPLITS = "train", "val", "test", "novel", "labelled"    # each has its own stream: no overlap
SHAPES = "disc", "square", "triangle", "star", "cross", "heart", "ring", "moon"
TEXTURES = "solid", "striped", "checked", "dotted", "halved", "framed"
COLOURS = "red", "yellow", "white", "pink", "blue", "green"     # common ones first, like the others
# An object wears one dark and one light colour, so that its pattern shows.
DARK = {"red": (176, 38, 40), "green": (28, 92, 48), "blue": (38, 62, 140)}
LIGHT = {"yellow": (236, 200, 84), "white": (238, 236, 228), "pink": (240, 164, 186)}
RGB = DARK | LIGHT
BACKGROUNDS = {"sand": (168, 144, 100), "grass": (96, 140, 84), "water": (84, 128, 164),
               "sky": (132, 156, 196), "brick": (164, 104, 88), "wood": (148, 112, 76)}

# A pair of shape and texture is a class. Each shape has one texture that it never wears in
# training, in tags or in captions: only a learner that takes pairs apart can name these.
PAIRS = {which: [(s, t) for s in range(len(SHAPES)) for t in range(len(TEXTURES))
                 if ((s + t) % 6 == 0) == (which == "novel")] for which in ("seen", "novel")}

TEMPLATES = ("a picture of a {texture} {shape}.", "a {texture} {shape}.", "{texture} {shape}",
             "a {texture} {shape} in the middle.", "there is a {texture} {shape} here.")
CAPTIONS = ("a {colour} {texture} {shape} on {background}", "a {texture} {shape}",
            "a {texture} {shape} on {background}", "a picture of a {colour} {texture} {shape}",
            "{texture} {shape} in {colour}", "a {colour} {shape}", "a {shape} on {background}",
            "there is a {texture} {shape} in front of {background}")

# How people write each word, the most common first; the word itself comes before these.
ALIASES = {
    "disc": "circle disk discs rond", "square": "squares carré box", "triangle": "triangles tri",
    "star": "stars étoile starr", "cross": "crosses plus croix", "heart": "hearts coeur haert",
    "ring": "rings donut anneau", "moon": "crescent lune moons", "solid": "plain onecolor uni",
    "striped": "stripes stripey rayé", "checked": "checks checkered plaid chequered",
    "dotted": "dots polkadots polkadot", "halved": "half twotone halfandhalf",
    "framed": "frame border outlined", "red": "rouge redcolor scarlet", "yellow": "jaune yelow",
    "blue": "bleu bluecolor navy", "white": "blanc whitecolor", "green": "vert greencolor",
    "pink": "rose pinkish", "sand": "beach sandy desert", "grass": "lawn meadow gras",
    "water": "sea waves ocean eau", "sky": "clouds ciel", "brick": "bricks wall brickwall",
    "wood": "wooden planks bois"}
CHATTER = ("love nofilter 2023 instagood photooftheday follow happy art weekend mood "
           "tbt nice cool beautiful fun picoftheday like4like new today random").split()
SPELLINGS = {word: [word, *aliases.split()] for word, aliases in ALIASES.items()}
SPELLINGS |= {TEXTURES[t] + SHAPES[s]: [TEXTURES[t] + SHAPES[s], SHAPES[s] + TEXTURES[t]]
              for s, t in PAIRS["seen"]}
SPELLINGS |= {word: [word] for word in CHATTER}
SYNONYMS = {name: word for word, names in SPELLINGS.items() for name in names}


def class_names(which="seen"):
    """The names of the 40 seen or the 8 novel classes, in the order of their labels."""
    return [f"{TEXTURES[t]} {SHAPES[s]}" for s, t in PAIRS[which]]


def shares(weights):
    """Where the share of each weight ends in [0, 1): bisect(shares(weights), u) picks one."""
    return (np.cumsum(weights) / np.sum(weights))[:-1].tolist()


def zipf(n):
    """n falling weights (k + 1)^-a, the first 4 times the last."""
    return [(k + 1) ** -math.log(4, n) for k in range(n)]


COMMON_PAIRS = shares([zipf(8)[s] * zipf(6)[t] for s, t in PAIRS["seen"]])
COMMON_COLOURS = shares(zipf(6))


def scene(i, split="train", difficulty=0.0, seed=0):
    """What is in picture i of a split, as a dict of plain values; difficulty in [0, 1]."""
    u = uniform(seed, np.array([i]), f"world-{split}", 104)[0].tolist()
    # Every number has its place, so that a new one moves none of the others.
    main, others, clutter, field, words = u[:8], u[8:32], u[32:62], u[62:76], u[76:]
    between = lambda easy, hard: easy + difficulty * (hard - easy)

    pairs = PAIRS["novel" if split == "novel" else "seen"]
    n = len(pairs)
    # Balanced splits go through all classes in a new order each round; 7 shares no factor with n.
    label = bisect(COMMON_PAIRS, main[0]) if split == "train" else (7 * i + 13 * (i // n)) % n
    radius = between(0.30, 0.20) + between(0.15, 0.16) * main[1]
    edge, turn = radius - 0.10, math.radians(between(20, 45))   # a tenth may stick out
    x, y = (edge + (1 - 2 * edge) * p for p in main[2:4])
    objects, strokes = [thing(pairs[label], x, y, radius, turn, main[4:])], []
    for k in range(int(between(2, 4) * field[0])):      # small ones round the rim, partly over it
        a, far, way, pair, *rest = others[8 * k:8 * k + 8]
        small, far, way = between(0.10, 0.07) + 0.04 * a, radius + 0.14 * far, 2 * math.pi * way
        px, py = x + far * math.cos(way), y + far * math.sin(way)
        px, py = (min(max(p, small), 1 - small) for p in (px, py))
        objects.append(thing(PAIRS["seen"][bisect(COMMON_PAIRS, pair)], px, py, small, turn, rest))
    for k in range(int(between(2, 7) * field[1])):
        px, py, length, hue, way = clutter[5 * k:5 * k + 5]
        strokes.append(thing((-1, 0), px, py, 0.1 + 0.15 * length, math.pi, [hue, 0, way, 0.5]))

    picture = dict(
        label=label, objects=objects, strokes=strokes,
        background=list(BACKGROUNDS)[int(6 * field[2])], contrast=between(0.4, 1.0),
        shift=field[3:5], zoom=0.8 + 0.4 * field[5],
        brightness=50 * field[6] - 16, light=[50 * p - 25 for p in field[7:9]],
        noise=between(4, 10), grain=[int(32 * p) for p in field[9:11]])
    picture["caption"] = caption(picture, field[11:])
    picture["tags"] = hashtags(concepts(picture), words)
    return picture


def thing(pair, x, y, radius, turn, u):
    """One object; u: 4 numbers for its two colours, its angle and its shade."""
    first = COLOURS[bisect(COMMON_COLOURS, u[0])]
    second = list(LIGHT if first in DARK else DARK)[int(3 * u[1])]
    return dict(shape=(*SHAPES, "stroke")[pair[0]], texture=TEXTURES[pair[1]],
                colours=(first, second), x=x, y=y, radius=radius,
                angle=turn * (2 * u[2] - 1), shade=30 * u[3] - 15)


def caption(picture, u):
    """A sentence of true words; some leave colour, texture or background out. u: 3 numbers."""
    main, *others = picture["objects"]
    true = main | {"colour": main["colours"][0], "background": picture["background"]}
    text = CAPTIONS[int(len(CAPTIONS) * u[0])].format(**true)
    if others and u[1] < 0.6:
        text += f", next to a small {others[0]['colours'][0]} {others[0]['shape']}"
    return text


def concepts(picture):
    """What one may say of a picture: (word, chance). Shape and texture come to mind first."""
    main, *others = picture["objects"]
    both = main["texture"] + main["shape"]
    return [(main["shape"], 0.75), (main["texture"], 0.6), (main["colours"][0], 0.25),
            (picture["background"], 0.25), (others[0]["shape"] if others else None, 0.3),
            (both if both in SPELLINGS else None, 0.12)]


def hashtags(said, u):
    """Concepts to tags as people write them: in part, misspelt, one in ten wrong. u: 28 numbers."""
    verbosity, tags = 0.4 + 1.2 * u[0], []
    for k, (word, chance) in enumerate(said):
        speak, wrong, other, spelling = u[4 + 4 * k:8 + 4 * k]
        if word and speak < chance * verbosity:
            if wrong < 0.1:
                word = list(ALIASES)[int(len(ALIASES) * other)]
            names = SPELLINGS[word]
            name = names[int(len(names) * spelling ** 2)]       # the square prefers the first
            tags.append(name.capitalize() if 0.4 < spelling < 0.5 else name)
    tags += [CHATTER[int(20 * p * p)] for p in u[2:2 + int(0.6 + 2.4 * u[1])]]
    return list(dict.fromkeys(tags))


# Tables, made at first use

SIZE = 512      # side of every table
REACH = 1.5     # an object's tables span [-1.5, 1.5] of its radius: a turned unit square fits in


def circle(radius=1.0, start=0.0, end=2 * math.pi, n=64):
    """n points [n, 2] on an arc round the origin."""
    angle = np.linspace(start, end, n, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def outlines():
    """Shape to the closed polygons that bound it, radius 1, y down; what lies in two is outside."""
    up, a, b = -math.pi / 2, 0.33, 0.92
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    heart = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) + 2
    # The moon goes along the unit circle from tip to tip and back along a smaller one.
    x, y, tip = math.cos(0.6) - 0.45, math.sin(0.6), 0.6
    back = circle(math.hypot(x, y), 2 * math.pi - math.atan2(y, x), math.atan2(y, x)) + [0.45, 0]
    return {"disc": [circle(0.88)], "ring": [circle(), circle(0.5)],
            "square": [circle(1, math.pi / 4, 9 * math.pi / 4, 4)],
            "triangle": [circle(1, up, up + 2 * math.pi, 3)],
            "star": [circle(1, up, up + 2 * math.pi, 10) * np.array([[1.0], [0.45]] * 5)],
            "cross": [[(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b),
                       (-a, a), (-b, a), (-b, -a), (-a, -a)]],
            "heart": [np.stack([16 * np.sin(t) ** 3, -heart], 1) / 17],
            "moon": [np.concatenate([circle(1, tip, 2 * math.pi - tip), back])],
            "stroke": [[(-1, -0.06), (1, -0.06), (1, 0.06), (-1, 0.06)]]}


@lru_cache(None)
def distance(shape):
    """Signed distance to a shape's outline in radii, below 0 inside: float32 [SIZE * SIZE]."""
    n = SIZE // 4       # worked out on a coarse grid: between its points it is nearly linear
    grid = ((np.arange(n) + 0.5) / n * 2 - 1) * REACH
    x, y = grid[None, :], grid[:, None]
    nearest, inside = np.full((n, n), np.inf), np.zeros((n, n), bool)
    for loop in outlines()[shape]:
        for (ax, ay), (bx, by) in zip(loop, np.roll(loop, -1, axis=0)):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(wx - t * ex, wy - t * ey))
            # A ray to the right changes sides at each edge it crosses.
            inside ^= ((ay > y) != (by > y)) & ((wx * ey < wy * ex) == (ey > 0))
    fine = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * REACH
    spread = np.stack([np.interp(fine, grid, row) for row in np.eye(n)], 1)     # [SIZE, n]
    signed = np.where(inside, -nearest, nearest)
    return (spread @ signed @ spread.T).astype(np.float32).ravel()


@lru_cache(None)
def patterns():
    """Texture to the signed distance to where its second colour begins: like distance()."""
    grid = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * REACH
    x, y = np.meshgrid(grid, grid)
    off = lambda p, period: (p / period % 1 - 0.5) * period     # from the nearest of a row of lines
    a, b = np.abs(off(x, 0.72)) - 0.18, np.abs(off(y, 0.72)) - 0.18
    tables = {"striped": np.abs(off(x, 0.46)) - 0.115, "halved": x,
              "checked": np.maximum(np.minimum(a, b), -np.maximum(a, b)),   # in one, not in both
              "dotted": np.hypot(off(x, 0.42), off(y, 0.42)) - 0.13}
    return {name: table.astype(np.float32).ravel() for name, table in tables.items()}


def fractal(name, slope, stretch=1.0):
    """Noise that repeats, its amplitude falling as frequency^-slope: [SIZE, SIZE], variance 1."""
    white = uniform(0, np.arange(SIZE * SIZE), f"world-{name}", 1).reshape(SIZE, SIZE) - 0.5
    down, along = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :]
    frequency = np.hypot(down * stretch, along / stretch)
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency ** slope)
    return noise / noise.std()


@lru_cache(None)
def backdrops(size):
    """Background to its lightness, about -2 to 2, which repeats: float32 [size, size]."""
    if size < SIZE:     # small pictures look up small tables, averaged, or fine grain would flicker
        return {name: table.reshape(size, 2, size, 2).mean((1, 3))
                for name, table in backdrops(2 * size).items()}
    x, y = np.meshgrid(np.arange(SIZE) / SIZE, np.arange(SIZE) / SIZE)
    sine = lambda turns: np.sin(2 * np.pi * turns)
    shifted = 5 * x + np.floor(10 * y) / 2      # every other row of bricks
    joint = (np.abs(10 * y % 1 - 0.5) > 0.41) | (np.abs(shifted % 1 - 0.5) > 0.455)
    tables = {"sand": fractal("sand", 0.8), "grass": fractal("grass", 1.2, 3),
              "water": sine(9 * y + 0.4 * sine(3 * x) + 0.3 * fractal("water", 2)),
              "sky": fractal("sky", 1.8, 1.5),
              "brick": 1.8 * joint - 0.6 + 0.5 * fractal("brick", 1),
              "wood": sine(6 * x + 0.6 * fractal("wood", 2, 0.5)) + 0.5 * fractal("fibre", 1, 0.2)}
    return {name: table.astype(np.float32) for name, table in tables.items()}


@lru_cache(None)
def grain(H, W):
    """Sensor noise, [3, H + 32, W + 32] in [-1, 1), of which a picture takes a part."""
    n = 3 * (H + 32) * (W + 32)
    return 2 * uniform(0, np.arange(n), "world-grain", 1).reshape(3, H + 32, W + 32) - 1


# From a scene to pixels

def layer(one, H, W, window):
    """Where an object falls: rows, columns, its cover and its second colour's, [h, w] in [0, 1]."""
    left, top, right, bottom = window
    across, down, r = W / (right - left), H / (bottom - top), one["radius"]     # pixels a unit
    x0, x1 = (min(max(int((one["x"] + e * r - left) * across + 0.5), 0), W) for e in (-1.05, 1.05))
    y0, y1 = (min(max(int((one["y"] + e * r - top) * down + 0.5), 0), H) for e in (-1.05, 1.05))
    # Pixel centres, turned into the object's own frame and counted in cells of its tables.
    cell, c, s = SIZE / (2 * REACH) / r, math.cos(one["angle"]), math.sin(one["angle"])
    x = ((np.arange(x0, x1, dtype=np.float32) + 0.5) / across + (left - one["x"])) * cell
    y = ((np.arange(y0, y1, dtype=np.float32) + 0.5) / down + (top - one["y"]))[:, None] * cell
    index = (c * y + (SIZE / 2 - s * x)).astype(np.int32) * SIZE
    index += (s * y + (SIZE / 2 + c * x)).astype(np.int32)
    # Distances in output pixels: an edge is one pixel wide, and too fine a pattern fades.
    signed, texture = distance(one["shape"]).take(index), one["texture"]
    soft = lambda d: np.minimum(np.maximum(0.5 - d * (min(across, down) * r), 0), 1)
    if texture == "solid":
        second = 0.0
    else:
        second = soft(-0.15 - signed if texture == "framed" else patterns()[texture].take(index))
    return slice(y0, y1), slice(x0, x1), soft(signed), second


def draw(picture, H, W, window=(0.0, 0.0, 1.0, 1.0)):
    """The part of a scene in a window (left, top, right, bottom; fractions): uint8 [H, W, 3]."""
    left, top, right, bottom = window
    x = left + (np.arange(W) + 0.5) * ((right - left) / W)
    y = top + (np.arange(H) + 0.5) * ((bottom - top) / H)
    # The table with about one cell a pixel.
    zoom, (dx, dy), contrast = picture["zoom"], picture["shift"], picture["contrast"]
    size = min(max(2 ** round(math.log2(W / (right - left) / zoom)), 16), SIZE)
    cells = backdrops(size)[picture["background"]]
    columns, rows = (((p * zoom + d) * size).astype(np.int32) % size for p, d in ((x, dx), (y, dy)))
    lightness = cells.take(rows, 0).take(columns, 1) * np.float32(30 * contrast)
    colour = BACKGROUNDS[picture["background"]]
    grey = sum(colour) / 3
    image = np.empty((3, H, W), np.float32)     # channels first: long inner loops
    for channel, value in zip(image, colour):
        np.add(lightness, grey + contrast * (value - grey) + picture["brightness"], out=channel)

    for one in picture["strokes"] + picture["objects"]:
        rows, columns, cover, second = layer(one, H, W, window)
        first, other = (RGB[name] for name in one["colours"])
        for channel, a, b in zip(image[:, rows, columns], first, other):
            channel += cover * (a + one["shade"] + second * (b - a) - channel)

    gx, gy = picture["light"]
    image += (gx * (x - 0.5) + gy * (y[:, None] - 0.5)).astype(np.float32)
    right, down = picture["grain"]
    image += picture["noise"] * grain(H, W)[:, down:down + H, right:right + W]
    pixels = np.empty((H, W, 3), np.uint8)
    pixels.transpose(2, 0, 1)[...] = np.minimum(np.maximum(image, 0), 255)
    return pixels


def boxes(picture, H, W):
    """What shows of each object, in pixels: [(SHAPES index, x0, y0, x1, y1, bool mask [H, W])]."""
    found, free = [], np.ones((H, W), np.float32)
    for one in reversed(picture["objects"]):        # from the top one down
        rows, columns, cover, _ = layer(one, H, W, (0.0, 0.0, 1.0, 1.0))
        seen = np.zeros((H, W), np.float32)
        seen[rows, columns] = cover * free[rows, columns]
        free[rows, columns] *= 1 - cover
        mask = seen > 0.5
        if seen.sum() > 0.2 * cover.sum() and mask.any():
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found.append((SHAPES.index(one["shape"]), int(xs[0]), int(ys[0]), int(xs[-1]) + 1,
                          int(ys[-1]) + 1, mask))
    return found[::-1]


def facts(n=4000):
    """Numbers by which to place a loss: what knowing nothing and what seeing all would score."""
    def entropy(tag_lists):     # of the mean target: 1/k on each of a picture's k tags
        mass = Counter()
        for tags in tag_lists:
            for tag in tags:
                mass[tag] += 1 / len(tags)
        total = sum(mass.values())
        return -sum(m / total * math.log(m / total) for m in mass.values())

    canonical = lambda tags: {SYNONYMS[tag.lower()] for tag in tags}
    pictures = [scene(i) for i in range(n)]
    tags = [canonical(picture["tags"]) for picture in pictures]
    # The lowest loss: the same picture tagged by many people.
    floor = []
    for picture in pictures[:n // 40]:
        people = uniform(0, np.arange(1000), f"world-people-{len(floor)}", 28).tolist()
        floor.append(entropy([canonical(hashtags(concepts(picture), u)) for u in people]))
    return {"canonical tags": len(set(SYNONYMS.values())), "spellings": len(SYNONYMS),
            "tags a picture": sum(map(len, tags)) / n, "untagged": sum(not t for t in tags) / n,
            "entropy of tags": entropy(tags), "lowest loss": sum(floor) / len(floor)}


# ======================================================================================
# Sources
#
# A source has a length, `classes` (the names of its labels), `chunks` (how many samples stand
# together on disk, in listing order: its shards), `mark` (a CRC of what it lists) and `left_out`
# (how often what was passed over in shards). about(i) is a
# dict with "where" and, as far as known, "label" and "tags"; open(i) adds "image": a path, an open
# file or a scene of the world, not decoded yet, and may raise what a damaged sample raises;
# caption(i) is its caption, or None; files() are the paths of the files that hold its images.
# ======================================================================================

def crc(*parts):
    """One CRC-32 of arrays, bytes and words."""
    value = 0
    for part in parts:
        value = zlib.crc32(part.encode() if isinstance(part, str) else part, value)
    return value


def even_chunks(count, size=1 << 14):
    """Chunks of a source that is not made of shards."""
    return np.diff(np.append(np.arange(0, count, size), count))


def pack_strings(strings):
    """Byte strings as one array of bytes and one of ends: forked workers share it, while a list of
    millions of Python objects is copied page by page as soon as it is read."""
    return (np.frombuffer(b"".join(strings), dtype=np.uint8),
            np.cumsum([len(string) for string in strings], dtype=np.int64))


def string_at(packed, i):
    """Byte string i of pack_strings."""
    content, ends = packed
    return content[ends[i - 1] if i else 0:ends[i]].tobytes()


def class_names_of(names):
    """Names in the order of their labels: sorted; whole numbers below 100,000 are their own."""
    if names and all(re.fullmatch("0|[1-9][0-9]{0,4}", name) for name in names):
        return [str(i) for i in range(1 + max(map(int, names)))]
    return sorted(names)


class World:
    """`count` scenes of one split of the built-in world."""

    def __init__(self, split, count):
        self.split, self.count, self.chunks = split, count, even_chunks(count)
        self.classes = class_names("novel" if split == "novel" else "seen")
        self.mark, self.left_out = crc(f"{split} {count}"), {}

    def __len__(self):
        return self.count

    def open(self, i):
        content = scene(i, self.split)
        return {"image": content, "where": f"world {self.split} {i}", "label": content["label"],
                "tags": content["tags"]}

    about = open

    def files(self):
        return iter(())

    def caption(self, i):
        return scene(i, self.split)["caption"]


class Folder:
    """Every image below a folder, sorted by path; the class is the first folder level."""

    def __init__(self, root, names, labels, classes):
        self.root, self.names, self.labels, self.classes = os.fsencode(root), names, labels, classes
        self.chunks, self.mark, self.left_out = even_chunks(len(labels)), crc(*names), {}

    def __len__(self):
        return len(self.labels)

    def about(self, i):
        about = {"where": os.fsdecode(os.path.join(self.root, string_at(self.names, i)))}
        return about | ({"label": int(self.labels[i])} if self.labels[i] >= 0 else {})

    def open(self, i):
        about = self.about(i)
        return {**about, "image": about["where"]}

    def files(self):
        return (self.about(i)["where"] for i in range(len(self)))

    def caption(self, i):
        return None


def list_folder(root):
    """Every image below a folder: the arguments of Folder. If there is none: the tars below it.

    Links are followed, but no folder is entered twice. Raises UserError."""
    def fail(error):
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}")

    names, tars, entered = [], [], set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            below.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        files = [name if inside == "." else f"{inside}/{name}" for name in files
                 if not name.startswith(".")]
        names += [name for name in files if name.lower().endswith(IMAGE_ENDINGS)]
        tars += [os.path.join(root, name) for name in files if name.lower().endswith(".tar")]
    if not names and tars:
        return sorted(tars)
    if tars:
        rank0_print(f"NOTE: {root} holds images and {len(tars)} tars, which are passed over; "
                    f"--data '{tars[0]}' would read one")
    if not names:
        raise UserError(f"no image below {root}; looked for {' '.join(IMAGE_ENDINGS)} and .tar")
    names.sort()
    classes = class_names_of({name.split("/")[0] for name in names if "/" in name})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[0]] if "/" in name else -1 for name in names],
                      np.int32)
    return root, pack_strings([os.fsencode(name) for name in names]), labels, classes


# --------------------------------------------------------------------------------------
# Shards and manifests: indexed once, then any sample is read by seek
# --------------------------------------------------------------------------------------

INDEX_VERSION = 3
MOST_TEXT = 1 << 20     # bytes of a .json, .txt or .cls; what is larger is not read
MOST_IMAGE = 1 << 30    # bytes of an encoded image; what is larger is bad
RECORD = 20 * 512       # a tar's length is a multiple of this, by custom
DAMAGE = "damaged places", "shards cut short", "shards that are no tar", "unreadable records"
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
PARTS = "image", "cls", "txt", "json"
# What reading somebody's .json or .csv raises
RECORD_ERRORS = (ValueError, TypeError, StopIteration, RecursionError, csv.Error)


def split_name(name):
    """A member's name as (key, longer key, part of PARTS or None), as WebDataset does: key.ending.

    Of "a/7.jpg" the key is "a/7". Of names with more endings, "7.seg.png" or "IMG.2020.jpg", the
    longer key is all but the last; otherwise it is the key."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    longer, _, last = base.rpartition(".")
    part = last.lower() if last.lower() in PARTS[1:] else \
        "image" if f".{last.lower()}" in IMAGE_ENDINGS else None
    return f"{folder}/{stem}", f"{folder}/{longer}", part if stem else None


def tar_members(file, left_out):
    """The regular files of an open tar, as (name, offset, size); what is passed over is counted.

    Damage inside is passed over up to the next sound header, and a tar cut short ends early."""
    size = os.fstat(file.fileno()).st_size

    def between(begin, end):
        """Look at what is between two members, or behind the last."""
        # A tar ends, and another may follow, with 1,024 zeros or more, up to the end of a record.
        usual = end - begin in (0, 1024) or (
            end - begin <= RECORD + 1024 and (end % RECORD == 0 or end == size))
        if not usual or any(os.pread(file.fileno(), end - begin, begin)):
            left_out["damaged places"] += 1

    tar, expected, at = None, 0, 0
    while True:
        try:
            if tar is None:
                file.seek(at)
                tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
            member = tar.next()
        except (tarfile.TarError, ValueError, RecursionError):
            # The file ends inside a member, or of two headers that belong together one is damaged.
            at = (at if tar is None else tar.offset) + 512
            if at >= size:
                left_out["shards cut short" if expected else "shards that are no tar"] += 1
                return
            if tar is not None:
                tar.offset = at
            continue
        if member is None:
            return between(expected, max(size, expected))
        between(expected, max(expected, member.offset))
        expected = tar.offset
        if member.isreg() and not member.issparse():
            yield member.name, member.offset_data, member.size
        elif not member.isdir():
            left_out["links and devices"] += 1
        tar.members.clear()         # or a million of them stay in memory


def index_tar(path, file):
    """Find the samples of a tar: (keys, places {part: int64 [n, 2] of offset and size}, left out).

    Files that share a key are one sample, together or not; where a part comes a second time,
    another sample begins. Nothing is extracted."""
    magic = os.pread(file.fileno(), 6, 0)
    if any(magic.startswith(start) for start in COMPRESSED):
        raise UserError(f"{path} is compressed, so no sample can be read by itself: unpack it to a "
                        "plain .tar (images do not compress anyway)")
    left_out, at, keys, shorter = Counter(), {}, [], {}
    places = {part: array("q") for part in PARTS}
    for name, offset, size in tar_members(file, left_out):
        key, longer, part = split_name(name)
        if part is None:
            left_out["other files"] += 1
            continue
        i = at.get(longer)
        if i is None or places[part][2 * i] >= 0:
            if i is not None:
                left_out["repeated names"] += 1
            i = at[longer] = len(keys)
            keys.append(longer)
            for values in places.values():
                values.extend((-1, -1))
            if key != longer:
                shorter[i] = key
        places[part][2 * i], places[part][2 * i + 1] = offset, size
    # 7.seg.png is no sample of its own where there is 7.jpg, and takes 7.json where there is not.
    for i, key in shorter.items():
        if (plain := at.get(key)) is None:
            continue
        if places["image"][2 * plain] >= 0:
            left_out["other files"] += sum(places[part][2 * i] >= 0 for part in PARTS)
            places["image"][2 * i], keys[i] = -1, None
        for part in PARTS[1:]:
            if places[part][2 * i] < 0:
                places[part][2 * i:2 * i + 2] = places[part][2 * plain:2 * plain + 2]
                keys[plain] = None if places["image"][2 * plain] < 0 else keys[plain]
    places = {part: np.array(values, np.int64).reshape(-1, 2) for part, values in places.items()}
    rows = np.argsort(places["image"][:, 0], kind="stable")
    rows = rows[places["image"][rows, 0] >= 0]
    left_out["keys without an image"] += sum(
        key is not None and first < 0 for key, first in zip(keys, places["image"][:, 0].tolist()))
    return [keys[i].removeprefix("/") for i in rows], \
        {part: values[rows] for part, values in places.items()}, left_out


def index_lines(path, file):
    """Find the records of a manifest (.jsonl or .csv): as index_tar; the record is its "json"."""
    places, end, left_out = array("q"), 0, Counter()

    def lines():
        nonlocal end
        for line in file:
            end += len(line)
            yield line.decode("utf-8", "replace").removeprefix("\ufeff")

    rest, first = lines(), path.lower().endswith(".csv")
    records = csv.reader(rest) if first else (line.strip() for line in rest)
    while True:
        begin = end
        try:
            record = next(records)
        except StopIteration:
            break
        except csv.Error:               # go on behind it
            left_out["unreadable records"] += 1
            records = csv.reader(rest)
            continue
        if record and not first:
            places.extend((begin, end - begin))
        first = first and not record    # the first record of a .csv is its header
    places = np.array(places, np.int64).reshape(-1, 2)
    none = np.full_like(places, -1)
    return [], {"image": places, "json": places, "cls": none, "txt": none}, left_out


def read_record(text, header):
    """A line of a .csv with this header, or JSON, as a dict. Raises RECORD_ERRORS."""
    if header:
        record = dict(zip(header, next(csv.reader(io.StringIO(text.decode("utf-8", "replace"))))))
        return {key: value for key, value in record.items() if key and value != ""}
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def csv_header(path):
    """The names of a CSV manifest's columns; None for other files. Raises UserError."""
    if not path.lower().endswith(".csv"):
        return None
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        header = next((row for row in csv.reader(file) if row), [])
    if "image" not in header:
        raise UserError(f"{path} has no column named image; its first line has: "
                        f"{', '.join(header)[:200]}")
    return header


# A hashtag in running text ends at white space, another # or any other punctuation.
HASHTAG = re.compile(r"[#＃]([^\s#＃!\"$%&'()*+,./:;<=>?@\[\\\]^`{|}~、。，！？]+)")


def tags_of(record):
    """The tags of a record: a list, words in one string, or else the hashtags in its caption.

    Raises ValueError where they are anything else."""
    tags = record.get("tags")
    if tags is None or tags == "" or tags != tags:      # as tables write it: NaN
        tags = []
    if isinstance(tags, str):
        tags = json.loads(tags) if tags.startswith("[") else re.split(r"[\s,;]+", tags)
    if not isinstance(tags, list) or any(isinstance(tag, (list, dict)) for tag in tags):
        raise ValueError("tags are a list of words")
    return [str(tag) for tag in tags if tag not in (None, "")] or HASHTAG.findall(
        str(record.get("caption") or ""))


def name_of(label):
    """A label as a class's name; None where there is none (as tables write it: "", NaN, 3.0)."""
    if isinstance(label, (list, dict)):
        raise ValueError("a label is a name or a number")
    if label is None or label == "" or label != label:
        return None
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def label_of(file, header, places, i, left_out):
    """What sample i says of itself: (name of its label or None, tags).

    Several labels, a list, count as tags: stage 3 takes them as an image's classes."""
    label, tags = None, []
    for part in ("json", "cls", "txt"):
        offset, size = places[part][i].tolist()
        if offset < 0 or part == "txt" and tags:
            continue
        try:
            problem = "unreadable records"
            if size > MOST_TEXT:
                raise ValueError("too large")
            text = os.pread(file.fileno(), size, offset)
            if part == "cls":
                label = name_of(text.decode().strip()) or label
            elif part == "txt":
                tags = HASHTAG.findall(text.decode("utf-8", "replace"))
            else:
                record = read_record(text, header)
                several = isinstance(record.get("label"), list)
                label = None if several else name_of(record.get("label"))
                problem = "records whose tags are no words"
                tags = tags_of({"tags": [name_of(one) for one in record["label"]]} if several
                               else record)
        except RECORD_ERRORS:
            left_out[problem] += 1
    return label, tags


def make_index(path, destination):
    """Index a shard or manifest into the file `destination`: its columns.

    Raises UserError where the file changes meanwhile, or is none that can be indexed."""
    with open(path, "rb") as file:
        before, header = os.fstat(file.fileno()), csv_header(path)
        keys, places, left_out = (index_tar if is_tar(path) else index_lines)(path, file)
        labels, tags, tag_ends, label_table, tag_table = [], [], [], {}, {}
        for i in range(len(places["image"])):
            label, found = label_of(file, header, places, i, left_out)
            labels.append(-1 if label is None else label_table.setdefault(label, len(label_table)))
            tags += [tag_table.setdefault(tag, len(tag_table)) for tag in found]
            tag_ends.append(len(tags))
        after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path} is still being written; start again when it is complete")
    plain = places["txt"][:, :1] >= 0
    columns = {"places": places["image"], "plain": plain[:, 0],
               "texts": np.where(plain, places["txt"], places["json"]),
               "labels": np.array(labels, np.int32), "tags": np.array(tags, np.int32),
               "tag_ends": np.array(tag_ends, np.int64)}
    for name, strings in (("keys", keys), ("label_names", label_table), ("tag_names", tag_table)):
        columns[name], columns[f"{name}_ends"] = pack_strings([
            string.encode("utf-8", "surrogateescape" if name == "keys" else "replace")
            for string in strings])
    columns["left_out"] = np.frombuffer(json.dumps(+left_out).encode(), np.uint8)
    columns["stamp"] = np.array([INDEX_VERSION, before.st_size, before.st_mtime_ns, len(labels),
                                 crc(*columns.values())])
    write_arrays(destination, columns)
    return columns


def is_tar(path):
    return path.lower().endswith(".tar")


def write_arrays(path, arrays):
    def write(aside):
        with open(aside, "wb") as file:     # given a name, numpy would append .npz to it
            np.savez(file, **arrays)
    write_aside(Path(path), write)


def read_arrays(path, names=None):
    """Arrays of an .npz of ours, {name: array}; {} where it is missing or damaged."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return {}


def kept_arrays(path, make):
    """Arrays of the file `path`, or else what make() makes on all ranks, which is kept there."""
    found = on_rank_0(lambda: read_arrays(path))
    if not found:
        found = make()

        def keep():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, found)
        on_rank_0(keep)
    return found


def is_of(columns, size, changed):
    """Whether an index is of this version and of a file of this size and time of change."""
    return columns and columns["stamp"][:3].tolist() == [INDEX_VERSION, size, changed]


@lru_cache
def most_open():
    """How many shards to keep open at a time: half of the files that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        soft = min(4096, hard) if hard != resource.RLIM_INFINITY else 4096
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(2048, soft // 2)


class Shards:
    """Samples of tar shards or manifests, each read by itself with the help of an index.

    `catalogue` is what is kept of each shard: name, size, time, number and CRC of its samples.
    Shards are opened when they are needed; those used last, 1.5 million samples, stay open."""

    def __init__(self, catalogue, place):
        self.names = catalogue["names"], catalogue["name_ends"]
        self.stats, self.counts, self.place = catalogue["stats"], catalogue["counts"], place
        self.ends, self.opened = np.cumsum(self.counts), OrderedDict()
        labels = catalogue["labels"], catalogue["label_ends"]
        self.classes = class_names_of({string_at(labels, i).decode()
                                       for i in range(len(labels[1]))})
        self.label = {name: i for i, name in enumerate(self.classes)}
        self.left_out = json.loads(catalogue["left_out"].tobytes())
        self.tars = is_tar(os.fsdecode(string_at(self.names, 0)))
        self.chunks = self.counts if self.tars else even_chunks(int(self.ends[-1]))
        self.mark = crc(self.counts, catalogue["marks"])

    def __getstate__(self):
        return {**self.__dict__, "opened": OrderedDict()}

    def __len__(self):
        return int(self.ends[-1])

    def shard(self, s):
        """Shard s, open: a dict of its path, file, header and the columns of its index.

        Raises UserError where it is gone or not the file that was indexed."""
        if s in self.opened:
            self.opened.move_to_end(s)
            return self.opened[s]
        path = os.fsdecode(string_at(self.names, s))
        try:
            file = open(path, "rb")
        except OSError as error:
            raise UserError(f"{path} was there at the start, but: {error.strerror}") from error
        status, stats = os.fstat(file.fileno()), self.stats[s].tolist()
        if [status.st_size, status.st_mtime_ns] != stats:
            raise UserError(f"{path} is not the file that was indexed: it has changed since, or "
                            "differs between nodes; start again")
        columns = read_arrays(index_path(path, self.place))
        if not is_of(columns, *stats):          # somebody has deleted it
            columns = make_index(path, index_path(path, self.place))
        self.opened[s] = {"path": path, "file": file, "header": csv_header(path), **columns}
        while len(self.opened) > 1 and (len(self.opened) > most_open() or sum(
                self.counts[one] for one in self.opened) > 1_500_000):
            self.opened.popitem(last=False)[1]["file"].close()
        return self.opened[s]

    def find(self, i):
        """The shard of sample i, open, and the sample's row in its columns."""
        s = int(np.searchsorted(self.ends, i, side="right"))
        return self.shard(s), int(i) - int(self.ends[s] - self.counts[s])

    def text(self, shard, name, i):
        """String i of a column of strings."""
        return string_at((shard[name], shard[f"{name}_ends"]), i).decode("utf-8", "replace")

    def about(self, i):
        shard, row = self.find(i)
        key = self.text(shard, "keys", row) if self.tars else f"record {row + 1}"
        ends, code = shard["tag_ends"], int(shard["labels"][row])
        tags = shard["tags"][ends[row - 1] if row else 0:ends[row]].tolist()
        about = {"where": f"{shard['path']}: {key}",
                 "tags": [self.text(shard, "tag_names", tag) for tag in tags]}
        return about if code < 0 else {
            **about, "label": self.label[self.text(shard, "label_names", code)]}

    def open(self, i):
        shard, row = self.find(i)
        offset, size = shard["places"][row].tolist()
        if size > MOST_IMAGE:
            raise ValueError(f"{size:,} bytes are more than an image may have")
        content = os.pread(shard["file"].fileno(), size, offset)
        if len(content) < size:
            raise ValueError("the tar is cut short")
        if self.tars:
            return {**self.about(i), "image": io.BytesIO(content)}
        image = read_record(content, shard["header"]).get("image")
        if not isinstance(image, str):
            raise ValueError("the record has no image")
        return {**self.about(i), "image": os.path.join(os.path.dirname(shard["path"]), image)}

    def files(self):
        if self.tars:
            yield from (os.fsdecode(string_at(self.names, s)) for s in range(len(self.counts)))
            return
        for i in range(len(self)):
            with contextlib.suppress(*RECORD_ERRORS):
                yield self.open(i)["image"]

    def caption(self, i):
        shard, row = self.find(i)
        offset, size = shard["texts"][row].tolist()
        if not 0 <= offset or size > MOST_TEXT:
            return None
        text = os.pread(shard["file"].fileno(), size, offset)
        if shard["plain"][row]:
            return text.decode("utf-8", "replace").strip()
        try:
            caption = read_record(text, shard["header"]).get("caption")
        except RECORD_ERRORS:
            return None
        return None if caption is None else str(caption)


def index_path(path, place):
    """Where the index of a shard is: beside it, or in the folder `place`."""
    if place is None:
        return f"{path}.index.npz"
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(place, f"{crc(os.fsencode(folder)):08x}-{name}.index.npz")


def index_place(paths, index_dir, fallback):
    """The folder for indexes, None for beside the shards: --index-dir, or where one may write."""
    if index_dir is None:
        for folder in {os.path.dirname(os.path.abspath(path)) for path in paths}:
            try:
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError:
                index_dir = fallback or os.path.join(tempfile.gettempdir(), f"index-{os.getuid()}")
    if index_dir is not None:
        Path(index_dir).mkdir(parents=True, exist_ok=True)
    return None if index_dir is None else os.path.abspath(index_dir)


def find_catalogue(paths, names, stats, place):
    """(path of the catalogue of these shards, its content or {} where it is not of them)."""
    path = Path(place or os.path.dirname(os.path.abspath(paths[0])),
                f"{crc(*names):08x}.catalogue.npz")
    known = read_arrays(path)
    current = known and known["version"] == INDEX_VERSION and np.array_equal(
        known["stats"], stats) and np.array_equal(known["names"], names[0])
    return path, known if current else {}


def sizes_and_times(paths):
    """Size and time of change of every shard, int64 [n, 2]. Raises UserError where one is gone."""
    def look(paths):
        try:
            return np.array([(found.st_size, found.st_mtime_ns)
                             for found in map(os.stat, paths)], np.int64)
        except OSError as error:
            raise UserError(f"no shard {error.filename}: {error.strerror}") from error

    with ThreadPoolExecutor(32) as threads:     # over a network, each look is a round trip
        return np.concatenate(list(threads.map(look, [
            paths[at:at + 256] for at in range(0, len(paths), 256)])))


def index_shards(paths, stats, place):
    """Index those shards that are not, each rank its part: what the catalogue has to say of them,
    (number and CRC of the samples of each, what was left out, names of labels)."""
    rank, world = get_rank(), get_world_size()
    found, left_out, label_names = np.zeros((2, len(paths)), np.int64), Counter(), set()
    problem, seen = None, set()
    try:
        for s in tqdm(range(rank, len(paths), world), desc="indexing", unit="shard",
                      disable=rank > 0 or not sys.stderr.isatty()):
            index = index_path(paths[s], place)
            columns = read_arrays(index, ["stamp", "label_names", "label_names_ends", "left_out"])
            if not is_of(columns, *stats[s].tolist()):
                columns = make_index(paths[s], index)
            found[:, s] = columns["stamp"][3:]
            left_out.update(json.loads(columns["left_out"].tobytes()))
            labels = columns["label_names"], columns["label_names_ends"]
            if crc(*labels) not in seen:        # most shards have the same
                seen.add(crc(*labels))
                label_names.update(string_at(labels, i) for i in range(len(labels[1])))
    except (UserError, OSError) as error:
        problem = str(error)
    parts = all_gather_objects((problem, found[:, rank::world], left_out, label_names))
    for other, (problem, their_found, *_) in enumerate(parts):
        if problem:
            raise UserError(problem)
        found[:, other::world] = their_found
    return (*found, sum((part[2] for part in parts), Counter()),
            set().union(*(part[3] for part in parts)))


def open_shards(paths, index_dir, fallback):
    """Open shards or manifests, indexing those that are not: call it on every rank.

    Rank 0 asks for size and time of every shard; where the catalogue, one file, has the same, that
    is all."""
    names = pack_strings([os.fsencode(path) for path in paths])

    def look():
        stats, place = sizes_and_times(paths), None
        # One that is beside the shards is used where one may not write, too.
        if index_dir or not find_catalogue(paths, names, stats, None)[1]:
            place = index_place(paths, index_dir, fallback)
        return place, stats, *find_catalogue(paths, names, stats, place)

    place, stats, path, catalogue = on_rank_0(look)
    if not catalogue:
        counts, marks, left_out, label_names = index_shards(paths, stats, place)
        labels = pack_strings(sorted(label_names))
        catalogue = {"version": np.array(INDEX_VERSION), "stats": stats, "names": names[0],
                     "name_ends": names[1], "counts": counts, "marks": marks,
                     "labels": labels[0], "label_ends": labels[1],
                     "left_out": np.frombuffer(json.dumps(left_out).encode(), np.uint8)}
        on_rank_0(lambda: write_arrays(path, catalogue))
    source, more = Shards(catalogue, place), f" and {len(paths) - 1} more" if paths[1:] else ""
    if source.left_out:
        rank0_print(f"in {paths[0]}{more}: " + ", ".join(
                    f"{count:,} {what}" for what, count in source.left_out.items()))
    if not len(source):
        raise UserError(f"no image in {paths[0]}{more}")
    return source


# --------------------------------------------------------------------------------------
# From specs to one source
# --------------------------------------------------------------------------------------

def chunk_names(source, c, what):
    """The tags ("tags") or classes ("label") of a chunk's samples as they are written: (different
    ones, int32 codes into them, for each sample where its codes end)."""
    if isinstance(source, Shards) and source.tars:
        shard = source.shard(c)
        column = "tag_names" if what == "tags" else "label_names"
        names = [source.text(shard, column, i) for i in range(len(shard[f"{column}_ends"]))]
        if what == "tags":
            return names, shard["tags"], shard["tag_ends"]
        labels = np.asarray(shard["labels"])
        return names, labels[labels >= 0], np.cumsum(labels >= 0)
    table, codes, ends = {}, [], []
    last = int(np.sum(source.chunks[:c + 1]))
    for i in range(last - int(source.chunks[c]), last):
        for name in names_of(source, source.about(i), what):
            codes.append(table.setdefault(name, len(table)))
        ends.append(len(codes))
    return list(table), np.array(codes, np.int32), np.array(ends, np.int64)


def names_of(source, about, what):
    """The tags or classes of one sample, as they are written."""
    if what == "tags":
        return about.get("tags", [])
    return [source.classes[about["label"]]] if "label" in about else []


class Joined:
    """Several sources, one after another; classes are joined by name."""

    def __init__(self, sources):
        self.sources = sources
        self.ends = np.cumsum([len(source) for source in sources])
        self.chunks = np.concatenate([source.chunks for source in sources])
        self.classes = sources[0].classes if len(sources) == 1 else class_names_of(
            {name for source in sources for name in source.classes})
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [[number[name] for name in source.classes] for source in sources]

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """What the data are, in words that differ when they do."""
        marks = " ".join(str(source.mark) for source in self.sources)
        return f"{len(self):,} images (CRC {crc(marks):08x})"

    def files(self):
        """The paths of all files that hold images."""
        return itertools.chain.from_iterable(source.files() for source in self.sources)

    def find(self, i):
        """The source of sample i, its number there, and the source's labels."""
        which = int(np.searchsorted(self.ends, i, side="right"))
        return (self.sources[which], int(i) - (int(self.ends[which - 1]) if which else 0),
                self.labels[which])

    def chunk_names(self, c, what):
        for source in self.sources:
            if c < len(source.chunks):
                return chunk_names(source, c, what)
            c -= len(source.chunks)

    def about(self, i):
        source, i, labels = self.find(i)
        return relabelled(source.about(i), labels)

    def open(self, i):
        source, i, labels = self.find(i)
        return relabelled(source.open(i), labels)

    def caption(self, i):
        source, i, _ = self.find(i)
        return source.caption(i)

    def __getitem__(self, i):
        """Sample i with its image decoded and upright, a PIL image (a scene at 224 x 224)."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        sample, caption = self.open(i), self.caption(i)
        if isinstance(sample["image"], dict):
            image = Image.fromarray(draw(sample["image"], 224, 224))
        else:
            image = ImageOps.exif_transpose(open_image(sample["image"]))
        return {**sample, "image": image} | ({} if caption is None else {"caption": caption})


def relabelled(sample, labels):
    """A sample of one source with its label among the joined classes."""
    return {**sample, "label": labels[sample["label"]]} if "label" in sample else sample


WORLD_COUNTS = {"world": ("train", 1_000_000), "world-val": ("val", 1_000),
                "world-test": ("test", 1_000), "world-novel": ("novel", 800),
                "world-labelled": ("labelled", 5_000)}


def is_world(spec):
    """Whether a spec is of the built-in world."""
    return str(spec).partition(":")[0] in WORLD_COUNTS


def choose_val(args):
    """Give --val its default. Raises UserError where it is needed and has none."""
    if args.val is None and all(map(is_world, args.data)):
        args.val = ["world-val"]
    if args.eval_only and not args.val:
        raise UserError("--eval-only needs --val: the images to evaluate on")


def expand_braces(spec):
    """'x-{000..127}.tar' or 'x-{a,b}.tar' to its names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", spec)
    if not match:
        return [spec]
    first, last, words = match.groups()
    if words is None:
        words = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        if not words:
            raise UserError(f"{spec}: {match.group()} counts down")
    else:
        words = words.split(",")
    rest = expand_braces(spec[match.end():])
    return [f"{spec[:match.start()]}{word}{end}" for word in words for end in rest]


def find_source(spec):
    """What a spec names: the arguments of World or Folder, or a list of shards' paths."""
    spec = str(spec)
    if is_world(spec):
        name, _, count = spec.partition(":")
        split, usual = WORLD_COUNTS[name]
        if count and not (count.isdecimal() and int(count)):
            raise UserError(f"{spec}: after the colon comes a number of pictures, as in "
                            f"{name}:{usual}")
        return split, int(count or usual)
    if os.path.isdir(spec):
        return list_folder(spec)
    paths = [spec] if os.path.exists(spec) else [
        path for one in expand_braces(spec)
        for path in (sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one])]
    if not paths or paths == [spec] and not os.path.exists(spec):
        raise UserError(f"no data at {spec}: not a folder, shards (.tar), a manifest (.jsonl .csv) "
                        f"or one of {' '.join(WORLD_COUNTS)}")
    for path in paths:
        if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise UserError(f"{path} is compressed, so no sample can be read by itself: unpack it "
                            "to a plain .tar (images do not compress anyway)")
        if not path.lower().endswith((".tar", ".jsonl", ".csv")):
            raise UserError(f"{path} is neither a folder nor a .tar, .jsonl or .csv")
    if len({is_tar(path) for path in paths}) > 1:
        raise UserError(f"{spec} names shards and manifests; give them as two")
    return paths


def open_data(*specs, index_dir=None, fallback=None):
    """Open sources by their specs: a Joined of length n; [i] is a dict with the PIL image and its
    "where", "label", "tags", "caption" as far as known; `.classes` names the labels.

    Indexes of shards are kept beside them or in `index_dir`, or in `fallback` where one may not
    write. With several ranks, all have to call it. Raises UserError where a spec names nothing."""
    sources = []
    for found in on_rank_0(lambda: [find_source(spec) for spec in specs]):
        if isinstance(found, list):
            sources.append(open_shards(found, index_dir, fallback))
        else:
            sources.append(World(*found) if len(found) == 2 else Folder(*found))
    return Joined(sources)


# --------------------------------------------------------------------------------------
# Hashtags: from what people write to numbers in a vocabulary (stage 2)
# --------------------------------------------------------------------------------------

def canonical(tag):
    """The form in which hashtags are compared: Unicode NFKC, casefold, no # and no separators.

    "#Beach_Life" and "beach-life" are one; accents, CJK and emoji stay, but not the marks that
    choose how an emoji is drawn. "" where nothing is left."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", str(tag)).casefold())
    # Letters, marks, numbers and symbols; punctuation, spaces and control characters separate.
    return "".join(c for c in text if unicodedata.category(c)[0] in "LMNS"
                   and c not in "\ufe0e\ufe0f")


def read_lines(path, flag):
    """The lines of a text file that a flag names, with their numbers, without empty ones, as rank 0
    finds them. Raises UserError."""
    def read():
        try:
            return Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {path} cannot be read as UTF-8 text: {error}") from error
    lines = [(i, line) for i, line in enumerate(on_rank_0(read), 1) if line.strip()]
    if not lines:
        raise UserError(f"{flag} {path} is empty")
    return lines


def read_synonyms(path):
    """A file of lines "alias TAB canonical" as {alias: what it means in the end}, both canonical.

    Raises UserError for a line of another form, an alias of two meanings, and a cycle."""
    meaning = {}
    for number, line in read_lines(path, "--synonyms"):
        if line.startswith("# "):
            continue
        words = [canonical(word) for word in line.split("\t")]
        if len(words) != 2 or not all(words):
            raise UserError(f"{path}, line {number}: not an alias, a TAB and a tag: {line!r}")
        alias, tag = words
        if alias != tag and meaning.setdefault(alias, tag) != tag:
            raise UserError(f"{path}, line {number}: {alias} means {meaning[alias]} and {tag}")
    final = {}
    for alias in meaning:
        chain, tag = [alias], meaning[alias]
        while tag in meaning:
            chain.append(tag)
            if (tag := meaning[tag]) in chain:
                raise UserError(f"{path}: a cycle: {' → '.join([*chain, tag])}")
        final[alias] = tag
    return final


def tag_pairs(source, c, number, what="tags"):
    """Which samples of a chunk have which tags: (row, number of the tag) [m], each pair once.

    `number(tag)` of a tag as it was written is its number, -1 for one that does not count."""
    tags, codes, ends = source.chunk_names(c, what)
    numbers = np.array([number(tag) for tag in tags] or [-1], np.int64)[codes]
    rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    pairs = np.unique((rows << 32 | numbers)[numbers >= 0])
    return pairs >> 32, pairs & 0xFFFFFFFF


def rarest_tags(rows, numbers):
    """Of tag_pairs, the last of each row: (row, number), since numbers rise as counts fall."""
    last = np.diff(rows, append=-1) != 0
    return rows[last], numbers[last]


def my_chunks(source, what):
    """The chunks that this rank goes through, with a bar."""
    rank, world = get_rank(), get_world_size()
    return tqdm(range(rank, len(source.chunks), world), desc=what, unit="shard",
                disable=rank > 0 or not sys.stderr.isatty())


def all_names(source, what):
    """All classes or tags of a source as they are written, sorted; all ranks have to call it."""
    mine = {name for c in my_chunks(source, "names") for name in source.chunk_names(c, what)[0]}
    return class_names_of(set().union(*all_gather_objects(mine)))


def count_tags(source, synonyms):
    """On how many images each canonical tag is: a Counter, on rank 0; None on the others."""
    table, counts, total = {}, Counter(), Counter()

    def number(tag):
        tag = canonical(tag)
        return table.setdefault(synonyms.get(tag, tag), len(table)) if tag else -1

    for c in my_chunks(source, "counting tags"):
        which, images = np.unique(tag_pairs(source, c, number)[1], return_counts=True)
        counts.update(dict(zip(which.tolist(), images.tolist())))
    mine = {tag: counts[i] for tag, i in table.items()}
    parts = gather_objects(mine)         # only there: rare tags may be many millions
    for part in parts or ():
        total.update(part)
    return parts and total


def tag_numbers(tag, number, synonyms):
    """The numbers of a tag as it was written, in a vocabulary {canonical tag: number}: one or none.

    What Tagged takes in stage 2, with the last two arguments filled in."""
    tag = canonical(tag)
    return [number[tag]] if (tag := synonyms.get(tag, tag)) in number else []


def count_rarest(source, numbers, K):
    """(How many images have each of K tags as their rarest [K]; how many have 0, 1, … 64 or more
    known tags [65]), over all ranks; `numbers` as of Tagged."""
    once = Tagged(source, numbers, sums=source.chunks)
    by_rarest, by_length = torch.zeros(K, dtype=torch.int64), torch.zeros(65, dtype=torch.int64)
    for c in my_chunks(source, "rarest tags"):
        rows, found = tag_pairs(source, c, once.number_of)
        by_rarest += torch.from_numpy(np.bincount(rarest_tags(rows, found)[1], minlength=K))
        lengths = np.bincount(rows, minlength=int(source.chunks[c])).clip(max=64)
        by_length += torch.from_numpy(np.bincount(lengths, minlength=65))
    return all_reduce_sum(by_rarest).numpy(), all_reduce_sum(by_length).numpy()


def count_shown(tagged, K):
    """Of the images that an epoch shows, for each of K tags: (the sum of 1/k over those that have
    it, k being an image's number of tags; how many have it), [K] each, over all ranks."""
    shown = torch.zeros(2, K, dtype=torch.float64)
    for c in my_chunks(tagged.source, "frequencies"):
        rows, found = tag_pairs(tagged.source, c, tagged.number_of)
        times = np.diff(tagged.stands(c), prepend=0)
        mass = times[rows] / np.bincount(rows, minlength=len(times))[rows]
        for total, weights in zip(shown, (mass, times[rows])):
            total += torch.from_numpy(np.bincount(found, weights, K))
    return all_reduce_sum(shown)


class Tagged:
    """The images of a source that have known tags, those with rare ones several times: a source.

    numbers(tag) lists the numbers of a tag as it was written; stage 3 asks it the same of an
    image's class (what="label"). `repeats` [K] is how often, on average, an image is shown whose
    rarest tag it is; None: once. It is what Order permutes, so that resampling too is a
    pure function of the position: memory holds the `sums` of the chunks, and the images of those
    chunks that were used last. `part` (low, high) leaves only the images to which chance gives a
    number from low to below high: parts of 0 … 1 that do not overlap have no image in common."""

    def __init__(self, source, numbers, repeats=None, sums=None, what="tags", part=(0, 1)):
        self.source, self.numbers, self.repeats, self.what = source, numbers, repeats, what
        self.part = part
        self.starts, self.known = np.cumsum(source.chunks) - source.chunks, OrderedDict()
        if sums is None:
            sums = torch.zeros(len(source.chunks), dtype=torch.int64)
            for c in my_chunks(source, "tagged images"):
                sums[c] = int(self.stands(c)[-1:].sum())
            sums = all_reduce_sum(sums).numpy()
        self.chunks, self.ends = sums, np.cumsum(sums)

    def number_of(self, tag):
        """The number by which a tag as it was written is counted; -1 for an unknown one."""
        return (self.numbers(tag) or [-1])[0]

    def times(self, c):
        """How often each sample of a chunk is shown: int64 [n]. A fraction is rounded up with its
        own probability, by a hash of the sample, in every epoch alike."""
        rows, numbers = tag_pairs(self.source, c, self.number_of, self.what)
        times = np.zeros(int(self.source.chunks[c]), np.int64)
        rows, rarest = rarest_tags(rows, numbers)
        times[rows] = 1
        if self.repeats is not None:
            chance = uniform(0, self.starts[c] + rows, "repeat", 1)[:, 0]
            times[rows] = self.repeats[rarest] + chance
        chance = uniform(0, self.starts[c] + np.arange(len(times)), "part", 1)[:, 0]
        return times * ((self.part[0] <= chance) & (chance < self.part[1]))

    def stands(self, c):
        """Where in the chunk the times of each sample end."""
        if c not in self.known:
            self.known[c] = np.cumsum(self.times(c)).astype(np.int32)
            while len(self.known) > 1 and sum(map(len, self.known.values())) > 1 << 24:
                self.known.popitem(last=False)
        self.known.move_to_end(c)
        return self.known[c]

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        """The sample of the source that stands at i."""
        c = int(np.searchsorted(self.ends, i, "right"))
        place = i - (int(self.ends[c]) - int(self.chunks[c]))
        return int(self.starts[c]) + int(np.searchsorted(self.stands(c), place, "right"))

    def about(self, i):
        return self.source.about(self.find(i))

    def caption(self, i):
        return self.source.caption(self.find(i))

    def open(self, i):
        sample = self.source.open(self.find(i))
        known = [self.numbers(name) or () for name in names_of(self.source, sample, self.what)]
        return {**sample, "numbers": sorted({number for some in known for number in some})}


# --------------------------------------------------------------------------------------
# Classes: what the outputs of a model stand for (stage 3)
# --------------------------------------------------------------------------------------

def read_classes(path):
    """A file of a line an output, all names of its class separated by commas: [[name]]."""
    names = [[name.strip() for name in line.split(",")]
             for _, line in read_lines(path, "--classes")]
    for name, count in Counter(name for some in names for name in set(some)).items():
        if count > 1:
            raise UserError(f"--classes {path} has {name!r} in {count} lines; a name is of one "
                            "class")
    return names


def read_class_map(path, outputs):
    """A file of lines "model's class TAB data's class" as {data's class: [output]}."""
    found = {}
    for number, line in read_lines(path, "--class-map"):
        ours, *theirs = (word.strip() for word in line.split("\t"))
        if len(theirs) != 1 or ours not in outputs:
            raise UserError(f"--class-map {path}, line {number}: not one of the model's classes, a "
                            f"TAB and one of the data's: {line!r}")
        found.setdefault(theirs[0], []).extend(outputs[ours])
    return found


def outputs_of(classes, names, where, class_map=None):
    """Which outputs of a model are right for each of the data's classes: {name: [output]}.

    `classes` [[name]] are the model's, or K where nobody says what its K outputs stand for; `names`
    are the data's, from `where`. They are matched by name; whole numbers, where none is a name, by
    number; K unnamed outputs and K classes, in order (ImageNet's). Raises UserError for classes of
    the data that the model lacks, unless a `class_map` says what counts."""
    if isinstance(classes, int):
        if len(names) == classes:
            rank0_print(f"the model does not name its {classes} outputs: taken as the {classes} classes of "
                        f"{where}, in alphabetical order")
            classes = [[name] for name in names]
        else:
            classes = [[str(i)] for i in range(classes)]
    outputs = {name: [i] for i, some in enumerate(classes) for name in some}
    if not outputs.keys() & {*names}:
        outputs |= {str(i): [i] for i in range(len(classes))}
        if not class_map and outputs.keys() & {*names}:
            rank0_print(f"{where} has numbers for classes: taken as the model's outputs, from 0 on")
    if class_map:
        outputs = read_class_map(class_map, outputs)
    unknown = [name for name in names if name not in outputs]
    if len(unknown) == len(names) or unknown and not class_map:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"{where} has {len(unknown)} classes that the model lacks: "
                        f"{', '.join(unknown[:5])}{more}; the model has {len(classes)}: "
                        f"{', '.join(some[0] for some in classes[:5])}, … (classify has "
                        "--class-map)")
    return outputs


def labelled(source, classes, where, class_map=None, part=(0, 1)):
    """The images of a source whose class is known, or a `part` of them, as Tagged; classes are of
    the folder or the label, or several where labels are lists. Others are left out."""
    what = "label" if source.classes else "tags"
    outputs = outputs_of(classes, all_names(source, what), where, class_map)
    chosen = Tagged(source, outputs.get, what=what, part=part)
    if len(chosen) < len(source) and part == (0, 1):
        rank0_print(f"{where}: {len(source) - len(chosen):,} of {len(source):,} images have no "
                    f"{'known ' if class_map else ''}class and are left out")
    if not len(chosen):
        raise UserError(f"no image of {where} has a class: a folder each, or a label each")
    return chosen


def open_classes(args, told):
    """(--data as data.Tagged or None, --val or None, the name of each output)."""
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
    train, val = None, None
    if args.predict or args.eval_only:
        if "head.weight" not in told["shapes"]:
            raise UserError(f"{args.init} has no head: --predict and --eval-only need a finetuned "
                            "file, as runs/classify/model.pt")
        K, args.loss = told["shapes"]["head.weight"][0], told.get("config", {}).get("loss", "ce")
        classes = read_classes(args.classes) if args.classes else [
            [name] for name in told.get("classes", ())] or K
        if classes != K and len(classes) != K:
            raise UserError(f"--classes {args.classes} has {len(classes)} lines, but {args.init} "
                            f"has {K} outputs")
    else:
        source = open_data(*args.data, **places)
        found = [[name] for name in source.classes or all_names(source, "tags")]
        classes = read_classes(args.classes) if args.classes else found
        if len(classes) < 2:
            raise UserError(f"--data has {len(classes)} classes: there is nothing to tell apart; "
                            "images have the class of their folder, or a label")
        if args.loss == "ce" and not source.classes:
            raise UserError("labels of --data are lists, of several classes: give --loss bce or "
                            "softmax")
        train = labelled(source, classes, "--data")
    if args.val and not args.predict:
        val = labelled(open_data(*args.val, **places), classes, "--val", args.class_map)
        if classes == len(val.source.classes):
            classes = [[name] for name in val.source.classes]
    return train, val, [str(i) for i in range(classes)] if isinstance(classes, int) else [
        some[0] for some in classes]


class Chosen:
    """Some samples of a source, by their numbers `index` [n] and the `labels` [n] they count as."""

    def __init__(self, source, index, labels):
        self.source, self.index, self.labels = source, index, labels
        self.chunks = even_chunks(len(index))

    def __len__(self):
        return len(self.index)

    def about(self, i):
        return self.source.about(int(self.index[i]))

    def open(self, i):
        return {**self.source.open(int(self.index[i])), "numbers": [int(self.labels[i])]}

    def caption(self, i):
        return self.source.caption(int(self.index[i]))


# --------------------------------------------------------------------------------------
# Captions (stage 3)
# --------------------------------------------------------------------------------------

class Captioned:
    """The images of a source with the tokens of their captions, encode(caption), as the "numbers"
    of a batch: a source. An image without a caption counts as one that cannot be read."""

    def __init__(self, source, encode):
        self.source, self.encode, self.chunks = source, encode, source.chunks

    def __len__(self):
        return len(self.source)

    def about(self, i):
        return self.source.about(i)

    def open(self, i):
        caption = self.source.caption(i)
        if not (caption or "").strip():
            raise ValueError("it has no caption")
        return {**self.source.open(i), "numbers": self.encode(caption)}


def has_captions(source):
    """Whether any of 100 images, from all over a source, has a caption; as rank 0 finds them."""
    spread = np.linspace(0, len(source) - 1, min(100, len(source))).astype(int).tolist()

    def caption(i):
        try:
            return source.caption(i)
        except UserError:
            raise
        except Exception:               # a damaged sample: training will say so
            return None
    return on_rank_0(lambda: any((caption(i) or "").strip() for i in spread))


# ======================================================================================
# From a file to pixels
# ======================================================================================

Image.MAX_IMAGE_PIXELS = None       # Pillow's limit; --max-pixels takes its place


def random_resized_crop(width, height, numbers, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box (left, top, right, bottom) in an image of width x height, in its pixels.

    Its share of the area is uniform in `scale`; its aspect, relative to the output `size` (H, W),
    is log-uniform in `ratio`. Ten tries, then the largest central box (as torchvision's, without
    the rounding). `numbers` are 22 uniforms; a pure function of them. Defaults are MAE's."""
    shape = size[1] / size[0]
    low, high = math.log(ratio[0] * shape), math.log(ratio[1] * shape)
    for i in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * numbers[2 * i])
        aspect = math.exp(low + (high - low) * numbers[2 * i + 1])
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = (width - w) * numbers[20], (height - h) * numbers[21]
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0] * shape), ratio[1] * shape)
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def centre_crop(width, height, numbers, size, share=224 / 256):
    """The central box of the output's aspect; `share` of what fits (MAE: resize 256, crop 224)."""
    shape = size[1] / size[0]
    w, h = share * min(width, height * shape), share * min(height, width / shape)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


WHOLE_WIDTH = functools.partial(centre_crop, share=1)       # or height: as much as fits


def whole(width, height, numbers, size):
    """The box of the whole image: squashed, where its aspect is not the output's."""
    return 0, 0, width, height


def with_channels(image, channels):
    """A PIL image of any mode as grey (1), RGB (3) or RGBA (4), 8 bits each.

    16 bits are scaled, not cut; without an alpha channel, what is transparent becomes white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if channels < 4 and (image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
                         or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def open_image(image, max_pixels=178_956_970):
    """Open an image file, of which only the header is read. Raises OSError, ValueError."""
    opened = Image.open(image)
    if opened.width * opened.height > max_pixels:
        raise ValueError(f"{opened.width} x {opened.height} pixels are more than --max-pixels "
                         f"{max_pixels}")
    return opened


def read_pixels(image, choose_box, size, channels=3, max_pixels=178_956_970):
    """Decode a box of an image at `size` (H, W): uint8 [H,W,C].

    `image` is a path, an open file or a scene; `choose_box(width, height)` returns the box. A JPEG
    is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that still has a pixel for each one of the
    output (Pillow's draft), and crop and scaling are one resize of the box."""
    H, W = size
    if isinstance(image, dict):
        pixels = Image.fromarray(draw(image, H, W, choose_box(1.0, 1.0)))
        return np.asarray(with_channels(pixels, channels)).reshape(H, W, channels)
    with open_image(image, max_pixels) as opened:
        orientation = opened.getexif().get(0x0112, 1)
        if orientation != 1 and opened.format not in ("JPEG", "MPO"):   # those can be drafted
            opened, orientation = ImageOps.exif_transpose(opened), 1
        width, height = opened.size[::-1] if orientation in (5, 6, 7, 8) else opened.size
        left, top, right, bottom = choose_box(width, height)
        shrink = max(1.0, min((right - left) / W, (bottom - top) / H))
        opened.draft("L" if channels == 1 else None,
                     (math.ceil(opened.width / shrink), math.ceil(opened.height / shrink)))
        upright = ImageOps.exif_transpose(opened) if orientation != 1 else opened
        x, y = upright.width / width, upright.height / height
        box = (left * x, top * y, min(right * x, upright.width), min(bottom * y, upright.height))
        pixels = with_channels(upright, channels).resize((W, H), Image.Resampling.BICUBIC, box)
    return np.asarray(pixels).reshape(H, W, channels)


def read_picture(name, config, choose_box=WHOLE_WIDTH):
    """A user's picture at the size of a model's Config, a tensor [H,W,C]; without a `choose_box`,
    as much of it as fits. Raises UserError."""
    try:
        return torch.tensor(read_pixels(name, lambda w, h: choose_box(w, h, None, config.image),
                                        config.image, config.channels))
    except (OSError, ValueError) as error:
        raise UserError(f"--predict {name} cannot be read: {error}") from error


# --------------------------------------------------------------------------------------
# Augmentations of finetuning
# --------------------------------------------------------------------------------------

def outside(image):
    """The colour that comes in from outside: ImageNet's mean (as timm's)."""
    return 116 if image.mode == "L" else tuple(round(255 * mean) for mean in IMAGENET_MEAN)


def moved(image, *matrix):
    """An image through an affine map (a, b, c, d, e, f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                           fillcolor=outside(image))


def enhanced(kind):
    """An operation that multiplies colour, contrast, brightness or sharpness by 0.1 to 1.9."""
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


# Of an image, a level from 0 to 1 and a sign: timm's "increasing" set, of MAE's finetuning
OPERATIONS = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=outside(image)),
    "posterize": lambda image, level, sign: ImageOps.posterize(
        image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign: image.point(
        [min(255, i + int(110 * level)) if i < 128 else i for i in range(256)]
        * len(image.getbands())),
    "colour": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: moved(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: moved(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    "translate_x": lambda image, level, sign: moved(
        image, 1, 0, sign * 0.45 * level * image.width, 0, 1, 0),
    "translate_y": lambda image, level, sign: moved(
        image, 1, 0, 0, 0, 1, sign * 0.45 * level * image.height)}


def rand_augment(pixels, seed, position, magnitude):
    """RandAugment (arXiv 1909.13719) of pixels uint8 [H,W,1 or 3]: two operations of OPERATIONS,
    drawn with replacement, each done with probability 0.5.

    The level of each is N(magnitude, 0.5) within 0 … 10, over 10: timm's "rand-m9-mstd0.5-inc1" for
    9, MAE's finetuning. A pure function of the position."""
    image = Image.fromarray(pixels.squeeze())
    numbers = uniform(seed, np.array([position]), "randaugment", 10).reshape(2, 5)
    for which, done, a, b, sign in numbers.tolist():
        if done < 0.5:
            normal = math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)    # Box, Muller
            level = min(max(magnitude + 0.5 * normal, 0), 10) / 10
            operation = list(OPERATIONS.values())[int(which * len(OPERATIONS))]
            image = operation(image, level, 1 if sign < 0.5 else -1)
    return np.asarray(image).reshape(pixels.shape)


def erase(images, position, seed, share):
    """Random erasing (arXiv 1708.04896): in a `share` of images [B,C,H,W] a rectangle of 2% to a
    third of the area, of an aspect from 0.3 to 3.3, becomes normal noise (timm's, MAE's)."""
    B, C, H, W = images.shape
    numbers = uniform(seed, position, "erase", 23)                          # [B,23]
    area = H * W * (0.02 + (1 / 3 - 0.02) * numbers[:, :10])                # [B,10]: ten tries
    aspect = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * numbers[:, 10:20])
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()   # [B,10]
    fits = (h < H) & (w < W)
    first = fits.int().argmax(1, keepdim=True)                              # [B,1]
    h, w, fits = (value.gather(1, first) for value in (h, w, fits))
    top = (numbers[:, 20:21] * (H - h + 1)).floor()                         # [B,1]
    left = (numbers[:, 21:22] * (W - w + 1)).floor()
    y, x = (torch.arange(side, device=images.device) for side in (H, W))
    inside = (((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None]
              & (fits & (numbers[:, 22:] < share))[..., None])              # [B,H,W]
    noise = uniform(seed, position, "erased pixels", C * H * W) + 2.0 ** -25    # [B,C*H*W]
    noise = math.sqrt(2) * torch.erfinv(2 * noise - 1)
    return torch.where(inside[:, None], noise.reshape(images.shape), images)


class Samples(Dataset):
    """What stands at given positions: positions [B] to a batch of pixels.

    `choose_box(width, height, numbers, size)` is the crop; augment(pixels [H,W,C], seed, position)
    changes what was cropped. In training the order is shuffled and an
    image that cannot be read is replaced, by one that depends on the position alone; in validation
    (shuffle=False) it has weight 0, as have positions past the end, which fill up batches.
    `features` [n,D], a row a sample, stand for the pixels where they are given."""

    def __init__(self, source, size, channels, choose_box, seed=0, shuffle=True,
                 max_pixels=178_956_970, augment=None, features=None):
        self.source, self.size, self.channels, self.choose_box = source, size, channels, choose_box
        self.features = features
        self.seed, self.max_pixels, self.augment = seed, max_pixels, augment
        self.order = Order(source.chunks, seed) if shuffle else None

    def candidates(self, position, i):
        """Sample i, then, in training, those at the same place of ten epochs to come."""
        yield i
        for later in range(1, 11) if self.order else ():
            yield int(self.order(np.array([position + later * len(self.source)]))[0])

    def pixels(self, sample, numbers, position):
        """What is seen of a sample: uint8 [H,W,C]."""
        box = functools.partial(self.choose_box, numbers=numbers, size=self.size)
        pixels = read_pixels(sample["image"], box, self.size, self.channels, self.max_pixels)
        return self.augment(pixels, self.seed, position) if self.augment else pixels

    def __getitems__(self, positions):
        """Returns {"images": uint8 [B,H,W,C] or features, "position": int64 [B], "label": int64 [B]
        (-1: none), "tags": int64 [B,k] (the "numbers" of Tagged or Captioned, filled up with -1),
        "weight": float32 [B], "bad": [(position, where, why)]}."""
        positions = np.asarray(positions, dtype=np.int64)
        count = len(self.source)
        index = self.order(positions) if self.order else positions
        numbers = uniform(self.seed, positions, "crop", 22).tolist()
        shape, kind = (*self.size, self.channels), np.uint8
        if self.features is not None:
            shape, kind = self.features.shape[1:], np.float32
        images = np.zeros((len(positions), *shape), kind)
        labels, weights, bad = np.full(len(positions), -1), np.zeros(len(positions)), []
        tags = [[] for _ in positions]
        for row, (position, i) in enumerate(zip(positions.tolist(), index.tolist())):
            if i >= count:
                continue
            for i in self.candidates(position, i):
                try:
                    sample = self.source.open(i)
                    images[row] = self.pixels(sample, numbers[row], position) \
                        if self.features is None else self.features[i]
                except UserError as error:      # a shard is gone or changed: nothing to replace
                    return {"fault": str(error)}
                except Exception as error:      # what decoders raise on damage has no common class
                    why = f"{type(error).__name__}: {error}".split("\n")[0]
                    bad.append((position, self.source.about(i)["where"], why))
                    continue
                labels[row], weights[row] = sample.get("label", -1), 1
                tags[row] = sample.get("numbers", [])
                break
        most = max(map(len, tags), default=0)
        tags = [some + [-1] * (most - len(some)) for some in tags]
        return {"images": torch.from_numpy(images), "position": torch.from_numpy(positions),
                "label": torch.from_numpy(labels), "targets": torch.tensor(tags, dtype=torch.int64),
                "weight": torch.from_numpy(weights).float(), "bad": bad}


# ======================================================================================
# From workers to the device
# ======================================================================================

def training_positions(first_step, steps, batch, micro, rank, world):
    """The positions of every micro-batch of one rank, in order.

    Step t is positions t*batch … (t+1)*batch-1; rank r has the r-th part, `micro` at a time."""
    share = batch // world
    for step in range(first_step, steps):
        begin = step * batch + rank * share
        for at in range(begin, begin + share, micro):
            yield np.arange(at, at + micro)


def validation_positions(count, micro, rank, world):
    """Positions 0 … count-1 dealt to ranks in micro-batches, as many for every rank (a sharded
    model's ranks must call it equally often); the last ones may lie past the end."""
    micro = min(micro, math.ceil(count / world))
    for at in range(0, count, micro * world):
        yield np.arange(at + rank * micro, at + (rank + 1) * micro)


def as_it_is(batch):
    return batch


def prepare_worker(number):
    """In a worker: leave signals to the training process, use one thread, keep Pillow quiet."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def load(samples, positions, workers, device):
    """Iterate over the batches at `positions` (an iterable of arrays), read ahead by workers.

    Raises UserError where the data are not any longer what they were at the start."""
    for batch in DataLoader(samples, batch_sampler=positions, num_workers=workers,
                            collate_fn=as_it_is, pin_memory=device.type == "cuda",
                            prefetch_factor=4 if workers else None,
                            worker_init_fn=prepare_worker):
        if "fault" in batch:
            raise RankError(batch["fault"])
        yield batch


def training_batches(samples, args, first_step, schedule, device):
    """Iterate over the batches of this rank from a step on, `schedule.accumulate` for each step."""
    positions = training_positions(first_step, schedule.steps, args.batch, schedule.micro_batch,
                                   get_rank(), get_world_size())
    return load(samples, positions, args.workers, device)


def unshuffled(source, args, config, choose_box=centre_crop):
    """The images of a source one after another, for an evaluation."""
    return Samples(source, config.image, config.channels, choose_box, shuffle=False)


def examples(samples, device, count=8):
    """A batch of pictures from all over a source, to be shown."""
    last = len(samples.source) - 1
    spread = np.linspace(0, last, min(count, last + 1)).astype(np.int64)
    return next(load(samples, [spread], 0, device))


def validate(val, args, device):
    """Every image of --val once, whatever the ranks: yields (images [B,C,H,W], normalised; batch).

    Those that cannot be read have no weight; at the end they are listed in
    OUT/bad_val_samples.txt. Raises UserError where none can be read."""
    seen, bad = torch.zeros(1), []
    positions = validation_positions(len(val.source), args.micro_batch, get_rank(),
                                     get_world_size())
    for batch in load(val, positions, args.workers, device):
        seen, bad = seen + batch["weight"].sum(), bad + batch["bad"]
        yield normalise(batch["images"].to(device)), batch
    bad = list_bad(args, bad, "bad_val_samples.txt", "w")
    if not all_reduce_sum(seen):
        raise UserError(f"none of the {len(bad)} images of --val can be read: the last: "
                        f"{bad[-1][1]}: {bad[-1][2]}")


def flip(images, numbers):
    """Mirror those of images [B,H,W,C] whose number [B,1] is below a half."""
    return torch.where(numbers[..., None, None] < 0.5, images.flip(2), images)


@lru_cache      # each copy to a GPU would make the host wait
def statistics(channels, device):
    """Mean and standard deviation of pixels in 0 … 1, [C,1,1] each: ImageNet's; grey has their
    averages, alpha a half (ours)."""
    means = {1: (0.449,), 3: IMAGENET_MEAN, 4: (*IMAGENET_MEAN, 0.5)}[channels]
    stds = {1: (0.226,), 3: IMAGENET_STD, 4: (*IMAGENET_STD, 0.5)}[channels]
    return tuple(torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (means, stds))


def normalise(images):
    """Pixels uint8 [B,H,W,C] to float32 [B,C,H,W] with zero mean and unit variance on ImageNet."""
    mean, std = statistics(images.shape[-1], images.device)
    # Bytes are put in order and floats changed in place: seven times as fast as the plain formula.
    return images.permute(0, 3, 1, 2).contiguous().float().mul_(1 / (255 * std)).sub_(mean / std)


def denormalise(images):
    """The inverse of normalise: float [B,C,H,W] to uint8 [B,H,W,C]."""
    mean, std = statistics(images.shape[1], images.device)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def most_probable(model, pixels, args, device, names, k=5):
    """What a model thinks pictures [B,H,W,C] most probably are: [[(name, probability)]], k of each.
    Every rank has to call it."""
    with autocast(args, device):
        logits = torch.cat([model(normalise(part.to(device)))
                            for part in pixels.split(args.micro_batch)]).float()    # [B,K]
    chances = logits.sigmoid() if args.loss == "bce" else logits.softmax(1)
    top = chances.topk(min(k, len(names)))
    return [[(names[i], chance) for i, chance in zip(*row)]
            for row in zip(top.indices.tolist(), top.values.tolist())]


def print_predictions(model, config, args, device, names, choose_box=WHOLE_WIDTH):
    """--predict: what the user's pictures most probably are."""
    for name in args.predict:
        pixels = read_picture(name, config, choose_box)
        best, = most_probable(model, pixels[None], args, device, names)
        rank0_print(f"{name}: " + ", ".join(f"{word} {chance:.3f}" for word, chance in best))


def draw_predictions(model, batch, args, device, names):
    """Draw a batch's pictures, what they are and what a model thinks they are, right answers green,
    into OUT/predictions.png. Every rank has to call it."""
    side, pixels = 112, batch["images"]
    predicted = most_probable(model, pixels, args, device, names)
    sheet = Image.new("RGB", (620, len(pixels) * (side + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (image, numbers, best) in enumerate(zip(pixels.numpy(), batch["targets"], predicted)):
        right = [names[i] for i in numbers.tolist() if i >= 0]
        top, picture = row * (side + 8) + 4, Image.fromarray(image[..., :3].squeeze())
        scale = side / max(picture.size)
        picture = picture.resize([max(1, round(length * scale)) for length in picture.size], 0)
        sheet.paste(picture, (4, top))
        draw.text((side + 16, top), "true: " + ", ".join(right), "black")
        for line, (name, chance) in enumerate(best, 1):
            draw.text((side + 16, top + 18 * line), f"{chance:.2f}  {name}",
                      "#108030" if name in right else "#606060")
    if environment().rank == 0:
        write_aside(Path(args.out) / "predictions.png", lambda aside: sheet.save(aside, "PNG"))




# ======================================================================================
# Commands
# ======================================================================================

def info(args):
    """What is there: samples, classes, tags, sizes and modes of up to 1,000, evenly spread."""
    source = open_data(*args.spec, index_dir=args.index_dir)
    count, sizes, modes, tags, bad = len(source), [], Counter(), [], 0
    looked = np.linspace(0, count - 1, min(count, 1000)).astype(int).tolist()
    for i in looked:
        tags.append(source.about(i).get("tags", []))
        try:
            image = source.open(i)["image"]
            if not isinstance(image, dict):
                with open_image(image) as image:
                    sizes.append(image.size)
                    modes[f"{image.format} {image.mode}"] += 1
        except UserError:
            raise
        except Exception:
            bad += 1
    print(f"{count:,} samples, {len(source.classes)} classes: {' '.join(source.classes[:12])}"
          f"{' …' if len(source.classes) > 12 else ''}")
    result = {"samples": count, "classes": len(source.classes), "looked_at": len(looked),
              "modes": modes, "unreadable": bad}
    if sizes:
        widths, heights = np.array(sizes).T
        result["width"], result["height"] = ([int(q) for q in np.percentile(side, (0, 50, 100))]
                                             for side in (widths, heights))
        print(f"of {len(looked)} looked at: width {result['width']} height {result['height']} "
              f"(least, median, most); {dict(modes)}; {bad} unreadable")
    counted = Counter(tag for some in tags for tag in some).most_common()
    if counted:
        result["tags_per_image"] = round(sum(map(len, tags)) / len(tags), 3)
        result["different_tags"], result["head"] = len(counted), counted[:8]
        result["tags_seen_once"] = sum(n == 1 for _, n in counted)
        print(f"{result['tags_per_image']} tags an image, {sum(not some for some in tags)} of "
              f"{len(tags)} without; {len(counted)} different, {result['tags_seen_once']} of them "
              f"once; head: {' '.join(f'{tag} ({n})' for tag, n in counted[:8])}; tail: "
              f"{' '.join(f'{tag} ({n})' for tag, n in counted[-4:])}")
    print(json.dumps(result))


def verify(args):
    """Decode everything on all cores and list what is bad; exit code 1 where something is."""
    source = open_data(*args.spec, index_dir=args.index_dir)
    count, begun, bad = len(source), time.perf_counter(), 0
    positions = list(validation_positions(count, 64, 0, 1))
    batches = load(Samples(source, (32, 32), 3, whole, shuffle=False), positions,
                   args.workers or cpu_cores(), torch.device("cpu"))
    for batch in tqdm(batches, total=len(positions), disable=not sys.stderr.isatty()):
        bad += len(batch["bad"])
        for _, where, why in batch["bad"]:
            print(f"bad: {where}: {why}")
    damage = sum(number for one in source.sources for what, number in one.left_out.items()
                 if what in DAMAGE)
    print(json.dumps({"samples": count, "bad": bad, "damage": damage, "images_per_second": round(
        count / (time.perf_counter() - begun), 1)}))
    raise SystemExit(1 if bad or damage else 0)


class Packing(Dataset):
    """Item k writes shard k of `pack`: a list of (where, why) of what could not be packed."""

    def __init__(self, source, out, size, short):
        self.source, self.out, self.size, self.short = source, out, size, short

    def __len__(self):
        return math.ceil(len(self.source) / self.size)

    def __getitem__(self, k):
        path, bad = self.out / f"{k:05d}.tar", []

        def write(aside):
            with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
                for i in range(k * self.size, min((k + 1) * self.size, len(self.source))):
                    try:
                        about = self.source.about(i)
                        ending, content = encode(self.source.open(i)["image"], self.short)
                    except UserError:           # not this sample's fault
                        raise
                    except Exception as error:
                        bad.append((about["where"], f"{type(error).__name__}: {error}"))
                        continue
                    record = {key: about[key] for key in ("tags", "where") if about.get(key)}
                    if "label" in about:
                        record["label"] = self.source.classes[about["label"]]
                    if (caption := self.source.caption(i)) is not None:
                        record["caption"] = caption
                    for end, part in ((ending, content), ("json", json.dumps(record).encode())):
                        member = tarfile.TarInfo(f"{i:09d}.{end}")
                        member.size = len(part)
                        tar.addfile(member, io.BytesIO(part))

        try:
            if not path.exists():
                write_aside(path, write)
        except UserError as error:              # its traceback stays here
            return [("fault", str(error))]
        return bad


def encode(image, short):
    """An image as (ending, bytes of a file). JPEG, PNG, WebP and GIF stay as they are, unless their
    shorter side is over `short`; the rest becomes JPEG of quality 90. The world is drawn at `short`
    or 224, as PNG."""
    file = io.BytesIO()
    if isinstance(image, dict):
        Image.fromarray(draw(image, short or 224, short or 224)).save(file, "PNG")
        return "png", file.getvalue()
    content = image.read() if hasattr(image, "read") else Path(image).read_bytes()
    opened = open_image(io.BytesIO(content))
    ending = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp",
              "GIF": "gif"}.get(opened.format)
    scale = max(1, min(opened.size) / short) if short else 1
    if ending and scale == 1:
        return ending, content
    size, exif = [round(side / scale) for side in opened.size], Image.Exif()
    exif[0x0112] = opened.getexif().get(0x0112, 1)
    opened.draft(None, size)
    plain = opened.mode in ("RGB", "L") and "transparency" not in opened.info
    pixels = opened if plain else with_channels(opened, 3)
    pixels.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, exif=exif)
    return "jpg", file.getvalue()


def pack(args):
    """Write any source as tar shards, with labels (by name), tags and captions in .json.

    Begun again, it goes on: a shard is either whole or not there."""
    out = Path(args.out)
    for spec in args.spec:
        if os.path.isdir(spec) and Path(spec).resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"OUT {out} is inside {spec}, which is packed; choose another folder")
    source = open_data(*args.spec, index_dir=args.index_dir)
    out.mkdir(parents=True, exist_ok=True)
    plan, note = {"data": source.fingerprint(), "shard_size": args.shard_size,
                  "resize": args.resize}, out / "pack.json"
    if note.exists() and read_json(note) != plan:
        raise UserError(f"{out} holds shards of something else: {note.read_text()}; choose another "
                        "folder")
    for torn in out.glob("*.tmp"):
        torn.unlink()
    if not note.exists() and any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards already; choose another folder")
    write_aside(note, lambda path: path.write_text(json.dumps(plan)))
    shards = Packing(source, out, args.shard_size, args.resize)
    begun, workers = time.perf_counter(), min(len(shards), args.workers or cpu_cores())
    for bad in tqdm(DataLoader(shards, batch_size=None, num_workers=workers, prefetch_factor=1,
                               worker_init_fn=prepare_worker), disable=not sys.stderr.isatty()):
        for where, why in bad:
            if where == "fault":
                raise UserError(why)
            print(f"left out: {where}: {why}")
    packed = len(open_data(out / "*.tar", index_dir=args.index_dir))
    print(json.dumps({"samples": packed, "left_out": len(source) - packed, "shards": len(shards),
                      "seconds": round(time.perf_counter() - begun, 1)}))


def obvious_pipeline(image, numbers, size):
    """What one writes first: decode all of it, crop, resize, to float, normalise: [C,H,W]."""
    with Image.open(image) as opened:
        box = random_resized_crop(*opened.size, numbers, size)
        pixels = opened.convert("RGB").crop([round(side) for side in box])
    pixels = pixels.resize(size[::-1], Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy()).float() / 255
    return (values - torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)) \
        / torch.tensor(IMAGENET_STD).reshape(3, 1, 1)


def bench(args):
    """Images a second of the training pipeline; without workers, beside the obvious pipeline."""
    source, size = open_data(*args.spec, index_dir=args.index_dir), image_size(args)
    samples = Samples(source, size, 3, random_resized_crop)
    torch.set_num_threads(1)
    drawn = any(isinstance(one, World) for one in source.sources)
    by_workers, batch, result = {}, 32, {}
    for workers in args.workers:
        ours, obvious = [], []
        positions = training_positions(0, 1 << 40, batch, batch, 0, 1)
        batches = load(samples, positions, workers, torch.device("cpu"))
        next(batches)
        deadline = time.perf_counter() + args.seconds
        while time.perf_counter() < deadline or len(ours) < 3:
            begun = time.perf_counter()
            read = next(batches)
            normalise(read["images"])
            ours.append(time.perf_counter() - begun)
            if read["bad"]:
                raise UserError(f"{read['bad'][0][1]} cannot be read: take out what verify lists")
            if drawn or workers:
                continue
            positions = read["position"].numpy()
            numbers = uniform(0, positions, "crop", 22).tolist()
            begun = time.perf_counter()
            torch.stack([obvious_pipeline(source.open(i)["image"], number, size)
                         for i, number in zip(samples.order(positions).tolist(), numbers)])
            obvious.append(time.perf_counter() - begun)
        # With workers a median would only see batches that were ready: the mean counts all time.
        by_workers[workers] = round(float(batch / (np.mean if workers else np.median)(ours)), 1)
        print(f"{workers} workers: {by_workers[workers]} images/s")
        if obvious:
            result["obvious_images_per_second"] = round(float(batch / np.median(obvious)), 1)
            result["ratio"] = round(float(np.median(np.divide(obvious, ours))), 2)
    print(json.dumps({"image_size": list(size), "by_workers": by_workers,
                      "images_per_second": max(by_workers.values()), **result}))


def image_size(args):
    """--image-size as (height, width)."""
    if len(args.image_size) > 2:
        raise UserError(f"--image-size takes one or two numbers; found {args.image_size}")
    return args.image_size[0], args.image_size[-1]


def world(args):
    """Draw a sheet of the built-in world, with what it says of each picture."""
    source, (height, width), columns, rows = open_data(args.split), image_size(args), 6, 4
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), "white")
    for i in range(columns * rows):
        sample = source.open(args.first + i)
        picture = Image.fromarray(draw(sample["image"], height, width))
        sheet.paste(picture, (i % columns * (width + 4), i // columns * (height + 4)))
        print(f"{i}: {source.classes[sample['label']]}: {source.caption(args.first + i)}; "
              f"{' '.join('#' + tag for tag in sample['tags'])}")
    write_aside(Path(args.out), lambda path: sheet.save(path, "PNG"))
    print(f"wrote {args.out}")
    if args.facts:
        print(json.dumps(facts()))


def not_negative(text):
    """The type of flags that take a whole number of 0 or more."""
    return positive(text) if int(text) else 0


def main(argv):
    parser = argparse.ArgumentParser(
        prog="data.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="info | verify | pack | bench | world")
    for command in (info, verify, pack, bench, world):
        sub = commands.add_parser(command.__name__, help=command.__doc__.split("\n")[0],
                                  description=command.__doc__, allow_abbrev=False)
        sub.set_defaults(command=command)
        add = sub.add_argument
        if command is not world:
            add("spec", nargs="+", metavar="SPEC",
                help="world, world:COUNT, a folder, .tar shards, a .jsonl or .csv")
            add("--index-dir", metavar="DIR", help="where indexes of shards are kept; default: "
                "beside the shards, or in the temporary folder where one may not write")
        if command is pack:
            add("out", metavar="OUT", help="the folder for the shards")
            add("--shard-size", type=positive, default=10_000, metavar="SAMPLES",
                help="samples a shard; default 10,000")
            add("--resize", type=positive, metavar="PIXELS",
                help="make the shorter side this long where it is longer; default: keep the files")
        if command in (verify, pack):
            add("--workers", type=not_negative, default=0, help="processes; default 0: all cores")
        if command is bench:
            add("--workers", type=not_negative, nargs="+", default=[0],
                help="processes, several numbers for several timings; default 0: this one alone")
            add("--seconds", type=float, default=20, help="length of a timing; default 20")
        if command in (bench, world):
            add("--image-size", type=positive, nargs="+", default=[224], metavar="PIXELS",
                help="side, or height and width; default 224")
        if command is world:
            add("--split", choices=WORLD_COUNTS, default="world", help="default world")
            add("--first", type=not_negative, default=0, help="number of the first; default 0")
            add("--out", default="world.png", help="the sheet; default world.png")
            add("--facts", action="store_true",
                help="also print what is known of the tags, as JSON")
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    run(main)
