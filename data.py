"""Data: where images come from, in what order, how they are decoded and cropped.

A position p = 0, 1, 2, … counts the images of a run over all its epochs. The heart of this file are
two pure functions of the position: `Order` says which sample is at p, `uniform` gives all its
random numbers. So what a run trains on depends neither on the number of ranks and workers nor on
interruptions, and no random generator's state is saved anywhere.

    python data.py info SPEC…                     what is there: samples, classes, tags, sizes
    python data.py verify SPEC…                   decode everything and list what is bad
    python data.py pack SPEC… OUT                 write tar shards of 10,000 samples
    python data.py bench SPEC… --image-size 224   measure images per second
    python data.py world --out world.png          draw a sheet of the built-in world

A SPEC is one of
    world, world:COUNT, world-val, …              the built-in world: drawn, not downloaded
    photos/                                       a folder: every image below it; the class is the
                                                  first folder level. If it holds only tars: those
    x.tar  'x-{000..127}.tar'  'dir/*.tar'        shards in WebDataset's layout: 7.jpg with 7.json
                                                  (label, tags, caption), 7.cls, 7.txt (caption)
    x.jsonl  x.csv                                a manifest: image (a path), label, tags, caption
"""

import argparse
import ast
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
import signal
import sys
import tarfile
import time
import warnings
import zlib
from bisect import bisect
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from vit import (
    Parser, RankError, UserError, all_gather_objects, all_reduce_sum, autocast, cpu_cores,
    environment, get_rank, get_world_size, list_bad, number, on_rank_0, positive, rank0_print,
    read_json, run, stop_signals, write_aside)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif",
                 ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga")
warnings.filterwarnings("ignore", "This DataLoader will create")     # more workers than cores
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ======================================================================================
# Order and randomness: pure functions of the position
# ======================================================================================

# The constants of splitmix64 (Steele, Lea, Flood 2014): BF58476D1CE4E5B9, 94D049BB133111EB and
# 9E3779B97F4A7C15 as int64
MIX_A, MIX_B, GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


def splitmix64(x):
    """splitmix64's finalizer, a hash of each int64: a bijection; every bit depends on all bits."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed, position, stream, n):
    """Random numbers in [0, 1), float32 [..., n], for int64 positions [...]: a pure function.

    `position` is a numpy array or a tensor on any device, with equal results; `stream` is a word
    that names the use ("crop", "mask"), so that uses do not share numbers."""
    key = zlib.crc32(f"{seed}/{stream}".encode())
    count = torch.arange(n, device=position.device) if torch.is_tensor(position) else np.arange(n)
    hashed = splitmix64(splitmix64(position) + key)[..., None]
    bits = (splitmix64(hashed + count * GOLDEN) >> 40) & 0xFFFFFF           # the upper 24
    return (bits if torch.is_tensor(bits) else bits.astype(np.float32)) * 2.0 ** -24


def permute(index, size, key):
    """A pseudorandom permutation of 0 … size-1, evaluated at int64 `index` [n], without a table.

    A Feistel network permutes 0 … 4^k-1, the next power of 4. A result outside 0 … size-1 is
    permuted again until it is inside (cycle walking; fewer than four rounds on average)."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    result, todo = np.array(index, dtype=np.int64), np.arange(len(index))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for i in range(6):
            left, right = right, left ^ (
                splitmix64(splitmix64(right + (i << 40)) ^ key) >> 20) & mask
        result[todo] = left << half | right
        todo = todo[result[todo] >= size]
    return result


class Order:
    """Which sample, 0 … n-1, is at a position of a run: a pure function.

    `chunks` are the numbers of samples that are stored together: the shards. Each epoch is another
    permutation of all samples. It permutes the chunks, deals them to windows of about a million
    samples (of 64 chunks or more, 128 at most: so many shards are kept open), and permutes the
    samples inside each window. So reads stay within a window's shards, and memory holds no list
    longer than that of the chunks. Inside a window the order does not depend on how the data are
    cut into chunks.

    Example: chunks of [2, 2, 1, 1] samples and two windows. The permuted chunks are 2 0 | 3 1, in
    the order of the listing 0 2 | 1 3, with the samples 0 1 4 | 2 3 5. The samples inside each
    window are permuted, to 4 0 1 | 3 5 2: these are at positions 0 to 5."""

    def __init__(self, chunks, seed):
        self.chunks, self.key = np.asarray(chunks, np.int64), zlib.crc32(f"{seed}/order".encode())
        self.starts, self.total = np.cumsum(self.chunks) - self.chunks, int(np.sum(chunks))
        self.windows = max(1, min(self.total >> 20, len(self.chunks) // 64),
                           math.ceil(len(self.chunks) / 128))

    @lru_cache(16)      # a batch, and what replaces its bad images, needs fewer
    def epoch(self, number):
        """(permuted chunks, where the samples of each end, where each window begins)."""
        count = len(self.chunks)
        key = splitmix64(splitmix64(np.array([number])) + ~self.key)
        chunks = permute(np.arange(count), count, key)
        bounds = np.arange(self.windows + 1) * count // self.windows
        chunks = np.concatenate([np.sort(window) for window in np.split(chunks, bounds[1:-1])])
        ends = np.cumsum(self.chunks[chunks])
        return chunks, ends, np.append(0, ends)[bounds]

    def __call__(self, positions):
        """The samples at int64 `positions` [n]: int64 [n]."""
        epochs, places = np.divmod(positions, self.total)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chunks, ends, begins = self.epoch(epoch)
            windows = np.searchsorted(begins, places, "right") - 1
            for w in np.unique(windows[epochs == epoch]).tolist():
                rows = np.flatnonzero((epochs == epoch) & (windows == w))
                key = splitmix64(splitmix64(np.array([epoch])) + self.key + w)
                size = int(begins[w + 1] - begins[w])
                places_now = begins[w] + permute(places[rows] - begins[w], size, key)
                which = np.searchsorted(ends, places_now, "right")
                before = ends[which] - self.chunks[chunks[which]]
                samples[rows] = self.starts[chunks[which]] + places_now - before
        return samples


# ======================================================================================
# The built-in world: pictures of one large patterned shape, made from a number
#
# scene() says what is in picture i, draw() paints it at any size and crop, so that every stage runs
# without a download. Lengths are fractions of the image's side. All of it is ours.
# ======================================================================================

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


def world_classes(which="seen"):
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


def scene(i, split="train"):
    """What is in picture i of a split, as a dict of plain values. Each split ("train", "val",
    "test", "novel", "labelled") has its own stream of random numbers: no overlap."""
    u = uniform(0, np.array([i]), f"world-{split}", 104)[0].tolist()
    # Every number has its place, so that a new one moves none of the others.
    main, others, clutter, field, words = u[:8], u[8:32], u[32:62], u[62:76], u[76:]
    pairs = PAIRS["novel" if split == "novel" else "seen"]
    n = len(pairs)
    # Balanced splits go through all classes in a new order each round; 7 shares no factor with n.
    label = bisect(COMMON_PAIRS, main[0]) if split == "train" else (7 * i + 13 * (i // n)) % n
    radius = 0.30 + 0.15 * main[1]
    edge, turn = radius - 0.10, math.radians(20)        # a tenth may stick out
    x, y = (edge + (1 - 2 * edge) * p for p in main[2:4])
    objects, strokes = [thing(pairs[label], x, y, radius, turn, main[4:])], []
    for k in range(int(2 * field[0])):      # small ones round the rim, partly over it
        a, far, way, pair, *rest = others[8 * k:8 * k + 8]
        small, far, way = 0.10 + 0.04 * a, radius + 0.14 * far, 2 * math.pi * way
        px, py = x + far * math.cos(way), y + far * math.sin(way)
        px, py = (min(max(p, small), 1 - small) for p in (px, py))
        objects.append(thing(PAIRS["seen"][bisect(COMMON_PAIRS, pair)], px, py, small, turn, rest))
    for k in range(int(2 * field[1])):
        px, py, length, hue, way = clutter[5 * k:5 * k + 5]
        strokes.append(thing((-1, 0), px, py, 0.1 + 0.15 * length, math.pi, [hue, 0, way, 0.5]))

    picture = dict(
        label=label, objects=objects, strokes=strokes,
        background=list(BACKGROUNDS)[int(6 * field[2])], contrast=0.4,
        shift=field[3:5], zoom=0.8 + 0.4 * field[5],
        brightness=50 * field[6] - 16, light=[50 * p - 25 for p in field[7:9]],
        noise=4, grain=[int(32 * p) for p in field[9:11]])
    picture["caption"] = caption(picture, field[11:])
    picture["tags"] = hashtags(picture, words)
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


def hashtags(picture, u):
    """Tags as people write them: in part, misspelt, one in ten wrong. u: 28 numbers."""
    main, *others = picture["objects"]
    both = main["texture"] + main["shape"]
    concepts = [        # shape and texture come to mind first
        (main["shape"], 0.75), (main["texture"], 0.6), (main["colours"][0], 0.25),
        (picture["background"], 0.25), (others[0]["shape"] if others else None, 0.3),
        (both if both in SPELLINGS else None, 0.12)]
    verbosity, tags = 0.4 + 1.2 * u[0], []
    for k, (word, chance) in enumerate(concepts):
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
    """What shows of each object at H x W pixels: "objects" (see "Objects in images" below)."""
    found, free = [], np.ones((H, W), np.float32)
    for one in reversed(picture["objects"]):        # from the top one down
        rows, columns, cover, _ = layer(one, H, W, (0.0, 0.0, 1.0, 1.0))
        seen = np.zeros((H, W), np.float32)
        seen[rows, columns] = cover * free[rows, columns]
        free[rows, columns] *= 1 - cover
        mask = seen > 0.5
        if seen.sum() > 0.2 * cover.sum() and mask.any():
            ys, xs = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
            found.append({"bbox": (xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]),
                          "category": one["shape"], "area": int(mask.sum()), "iscrowd": 0,
                          "segmentation": {"size": (H, W), "counts": runs_of_mask(mask)}})
    return found[::-1]


# ======================================================================================
# Sources
#
# source[i] is what is known of sample i of a source, a dict: "where" (for messages),
# "image" (a path, a function that returns the bytes of a file, or a scene of the world) and, as far
# as known, "label" (one of source.classes; where sources are joined, its number), "tags" (words)
# and "caption". It reads the index only, so a damaged image is met later, by whoever reads its
# pixels.
#
# `chunks` are the numbers of samples that are stored together, in the order of the listing: the
# shards. words(c, what) gives the "labels" or "tags" of a chunk without a loop over its samples:
# the different words, codes into these, and where the codes of each sample end. `mark` is a CRC of
# what is listed.
# ======================================================================================

def crc(*parts):
    """One CRC-32 of arrays, bytes and words."""
    value = 0
    for part in parts:
        value = zlib.crc32(part.encode() if isinstance(part, str) else part, value)
    return value


def even_chunks(count, size=1 << 14):
    """The chunks of what is not made of shards."""
    return np.diff(np.append(np.arange(0, count, size), count))


def pack_strings(name, strings):
    """Strings as two columns: one array of bytes, and where each string ends in it.

    Forked workers share arrays. A list of millions of Python objects would be copied page by page,
    since reading an object changes its reference count."""
    strings = [string.encode("utf-8", "surrogateescape") for string in strings]
    return {name: np.frombuffer(b"".join(strings), np.uint8),
            f"{name}_ends": np.cumsum([len(string) for string in strings], dtype=np.int64)}


def locate(i, ends):
    """(Which part item i is in, its number there) of parts that end at `ends`."""
    part = int(np.searchsorted(ends, i, "right"))
    return part, int(i) - (int(ends[part - 1]) if part else 0)


def part_of(values, ends, i):
    """Part i of an array whose parts end at `ends`."""
    return values[ends[i - 1] if i else 0:ends[i]]


def string_at(columns, name, i):
    """String i of columns that pack_strings has made."""
    content = part_of(columns[name], columns[f"{name}_ends"], i)
    return content.tobytes().decode("utf-8", "surrogateescape")


def all_strings(columns, name):
    content, ends = columns[name].tobytes(), columns[f"{name}_ends"].tolist()
    return [content[begin:end].decode("utf-8", "surrogateescape")
            for begin, end in zip([0, *ends], ends)]


def in_label_order(names):
    """Names in the order of their labels: sorted; whole numbers below 100,000 are their own."""
    if names and all(re.fullmatch("0|[1-9][0-9]{0,4}", name) for name in names):
        return [str(i) for i in range(1 + max(map(int, names)))]
    return sorted(names)


def columns_of(samples):
    """Samples (name, label or None, tags, caption or None) as columns, a dict of arrays.

    Labels and tags are numbers of the words in the columns label_words and tag_words."""
    names, labels, tags, ends, captions, label_words, tag_words = [], [], [], [], [], {}, {}
    for name, label, words, caption in samples:
        names.append(name)
        labels.append(-1 if label is None else label_words.setdefault(label, len(label_words)))
        tags += [tag_words.setdefault(word, len(tag_words)) for word in words]
        ends.append(len(tags))
        captions.append(caption or "")
    return {**pack_strings("names", names), **pack_strings("captions", captions),
            "labels": np.array(labels, np.int32), **pack_strings("label_words", label_words),
            "tags": np.array(tags, np.int32), "tag_ends": np.array(ends, np.int64),
            **pack_strings("tag_words", tag_words)}


def sample_at(columns, i):
    """(The name of sample i, what is known of it: a dict of "label", "tags", "caption")."""
    tags, label = part_of(columns["tags"], columns["tag_ends"], i), columns["labels"][i]
    found = {"tags": [string_at(columns, "tag_words", tag) for tag in tags]}
    if label >= 0:
        found["label"] = string_at(columns, "label_words", label)
    if caption := string_at(columns, "captions", i):
        found["caption"] = caption
    return string_at(columns, "names", i), found


def words_of(columns, begin, end, what):
    """The "labels" or "tags" of samples begin … end-1: (words, codes, where each's codes end)."""
    if what == "labels":
        labels = columns["labels"][begin:end]
        return all_strings(columns, "label_words"), labels[labels >= 0], np.cumsum(labels >= 0)
    first = columns["tag_ends"][begin - 1] if begin else 0
    ends = columns["tag_ends"][begin:end]
    return all_strings(columns, "tag_words"), columns["tags"][first:ends[-1]], ends - first


class World:
    """`count` scenes of one split of the built-in world."""

    def __init__(self, split, count):
        self.split, self.chunks, self.mark = split, even_chunks(count), crc(f"{split} {count}")
        self.scene = clip_scene if split.startswith("clips") else scene
        self.classes = [*MOTIONS] if split.startswith("clips") else world_classes(
            "novel" if split == "novel" else "seen")

    def __getitem__(self, i):
        picture = self.scene(i, self.split)
        return {"image": picture, "where": f"world {self.split} {i}", "tags": picture["tags"],
                "label": self.classes[picture["label"]], "caption": picture["caption"]}

    def files(self):
        return iter(())

    def words(self, c, what):
        first = int(np.sum(self.chunks[:c]))
        pictures = [self[i] for i in range(first, first + int(self.chunks[c]))]
        return words_of(columns_of(("", one["label"], one["tags"], None) for one in pictures), 0,
                        len(pictures), what)


class Files:
    """The images of a folder or a manifest, listed in memory; their names are paths from `root`."""

    def __init__(self, root, columns):
        self.root, self.columns, self.mark = root, columns, crc(*columns.values())
        self.chunks = even_chunks(len(columns["labels"]))
        self.classes = in_label_order({*all_strings(columns, "label_words")})

    def __getitem__(self, i):
        name, found = sample_at(self.columns, i)
        path = os.path.join(self.root, name)
        return {"image": path, "where": path, **found}

    def files(self):
        return (os.path.join(self.root, name) for name in all_strings(self.columns, "names"))

    def words(self, c, what):
        first = int(np.sum(self.chunks[:c]))
        return words_of(self.columns, first, first + int(self.chunks[c]), what)


def walk(folder, above=()):
    """Yield the paths of all files below a folder, but not hidden ones and not those of our runs.

    Links are followed, but not to a folder that they are in (`above`, and this one)."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    if above[1:] and {"config.json", "log.jsonl"} <= {entry.name for entry in entries}:
        return rank0_print(f"NOTE: {folder} is passed over: it is the --out of a run")
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from walk(entry.path, above)


def list_folder(root, clips=False):
    """Every image or clip below a folder, sorted by path: the arguments of Files. If there is none:
    the paths of the tars below it. Raises UserError."""
    names, tars, others = [], [], Counter()
    try:
        for path in walk(root):
            ending = os.path.splitext(path)[1].lower()
            if ending in IMAGE_ENDINGS:
                names.append(path.removeprefix(os.path.join(root, "")))
                continue
            others[ending or "no ending"] += 1
            if ending == ".tar":
                tars.append(path)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error
    if not names and tars:
        return sorted(tars)
    others = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(8))
    if not names:
        raise UserError(f"no {'clip' if clips else 'image'} below {root}; found: "
                        f"{others or 'no file'}; looked for {' '.join(IMAGE_ENDINGS)} and .tar")
    if others:
        rank0_print(f"NOTE: other files below {root} are passed over: {others}")

    def class_of(name):     # a name that is not UTF-8 becomes one that can be written anywhere
        *folders, _ = name.encode("utf-8", "backslashreplace").decode().split("/")
        return folders[-1 if clips else 0] if folders else None

    names = clips_among(root, names) if clips else names
    return root, columns_of((name, class_of(name), (), None) for name in sorted(names))


# A hashtag in running text ends at white space, another # or any other punctuation.
HASHTAG = re.compile(r"[#＃]([^\s#＃!\"$%&'()*+,./:;<=>?@\[\\\]^`{|}~、。，！？]+)")
# What reading somebody's .json or .csv raises
RECORD_ERRORS = ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error
# How tables write "no value"; pandas reads these so, too
MISSING = {"", "nan", "NaN", "-nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "null", "NULL", "None"}


def word_of(value):
    """A label, tag, caption or path as a string; None where it is MISSING. 3.0 is "3".

    Raises ValueError for a list or a dict."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"{value!r:.40} is neither a word nor a number")
    word = str(value).strip()
    word = word[:-2] if re.fullmatch(r"\d+\.0", word) else word
    # Half of a surrogate pair becomes ?
    return None if word in MISSING else word.encode("utf-8", "replace").decode()


def words_in(value):
    """The words of a list, also of one that a table holds as text (JSON, or as Python prints it);
    None where the value is no list."""
    for read in (json.loads, ast.literal_eval) if str(value).startswith("[") else ():
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = read(value)
    return [word_of(one) for one in value if word_of(one)] if isinstance(value, list) else None


def read_record(record):
    """(label or None, tags, caption or None) of a dict that somebody has written.

    Tags are a list, or words in one string, or else the hashtags in the caption. Several labels, a
    list, count as tags: stage 3 takes them as the classes of an image. Of several captions, the
    first is taken. Raises RECORD_ERRORS."""
    label, tags, caption = (record.get(name) for name in ("label", "tags", "caption"))
    captions = [] if isinstance(caption, dict) else words_in(caption)
    caption = word_of(caption) if captions is None else next(iter(captions), None)
    if words_in(label) is not None:
        return None, words_in(label), caption
    if isinstance(tags, str) and not tags.startswith("["):
        tags = re.split(r"[\s,;]+", tags)
    if words_in(tags) is None and word_of(tags):
        raise ValueError("tags are a list of words")
    return word_of(label), words_in(tags) or HASHTAG.findall(caption or ""), caption


def read_manifest(path, kind):
    """Yield the samples of a .jsonl or .csv, for columns_of; `kind` "image" or "clip" names their
    paths. Raises UserError."""
    read = 0
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            records = map(json.loads, filter(str.strip, file))
            if path.lower().endswith(".csv"):
                records = csv.DictReader(file, skipinitialspace=True, strict=True)
                if kind not in (records.fieldnames or ()):
                    raise UserError(f"{path} has no column named {kind}; its first line has: "
                                    f"{', '.join(records.fieldnames or ())[:200]}")
            for record in records:
                image = word_of(record.get(kind))
                if image is None:
                    raise ValueError(f"it has no {kind}")
                if None in record:
                    raise ValueError(f"it has more fields than columns: {record[None]}")
                yield image, *read_record(record)
                read += 1
    except RECORD_ERRORS as error:
        raise UserError(f"{path}, record {read + 1}, cannot be read: {type(error).__name__}: "
                        f"{error}") from error


# --------------------------------------------------------------------------------------
# Shards: each is indexed once, then any sample is read by itself
# --------------------------------------------------------------------------------------

INDEX_VERSION = 6
# What is counted when a shard is indexed; the first two are damage
LEFT_OUT = ("damaged places", "shards cut short", "other files", "keys without an image",
            "unreadable records")
# The parts of a sample, and the most bytes of each; what is larger is not read
MOST = {"image": 1 << 30, "cls": 1 << 20, "txt": 1 << 20, "json": 1 << 20}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def tar_members(file, left_out):
    """The regular files of an open tar as (name, offset, size).

    tarfile passes over what is damaged, up to the next sound header (ignore_zeros)."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while member := tar.next():
                # Zeros only are usual: they end a tar, and another may follow.
                skipped = os.pread(file.fileno(), min(member.offset - end, 1 << 20), end)
                left_out["damaged places"] += any(skipped)
                if tar.offset <= end:
                    raise tarfile.ReadError("a member of negative size")
                end = tar.offset
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
                elif not member.isdir():
                    left_out["other files"] += 1
                tar.members.clear()         # or a million of them stay in memory
        left_out["damaged places"] += any(os.pread(file.fileno(), 1 << 20, end))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        left_out["shards cut short"] += 1


def split_name(name):
    """(key, longer key, part of MOST or None) of a member.

    WebDataset's key ends at the first dot of the file's name. The longer key ends at the last dot:
    "IMG" and "IMG.2020.01" of IMG.2020.01.jpg."""
    base = name.rpartition("/")[2]
    stem, longer, ending = base.partition(".")[0], *base.rpartition(".")[::2]
    part = "image" if f".{ending.lower()}" in IMAGE_ENDINGS else ending.lower()
    folder = name[:len(name) - len(base)]
    return folder + stem, folder + longer, part if part in MOST and stem else None


def find_samples(file, left_out, clips):
    """The samples of a tar: dicts of "key" and the places [(offset, size)] of each part.

    As in WebDataset, files with the same key are one sample. They need not stand together. All
    images of a key are the frames of one of the `clips`. Without clips, files whose names have more
    dots keep the longer key, but only where no other file has the key, and where a part comes a
    second time, another sample begins."""
    members = [(*split_name(name), offset, size)
               for name, offset, size in tar_members(file, left_out)]
    if clips:
        members.sort(key=lambda member: natural(member[1]))     # frames by their numbers
    claimed = {key for key, longer, *_ in members if key == longer and not clips}
    samples, last = [], {}
    for key, longer, part, offset, size in members:
        if part is None or key != longer and key in claimed or size > MOST[part]:
            left_out["other files"] += 1
            continue
        name = key if clips else longer
        if name not in last or part in last[name] and not clips:
            last[name] = {"key": name}
            samples.append(last[name])
        last[name].setdefault(part, []).append((offset, size))
    found = [sample for sample in samples if "image" in sample]
    left_out["keys without an image"] += len(samples) - len(found)
    return sorted(found, key=lambda sample: sample["image"])


def read_part(file, offset, size):
    """The bytes of one file in a tar. Raises ValueError where the tar ends before."""
    content = os.pread(file.fileno(), size, offset)
    if len(content) < size:
        raise ValueError("the tar is cut short")
    return content


def index_tar(path, file, clips):
    """The columns of a tar's index: those of columns_of, "places" [n,2] (offset, size) of images,
    where those of each sample end, and "left_out". Raises UserError for a compressed file."""
    if os.pread(file.fileno(), 6, 0).startswith(COMPRESSED):
        raise UserError(f"{path} is compressed: unpack it to a plain .tar (no sample of it could "
                        "be read by itself)")
    left_out = Counter()
    samples = find_samples(file, left_out, clips)

    def read(sample):
        text = {part: read_part(file, *sample[part][-1]).decode("utf-8-sig", "replace").strip()
                for part in ("cls", "txt", "json") if part in sample}
        from_files = {"label": text.get("cls"), "caption": text.get("txt")}
        try:
            record = json.loads(text.get("json", "{}"))
            record.update({name: value for name, value in from_files.items() if value})
            return sample["key"], *read_record(record)
        except RECORD_ERRORS:
            left_out["unreadable records"] += 1
            return sample["key"], *read_record(from_files)

    columns = columns_of(map(read, samples))        # counts what it leaves out, too
    images = [sample["image"] for sample in samples]
    return {**columns, "places": np.array([*itertools.chain(*images)], np.int64).reshape(-1, 2),
            "place_ends": np.cumsum([*map(len, images)], dtype=np.int64),
            "left_out": np.array([left_out[kind] for kind in LEFT_OUT])}


def write_arrays(path, arrays):
    """Write an index, or what else is kept beside indexes. Raises UserError."""
    def write(aside):
        with open(aside, "wb") as file:     # given a name, numpy would append .npz to it
            np.savez(file, **arrays)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_aside(Path(path), write)
    except (OSError, UserError) as error:
        raise UserError(f"{error}; give a folder where you may write (for indexes of shards as "
                        "--index-dir)") from error


def read_arrays(path):
    """Arrays of an .npz of ours, {name: array}; {} where it is missing or damaged."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except Exception:       # what numpy raises on damage has no common class
        return {}


def kept_arrays(path, make):
    """Arrays of the file `path`, or else what make() makes on all ranks, which is kept there."""
    found = on_rank_0(lambda: read_arrays(path))
    if not found:
        found = make()
        on_rank_0(lambda: write_arrays(path, found))
    return found


def index_path(path, index_dir, clips):
    """Where the index of a shard is: beside the shard, or in the folder `index_dir`."""
    ending = "clips.npz" if clips else "index.npz"
    if index_dir is None:
        return f"{path}.{ending}"
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(index_dir, f"{crc(os.fsencode(folder)):08x}-{name}.{ending}")


def size_and_time(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def open_index(path, index_dir, clips):
    """The columns of a shard's index. It is made now where there is none of this version of the
    shard. Raises UserError."""
    index, found = index_path(path, index_dir, clips), size_and_time(path)
    columns = read_arrays(index)
    if columns and columns["stamp"].tolist() == [INDEX_VERSION, *found]:
        return columns
    with open(path, "rb") as file:
        columns = index_tar(path, file, clips)
    if size_and_time(path) != found:
        raise UserError(f"{path} is still being written; start again when it is complete")
    write_arrays(index, {**columns, "stamp": np.array([INDEX_VERSION, *found])})
    return columns


class Shards:
    """Samples of tar shards, images or `clips`, each read by itself with the help of an index.

    `catalogue` has a row for each shard: "paths", "stats" (size and time of change), "counts" and
    "marks" (number and CRC of its samples); and "classes" and "left_out" of all together."""

    def __init__(self, catalogue, index_dir, clips):
        self.catalogue, self.index_dir, self.clips = catalogue, index_dir, clips
        self.chunks, self.ends = catalogue["counts"], np.cumsum(catalogue["counts"])
        self.classes = in_label_order({*all_strings(catalogue, "classes")})
        self.mark = crc(catalogue["counts"], catalogue["marks"])

    @lru_cache(130)     # a window of Order, and what goes over its edges
    def shard(self, s):
        """(path, open file, columns) of shard s. Raises UserError where it has changed."""
        path = string_at(self.catalogue, "paths", s)
        file = open(path, "rb")
        if [*size_and_time(file.fileno())] != self.catalogue["stats"][s].tolist():
            raise RankError(f"{path} is not the file that was indexed: it has changed since, or "
                            "differs between nodes; start again")
        return path, file, open_index(path, self.index_dir, self.clips)

    def __getitem__(self, i):
        s, row = locate(i, self.ends)
        path, file, columns = self.shard(s)
        name, found = sample_at(columns, row)
        images = [functools.partial(read_part, file, *place) for place in
                  part_of(columns["places"], columns["place_ends"], row).tolist()]
        return {"image": images if self.clips else images[0], "where": f"{path}: {name}", **found}

    def files(self):
        return iter(all_strings(self.catalogue, "paths"))

    def words(self, c, what):
        return words_of(self.shard(c)[2], 0, int(self.chunks[c]), what)


def process_pool(count):
    """A pool of processes; Control-C ends them at once, without a traceback from each."""
    return ProcessPoolExecutor(max(1, count), initializer=signal.signal,
                               initargs=(signal.SIGINT, signal.SIG_DFL))


def catalogue_row(path, index_dir, clips):
    """What a catalogue has of a shard, which is indexed if it was not: (number of samples, CRC,
    what was left out, classes)."""
    columns = open_index(path, index_dir, clips)
    return (len(columns["labels"]), crc(*(columns[name] for name in columns if name != "stamp")),
            columns["left_out"].tolist(), all_strings(columns, "label_words"))


def index_shards(paths, index_dir, clips):
    """Index those shards that have no index yet, each rank its part: the "counts", "marks",
    "classes" and "left_out" of a catalogue."""
    found, problem, mine = {}, None, my_part(len(paths), "indexing")
    cores = cpu_cores() // environment().local_world_size
    try:
        with process_pool(cores) as processes:
            work = (functools.partial(catalogue_row, index_dir=index_dir, clips=clips),
                    paths[get_rank()::get_world_size()])
            results = processes.map(*work) if len(mine) > 16 else map(*work)
            found.update(zip(mine, results))
    except (UserError, OSError) as error:
        problem = str(error)
    classes = set().union(*(shard[3] for shard in found.values()))
    found = {s: shard[:3] for s, shard in found.items()}
    # The first message between ranks: whoever has less to index waits here.
    problems, parts, classes = zip(*all_gather_objects((problem, found, classes)))
    if any(problems):
        raise UserError(next(filter(None, problems)))
    found = {s: shard for part in parts for s, shard in part.items()}
    counts, marks, left_out = zip(*(found[s] for s in range(len(paths))))
    return {"counts": np.array(counts), "marks": np.array(marks), "left_out": np.sum(left_out, 0),
            **pack_strings("classes", sorted(set().union(*classes)))}


def sizes_and_times(paths):
    """int64 [n,2]: size and time of change of every file. Raises UserError where one is missing."""
    try:
        with ThreadPoolExecutor(32) as threads:     # over a network, each look is a round trip
            return np.array([*threads.map(size_and_time, paths)])
    except OSError as error:
        raise UserError(f"no shard {error.filename}: {error.strerror}") from error


def open_shards(paths, index_dir, clips=False):
    """Open shards of images or clips, and index those that are not: call it on every rank.

    The catalogue is one file, kept under a CRC of the names, sizes and times of all shards. Where
    it is there, no index is opened until a sample is read."""
    stats = on_rank_0(lambda: sizes_and_times(paths))
    names = pack_strings("paths", paths)
    mark = crc(*names.values(), stats, f"version {INDEX_VERSION} {clips}")
    folder = index_dir or os.path.dirname(os.path.abspath(paths[0]))
    catalogue = kept_arrays(os.path.join(folder, f"{mark:08x}.catalogue.npz"), lambda: {
        **names, "stats": stats, **index_shards(paths, index_dir, clips)})
    left_out = [f"{n:,} {kind}" for n, kind in zip(catalogue["left_out"], LEFT_OUT) if n]
    if left_out:
        rank0_print(f"in {first_of(paths)}: {', '.join(left_out)}")
    return Shards(catalogue, index_dir, clips)


# --------------------------------------------------------------------------------------
# From specs to one source, and which of its samples are used
# --------------------------------------------------------------------------------------

class Joined:
    """Several sources, one after another; classes are joined by name."""

    def __init__(self, sources):
        self.sources = sources
        self.ends = np.cumsum([source.chunks.sum() for source in sources])
        self.chunks = np.concatenate([source.chunks for source in sources])
        self.classes = sources[0].classes if len(sources) == 1 else in_label_order(
            {name for source in sources for name in source.classes})
        self.numbers = {name: i for i, name in enumerate(self.classes)}

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """A line that differs where the data do."""
        marks = " ".join(str(source.mark) for source in self.sources)
        return f"{len(self):,} images (CRC {crc(marks):08x})"

    def files(self):
        """The paths of all files that the images are read from."""
        return itertools.chain.from_iterable(source.files() for source in self.sources)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        which, row = locate(i, self.ends)
        sample = self.sources[which][row]
        if "label" in sample:
            sample["label"] = self.numbers[sample["label"]]
        return sample

    def words(self, c, what):
        which, c = locate(c, np.cumsum([len(source.chunks) for source in self.sources]))
        return self.sources[which].words(c, what)


WORLD_COUNTS = {"world": ("train", 1_000_000), "world-val": ("val", 1_000),
                "world-test": ("test", 1_000), "world-novel": ("novel", 800),
                "world-labelled": ("labelled", 5_000), "world-clips": ("clips", 8_000),
                "world-clips-val": ("clips-val", 400), "world-boxes": ("train", 20_000),
                "world-boxes-val": ("val", 500)}


def is_world(spec):
    """Whether a spec is of the built-in world."""
    return str(spec).partition(":")[0] in WORLD_COUNTS


def choose_val(args, default="world-val"):
    """Give --val its default. Raises UserError where it is needed and has none."""
    if args.val is None and all(map(is_world, args.data)):
        args.val = [default]
    if args.eval_only and not args.val:
        raise UserError("--eval-only needs --val: the images to evaluate on")


def expand_braces(spec):
    """The names that 'x-{000..127}.tar' or 'x-{a,b}.tar' stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", spec)
    if not match:
        return [spec]
    first, last, words = match.groups()
    words = words.split(",") if words else [
        f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [f"{spec[:match.start()]}{word}{rest}" for word in words
            for rest in expand_braces(spec[match.end():])]


def find_source(spec, clips=False):
    """What a spec names, as images or `clips`: the arguments of World or Files, or a list of the
    paths of shards."""
    spec = str(spec)
    if is_world(spec):
        name, _, count = spec.partition(":")
        split, usual = WORLD_COUNTS[name]
        if count and not (count.isdecimal() and int(count)):
            raise UserError(f"{spec}: after the colon comes a number of pictures, as in "
                            f"{name}:{usual}")
        if clips and not split.startswith("clips"):
            raise UserError(f"{spec} has pictures, not clips; world-clips has")
        return split, int(count or usual)
    if os.path.isdir(spec):
        return list_folder(spec, clips)
    if spec.lower().endswith((".jsonl", ".csv")) and os.path.exists(spec):
        kind = "clip" if clips else "image"
        return os.path.dirname(spec), columns_of(read_manifest(spec, kind))
    paths = [spec] if os.path.exists(spec) else [
        path for one in expand_braces(spec)
        for path in (sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one])]
    if not paths or not all(path.lower().endswith(".tar") for path in paths):
        raise UserError(f"no data at {spec}: give a folder, shards (.tar; unpack compressed ones), "
                        f"a manifest (.jsonl .csv) or one of {' '.join(WORLD_COUNTS)}")
    return paths


def open_data(*specs, index_dir=None, clips=False):
    """Open sources of images or `clips` by their specs, joined to one (see "Sources" above): call
    it on every rank.

    Indexes of shards are kept beside them, or in `index_dir`. Raises UserError where a spec names
    nothing."""
    sources = []
    found_all = on_rank_0(lambda: [find_source(spec, clips) for spec in specs])
    for spec, found in zip(specs, found_all):
        if isinstance(found, list):
            sources.append(open_shards(found, index_dir, clips))
        else:
            sources.append((World if is_world(spec) else Files)(*found))
        if not sources[-1].chunks.sum():
            raise UserError(f"no image in {spec}")
    source = Joined(sources)
    rank0_print(f"{first_of(specs)}: images: {len(source):,}; classes: "
                f"{first_of(source.classes, 12) or 'none'}")
    if source.classes and {*source.classes} <= {"train", "training", "val", "validation", "test"}:
        rank0_print(f"NOTE: these classes look like parts of a data set: give {specs[0]}/"
                    f"{source.classes[0]} to use one of them")
    return source


def first_of(names, most=1):
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def progress(steps, what, unit="batch", total=None):
    """Iterate over steps with a bar: on rank 0, if stderr is a terminal."""
    return tqdm(steps, what, total, unit=unit, leave=False, dynamic_ncols=True,
                disable=get_rank() > 0 or not sys.stderr.isatty())


def my_part(count, what):
    """The numbers below `count` that this rank works through, with a bar."""
    return progress(range(get_rank(), count, get_world_size()), what, "part")


def pairs(source, c, number_of, what="tags"):
    """Which samples of a chunk have which words: (rows, numbers), int64 [m] each, sorted, each pair
    once. number_of(word) is the number of a "tags" or "labels" word; -1: it does not count."""
    words, codes, ends = source.words(c, what)
    numbers = np.array([number_of(word) for word in words] or [-1], np.int64)[codes]
    rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    both = np.unique((rows << 32 | numbers)[numbers >= 0])
    return both >> 32, both & 0xFFFFFFFF


class Rows:
    """The samples of a source that are used, some of them several times: rows[i] is a number in the
    source.

    times(c) is how often each sample of chunk c is used, int64 [n]. Memory holds its sum for each
    chunk, and what was used last: enough for billions of samples. Ranks share the summing, so call
    it on every rank, or give the `sums`."""

    def __init__(self, source_chunks, times, sums=None):
        self.times, self.starts = times, np.cumsum(source_chunks) - source_chunks
        if sums is None:
            sums = torch.zeros(len(source_chunks), dtype=torch.int64)
            for c in my_part(len(source_chunks), "choosing images"):
                sums[c] = int(times(c).sum())
            sums = all_reduce_sum(sums).numpy()
        self.chunks, self.ends = sums, np.cumsum(sums)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        c, place = locate(i, self.ends)
        return int(self.starts[c]) + locate(place, self.summed(c))[0]

    @lru_cache(1024)
    def summed(self, c):
        return np.cumsum(self.times(c)).astype(np.int32)


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


# ======================================================================================
# Objects in images: boxes and masks, for detection
#
# A sample of these sources has also "id", "height", "width" and "objects", a list of COCO's
# annotations: "bbox" [left, top, width, height] in pixels, "category" (a name of source.classes),
# "area", "iscrowd", and "segmentation" where there is a mask.
#
# A mask is kept as run lengths, like COCO's: int64 [n], the numbers of pixels outside, inside,
# outside … the object, from the top of each column to its bottom, column by column.
# ======================================================================================

def runs_of_mask(mask):
    """A mask, bool [H,W], as run lengths [n]."""
    pixels = mask.T.ravel()
    return np.diff(np.flatnonzero(np.diff(pixels, prepend=False)), prepend=0, append=pixels.size)


def mask_of_runs(runs, H, W):
    """Run lengths [n] (see runs_of_mask) as a mask, bool [H,W]. Raises ValueError."""
    if min(runs, default=0) < 0 or sum(runs) != H * W:
        raise ValueError(f"a mask of {sum(runs)} pixels in an image of {W} x {H}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(W, H).T


def runs_of_polygon(polygon, H, W):
    """The run lengths [n] of a polygon [x0, y0, x1, y1, …], of the pixels that COCO takes.

    COCO draws the outline on a grid five times as fine. Where it passes the middle of a column of
    pixels, what is below changes sides."""
    x, y = np.trunc(5 * np.reshape(polygon, (-1, 2)).T + 0.5).astype(np.int64)
    dx, dy = np.roll(x, -1) - x, np.roll(y, -1) - y
    steps = np.maximum(abs(dx), abs(dy))
    edge = np.repeat(np.arange(len(x)), steps + 1)
    t = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    x, y, dx, dy, steps = (values[edge] for values in (x, y, dx, dy, steps))
    # An edge is drawn from its lower end, on the axis on which it is longer.
    back = np.where(abs(dx) >= abs(dy), dx, dy) < 0
    x, y, dx, dy = np.where(back, (x + dx, y + dy, -dx, -dy), (x, y, dx, dy))
    x, y = (np.trunc(start + d / np.maximum(steps, 1) * np.where(back, steps - t, t) + 0.5)
            .astype(np.int64) for start, d in ((x, dx), (y, dy)))
    column, row = np.minimum(x[1:], x[:-1]), np.minimum(y[1:], y[:-1])
    passed = (x[1:] != x[:-1]) & (column % 5 == 2) & (column >= 0) & (column // 5 < W)
    row = np.ceil(np.clip((row[passed] + 0.5) / 5 - 0.5, 0, H)).astype(np.int64)
    changes, times = np.unique(column[passed] // 5 * H + row, return_counts=True)
    changes = changes[(times % 2 == 1) & (changes < H * W)]     # twice is not at all
    return np.diff(changes, prepend=0, append=H * W)


def text_of_runs(runs):
    """Run lengths as COCO's text: each less the one two before it, in digits of 5 bits, the lowest
    first; a sixth bit says that more follow; a digit's letter is number 48 on."""
    letters = []
    for length, before in zip(runs.tolist(), [0, 0, 0, *runs[1:].tolist()]):
        rest, more = length - before, True
        while more:
            low, rest = rest & 31, rest >> 5
            more = rest != -(low >> 4)          # the top bit of the last digit is the sign
            letters.append(chr(48 + low + 32 * more))
    return "".join(letters)


def runs_of_text(text):
    """The inverse of text_of_runs, as a list. Raises ValueError for a damaged text."""
    runs, value, bits = [], 0, 0
    for digit in (ord(letter) - 48 for letter in text):
        if not 0 <= digit < 64:
            raise ValueError("its mask does not decode")
        value, bits = value + ((digit & 31) << bits), bits + 5
        if digit < 32:      # the last digit of a number; its top bit is the sign
            value -= (digit & 16) << (bits - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, bits = 0, 0
    if bits:
        raise ValueError("its mask ends within a number")
    return runs


def read_mask(segmentation, H, W):
    """A "segmentation" of COCO's, polygons or run lengths, as a mask, bool [H,W]. Raises
    ValueError."""
    if isinstance(segmentation, list):
        parts = [runs_of_polygon(polygon, H, W) for polygon in segmentation]
        return np.logical_or.reduce([mask_of_runs(runs, H, W) for runs in parts])
    runs = segmentation["counts"]
    return mask_of_runs(runs_of_text(runs) if isinstance(runs, str) else runs, H, W)


IMAGE_KEYS = ("id", "height", "width", "file_name", "coco_url",     # and of LVIS:
              "neg_category_ids", "not_exhaustive_category_ids")


def read_coco(path):
    """A COCO or LVIS file: (columns with a record of each image and its objects, categories). What
    is left out is counted and named. Raises UserError."""
    left_out = {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        categories = sorted(({**one, "name": str(one["name"]).strip()}
                             for one in content["categories"]), key=lambda one: one["id"])
        names = {one["id"]: one["name"] for one in categories}
        images = {one["id"]: {**{key: one[key] for key in IMAGE_KEYS if key in one}, "objects": []}
                  for one in content["images"]}
        if len({*names.values()}) < len(categories) or len(images) < len(content["images"]):
            raise ValueError("two categories have one name, or two images one id")
        for one in content["annotations"]:
            image, (x, y, w, h) = images.get(one["image_id"]), map(float, one["bbox"])
            fault = ("of images that are not listed" if image is None else
                     "of categories that are not listed" if one["category_id"] not in names else
                     "without area inside their images" if not (
                         w > 0 and h > 0 and 0 < x + w and x < image["width"] and
                         0 < y + h and y < image["height"]) else None)
            if fault:
                left_out.setdefault(fault, []).append(one.get("id"))
                continue
            image["objects"].append({
                "bbox": (x, y, w, h), "category": names[one["category_id"]],
                "area": float(one.get("area", w * h)), "iscrowd": int(one.get("iscrowd", 0)),
                **({"segmentation": one["segmentation"]} if one.get("segmentation") else {})})
        for one in images.values():     # LVIS has the place of an image as a URL
            one["file_name"] = one.get("file_name") or "/".join(one["coco_url"].split("/")[-2:])
    except (OSError, *RECORD_ERRORS) as error:
        raise UserError(f"{path} cannot be read as COCO's annotations: {type(error).__name__}: "
                        f"{error}; it needs images, annotations and categories") from error
    for fault, ids in left_out.items():
        rank0_print(f"{path}: left out {len(ids):,} annotations {fault}, the first: id {ids[0]}")
    counts = [sum(not one["iscrowd"] for one in image["objects"]) for image in images.values()]
    masks = all("segmentation" in one for image in images.values() for one in image["objects"])
    # Images without objects are not left out: an evaluation needs all.
    return {"objects": np.array(counts, np.int64), "masks": masks,
            **pack_strings("records", map(json.dumps, images.values()))}, categories


class Coco:
    """The images and objects of a file as COCO's or LVIS's; the images are in a folder."""

    def __init__(self, folder, columns, categories):
        self.folder, self.columns, self.categories = folder, columns, categories
        self.classes = [one["name"] for one in categories]
        self.objects = columns["objects"]       # how many to learn in each image, without crowds
        self.masks = columns["masks"]           # whether all have masks
        self.chunks, self.mark = even_chunks(len(self.objects)), crc(columns["records"])

    def __getitem__(self, i):
        record = json.loads(string_at(self.columns, "records", i))
        path = os.path.join(self.folder, record["file_name"])
        return {**record, "image": path, "where": path}


class WorldObjects:
    """The built-in world with boxes and masks of shapes, drawn at `size` (H, W)."""

    def __init__(self, split, count, size):
        self.world, self.size, self.classes = World(split, count), size, list(SHAPES)
        self.categories = [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)]
        self.chunks, self.mark = self.world.chunks, crc(f"objects {split} {count} {size}")
        self.objects, self.masks = np.full(count, 2), True      # so many at most

    def __getitem__(self, i):
        sample, (H, W) = self.world[i], self.size
        return {"image": sample["image"], "where": sample["where"], "id": i, "height": H,
                "width": W, "objects": boxes(sample["image"], H, W)}


def open_objects(specs, folder, size):
    """Open world-boxes, world-boxes-val or files as COCO's, whose images are in `folder` (default:
    that of the file), joined to one source. Raises UserError."""
    sources, known = [], {}
    for spec in map(str, specs):
        if spec.startswith("world-boxes"):
            sources.append(WorldObjects(*find_source(spec), tuple(size)))
        elif spec.lower().endswith(".json"):
            found = on_rank_0(functools.partial(read_coco, spec))
            sources.append(Coco(folder or os.path.dirname(spec), *found))
        else:
            raise UserError(f"no objects in {spec}: give world-boxes, world-boxes-val, with :COUNT "
                            "or without, or a .json as COCO's")
        if not len(sources[-1].objects):
            raise UserError(f"no image in {spec}")
        known |= {one["name"]: one for one in sources[-1].categories}
    joined = Joined(sources)
    joined.classes, joined.categories = [*known], [*known.values()]
    joined.masks = all(source.masks for source in sources)
    joined.federated = all({"frequency", "image_count"} <= one.keys()           # LVIS
                           for one in joined.categories)
    return joined


def frame(width, height, size, uniforms, jitter):
    """Where an image goes on a canvas of `size` (H, W), at its top left: (the box of the image that
    is seen, in the image's pixels; its (height, width) on the canvas).

    The image is scaled to what fits the canvas, in training times a number that is uniform in
    `jitter` (low, high), then cut to the canvas at random (large-scale jitter, arXiv 2012.07177).
    `uniforms` are 3; a pure function of them."""
    (H, W), (low, high) = size, jitter
    scale = min(H / height, W / width) * (low + (high - low) * uniforms[0])
    h, w = max(1, round(height * scale)), max(1, round(width * scale))      # the whole image
    left, top = max(0, w - W) * uniforms[1] * width / w, max(0, h - H) * uniforms[2] * height / h
    seen_h, seen_w = min(h, H), min(w, W)
    return (left, top, left + seen_w * width / w, top + seen_h * height / h), (seen_h, seen_w)


# ======================================================================================
# From a file to pixels
# ======================================================================================

def random_resized_crop(width, height, uniforms, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random box (left, top, right, bottom) in an image of width x height, in its pixels.

    Its share of the area is uniform in `scale`; its aspect, relative to the output `size` (H, W),
    is log-uniform in `ratio`. Ten tries, then the largest central box (as torchvision's, without
    the rounding). `uniforms` are 22; a pure function of them. Defaults are MAE's."""
    shape = size[1] / size[0]
    low, high = math.log(ratio[0] * shape), math.log(ratio[1] * shape)
    for i in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * i])
        aspect = math.exp(low + (high - low) * uniforms[2 * i + 1])
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = (width - w) * uniforms[20], (height - h) * uniforms[21]
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0] * shape), ratio[1] * shape)
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def centre_crop(width, height, uniforms, size, share=224 / 256, place=0.5):
    """The central box of the output's aspect; `share` of what fits (MAE: resize 256, crop 224).
    A `place` of 0 is at the left and top, 1 at the right and bottom."""
    shape = size[1] / size[0]
    w, h = share * min(width, height * shape), share * min(height, width / shape)
    left, top = (width - w) * place, (height - h) * place
    return left, top, left + w, top + h


WHOLE_WIDTH = functools.partial(centre_crop, share=1)       # or height: as much as fits


def whole_image(width, height, uniforms=None, size=None):
    """The box of the whole image: squashed, where its aspect is not the output's."""
    return 0, 0, width, height


def with_channels(image, channels):
    """A PIL image of any mode as grey (1), RGB (3) or RGBA (4), 8 bits each.

    16 bits are scaled, not cut; 32 bits and floats by their own range. Without an alpha channel,
    what is transparent becomes white."""
    if image.mode[0] in "IF":
        values, low, high = np.asarray(image, np.float64), 0, 65535
        if image.mode == "F" or values.min() < low or values.max() > high:
            low, high = values.min(), values.max()
        if not math.isfinite(high - low):
            raise ValueError("some pixels are not finite")
        values = (values - low) / (max(high - low, 1e-30) / 255)
        image = Image.fromarray(values.round().astype(np.uint8))
    if channels < 4 and (image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
                         or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def png_without_extras(content):
    """A PNG file without the chunks that change no pixel: texts, profiles, dates. Pillow refuses
    large and damaged ones, which other decoders pass over."""
    kept, at = [content[:8]], 8
    while at < len(content):
        kind, end = content[at + 4:at + 8], at + 12 + int.from_bytes(content[at:at + 4], "big")
        sound = content[end - 4:end] == zlib.crc32(content[at + 4:end - 4]).to_bytes(4, "big")
        # tRNS is transparency; the next three are of animations
        if kind[:1].isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT") or (
                kind == b"eXIf" and sound):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def open_image(image):
    """Open an image, a path or a function that reads its bytes; its pixels are decoded later. A
    frame that is decoded already stays as it is.

    Raises what Pillow raises, also for more than 178,956,970 pixels: it takes these for a bomb."""
    if isinstance(image, Image.Image):
        return image
    content = image() if callable(image) else Path(image).read_bytes()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        content = png_without_extras(content)
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError("Pillow knows no such image format") from error


def orientation_of(opened):
    """Exif's orientation of an open image, 1 (upright) to 8: what is still to be undone."""
    if opened.format == "TIFF":
        opened.load()                   # Pillow turns it here, and forgets its orientation
    try:
        found = opened.getexif().get(0x0112, 1)
    except Exception:                   # damaged Exif, which says nothing of the pixels
        found = 1
    return found if found in range(1, 9) else 1


def read_pixels(image, choose_box, size, channels=3):
    """Decode a box of an image at `size` (H, W): uint8 [H,W,C].

    `image` is a sample's; `choose_box(width, height)` returns the box. A JPEG is decoded at the
    smallest of 1/1, 1/2, 1/4, 1/8 that still has a pixel for each one of the output (Pillow's
    draft), and crop and scaling are one resize of the box."""
    H, W = size
    if isinstance(image, dict):
        pixels = Image.fromarray(draw(image, H, W, choose_box(1.0, 1.0)))
        return np.asarray(with_channels(pixels, channels)).reshape(H, W, channels)
    with open_image(image) as opened:
        orientation = orientation_of(opened)
        width, height = opened.size[::-1] if orientation > 4 else opened.size
        left, top, right, bottom = choose_box(width, height)
        shrink = max(1.0, min((right - left) / W, (bottom - top) / H))
        opened.draft("L" if channels == 1 else None,
                     (math.ceil(opened.width / shrink), math.ceil(opened.height / shrink)))
        upright = opened if orientation == 1 else ImageOps.exif_transpose(opened)
        x, y = upright.width / width, upright.height / height
        box = (left * x, top * y, min(right * x, upright.width), min(bottom * y, upright.height))
        pixels = with_channels(upright, channels).resize((W, H), Image.Resampling.BICUBIC, box)
    return np.asarray(pixels).reshape(H, W, channels)


class Samples(Dataset):
    """A source as batches of pixels: what is at given positions.

    `choose_box(width, height, uniforms, size)` is the crop; augment(pixels [H,W,C], seed, position)
    changes what was cropped. `rows` (an array or Rows) are the samples that are used; None: each
    once. targets_of(sample) lists what is to be learned: numbers of classes, tags or tokens.

    In training the order is shuffled, and an image that cannot be read is replaced by one that
    depends on the position alone. In validation (shuffle=False) it has weight 0, as have positions
    past the end, which fill up batches. `features` [n,D], if given, replace the pixels. With
    `views` the source has clips (see Views). annotate(sample, uniforms), if given, returns the
    pixels and a row of a numpy array of type `layout`, whose fields the batch has, too; of clips,
    "short" is 1 if they are too short."""

    def __init__(self, source, size, channels, choose_box=None, seed=0, shuffle=True, rows=None,
                 targets_of=None, augment=None, features=None, views=None, annotate=None,
                 layout=()):
        self.source, self.size, self.channels, self.choose_box = source, size, channels, choose_box
        self.seed, self.rows, self.targets_of, self.views = seed, rows, targets_of, views
        self.augment, self.features, self.annotate = augment, features, annotate
        self.shape, self.layout = (*size, channels), np.dtype(list(layout))
        if features is not None:
            self.shape = features.shape[1:]
        if views:
            self.layout = np.dtype([("short", np.float32)])
            self.shape = *([] if shuffle else [views.count]), views.frames, *self.shape
        used = source if rows is None else rows
        chunks = even_chunks(len(used)) if isinstance(rows, np.ndarray) else used.chunks
        self.order = Order(chunks, seed) if shuffle else None

    def __len__(self):
        return len(self.source if self.rows is None else self.rows)

    def sample(self, i):
        """What the source knows of the i-th sample that is used."""
        return self.source[i if self.rows is None else int(self.rows[i])]

    def candidates(self, position, i):
        """Sample i, then, in training, those at the same place of the next ten epochs."""
        yield i
        for later in range(1, 11) if self.order else ():
            yield int(self.order(np.array([position + later * len(self)]))[0])

    def see(self, sample, i, uniforms, position):
        """(What is seen of sample i: uint8 [H,W,C], of a clip [T,H,W,C] in training, else
        [V,T,H,W,C]; or its features [D]; and its row of `layout`)."""
        if self.features is not None:
            return self.features[i], ()
        if self.annotate:
            return self.annotate(sample, uniforms)
        box = functools.partial(self.choose_box, uniforms=uniforms, size=self.size)
        if not self.views:
            return read_pixels(sample["image"], box, self.size, self.channels), ()
        u = uniform(self.seed, np.array([position]), "frames", self.views.frames)[0]
        pixels, short = read_clip(sample["image"], self.views, self.size, self.channels,
                                  [(u, box)] if self.order else None)
        return pixels.reshape(self.shape), (short,)

    def __getitems__(self, positions):
        """The batch at int64 positions [B]: {"images": uint8 [B,H,W,C], or what else see() returns,
        "position": int64 [B], "label": int64 [B] (-1: none), "targets": int64 [B,k] (filled up with
        -1), "weight": float32 [B], "bad": [(position, where, why)], and the fields of `layout`}."""
        try:
            batch = self.batch(np.asarray(positions, dtype=np.int64))
            if get_worker_info():       # what goes wrong later would only be printed
                batch["images"].share_memory_()
            return batch
        except (UserError, OSError) as error:   # raised in a worker, it would have a traceback
            return {"fault": str(error)}
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return {"fault": f"{error}: start the container with --shm-size 8g or more, or give "
                    "fewer --workers"}

    def batch(self, positions):
        index = self.order(positions) if self.order else positions
        uniforms = uniform(self.seed, positions, "crop", 22).tolist()
        kind = np.uint8 if self.features is None else np.float32
        images, notes = (np.zeros((len(positions), *self.shape), kind),
                         np.zeros(len(positions), self.layout))
        targets, bad = [[] for _ in positions], []
        labels, weights = np.full(len(positions), -1), np.zeros(len(positions), np.float32)
        for row, (position, i) in enumerate(zip(positions.tolist(), index.tolist())):
            for i in self.candidates(position, i) if i < len(self) else ():
                sample = self.sample(i)
                try:
                    found = self.targets_of(sample) if self.targets_of else []
                    images[row], notes[row] = self.see(sample, i, uniforms[row], position)
                    frames = images[row].reshape(-1, *images.shape[-3:]) if self.augment else ()
                    for frame in frames:        # of a clip all alike
                        frame[...] = self.augment(frame, self.seed, position)
                except Exception as error:      # what decoders raise on damage has no common class
                    why = f"{type(error).__name__}: {error}".split("\n")[0]
                    bad.append((position, sample["where"], why))
                    continue
                targets[row], labels[row], weights[row] = found, sample.get("label", -1), 1
                break
            else:
                if self.order:
                    raise UserError("eleven images in a row cannot be read; the last: "
                                    f"{sample['where']}: {why}")
        most = max(1, *map(len, targets))       # a batch past the end has a column, too
        targets = [some + [-1] * (most - len(some)) for some in targets]
        return {"images": torch.from_numpy(images), "position": torch.from_numpy(positions),
                "label": torch.from_numpy(labels), "weight": torch.from_numpy(weights), "bad": bad,
                "targets": torch.tensor(targets, dtype=torch.int64),
                **{name: torch.tensor(notes[name]) for name in notes.dtype.names or ()}}


def training_samples(source, args, config, smallest_crop, rows=None, targets_of=None, augment=None,
                     views=None):
    """The images of a source in shuffled order, for a run with --seed, in random crops of at least
    this share of their area."""
    choose_box = functools.partial(random_resized_crop, scale=(smallest_crop, 1.0))
    return Samples(source, config.image, config.channels, choose_box, args.seed, rows=rows,
                   targets_of=targets_of, augment=augment, views=views)


def evaluation_samples(source, config, choose_box=centre_crop, rows=None, targets_of=None,
                       views=None):
    """The images of a source one after another, for an evaluation."""
    return Samples(source, config.image, config.channels, choose_box, shuffle=False, rows=rows,
                   targets_of=targets_of, views=views)


# ======================================================================================
# Clips: what `finetune.py video` learns from
#
# The "image" of a clip's sample is the path of a folder of numbered frames or of an animated file,
# the frames of a shard's key as a list of functions that return bytes, or a scene with a "path".
# ======================================================================================

# Of world-clips. Each is the one beside it reversed in time.
MOTIONS = "right", "left", "down", "up", "clockwise", "anticlockwise", "growing", "shrinking"
CLIP_LENGTH = 32        # frames
# x and y (sides of the image), angle (radians), logarithm of the radius: the middle of an object's
# path is between the first two numbers; the path is as long as the third.
PATHS = (0.39, 0.61, 0.4), (0.39, 0.61, 0.4), (-0.35, 0.35, 1.9), (-1.6, -1.2, 0.8)


def clip_scene(i, split):
    """Clip i of world-clips: a scene whose main object moves, as it is at a random time.

    At a random time its place, angle and size are distributed alike for all MOTIONS, because those
    that stay the same are drawn from where a motion would be: one frame says nothing."""
    u = uniform(0, np.array([i]), f"world-{split}-path", 9)[0].tolist()
    shift = uniform(0, np.array([i // 8]), f"world-{split}-round", 1).item()
    picture = scene(i, split)
    main = picture["objects"][0]
    if main["texture"] == "framed":     # a framed disc looks the same however it is turned
        main["texture"] = "halved"
    picture["label"] = (i + int(8 * shift)) % 8         # balanced; tells nothing of the object
    picture["path"] = [(low + (high - low) * a, length, length * (b - 0.5))
                       for (low, high, length), a, b in zip(PATHS, u, u[4:])]
    return moment(picture, int(CLIP_LENGTH * u[8]))


def moment(picture, frame):
    """The scene of a clip at frame 0 … CLIP_LENGTH - 1."""
    axis, backwards = divmod(picture["label"], 2)
    time = ((frame + 0.5) / CLIP_LENGTH - 0.5) * (-1 if backwards else 1)
    x, y, angle, size = (middle + (time * length if k == axis else still)
                         for k, (middle, length, still) in enumerate(picture["path"]))
    main, *others = picture["objects"]
    main = main | {"x": x, "y": y, "angle": angle, "radius": math.exp(size)}
    return picture | {"objects": [main, *others], "grain": [7 * frame % 32, 11 * frame % 32]}


def natural(name):
    """The key that sorts names by the numbers in them: 2.jpg before 10.jpg."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def is_animated(path):
    """Whether a file is a clip by itself: a GIF, or an animated WebP or PNG."""
    with contextlib.suppress(OSError):
        if path.lower().endswith((".webp", ".png")):
            with Image.open(path) as image:
                return getattr(image, "is_animated", False)
    return path.lower().endswith(".gif")


def clips_among(root, images):
    """The clips that images below a folder are: those in one folder are one clip, the folder, or
    one each if the first is animated."""
    clips = []
    for folder, some in itertools.groupby(sorted(images, key=os.path.dirname), os.path.dirname):
        some = sorted(some)
        clips += some if is_animated(os.path.join(root, some[0])) else [folder or "."]
    return clips


class Views(NamedTuple):
    """What a model sees of a clip: T = `frames` frames, every `stride`-th or, with `segments`, one
    of each of T equal parts. In training it is one view, of a random crop and from a random start;
    in an evaluation V views, `temporal` x `spatial`."""
    frames: int
    stride: int
    segments: bool
    temporal: int
    spatial: int

    @property
    def count(self):
        return self.temporal * self.spatial

    @property
    def span(self):
        """The frames that a clip must have so that none is seen twice."""
        return self.frames if self.segments else (self.frames - 1) * self.stride + 1

    def looks(self, size):
        """What an evaluation sees: for each of V views the time, 0 to 1, and the crop."""
        times = (np.arange(self.temporal) + 0.5) / self.temporal
        places = np.linspace(0, 1, self.spatial) if self.spatial > 1 else [0.5]
        return [(time, functools.partial(centre_crop, uniforms=None, size=size, share=1,
                                         place=place))
                for time, place in itertools.product(times, places)]

    def numbers(self, count, u):
        """Which of `count` frames are seen [T], by numbers u [T] in [0, 1)."""
        if self.segments:
            return ((np.arange(self.frames) + u) * count / self.frames).astype(int)
        start = int(u[0] * (max(0, count - self.span) + 1))
        return np.minimum(start + self.stride * np.arange(self.frames), count - 1)


def clip_frames(clip):
    """The frames of a clip, in order, each as read_pixels takes an image."""
    if isinstance(clip, dict):
        return [moment(clip, frame) for frame in range(CLIP_LENGTH)]
    if isinstance(clip, list) and len(clip) > 1:
        return clip
    clip = clip[0] if isinstance(clip, list) else clip
    if not callable(clip) and os.path.isdir(clip):
        names = [name for name in os.listdir(clip) if name.lower().endswith(IMAGE_ENDINGS)]
        if not names:
            raise ValueError("a folder without frames")
        return [os.path.join(clip, name) for name in sorted(names, key=natural)]
    with open_image(clip) as file:
        return [frame.copy() for frame in ImageSequence.Iterator(file)]


def read_clip(clip, views, size, channels, looks=None):
    """(What is seen of a clip, uint8 [V,T,H,W,C]; whether it is too short, so that frames are
    repeated). `looks` are for each of V views numbers u [T], which choose the frames, and the crop;
    by default those of an evaluation.

    Raises ValueError for frames of different sizes, and what decoders raise."""
    frames, found, sizes = clip_frames(clip), [], set()
    for u, choose_box in looks or views.looks(size):
        def box(width, height):
            sizes.add((width, height))
            return choose_box(width, height)

        numbers = views.numbers(len(frames), np.broadcast_to(u, views.frames)).tolist()
        seen = {i: read_pixels(frames[i], box, size, channels) for i in {*numbers}}
        found.append(np.stack([seen[i] for i in numbers]))
    if len(sizes) > 1:
        raise ValueError(f"frames of different sizes, as {sorted(sizes)[:2]}")
    return np.stack(found), len(frames) < views.span


# ======================================================================================
# From workers to the device
# ======================================================================================

def training_positions(first_step, steps, batch, micro_batch, rank, world_size):
    """The positions of every micro-batch of one rank, in order.

    Step t is positions t*batch … (t+1)*batch-1; rank r has its r-th part, micro_batch at a time."""
    share = batch // world_size
    for step in range(first_step, steps):
        begin = step * batch + rank * share
        for at in range(begin, begin + share, micro_batch):
            yield np.arange(at, at + micro_batch)


def validation_positions(count, micro_batch, rank, world_size):
    """Positions 0 … count-1 dealt to ranks in micro-batches, as many for every rank (a sharded
    model's ranks must call it equally often); the last ones may lie past the end."""
    micro_batch = min(micro_batch, math.ceil(count / world_size))
    for at in range(0, count, micro_batch * world_size):
        yield np.arange(at + rank * micro_batch, at + (rank + 1) * micro_batch)


def prepare_worker(_):
    """In a worker: leave signals to the training process, use one thread, keep Pillow quiet."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


POLL, PATIENCE = 5, 600     # seconds: how often workers are looked at; how late a batch may be


def load(samples, positions, workers, device):
    """Iterate over the batches at `positions` (an iterable of arrays), read ahead by workers.

    Raises UserError where the data are no longer what they were at the start, where a worker has
    ended, where no batch comes for ten minutes, or where a signal to stop comes meanwhile."""
    batches = iter(DataLoader(
        samples, batch_sampler=positions, num_workers=workers, collate_fn=dict,  # it is a batch
        pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None,
        worker_init_fn=prepare_worker, timeout=POLL if workers else 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None))
    if workers:     # torch would raise in the middle of a step: a dead worker is seen below
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    waited = 0
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            waited += POLL
            if "timed out" not in str(error):
                raise RankError(f"a process that reads images has ended: {error}; was it killed, "
                                "or is memory short? Fewer --workers need less") from error
            if waited >= PATIENCE or waited >= 4 * POLL and stop_signals:
                raise RankError(f"no images came for {waited} seconds; the same command resumes "
                                "from the newest checkpoint") from error
            continue
        if batch is None:
            return
        if "fault" in batch:
            raise RankError(batch["fault"])
        waited = 0
        yield batch


def training_batches(samples, args, first_step, schedule, device):
    """Iterate over this rank's micro-batches, from a step on; `schedule` is vit.make_schedule's."""
    positions = training_positions(first_step, schedule.steps, args.batch, schedule.micro_batch,
                                   get_rank(), get_world_size())
    return load(samples, positions, args.workers, device)


def examples(samples, device, count=8):
    """A batch of central crops from all over the images of `samples`, to be shown."""
    if samples.order or samples.views:      # without order, crops and augmentation of training
        samples = Samples(samples.source, samples.size, samples.channels, centre_crop,
                          shuffle=False, rows=samples.rows, targets_of=samples.targets_of,
                          views=samples.views and samples.views._replace(temporal=1, spatial=1))
    spread = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64)
    return next(load(samples, [spread], 0, device))


def validate(val, args, device):
    """Every image of --val once, whatever the ranks: yields (images [B,C,H,W], of clips
    [B,V,T,C,H,W], normalised; batch).

    Those that cannot be read have no weight; at the end they are listed in
    OUT/bad_val_samples.txt. Raises UserError where none can be read."""
    sums, bad, world_size = torch.zeros(2), [], get_world_size()    # sums: read; too short
    micro_batch = max(1, args.micro_batch // (val.views.count if val.views else 1))
    batches = load(val, validation_positions(len(val), micro_batch, get_rank(), world_size),
                   args.workers, device)
    total = math.ceil(len(val) / (micro_batch * world_size))
    for batch in progress(batches, "evaluating", "batch", total):
        short = batch["short"].sum() if val.views else torch.tensor(0)
        sums, bad = sums + torch.stack([batch["weight"].sum(), short]), bad + batch["bad"]
        yield normalise(batch["images"].to(device)), batch
    bad = list_bad(args, bad, "bad_val_samples.txt", "w")
    read, short = all_reduce_sum(sums).tolist()
    if short:
        say_once(f"NOTE: {int(short)} of {len(val)} clips of --val have fewer than "
                 f"{val.views.span} frames: some are repeated")
    if not read:
        raise UserError(f"none of {len(bad)} images can be read; the last: "
                        f"{bad[-1][1]}: {bad[-1][2]}")
    if bad:
        rank0_print(f"NOTE: {len(bad):,} of {len(val):,} images cannot be read: see "
                    f"{args.out}/bad_val_samples.txt")


@lru_cache
def say_once(text):
    """Print a line on rank 0, the first time that it is said."""
    rank0_print(text)


def flip(images, uniforms):
    """Mirror those of images [B,H,W,C] or clips [B,T,H,W,C] whose number [B,1] is below a half."""
    uniforms = uniforms.view(-1, *[1] * (images.dim() - 1))
    return torch.where(uniforms < 0.5, images.flip(-2), images)


@lru_cache      # each copy to a GPU would make the host wait
def statistics(channels, device):
    """Mean and standard deviation of pixels in 0 … 1, [C,1,1] each: ImageNet's; grey has their
    averages, alpha a half (ours)."""
    means = {1: (0.449,), 3: IMAGENET_MEAN, 4: (*IMAGENET_MEAN, 0.5)}[channels]
    stds = {1: (0.226,), 3: IMAGENET_STD, 4: (*IMAGENET_STD, 0.5)}[channels]
    return tuple(torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (means, stds))


def normalise(images):
    """Pixels uint8 [B,H,W,C] to float32 [B,C,H,W] with zero mean and unit variance on ImageNet; of
    clips [B,T,H,W,C] to [B,T,C,H,W]."""
    mean, std = statistics(images.shape[-1], images.device)
    # Bytes are put in order and floats changed in place: seven times as fast as the plain formula.
    return images.movedim(-1, -3).contiguous().float().mul_(1 / (255 * std)).sub_(mean / std)


def denormalise(images):
    """The inverse of normalise: float [B,C,H,W] to uint8 [B,H,W,C]."""
    mean, std = statistics(images.shape[1], images.device)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def read_pictures(args, config, choose_box=WHOLE_WIDTH, views=None):
    """--predict's pictures at the size of a model's Config, by default as much of each as fits, or
    clips in these Views: (the names of those that can be read; their pixels uint8 [B,H,W,C], of
    clips [B,V,T,H,W,C]; a line about the others, or ""). Raises UserError if none can be read."""
    files = [{"image": name, "where": name} for name in args.predict]
    batch = evaluation_samples(files, config, choose_box, np.arange(len(files)),
                               views=views).batch(np.arange(len(files)))
    problem = "; ".join(f"--predict {name} cannot be read: {why}" for _, name, why in batch["bad"])
    good = batch["weight"].nonzero()[:, 0]
    if not len(good):
        raise UserError(problem)
    return [args.predict[i] for i in good], batch["images"][good], problem


@torch.no_grad()
def most_probable(logits_of, pixels, names, args, device):
    """The five most probable names of each picture uint8 [B,H,W,C] or clip [B,V,T,H,W,C]:
    [[(name, probability)]]. logits_of(normalised images) is [B,K]. Every rank has to call it."""
    with autocast(args, device):
        views = pixels.shape[1] if pixels.dim() == 6 else 1
        parts = normalise(pixels).split(max(1, args.micro_batch // views))
        logits = torch.cat([logits_of(part.to(device)) for part in parts]).float()      # [B,K]
    chances = logits.sigmoid() if args.loss == "bce" else logits.softmax(1)
    top = chances.topk(min(5, len(names)))
    return [[(names[i], chance) for i, chance in zip(*row)]
            for row in zip(top.indices.tolist(), top.values.tolist())]


def print_predictions(args, config, logits_of, names, device, **options):
    """Print what --predict's pictures, read with these options of read_pictures, most probably are.
    Raises UserError at the end if some cannot be read."""
    files, pixels, problem = read_pictures(args, config, **options)
    for file, picture in zip(files, pixels):
        best, = most_probable(logits_of, picture[None], names, args, device)
        rank0_print(f"{file}: " + ", ".join(f"{name} {chance:.3f}" for name, chance in best))
    if problem:
        raise UserError(problem)


def draw_predictions(args, batch, logits_of, names, device):
    """Draw a batch's pictures, what they are and what a model thinks they are, right answers green,
    into OUT/predictions.png; of clips four frames each, into OUT/clips.png. Every rank has to call
    it; rank 0 draws."""
    predicted = most_probable(logits_of, batch["images"], names, args, device)
    if get_rank():
        return
    side, texts, font = 112, [], ImageFont.load_default()
    file, pixels = "predictions.png", batch["images"][:, None]              # [B,1,H,W,C]
    if pixels.dim() == 7:
        frames = np.linspace(0, pixels.shape[3] - 1, 4).astype(int)
        file, pixels = "clips.png", pixels[:, 0, 0, frames]                 # [B,4,H,W,C]
    for targets, best in zip(batch["targets"].tolist(), predicted):
        right = [names[i] for i in targets if i >= 0]
        texts.append([("true: " + ", ".join(right)[:60], "black")] + [
            (f"{chance:.3f}  {name}", "#108030" if name in right else "#606060")
            for name, chance in best])
    beside = (side + 4) * pixels.shape[1]
    width = beside + 28 + max(int(font.getlength(text)) for lines in texts for text, _ in lines)
    columns = 2 if pixels.shape[1] == 1 else 1
    sheet = Image.new("RGB", (columns * width, math.ceil(len(texts) / columns) * (side + 8)),
                      "white")
    for i, (images, lines) in enumerate(zip(pixels.numpy(), texts)):
        left, top = i % columns * width + 4, i // columns * (side + 8) + 4
        for k, image in enumerate(images):
            picture = ImageOps.contain(Image.fromarray(image[..., :3].squeeze()), (side, side),
                                       Image.Resampling.NEAREST)
            sheet.paste(picture, (left + k * (side + 4), top))
        for row, (text, colour) in enumerate(lines):
            ImageDraw.Draw(sheet).text((left + beside + 8, top + 18 * row), text, colour, font)
    write_aside(Path(args.out) / file, lambda aside: sheet.save(aside, "PNG"))


# ======================================================================================
# Commands
# ======================================================================================

def info(args):
    """Print what is there: samples, classes, and of up to 1,000 samples sizes, modes and tags."""
    source = open_data(*args.spec, index_dir=args.index_dir)
    looked = np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int).tolist()
    sizes, modes, tags = [], Counter(), Counter()
    for sample in map(source.__getitem__, looked):
        tags.update(sample.get("tags", ()))
        try:
            with open_image(sample["image"]) as image:
                sizes.append(image.size)
                modes[f"{image.format} {image.mode}"] += 1
        except Exception:               # what decoders raise on damage has no common class
            modes["drawn" if isinstance(sample["image"], dict) else "unreadable"] += 1
    sizes = np.percentile(sizes or [(0, 0)], (0, 50, 100), axis=0).astype(int).tolist()
    print(json.dumps({
        "samples": len(source), "classes": len(source.classes), "names": source.classes[:12],
        "looked_at": len(looked), "modes": modes,
        **dict(zip(("smallest", "median", "largest"), sizes)),
        "tags_per_image": round(tags.total() / len(looked), 3), "different_tags": len(tags),
        "head": tags.most_common()[:8], "tail": tags.most_common()[8:][-4:]}))


def verify(args):
    """Decode everything on all cores and list what is bad; exit code 1 where something is."""
    source = open_data(*args.spec, index_dir=args.index_dir)
    count, start, bad = len(source), time.perf_counter(), 0
    positions = list(validation_positions(count, 64, 0, 1))
    batches = load(Samples(source, (32, 32), 3, whole_image, shuffle=False), positions,
                   args.workers, torch.device("cpu"))
    for batch in progress(batches, "decoding", "batch", len(positions)):
        bad += len(batch["bad"])
        for _, where, why in batch["bad"]:
            print(f"bad: {where}: {why}")
    damage = sum(int(one.catalogue["left_out"][:2].sum())
                 for one in source.sources if isinstance(one, Shards))
    print(json.dumps({"samples": count, "bad": bad, "damage": damage, "images_per_second": round(
        count / (time.perf_counter() - start), 1)}))
    raise SystemExit(1 if bad or damage else 0)


def encode(image, short):
    """An image as (ending, bytes of a file). JPEG, PNG, WebP and GIF stay as they are, unless their
    shorter side is over `short`; the rest becomes an upright JPEG of quality 90. The world is drawn
    at `short` or 224, as PNG."""
    file = io.BytesIO()
    if isinstance(image, dict):
        Image.fromarray(draw(image, short or 224, short or 224)).save(file, "PNG")
        return "png", file.getvalue()
    content = image() if callable(image) else Path(image).read_bytes()
    opened = open_image(lambda: content)
    ending = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp",
              "GIF": "gif"}.get(opened.format)
    shrink = max(1, min(opened.size) / short) if short else 1
    if ending and shrink == 1:
        return ending, content
    turned, channels = orientation_of(opened) > 4, 1 if opened.mode == "L" else 3
    W, H = (round(side / shrink) for side in opened.size[::-1 if turned else 1])
    pixels = read_pixels(lambda: content, whole_image, (H, W), channels)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "JPEG", quality=90)
    return "jpg", file.getvalue()


def write_shard(k, source, args):
    """Write shard k in OUT, unless it is there, and index it; print what is left out."""
    path, size = Path(args.out) / f"{k:05d}.tar", args.shard_size

    def write(aside):
        with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
            for i in range(k * size, min((k + 1) * size, len(source))):
                sample = source[i]
                try:
                    ending, content = encode(sample["image"], args.resize)
                except Exception as error:      # what decoders raise on damage has no common class
                    print(f"left out: {sample['where']}: {type(error).__name__}: {error}",
                          flush=True)
                    continue
                record = {key: sample[key] for key in ("tags", "caption", "where")
                          if sample.get(key)}
                if "label" in sample:
                    record["label"] = source.classes[sample["label"]]
                for end, part in ((ending, content), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{end}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))

    if not path.exists():
        write_aside(path, write)
    open_index(str(path), args.index_dir, clips=False)


def pack(args):
    """Write any source as tar shards, with labels (by name), tags and captions in .json.

    When it is started again, it goes on: a shard is either whole or not there."""
    out = Path(args.out)
    for spec in args.spec:
        if os.path.isdir(spec) and Path(spec).resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"OUT {out} is inside {spec}, which is packed; choose another folder")
    source = open_data(*args.spec, index_dir=args.index_dir)
    out.mkdir(parents=True, exist_ok=True)
    plan, note = {"data": source.fingerprint(), "shard_size": args.shard_size,
                  "resize": args.resize}, out / "pack.json"
    if read_json(note) != plan if note.exists() else any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards of something else; choose another folder")
    write_aside(note, lambda path: path.write_text(json.dumps(plan)))
    start, count = time.perf_counter(), math.ceil(len(source) / args.shard_size)
    work = functools.partial(write_shard, source=source, args=args)
    with process_pool(args.workers) as processes:
        # In a few portions for each process, since the list of files is sent with each portion.
        shards = processes.map(work, range(count), chunksize=1 + count // (8 * args.workers + 8))
        for _ in progress(shards, "packing", "shard", count):
            pass
    packed = len(open_data(out, index_dir=args.index_dir))
    print(json.dumps({"samples": packed, "left_out": len(source) - packed, "shards": count,
                      "seconds": round(time.perf_counter() - start, 1)}))


def bench(args):
    """Measure how many images per second the workers read, crop and normalise."""
    source, size = open_data(*args.spec, index_dir=args.index_dir), (args.image_size,) * 2
    torch.set_num_threads(1)
    batches = load(Samples(source, size, 3, random_resized_crop),
                   training_positions(0, 1 << 40, 32, 32, 0, 1), args.workers, torch.device("cpu"))
    for _ in range(1 + 4 * args.workers):       # what the workers have read before the clock starts
        next(batches)
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < args.seconds:
        count += len(normalise(next(batches)["images"]))
    print(json.dumps({"image_size": args.image_size, "workers": args.workers,
                      "images_per_second": round(count / seconds, 1)}))


def world(args):
    """Draw a sheet of the first 24 pictures of the built-in world; print what it says of each."""
    source, side = open_data(args.split), args.image_size
    sheet = Image.new("RGB", (6 * (side + 4), 4 * (side + 4)), "white")
    for i in range(24):
        sample = source[i]
        picture = Image.fromarray(draw(sample["image"], side, side))
        ImageDraw.Draw(picture).text((3, 1), str(i), "white", stroke_width=1, stroke_fill="black")
        sheet.paste(picture, (i % 6 * (side + 4), i // 6 * (side + 4)))
        print(f"{i}: {source.classes[sample['label']]}: {sample['caption']}; "
              f"{' '.join('#' + tag for tag in sample['tags'])}")
    write_aside(Path(args.out), lambda path: sheet.save(path, "PNG"))
    print(f"wrote {args.out}")


def main(argv):
    parser = Parser(prog="data.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="info | verify | pack | bench | world")
    for command in (info, verify, pack, bench, world):
        sub = commands.add_parser(command.__name__, help=(command.__doc__ or "").split("\n")[0],
                                  description=command.__doc__, allow_abbrev=False)
        sub.set_defaults(command=command)
        add = sub.add_argument
        if command != world:
            add("spec", nargs="+", metavar="SPEC",
                help="world, world:COUNT, a folder, .tar shards, a .jsonl or .csv")
            add("--index-dir", metavar="DIR",
                help="where indexes of shards are kept; default: beside the shards")
        if command in (verify, pack, bench):
            add("--workers", type=number(0, kind=int), default=cpu_cores(), metavar="PROCESSES",
                help="processes; 0: this one alone (pack: one); default: the CPU cores")
        if command in (bench, world):
            add("--image-size", type=positive, default=224, metavar="PIXELS",
                help="height and width; default 224")
        if command == pack:
            add("out", metavar="OUT", help="the folder for the shards")
            add("--shard-size", type=positive, default=10_000, metavar="SAMPLES",
                help="samples a shard; default 10,000")
            add("--resize", type=positive, metavar="PIXELS", help="make the shorter side this long "
                "where it is longer; default: keep the files")
        elif command == bench:
            add("--seconds", type=float, default=20, help="length of the timing; default 20")
        elif command == world:
            add("--split", choices=WORLD_COUNTS, default="world", help="default world")
            add("--out", default="world.png", help="the sheet; default world.png")
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    run(main)
