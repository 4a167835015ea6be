"""Images: where they come from, in what order, how they are decoded and augmented.

A position p = 0, 1, 2, … counts the images of a run over all its epochs. Two pure functions of it
are the heart of this file: `order` says which sample stands at p, `uniform` gives all its random
numbers. So neither the number of ranks and workers nor an interruption changes what is trained on,
and no generator state is kept anywhere.

    python data.py info SPEC…                     what is there: samples, classes, sizes
    python data.py verify SPEC…                   decode everything, list what is bad
    python data.py bench SPEC… --image-size 224   images a second, beside the obvious pipeline
    python data.py world --out world.png          look at the built-in world

A SPEC is `world`, `world:COUNT`, `world-val`, … (the built-in world: pictures drawn from their
number, no download) or a folder (every image below it; the class is the first folder level).
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
import zlib
from bisect import bisect
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vit import UserError, cpu_cores, run, write_aside

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


def order(positions, size, seed):
    """The sample, 0 … size-1, at each of int64 `positions` [n] of a run over `size` samples.

    Every epoch is a permutation of its own of all samples."""
    epoch, index = np.divmod(positions, size)
    return permute(index, size, mix(mix(epoch) + zlib.crc32(f"{seed}/order".encode())))


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
# A source has a length; source.open(i) is a dict with "image" (a PIL image that is not decoded
# yet, or a scene of the world), "where" and what is known of it: "label", "tags", "caption".
# ======================================================================================

class World:
    """`count` scenes of one split of the built-in world."""

    def __init__(self, split, count):
        self.split, self.count = split, count
        self.classes = class_names("novel" if split == "novel" else "seen")

    def __len__(self):
        return self.count

    def open(self, i):
        content = scene(i, self.split)
        return {"image": content, "where": f"world {self.split} {i}", "label": content["label"],
                "tags": content["tags"], "caption": content["caption"]}


class Folder:
    """Every image below a folder, sorted by path; the class is the first folder level."""

    def __init__(self, root):
        root = Path(root)
        names = []
        for folder, below, files in os.walk(root, followlinks=True):
            below.sort()
            inside = os.path.relpath(folder, root)
            names += [name if inside == "." else f"{inside}/{name}" for name in files
                      if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")]
        if not names:
            raise UserError(f"no image below {root}; looked for {' '.join(IMAGE_ENDINGS)}")
        names.sort()
        encoded = [os.fsencode(name) for name in names]
        # One array of bytes and one of offsets: workers share them after a fork, while a list of
        # millions of Python strings is copied page by page as soon as it is read.
        self.root = os.fsencode(root)
        self.names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded])
        self.classes = sorted({name.split("/")[0] for name in names if "/" in name})
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([number.get(name.split("/")[0], -1) for name in names], np.int32)

    def __len__(self):
        return len(self.ends)

    def path(self, i):
        begin = self.ends[i - 1] if i else 0
        return os.path.join(self.root, self.names[begin:self.ends[i]].tobytes())

    def open(self, i):
        path = os.fsdecode(self.path(i))
        sample = {"image": path, "where": path}
        if self.labels[i] >= 0:
            sample["label"] = int(self.labels[i])
        return sample


class Joined:
    """Several sources, one after another; classes are joined by name."""

    def __init__(self, sources):
        self.sources = sources
        self.ends = np.cumsum([len(source) for source in sources])
        self.classes = sorted({name for source in sources for name in source.classes})

    def __len__(self):
        return int(self.ends[-1])

    def open(self, i):
        which = int(np.searchsorted(self.ends, i, side="right"))
        source = self.sources[which]
        sample = source.open(int(i) - (int(self.ends[which - 1]) if which else 0))
        if "label" in sample:
            sample["label"] = self.classes.index(source.classes[sample["label"]])
        return sample

    def __getitem__(self, i):
        """Sample i with its image decoded and upright, a PIL image (a scene at 224 x 224)."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        sample = self.open(i)
        if isinstance(sample["image"], dict):
            return {**sample, "image": Image.fromarray(draw(sample["image"], 224, 224))}
        return {**sample, "image": ImageOps.exif_transpose(open_image(sample["image"]))}


WORLD_COUNTS = {"world": ("train", 1_000_000), "world-val": ("val", 1_000),
                "world-test": ("test", 1_000), "world-novel": ("novel", 800),
                "world-labelled": ("labelled", 5_000)}


def open_data(*specs):
    """Open sources by their specs: a Joined of length n; [i] is a dict with the PIL image and its
    "where", "label", "tags", "caption" as far as known; `.classes` names the labels.

    Raises UserError where a spec names nothing."""
    sources = []
    for spec in specs:
        name, _, count = str(spec).partition(":")
        if name in WORLD_COUNTS:
            split, usual = WORLD_COUNTS[name]
            if count and not (count.isdigit() and int(count)):
                raise UserError(f"{spec}: after the colon comes a number of pictures, as in "
                                f"{name}:{usual}")
            sources.append(World(split, int(count or usual)))
        elif Path(spec).is_dir():
            sources.append(Folder(spec))
        else:
            raise UserError(f"no data at {spec}: not a folder, and not one of "
                            f"{' '.join(WORLD_COUNTS)}")
    return Joined(sources)


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


class Samples(Dataset):
    """What stands at given positions: positions [B] to a batch of pixels.

    `choose_box(width, height, numbers, size)` is the crop. In training the order is shuffled and an
    image that cannot be read is replaced, by one that depends on the position alone; in validation
    (shuffle=False) it has weight 0, as have positions past the end, which fill up batches."""

    def __init__(self, source, size, channels, choose_box, seed=0, shuffle=True,
                 max_pixels=178_956_970):
        self.source, self.size, self.channels, self.choose_box = source, size, channels, choose_box
        self.seed, self.shuffle, self.max_pixels = seed, shuffle, max_pixels

    def candidates(self, position, i):
        """Sample i, then, in training, those at the same place of ten epochs to come."""
        yield i
        if self.shuffle:
            count = len(self.source)
            yield from order(position + np.arange(1, 11) * count, count, self.seed).tolist()

    def __getitems__(self, positions):
        """Returns {"images": uint8 [B,H,W,C], "position": int64 [B], "label": int64 [B] (-1: none),
        "weight": float32 [B], "bad": [(position, where, why)]}."""
        positions = np.asarray(positions, dtype=np.int64)
        count = len(self.source)
        index = order(positions, count, self.seed) if self.shuffle else positions
        numbers = uniform(self.seed, positions, "crop", 22).tolist()
        images = np.zeros((len(positions), *self.size, self.channels), dtype=np.uint8)
        labels, weights, bad = np.full(len(positions), -1), np.zeros(len(positions)), []
        for row, (position, i) in enumerate(zip(positions.tolist(), index.tolist())):
            if i >= count:
                continue
            for i in self.candidates(position, i):
                sample = self.source.open(i)
                try:
                    images[row] = read_pixels(
                        sample["image"], functools.partial(self.choose_box, numbers=numbers[row],
                                                           size=self.size),
                        self.size, self.channels, self.max_pixels)
                except Exception as error:      # what decoders raise on damage has no common class
                    why = f"{type(error).__name__}: {error}".split("\n")[0]
                    bad.append((position, sample["where"], why))
                    continue
                labels[row], weights[row] = sample.get("label", -1), 1
                break
        return {"images": torch.from_numpy(images), "position": torch.from_numpy(positions),
                "label": torch.from_numpy(labels), "weight": torch.from_numpy(weights).float(),
                "bad": bad}


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
    """Iterate over the batches at `positions` (an iterable of arrays), read ahead by workers."""
    return iter(DataLoader(
        samples, batch_sampler=positions, num_workers=workers, collate_fn=as_it_is,
        pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None,
        worker_init_fn=prepare_worker))


def flip(images, numbers):
    """Mirror those of images [B,H,W,C] whose number [B,1] is below a half."""
    return torch.where(numbers[..., None, None] < 0.5, images.flip(2), images)


@functools.lru_cache        # each copy to a GPU would make the host wait
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


def cut_bad_list(args, state):
    """On resuming, take from bad_samples.txt what comes after the checkpoint: it is met again."""
    path = Path(args.out) / "bad_samples.txt"
    if int(os.environ.get("RANK", 0)) == 0 and path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True)
                if (at := line.split("\t")[0]).isdigit() and int(at) < state["step"] * args.batch]
        write_aside(path, lambda aside: aside.write_text("".join(kept)))


def note_bad(bad, args, state):
    """Write down the bad samples of a step, gathered from all ranks, and end a run with too many.

    Call on all ranks with the same list. Raises UserError when more than --max-bad of the images
    seen (1,000 at least, so that a small data set is not ended by one) are bad."""
    path, seen = Path(args.out) / "bad_samples.txt", state["step"] * args.batch
    state["bad_samples"] += len(bad)
    if int(os.environ.get("RANK", 0)) == 0:
        with open(path, "a") as file:
            file.writelines(f"{position}\t{where}\t{why}\n" for position, where, why in bad)
    if state["bad_samples"] > args.max_bad * max(seen, 1000):
        _, where, why = bad[-1]
        raise UserError(f"{state['bad_samples']} of {seen} images are bad, more than "
                        f"--max-bad {args.max_bad}; see {path}; the last: {where}: {why}")


# ======================================================================================
# Commands
# ======================================================================================

def info(args):
    """What is there: samples, classes, sizes and modes of up to 1,000 of them, evenly spread."""
    source = open_data(*args.spec)
    count = len(source)
    sizes, modes, bad = [], {}, 0
    for i in np.linspace(0, count - 1, min(count, 1000)).astype(int).tolist():
        sample = source.open(i)
        if isinstance(sample["image"], dict):
            continue
        try:
            with open_image(sample["image"]) as image:
                sizes.append(image.size)
                name = f"{image.format} {image.mode}"
                modes[name] = modes.get(name, 0) + 1
        except Exception:
            bad += 1
    print(f"{count:,} samples, {len(source.classes)} classes: {' '.join(source.classes[:12])}"
          f"{' …' if len(source.classes) > 12 else ''}")
    result = {"samples": count, "classes": len(source.classes), "modes": modes, "unreadable": bad}
    if sizes:
        widths, heights = np.array(sizes).T
        result["width"], result["height"] = ([int(q) for q in np.percentile(side, (0, 50, 100))]
                                             for side in (widths, heights))
        print(f"of {len(sizes)} looked at: width {result['width']} height {result['height']} "
              f"(least, median, most); {modes}; {bad} unreadable")
    print(json.dumps(result))


def verify_one(source, i):
    """None, or (where, why) of a sample that cannot be decoded."""
    sample = source.open(i)
    try:
        read_pixels(sample["image"], lambda width, height: (0, 0, width, height), (32, 32))
    except Exception as error:
        return sample["where"], f"{type(error).__name__}: {error}".split("\n")[0]


def verify(args):
    """Decode everything on all cores and list what is bad; exit code 1 where something is."""
    source = open_data(*args.spec)
    begun, bad = time.perf_counter(), []
    with multiprocessing.Pool(args.workers or cpu_cores(), prepare_worker, (0,)) as pool:
        results = pool.imap(functools.partial(verify_one, source), range(len(source)), 64)
        for result in tqdm(results, total=len(source), disable=not sys.stderr.isatty()):
            if result:
                bad.append(result)
                print(f"bad: {result[0]}: {result[1]}")
    speed = len(source) / (time.perf_counter() - begun)
    print(json.dumps({"samples": len(source), "bad": len(bad),
                      "images_per_second": round(speed, 1)}))
    raise SystemExit(1 if bad else 0)


def obvious_pipeline(image, box, size):
    """What one writes first: decode all of it, crop, resize, to float, normalise: [C,H,W]."""
    pixels = Image.open(image).convert("RGB").crop([round(side) for side in box])
    pixels = pixels.resize(size[::-1], Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy()).float() / 255
    return (values - torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)) \
        / torch.tensor(IMAGENET_STD).reshape(3, 1, 1)


def bench(args):
    """Images a second of the training pipeline, turn by turn with the obvious one on one core."""
    source, size = open_data(*args.spec), (args.image_size[0], args.image_size[-1])
    samples = Samples(source, size, 3, random_resized_crop)
    torch.set_num_threads(1)
    batch, cpu = 32, torch.device("cpu")
    ours, obvious, files = [], [], not isinstance(source.open(0)["image"], dict)
    positions = training_positions(0, 1 << 40, batch, batch, 0, 1)
    batches = load(samples, positions, args.workers, cpu)
    next(batches)
    deadline = time.perf_counter() + args.seconds
    while time.perf_counter() < deadline or len(ours) < 3:
        begun = time.perf_counter()
        read = next(batches)
        normalise(read["images"])
        ours.append(time.perf_counter() - begun)
        if read["bad"]:
            raise UserError(f"{read['bad'][0][1]} cannot be read: take out what verify lists")
        if files and not args.workers:
            numbers = uniform(0, read["position"].numpy(), "crop", 22).tolist()
            index = order(read["position"].numpy(), len(source), 0).tolist()
            begun = time.perf_counter()
            images = []
            for i, number in zip(index, numbers):
                path = source.open(i)["image"]
                with Image.open(path) as image:
                    box = random_resized_crop(*image.size, number, size)
                images.append(obvious_pipeline(path, box, size))
            torch.stack(images)
            obvious.append(time.perf_counter() - begun)
    # With workers a median would only see batches that were ready: the mean counts all the time.
    typical = np.mean if args.workers else np.median
    result = {"image_size": list(size), "workers": args.workers,
              "images_per_second": round(batch / typical(ours), 1)}
    if obvious:
        result["obvious_images_per_second"] = round(batch / np.median(obvious), 1)
        result["ratio"] = round(float(np.median(np.divide(obvious, ours))), 2)
    print(json.dumps(result))


def world(args):
    """Draw a sheet of the built-in world, with what it says of each picture."""
    source, (side, columns, rows) = open_data(args.split), (args.image_size[0], 6, 4)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "white")
    for i in range(columns * rows):
        sample = source.open(args.first + i)
        picture = Image.fromarray(draw(sample["image"], side, side))
        sheet.paste(picture, (i % columns * (side + 4), i // columns * (side + 4)))
        print(f"{i}: {source.classes[sample['label']]}: {sample['caption']}; "
              f"{' '.join('#' + tag for tag in sample['tags'])}")
    write_aside(Path(args.out), lambda path: sheet.save(path, "PNG"))
    print(f"wrote {args.out}")
    if args.facts:
        print(json.dumps(facts()))


def main(argv):
    parser = argparse.ArgumentParser(prog="data.py", allow_abbrev=False,
                                     description="Look at, check and time a source of images.")
    commands = parser.add_subparsers(required=True, metavar="info | verify | bench | world")
    for command in (info, verify, bench, world):
        sub = commands.add_parser(command.__name__, help=command.__doc__.split("\n")[0],
                                  description=command.__doc__, allow_abbrev=False)
        sub.set_defaults(command=command)
        if command is not world:
            sub.add_argument("spec", nargs="+", metavar="SPEC",
                             help="world, world:COUNT or a folder")
        if command in (verify, bench):
            sub.add_argument("--workers", type=int, default=0, help="processes; default 0: "
                             + ("all cores" if command is verify else "this process alone"))
        if command in (bench, world):
            sub.add_argument("--image-size", type=int, nargs="+", default=[224], metavar="PIXELS",
                             help="side, or height and width; default 224")
    sub.add_argument("--split", choices=WORLD_COUNTS, default="world", help="default world")
    sub.add_argument("--first", type=int, default=0, help="number of the first picture; default 0")
    sub.add_argument("--out", default="world.png", help="the sheet; default world.png")
    sub.add_argument("--facts", action="store_true",
                     help="also print what is known of the tags, as JSON")
    commands.choices["bench"].add_argument("--seconds", type=float, default=20, help="default 20")
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    run(main)
