"""Stage 3: use a pretrained encoder.

Each task is a command of its own, `finetune.py TASK` (`finetune.py TASK --help`), and a section of
this file that can be read alone. The first, classify, is full finetuning on labelled images ("The
effectiveness of MAE pre-pretraining for billion-scale pretraining", arXiv 2303.13496, section 4;
the recipe at 224 pixels is that of the code of "Masked Autoencoders Are Scalable Vision Learners",
arXiv 2111.06377, "MAE" below).

    torchrun finetune.py classify --init runs/wsp/model.pt        # built-in world: minutes on a CPU
    torchrun finetune.py classify --init runs/mae/model.pt --data photos/train --val photos/val
    torchrun --nproc-per-node gpu finetune.py classify --init mae_pretrain_vit_base.pth \\
        --data imagenet/train --val imagenet/val                  # 83.6 (MAE), 83.5 (IG-3B; paper)
    torchrun --nproc-per-node gpu finetune.py classify --init maws.pt --recipe maws --data …
    python finetune.py classify --init maws_ft_in1k.pt --eval-only --val imagenet/val --crop squash
    python finetune.py classify --init runs/classify/model.pt --predict cat.jpg dog.jpg

Expected of the first: 46% of the world's images classified correctly, 43% from random weights.

features, knn, linear, lowshot leave the encoder as it is ("frozen"): they compute its features once
and judge them by nearest neighbours, a linear classifier, or a few labelled images per class.
lowshot also trains prompts, through the frozen encoder.

    torchrun finetune.py linear --init runs/wsp/model.pt --data photos/train --val photos/val

zeroshot trains a text tower for an encoder, or uses a released one: classes are given in words.

    python finetune.py zeroshot --init maws_clip.pt --tokenizer tokenizer.json --predict cat.jpg \\
        --texts "une photo de chat" "a photo of a dog"

video finetunes an image encoder on clips: folders of frames, or animated files.

    torchrun finetune.py video --init runs/wsp/model.pt         # motions of the built-in world

detect trains a detector on an encoder: boxes, classes and masks of objects.

    torchrun finetune.py detect --init runs/wsp/model.pt
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import vit
from vit import UserError, ViT, rank0_print

# ======================================================================================
# classify: recipes and flags
# ======================================================================================

RECIPES = {
    # MAE's code, FINETUNE.md, at the encoder's own image size, 224; the values of the paper's table
    # 9 are for encoders that have predicted pixels without --norm-pix
    "mae": dict(
        optimizer="adamw", batch=1024, weight_decay=0.05, clip_grad=0.0, final_lr=1e-6,
        pool="mean", crop="centre", smallest_crop=0.08, randaugment=9.0, erasing=0.25, mixup=0.8,
        cutmix=1.0, smoothing=0.1, ema=0.0),
    # crop: released files; warmup, smallest crop, drop path: ours; others: SWAG's issues 8 and 9
    "maws": dict(
        optimizer="sgd", batch=512, weight_decay=0.0, clip_grad=0.0, final_lr=0.0,
        pool="cls", crop="squash", smallest_crop=0.08, randaugment=0.0, erasing=0.0, mixup=0.1,
        cutmix=0.0, smoothing=0.0, ema=0.9999,
        epochs=8, base_lr=3e-3, layer_decay=1.0, drop_path=0.0, warmup=0.0),
    "ours": dict(       # for a classroom: nano, tiny, small
        optimizer="adamw", batch=64, weight_decay=0.05, clip_grad=1.0, final_lr=0.0,
        pool="cls", crop="centre", smallest_crop=0.3, randaugment=0.0, erasing=0.0, mixup=0.0,
        cutmix=0.0, smoothing=0.1, ema=0.0,
        epochs=12, base_lr=2e-3, layer_decay=1.0, drop_path=0.0, warmup=0.1),
}
MAE_BY_MODEL = {        # FINETUNE.md too; warmup: 5 epochs; 2b and 6.5b are not published
    "base": dict(epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1, warmup=0.05),
    "large": dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2, warmup=0.1),
    **dict.fromkeys(("huge", "2b", "6.5b"), dict(
        epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3, warmup=0.1)),
}
BETAS = 0.9, 0.999                              # MAE
HEAD_STD = {"mae": 2e-5, "maws": 0.0, "ours": 2e-5}     # MAE; SWAG; ours
NO_DECAY = "pos_embed", "cls_token", "pos_embed_temporal"      # no weight decay (MAE)
BELOW_1 = vit.number(0, 0.999)
FLAGS_BY_RECIPE = {     # of several tasks: type, unit, meaning
    "final-lr": (vit.number(0), "RATE", "learning rate at the end, before --layer-decay"),
    "layer-decay": (vit.number(1e-9, 1), "FACTOR", "learning rate of a layer relative to the layer "
                    "above it; 1 off"),
    "drop-path": (BELOW_1, "SHARE", "share of images that skip a branch of the last block; 0 off"),
    "smallest-crop": (vit.number(1e-9, 1), "SHARE", "smallest area of a random crop, as a share of "
                      "the image's"),
    "randaugment": (vit.number(0, 10), "LEVEL", "strength of RandAugment's two operations; 0 off"),
    "erasing": (vit.share, "SHARE", "share of images with an erased rectangle; 0 off"),
    "mixup": (vit.share, "ALPHA", "mix pairs of images by Beta(ALPHA, ALPHA); 0 off"),
    "cutmix": (vit.share, "ALPHA", "paste a part of the partner instead; with mixup each is used "
               "half of the time; 0 off"),
    "smoothing": (BELOW_1, "SHARE", "share of the target that is spread over all classes; 0 off"),
    "ema": (vit.number(0, 0.999999), "DECAY", "evaluate and save an exponential moving average of "
            "the weights; 0 off"),
}


def add_training_flags(add):
    """What classify and video share."""
    add("--classes", metavar="FILE", help="the model's outputs in words: a line each, names "
        "separated by commas; default: what --init says, or the classes of the data")
    add("--class-map", metavar="FILE", help="lines of: model's class, TAB, class of --val, where "
        "they differ; several model classes may be correct for one; default: by name")
    add_flags_by_recipe(add, *FLAGS_BY_RECIPE)


def add_flags_by_recipe(add, *flags):
    for flag in flags:
        kind, metavar, text = FLAGS_BY_RECIPE[flag]
        add(f"--{flag}", type=kind, metavar=metavar, help=f"{text}; default by recipe")


def fill_classify_recipe(args, config, name, file_info):
    """Choose --recipe and fill in its values, or those of the file where a trained model is used.
    `name` is the model's row of SIZES."""
    in_use, in_file = args.predict or args.eval_only, file_info.get("config", {})
    args.recipe = args.recipe or ("mae" if name in MAE_BY_MODEL else "ours")
    recipe = {**RECIPES[args.recipe], "loss": in_file.get("loss", "ce") if in_use else "ce"}
    if args.recipe == "mae":
        recipe |= MAE_BY_MODEL.get(name, MAE_BY_MODEL["base"])
    if args.recipe == "maws" and not args.image_size and not in_use:
        side = 518 if config.patch == 14 else 512 // config.patch * config.patch
        config.image = (side, side)
    if "fc_norm.weight" in file_info.get("shapes", {}):     # the file's head reads the mean
        recipe["pool"] = "mean"
    elif in_use:
        recipe["pool"] = in_file.get("pool", "cls")
    vit.fill_recipe(args, {**recipe, "crop": in_file.get("crop", recipe["crop"])})


def parse_classify_flags(argv):
    """All flags, with the recipe filled in: (args, Config, file_info of --init)."""
    parser = vit.stage_parser("finetune.py classify", __doc__, {
        **RECIPES, **{f"mae {name}": recipe for name, recipe in MAE_BY_MODEL.items()}})
    parser.set_defaults(data=["world-labelled"], flip=True, dropout=0.0)     # flags of video
    add = parser.add_argument_group("classification").add_argument
    add("--recipe", choices=RECIPES, help="mae: at 224 pixels (MAE); maws: at 512 or 518 (paper; "
        "not published in full); ours: for a classroom; default ours up to small, else mae")
    add("--loss", choices=("ce", "bce", "softmax"), help="ce: one class per image; softmax: 1/k on "
        "each of k classes; bce: binary cross-entropy for every class; default ce, but that of "
        "--init with --predict and --eval-only")
    add("--pool", choices=("cls", "mean"), help="input of the head: the class token or the mean of "
        "the patches; default by recipe, but mean if --init has fc_norm; with --predict and "
        "--eval-only that of --init")
    add("--freeze", action="store_true", help="train only the head (and the norm of --pool mean) "
        "on the encoder of --init; default off")
    add("--crop", choices=("centre", "squash"), help="for evaluation. centre: the central 7/8, or "
        "the whole central square above 224 pixels (MAE); squash: the whole image (released MAWS); "
        "default: that of --init, else by recipe")
    add("--optimizer", choices=("adamw", "sgd"), help="sgd: nesterov, 0.9; default by recipe")
    add_training_flags(add)
    args = parser.parse_args(argv)
    config, name, file_info = vit.choose_config(args, "classify")
    fill_classify_recipe(args, config, name, file_info)
    if args.freeze and not args.init and not args.plan:
        raise UserError("--freeze trains a head on a pretrained encoder: give its file as --init")
    data.choose_val(args)
    return args, config, file_info


# ======================================================================================
# classify: targets, mixing, loss
# ======================================================================================

def soft_targets(classes, K, smoothing, loss):
    """The probabilities [B,K] that the model should predict, for images with classes [B,k] (-1:
    none).

    1 for each class with bce, else 1/k; a share `smoothing` is spread evenly over all K."""
    known = classes >= 0                                                    # [B,k]
    hot = torch.zeros(len(classes), K + 1, device=classes.device)
    hot = hot.scatter(1, torch.where(known, classes, K), 1.0)[:, :K]        # [B,K]
    if loss != "bce":
        hot = hot / known.sum(1, keepdim=True).clamp(min=1)
    return (1 - smoothing) * hot + smoothing / K                            # [B,K]


def beta(uniforms, alpha):
    """Numbers [B] distributed as Beta(alpha, alpha), alpha in (0, 1], from uniforms [B,2,n].

    Jöhnk's method: of points (u^(1/alpha), v^(1/alpha)), take x / (x + y) of the first one with
    x + y <= 1. At least half of the points have it, so that n = 16 tries hardly ever fail."""
    x, y = (uniforms.double() + 2.0 ** -25).pow(1 / alpha).unbind(1)        # 2 x [B,n]
    first = (x + y <= 1).int().argmax(1, keepdim=True)                      # [B,1]
    x, y = x.gather(1, first)[:, 0], y.gather(1, first)[:, 0]               # 2 x [B]
    return (x / (x + y)).float()


def intervals(centre, share, length):
    """Which of `length` pixels are in an interval around `centre` [B] in [0, 1) that covers a
    `share` [B] of them; it is cut off at the ends. [B,length] of booleans."""
    half = (length * share).int()[:, None] // 2                             # [B,1]
    centre = (length * centre).int()[:, None]                               # [B,1]
    pixel = torch.arange(length, device=share.device)                       # [length]
    return (pixel >= centre - half) & (pixel < centre + half)


def mix(images, targets, uniforms, mixup, cutmix):
    """Mix images [B,C,H,W] number 2i and 2i+1, and their targets [B,K], with one λ per pair; the
    frames of clips [B,T,C,H,W] alike.

    mixup (arXiv 1710.09412) takes λ of an image and 1 - λ of its partner; cutmix (1905.04899)
    pastes a rectangle of the partner with 1 - λ of the area. λ ~ Beta(alpha, alpha), where `mixup`
    and `cutmix` are the alphas, 0 is off. With both on, each is used half of the time (MAE).
    `uniforms` [B/2,35]: 1 for the choice, 2 for the rectangle's centre, 2 x 16 for `beta`."""
    H, W = images.shape[-2:]
    use_cutmix = uniforms[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))  # [B/2]
    tries = uniforms[:, 3:].reshape(len(uniforms), 2, -1)                   # [B/2,2,16]
    lam = torch.where(use_cutmix, beta(tries, cutmix or 1.0), beta(tries, mixup or 1.0))    # [B/2]
    side = (1 - lam).sqrt()                                                 # [B/2]
    rows, columns = intervals(uniforms[:, 1], side, H), intervals(uniforms[:, 2], side, W)
    pasted = rows[:, :, None] & columns[:, None]                            # [B/2,H,W]
    area = rows.float().mean(1) * columns.float().mean(1)                   # [B/2]
    own = torch.where(use_cutmix[:, None, None], (~pasted).float(), lam[:, None, None])
    lam = torch.where(use_cutmix, 1 - area, lam)                            # [B/2]
    own = own.repeat_interleave(2, 0)                                       # [B,H,W]
    own = own.unflatten(0, (-1, *[1] * (images.dim() - 3)))                 # [B,1,H,W] [B,1,1,H,W]
    lam = lam.repeat_interleave(2)[:, None]                                 # [B,1]
    partner = lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return (own * images + (1 - own) * partner(images),                     # [B,C,H,W]
            lam * targets + (1 - lam) * partner(targets))                   # [B,K]


def class_losses(logits, targets, loss):
    """The loss of each image [B] from logits and soft targets [B,K]: cross-entropy, or with bce the
    mean of the binary cross-entropies of all classes."""
    logits = logits.float()
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return -(targets * logits.log_softmax(1)).sum(1)


# ======================================================================================
# classify: evaluation
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device, names):
    """Top-1 and top-5 over a source, every image once at any number of ranks; also OUT/classes.txt.

    An image with several classes counts as correct when the prediction is any of them (as in "Are
    we done with ImageNet?", arXiv 2006.07159). With --loss bce or softmax there is also "map", the
    mean average precision over classes (rank 0 then holds the logits of all images)."""
    mine = []
    for images, batch in data.validate(val, args, device):
        with vit.autocast(args, device):
            logits = model(images)                                          # [B,K]
        mine += answers(logits, batch, args)
    return summarise(mine, len(val), args, names)


# ======================================================================================
# classify: main
# ======================================================================================

def evaluation_crop(args, config):
    """The function that chooses the crop of an evaluation: with squash the whole image, else the
    central 7/8, above 224 pixels the whole central square (MAE)."""
    return data.whole_image if args.crop == "squash" else functools.partial(
        data.centre_crop, share=224 / 256 if max(config.image) <= 224 else 1.0)


def make_classifier(args, config, classes):
    """The model that `classify` trains; with --freeze only its head and the norm before it."""
    model = ViT(config, classes, args.pool, HEAD_STD[args.recipe])
    for name, parameter in model.named_parameters() if args.freeze else ():
        parameter.requires_grad_(name.startswith(("head.", "fc_norm.")))
    return model


def load_classifier(model, args, names, file_info, new=()):
    """Load --init into the model of `classify`, with its head if that is for the same classes and
    pooling. The file may lack `new` tensors, where the model is to be trained."""
    in_use = args.predict or args.eval_only
    pool = file_info.get("config", {}).get("pool", "cls")
    same = file_info.get("classes") == names and pool == args.pool
    keep_head = in_use or same
    vit.load_weights(model, args.init, new=() if in_use else ("norm.*", "fc_norm.*", *new),
                     renew=() if keep_head else ("head.*",))
    if "head.weight" in file_info["shapes"] and not keep_head:
        rank0_print(f"a new head for {len(names)} classes: --init has one for "
                    f"{file_info['shapes']['head.weight'][0]} "
                    + ("hashtags" if "vocabulary" in file_info else "other classes or pooling"))


def train_classifier(args, model, wrapped, device, train, val, model_info, flops):
    """The training of classify and video; `model_info` and `flops` as of vit.Run."""
    names, mixing = model_info["classes"], bool(args.mixup or args.cutmix)
    schedule = vit.make_schedule(args, len(train), multiple=2 if mixing else 1)
    if not vit.open_run(args, model_info["stage"], model, train, val,
                        {"classes": names, "ema": bool(args.ema)}):
        return
    examples = data.examples(val or train, device)

    def draw_and_evaluate():
        with vit.ema_weights(model, run.ema):
            data.draw_predictions(args, examples, model, names, device)
            metrics = evaluate(model, val, args, device, names) if val else {}
        score = metrics.get("map", metrics.get("top1", -1.0))
        if score > run.state["best"]:
            run.state["best"] = score
            run.write_model("best.pt")
        return {**metrics, "best": run.state["best"]} if val else {}

    # ---- loop
    groups = vit.decay_groups(model, args.weight_decay, NO_DECAY, args.layer_decay)
    optimizer = (torch.optim.AdamW(groups, betas=BETAS, fused=True) if args.optimizer == "adamw"
                 else torch.optim.SGD(groups, momentum=0.9, nesterov=True))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if args.ema else {}
    run = vit.Run(args, model, wrapped, optimizer, device, schedule, model_info, flops, ema,
                  {"best": -1.0, **({"short_clips": 0} if train.views else {})})
    batches = data.training_batches(train, args, run.state["step"], schedule, device)
    for _ in run.steps(draw_and_evaluate, args.final_lr):
        counts = {"short_clips": torch.zeros((), device=device)} if train.views else {}
        for batch in run.micro_batches(batches):
            position, images = batch["position"], batch["images"]           # [B] [B,H,W,C]
            if args.flip:
                images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images = data.normalise(images)                                 # [B,C,H,W]
            scales, dropped = None, ()
            if args.erasing:
                images = erase(images, position, args.seed, args.erasing)
            targets = soft_targets(batch["targets"], len(names), args.smoothing, args.loss)  # [B,K]
            if mixing:
                uniforms = data.uniform(args.seed, position[::2], "mix", 35)    # [B/2,35]
                images, targets = mix(images, targets, uniforms, args.mixup, args.cutmix)
            if args.drop_path:
                uniforms = data.uniform(args.seed, position, "drop path", 2 * model.config.depth)
                scales = vit.drop_path_scales(uniforms, args.drop_path)     # [B,L,2]
            if args.dropout:
                uniforms = data.uniform(args.seed, position, "dropout", model.config.width)
                dropped = ((uniforms >= args.dropout) / (1 - args.dropout),)    # [B,D]
            with vit.autocast(args, device):
                logits = wrapped(images, scales, *dropped)                  # [B,K]
            run.backward(class_losses(logits, targets, args.loss).mean())
            if counts:
                counts["short_clips"] += batch["short"].sum()
        run.update(counts)
        if run.state.get("short_clips"):
            data.say_once(f"NOTE: some clips of --data have fewer than {train.views.span} frames: "
                          "some are repeated (log.jsonl has their number)")


def classify(argv):
    args, config, file_info = parse_classify_flags(argv)
    stacks = [(config.depth, config.width, 1 + config.num_patches)]
    flops = (vit.forward_flops if args.freeze else vit.training_flops)(stacks)
    if args.plan:
        outputs = len(file_info.get("classes", range(1000)))
        if args.freeze:     # nothing is kept for a backward pass: one block's activations at a time
            stacks = [(1, config.width, 1 + config.num_patches)]
        return vit.plan(args, lambda: make_classifier(args, config, outputs), stacks, flops)
    device = vit.start(args, stacks)

    # ---- data, their classes, and the crops and RandAugment of training
    train, val, names = open_classes(args, config, file_info)

    # ---- model: random weights, or --init; a run that goes on replaces them (vit.Run)
    model, wrapped = vit.build(lambda: make_classifier(args, config, len(names)), args, device)
    if args.init:
        load_classifier(model, args, names, file_info)
    if args.predict:
        return data.print_predictions(args, config, model, names, device,
                                      choose_box=evaluation_crop(args, config))
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, names))
    model_info = {"config": {**asdict(config), "pool": args.pool, "crop": args.crop,
                             "loss": args.loss}, "stage": "classify", "classes": names}
    train_classifier(args, model, wrapped, device, train, val, model_info, flops)


# ======================================================================================
# Details of classify: metrics and classes.txt
# ======================================================================================

class Answer(NamedTuple):
    """What a model answers for one image of an evaluation."""
    position: int
    correct: list       # its classes
    top: list           # the five most probable classes
    loss: float
    logits: object      # array [K] where an image may have several classes, else None


def answers(logits, batch, args):
    """The Answers of the images of a batch that could be read, from logits [B,K]."""
    classes, K = batch["targets"].to(logits.device), logits.shape[1]        # [B,k]
    losses = class_losses(logits, soft_targets(classes, K, 0.0, args.loss), args.loss)      # [B]
    top = logits.topk(min(5, K)).indices                                    # [B,min(5,K)]
    kept = [None] * len(top) if args.loss == "ce" else logits.float().cpu().numpy()
    rows = zip(batch["weight"].tolist(), batch["position"].tolist(), classes.tolist(), top.tolist(),
               losses.tolist(), kept)
    return [Answer(position, [k for k in correct if k >= 0], best, loss, some)
            for weight, position, correct, best, loss, some in rows if weight]


def summarise(mine, total, args, names):
    """The metrics of all ranks' Answers; `total` images were tried. Writes OUT/classes.txt."""
    parts = [*vit.objects_in_turn(mine)]

    def compute():      # in the order of positions: the same sums at any number of ranks
        rows = sorted(sum(parts, []), key=lambda row: row.position)
        hits = [row.top[0] in row.correct for row in rows]
        hits5 = [bool({*row.top} & {*row.correct}) for row in rows]
        metrics = {"loss": sum(row.loss for row in rows) / len(rows),
                   "top1": sum(hits) / len(rows), "top5": sum(hits5) / len(rows)}
        if args.loss != "ce":
            logits = torch.stack([torch.from_numpy(row.logits) for row in rows])    # [n,K]
            hot = torch.zeros_like(logits, dtype=torch.bool)                # [n,K]
            for line, row in zip(hot, rows):
                line[row.correct] = True
            precisions = [average_precision(logits[:, k], hot[:, k]) for k in range(len(names))
                          if hot[:, k].any()]
            metrics["map"] = sum(precisions) / len(precisions)
        write_classes(Path(args.out) / "classes.txt", rows, hits, names)
        return {**metrics, "count": len(rows), "bad": total - len(rows)}
    return vit.on_rank_0(compute)


def write_classes(path, rows, hits, names):
    """Write classes.txt: the top-1 of each class, the worst first, and the commonest mistakes."""
    images = Counter(k for row in rows for k in row.correct)
    found = Counter(k for row, hit in zip(rows, hits) if hit for k in row.correct)
    wrong = Counter((row.correct[0], row.top[0]) for row, hit in zip(rows, hits) if not hit)
    recall = sorted((found[k] / images[k], names[k], images[k]) for k in images)
    lines = ["# class, images, top-1; the worst first",
             *(f"{name}\t{count}\t{share:.3f}" for share, name, count in recall),
             "# commonest mistakes: class, predicted class, times",
             *(f"{names[a]}\t{names[b]}\t{times}" for (a, b), times in wrong.most_common(30))]
    path.parent.mkdir(parents=True, exist_ok=True)
    vit.write_aside(path, lambda aside: aside.write_text(
        "\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape"))


def average_precision(logits, correct):
    """The average precision of one class, from logits [n] and booleans [n]: images are sorted by
    logit, and the share of correct ones so far is averaged over the correct images."""
    correct = correct[logits.argsort(descending=True, stable=True)].double()    # [n]
    precision = correct.cumsum(0) / torch.arange(1, len(correct) + 1)
    return float((precision * correct).sum() / correct.sum())


# ======================================================================================
# Details of classify: RandAugment and random erasing
# ======================================================================================

def outside(image):
    """The colour that comes in from outside: ImageNet's mean (as timm's)."""
    return 116 if image.mode == "L" else tuple(round(255 * mean) for mean in data.IMAGENET_MEAN)


def moved(image, *matrix):
    """An image through an affine map (a, b, c, d, e, f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                           fillcolor=outside(image))


def enhanced(kind):
    """An operation that multiplies colour, contrast, brightness or sharpness by 0.1 to 1.9."""
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


# Functions of an image, a level from 0 to 1 and a sign: timm's "increasing" set (MAE's finetuning)
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
    """RandAugment (arXiv 1909.13719) of pixels uint8 [H,W,1 or 3]: two of OPERATIONS, drawn with
    replacement, each done with probability 0.5. A pure function of the position.

    The level of each is N(magnitude, 0.5), clipped to 0 … 10, over 10; with a magnitude of 9 this
    is timm's "rand-m9-mstd0.5-inc1", that of MAE's finetuning."""
    image = Image.fromarray(pixels.squeeze())
    uniforms = data.uniform(seed, np.array([position]), "randaugment", 10).reshape(2, 5)
    for which, done, a, b, sign in uniforms.tolist():
        if done < 0.5:
            normal = math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)    # Box, Muller
            level = min(max(magnitude + 0.5 * normal, 0), 10) / 10
            operation = list(OPERATIONS.values())[int(which * len(OPERATIONS))]
            image = operation(image, level, 1 if sign < 0.5 else -1)
    return np.asarray(image).reshape(pixels.shape)


def erase(images, position, seed, share):
    """Random erasing (arXiv 1708.04896): in a `share` of images [B,C,H,W] a rectangle of 2% to a
    third of the area, of an aspect from 0.3 to 3.3, becomes normal noise (timm's, MAE's). It is the
    same in all frames of a clip [B,T,C,H,W]: a tube."""
    clips, images = images, images.flatten(1, -3)           # a clip is an image of T * C channels
    _, C, H, W = images.shape
    uniforms = data.uniform(seed, position, "erase", 23)                    # [B,23]
    area = H * W * (0.02 + (1 / 3 - 0.02) * uniforms[:, :10])               # [B,10]: ten tries
    aspect = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * uniforms[:, 10:20])
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()   # [B,10]
    fits = (h < H) & (w < W)
    first = fits.int().argmax(1, keepdim=True)                              # [B,1]
    h, w, fits = (value.gather(1, first) for value in (h, w, fits))
    top = (uniforms[:, 20:21] * (H - h + 1)).floor()                        # [B,1]
    left = (uniforms[:, 21:22] * (W - w + 1)).floor()
    y, x = (torch.arange(side, device=images.device) for side in (H, W))
    inside = (((y >= top) & (y < top + h))[:, :, None] & ((x >= left) & (x < left + w))[:, None]
              & (fits & (uniforms[:, 22:] < share))[..., None])              # [B,H,W]
    noise = data.uniform(seed, position, "erased pixels", C * H * W) + 2.0 ** -25    # [B,C*H*W]
    noise = math.sqrt(2) * torch.erfinv(2 * noise - 1)
    return torch.where(inside[:, None], noise.reshape(images.shape), images).reshape(clips.shape)


# ======================================================================================
# Details of classify: the classes of the data and the outputs of a model
# ======================================================================================

def read_classes(path):
    """The classes of --classes, a line each with names separated by commas: [[name]]. Lines may be
    equal, as in CLIP's list of ImageNet's classes. Raises UserError."""
    classes = []
    for number, line in data.read_lines(path, "--classes"):
        names = [name.strip() for name in line.split(",") if name.strip()]
        if not names:
            raise UserError(f"--classes {path}, line {number} has no name: {line!r}")
        classes.append(names)
    return classes


def read_class_map(path, outputs):
    """A file of lines "model's class TAB data's class" as {data's class: [output]}."""
    found = {}
    for number, line in data.read_lines(path, "--class-map"):
        ours, *theirs = (word.strip() for word in line.split("\t"))
        if len(theirs) != 1 or ours not in outputs:
            raise UserError(f"--class-map {path}, line {number}: not one of the model's classes, a "
                            f"TAB and one of the data's: {line!r}")
        found.setdefault(theirs[0], []).extend(outputs[ours])
    return found


def outputs_of(classes, names, where, class_map=None):
    """Which outputs of a model are right for each of the data's classes: {name: [output]}.

    `classes` [[name]] are the model's, `names` the data's, from `where`. They are matched by name;
    whole numbers that are no name, by number. Raises UserError for classes of the data that the
    model lacks, unless a `class_map` says what counts."""
    if len(classes) < 2:
        raise UserError(f"{where} has {'one class' if classes else 'no class'}: there is nothing "
                        "to tell apart; images have the class of their folder, or a label")
    if not names:
        raise UserError(f"{where} has no classes: images have that of their folder, or a label")
    outputs = {name: [i] for i, some in enumerate(classes) for name in some}
    lines = Counter(name for some in classes for name in {*some})
    if twice := [name for name in names if lines[name] > 1]:
        raise UserError(f"{twice[0]!r}, a class of {where}, is the name of {lines[twice[0]]} "
                        "classes of the model: it can be the name of one")
    if not outputs.keys() & {*names}:
        outputs |= {str(i): [i] for i in range(len(classes))}
        if not class_map and outputs.keys() & {*names}:
            rank0_print(f"{where} has numbers for classes: taken as the model's outputs, from 0 on")
    if class_map:
        outputs = read_class_map(class_map, outputs)
    unknown = [name for name in names if name not in outputs]
    if len(unknown) == len(names) or unknown and not class_map:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"{where} has classes that are not known: {', '.join(unknown[:5])}{more}; "
                        f"known are {len(classes)}: {', '.join(some[0] for some in classes[:5])}, "
                        "… (classify has --class-map)")
    return outputs


def classes_of_val(classes, val):
    """Classes [[name]] to label `val` by: `classes`, or, if there are as many and none of them is
    the name of a class of `val`, its own in sorted order (ImageNet's n01440764, …)."""
    named = {name for names in classes for name in names} & {*val.classes}
    if named or len(classes) != len(val.classes):
        return classes
    rank0_print(f"the {len(classes)} classes of --val are taken in sorted order: {val.classes[0]} "
                f"is {classes[0][0]}, …, {val.classes[-1]} is {classes[-1][0]}")
    return [[name] for name in val.classes]


def names_in(source):
    """The names of a source's classes; where labels are lists, all names in these, sorted: then all
    ranks have to call it."""
    if source.classes:
        return source.classes
    mine = {tag for c in data.my_part(len(source.chunks), "labels")
            for tag in source.words(c, "tags")[0]}
    return data.in_label_order(set().union(*vit.all_gather_objects(mine)))


def class_targets(sample, source, outputs):
    """The outputs that are right for a sample, each once: those of the class of its folder or
    label, or of several classes, where labels are lists."""
    names = sample.get("tags", [])
    if source.classes:
        names = [source.classes[sample["label"]]] if "label" in sample else []
    return sorted({i for name in names for i in outputs.get(name, ())})


def times_labelled(c, source, outputs):
    """1 for each sample of a chunk that has a known class, else 0: int64 [n]."""
    number_of = lambda name: 0 if name in outputs else -1
    rows, _ = data.pairs(source, c, number_of, "labels" if source.classes else "tags")
    return np.bincount(rows, minlength=int(source.chunks[c]))


def check_labelled(count, total, where):
    """Print how many of a source's images have no known class; UserError where none has one."""
    if not count:
        raise UserError(f"no image of {where} has a class: a folder each, or a label each")
    if count < total:
        rank0_print(f"{where}: {total - count:,} of {total:,} images have no known class and are "
                    "left out")


def labelled(source, classes, where, class_map=None):
    """(The data.Rows of a source whose class is known, targets_of(sample)), for data.Samples.

    `classes` as of outputs_of. Raises UserError where no image has a class."""
    outputs = outputs_of(classes, names_in(source), where, class_map)
    rows = data.Rows(source.chunks, functools.partial(
        times_labelled, source=source, outputs=outputs))
    check_labelled(len(rows), len(source), where)
    return rows, functools.partial(class_targets, source=source, outputs=outputs)


def classes_in_file(args, file_info):
    """The classes [[name]] of --init's outputs: those of --classes, or of the file, or those that
    config.json names, or numbers. Raises UserError for a file without a head for classes."""
    if "head.weight" not in file_info["shapes"]:
        raise UserError(f"{args.init} has no head: --predict and --eval-only need a finetuned "
                        "file, as runs/classify/model.pt")
    if "vocabulary" in file_info:
        raise UserError(f"{args.init} predicts hashtags, not classes: use it by wsp.py, or "
                        "finetune it first")
    K = file_info["shapes"]["head.weight"][0]
    if args.classes:
        classes = read_classes(args.classes)
        if len(classes) != K:
            raise UserError(f"--classes {args.classes} has {len(classes)} lines, but {args.init} "
                            f"has {K} outputs")
        return classes
    if "classes" in file_info:
        return [[name] for name in file_info["classes"]]
    # Hugging Face's config.json beside the file may name its outputs.
    labels = vit.read_json(Path(args.init).with_name("config.json")).get("id2label", {})
    labels = [labels.get(str(i)) for i in range(K)]
    if not all(labels) or labels[0] == "LABEL_0":
        labels = map(str, range(K))
    return [[label, *re.split(" *, *", label)] for label in labels]


def open_classes(args, config, file_info, views=None):
    """(--data as data.Samples or None, --val or None, the name of each output); of clips if there
    are `views` (data.Views)."""
    train, val = None, None
    if args.predict or args.eval_only:
        classes = classes_in_file(args, file_info)
    else:
        source = data.open_data(*args.data, index_dir=args.index_dir, clips=bool(views))
        classes = read_classes(args.classes) if args.classes else [
            [name] for name in names_in(source)]
        rows, targets_of = labelled(source, classes, "--data")
        if args.loss == "ce" and not source.classes:
            raise UserError("labels of --data are lists, of several classes: give --loss bce or "
                            "softmax")
        if args.randaugment and config.channels == 4:
            raise UserError("--randaugment knows no alpha channel; give --randaugment 0")
        augment = functools.partial(rand_augment, magnitude=args.randaugment)
        train = data.training_samples(source, args, config, args.smallest_crop, rows, targets_of,
                                      augment if args.randaugment else None, views)
    if args.val and not args.predict:
        source = data.open_data(*args.val, index_dir=args.index_dir, clips=bool(views))
        if args.eval_only and not args.class_map and "classes" not in file_info:
            classes = classes_of_val(classes, source)
        val = data.evaluation_samples(source, config, evaluation_crop(args, config),
                                      *labelled(source, classes, "--val", args.class_map), views)
    return train, val, [some[0] for some in classes]


# ======================================================================================
# Frozen encoders: features, which the tasks knn, linear and lowshot share
# ======================================================================================

def add_lowshot_flags(add):
    add("--shots", type=vit.positive, nargs="+", default=[1, 5, 10], metavar="IMAGES",
        help="labelled images per class; default 1 5 10 (paper)")
    add("--splits", type=vit.positive, default=5, metavar="COUNT",
        help="random choices of these images; default %(default)s (paper)")
    add("--prompts", type=vit.positive, default=10, metavar="COUNT",
        help="prompts in each block; default %(default)s (not published: ours)")
    add("--epochs", type=vit.positive, default=100,
        help="epochs in which prompts are trained; default %(default)s (VPT's)")
    add("--lr", type=vit.number(0), default=0.05,
        help="peak learning rate of prompts; default %(default)s (not published: ours)")


def start_frozen(task, argv):
    """Read the flags of a task on features of a frozen encoder and start: (args, Config, device,
    load). load(pool) is the encoder of --init, without a head and without gradients. Raises
    UserError."""
    parser = vit.stage_parser(f"finetune.py {task}", __doc__)
    parser.set_defaults(data=["world-labelled"])
    add = parser.add_argument_group("features").add_argument
    add("--pool", choices=("cls", "mean"), default="cls", help="the class token (default) or the "
        "mean of the patches")
    add("--crop", choices=("centre", "squash"), default="centre", help="centre (default): the "
        "central 7/8, all of it above 224 pixels (MAE); squash: the whole image")
    add("--features", metavar="DIR", default="runs/features", help="where features are kept, to be "
        "used again by any task; default runs/features")
    if task == "lowshot":
        add_lowshot_flags(parser.add_argument_group(task).add_argument)
    args = parser.parse_args(argv)
    if not args.init:
        raise UserError(f"{task} needs an encoder: give its file as --init")
    if task == "features" and args.val:
        raise UserError("features are those of --data: leave --val out")
    if task != "features":
        data.choose_val(args)
        if not args.val:
            raise UserError(f"{task} needs --val: the images to be right about")
    config, _, file_info = vit.choose_config(args, task)
    if task == "lowshot":
        if args.parallel in ("fsdp", "hsdp"):
            raise UserError("lowshot gives each rank splits of its own, which need the whole "
                            "encoder: leave --parallel out")
        args.parallel = "ddp"
    device = vit.start(args)
    torch.set_float32_matmul_precision("highest")   # TF32 is too coarse for fit_linear's L-BFGS
    vit.on_rank_0(lambda: Path(args.out).mkdir(parents=True, exist_ok=True))

    @functools.cache
    def load(pool):
        if pool == "mean":  # of a finetuned file, as its head saw it, or of any other, normalised
            pool = "mean" if "fc_norm.weight" in file_info["shapes"] else "patches"
        model, _ = vit.build(lambda: ViT(config, 0, pool), args, device, frozen=True)
        vit.load_weights(model, args.init)
        return model

    return args, config, device, load


def file_mark(path):
    """Bytes that tell a file from others and from what it was before a change: its size, its time
    of change, and 16 pieces of 4 kB from all over it, which is all of a file of up to 64 kB."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            starts = np.linspace(0, max(0, status.st_size - 4096), 16).astype(int).tolist()
            pieces = [os.pread(file.fileno(), 4096, start) for start in starts]
    except OSError as error:
        return str(error.strerror).encode()     # an image that cannot be read is not an error here
    return b"%d %d " % (status.st_size, status.st_mtime_ns) + b"".join(pieces)


def fingerprint(args, config, source, device):
    """16 hex digits of the encoder, the images and the settings that features are made of: rank 0's
    answer. The encoder's file counts as a whole, of images and shards their file_mark: the same
    names, sizes and times do not make the same images."""
    def compute():
        digest = hashlib.sha256(repr((
            vit.file_crc(args.init), config, args.pool, args.crop,
            str(vit.autocast_dtype(args, device)), source.fingerprint())).encode())
        files = source.files()
        with ThreadPoolExecutor(32) as threads:     # over a network, each file is a round trip
            while some := [*itertools.islice(files, 4096)]:
                for mark in threads.map(file_mark, some):
                    digest.update(mark)
        return digest.hexdigest()[:16]
    return vit.on_rank_0(compute)


@torch.no_grad()
def write_features(folder, encoder, samples, width, args, device):
    """Write what an encoder makes of samples into a folder: features.npy float32 [n,D], a row for
    each image that can be read, in order; labels.npy int64 [n] (-1: none); index.npy int64 [n], the
    numbers of these images in the source.

    Ranks send rank 0 a batch at a time, so memory is bounded. Images that cannot be read are listed
    in OUT/bad_val_samples.txt; as many rows at the end of features.npy are not used."""
    rank, count, n = vit.get_rank(), len(samples), 0
    labels, index = np.zeros(count, np.int64), np.zeros(count, np.int64)
    aside = Path(f"{folder}.{os.getpid()}.tmp")

    def begin():
        aside.mkdir(parents=True)
        size, free = 4 * count * width, shutil.disk_usage(aside).free
        if size > free:         # else a full disk would end the process without a word
            raise UserError(f"features of {count:,} images take {size / 1e9:.3g} GB, but there are "
                            f"{free / 1e9:.3g} GB left in {folder.parent}")
        np.lib.format.open_memmap(aside / "features.npy", "w+", np.float32, (count, width))

    vit.on_rank_0(begin)
    table = np.load(aside / "features.npy", mmap_mode="r+") if rank == 0 else None
    for images, batch in data.validate(samples, args, device):
        with vit.autocast(args, device):
            rows = vit.gather_rows(encoder(images).float().cpu())           # [ranks*B,D]
        weight, label, position = (vit.gather_rows(batch[name])
                                   for name in ("weight", "label", "position"))
        if rank == 0:
            seen = weight > 0
            end = n + int(seen.sum())
            table[n:end], labels[n:end], index[n:end] = rows[seen], label[seen], position[seen]
            n = end

    def finish():
        np.save(aside / "labels.npy", labels[:n])
        np.save(aside / "index.npy", index[:n])
        table.flush()
        if folder.exists():     # another process was faster
            return shutil.rmtree(aside)
        aside.rename(folder)
    vit.on_rank_0(finish)


def open_features(place, load, source, args, config, choose_box, device):
    """The arrays that write_features writes, {"features", "labels", "index"}, for a source's whole
    images: kept below `place`, or made now by the encoder that load() returns."""
    folder = Path(place) / fingerprint(args, config, source, device)
    if vit.on_rank_0(folder.exists):
        rank0_print(f"features of {len(source):,} images are taken from {folder}")
    else:
        samples = data.evaluation_samples(source, config, choose_box)
        write_features(folder, load(), samples, config.width, args, device)
        rank0_print(f"features of {len(source):,} images are kept in {folder}")
    table = {name: np.load(folder / f"{name}.npy") for name in ("labels", "index")}
    rows = np.load(folder / "features.npy", mmap_mode="r")
    return {**table, "features": rows[:len(table["index"])]}


def features(argv):
    """The task `features`: OUT/features.npz, for other programs."""
    args, config, device, load = start_frozen("features", argv)
    source = data.open_data(*args.data, index_dir=args.index_dir)
    table = open_features(args.features, lambda: load(args.pool), source, args, config,
                          evaluation_crop(args, config), device)
    count = len(table["index"])

    def write():
        names = [source[i]["where"].encode("utf-8", "replace") for i in table["index"]]
        data.write_arrays(Path(args.out) / "features.npz", {
            **table, "names": np.array(names), "classes": np.array(source.classes, str)})
    vit.on_rank_0(write)
    vit.report(args, {"count": count, "bad": len(source) - count, "width": config.width,
                      "classes": len(source.classes)})


def open_tables(args, config, device, load):
    """The features of --data and --val, of images that have a class: two dicts as of open_features,
    with their "source", its "targets_of", and "labels" that are numbers of the classes of --data;
    and the names of these classes. Classes of --val are matched by name. Raises UserError."""
    sources = [data.open_data(*specs, index_dir=args.index_dir) for specs in (args.data, args.val)]
    classes, tables = sources[0].classes, []
    for flag, source in zip(("--data", "--val"), sources):
        outputs = outputs_of([[name] for name in classes], source.classes, flag)
        table = open_features(args.features, lambda: load(args.pool), source, args, config,
                              evaluation_crop(args, config), device)
        numbers = np.array([outputs[name][0] for name in source.classes] + [-1])
        table["labels"] = numbers[table["labels"]]
        known = table["labels"] >= 0
        check_labelled(int(known.sum()), len(known), flag)
        if not known.all():
            table.update({name: values[known] for name, values in table.items()})
        targets_of = functools.partial(class_targets, source=source, outputs=outputs)
        tables.append({**table, "source": source, "targets_of": targets_of})
    return *tables, classes


# ======================================================================================
# k-nearest neighbours
# ======================================================================================

def nearest(queries, features, k, chunk=1 << 16):
    """The k most similar of features [n,D] to each of queries [m,D], by cosine: (similarity,
    index), [m,k] each, the most similar first; `features` are taken a chunk at a time."""
    best = torch.full((len(queries), 0), -2.0, device=queries.device)
    index = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    queries = F.normalize(queries, dim=1)
    for at in range(0, len(features), chunk):
        part = torch.tensor(features[at:at + chunk], device=queries.device)     # [c,D]
        similarity = queries @ F.normalize(part, dim=1).T                   # [m,c]
        some, where = similarity.topk(min(k, len(part)))
        best, order = torch.cat([best, some], 1).sort(
            dim=1, descending=True, stable=True)
        index = torch.cat([index, where + at], 1).gather(1, order)
        best, index = best[:, :k], index[:, :k]
    return best, index


def vote(similarity, labels, K, temperature=0.07):
    """The class [m] with the most votes of the neighbours' labels [m,k], each weighing
    exp(similarity / temperature) (0.07: instance discrimination, arXiv 1805.01978)."""
    votes = torch.zeros(len(labels), K, device=labels.device)
    return votes.scatter_add(1, labels, (similarity / temperature).exp()).argmax(1)


def knn(argv):
    """The task `knn`: top-1 by the labels of the 1, 5, 10, 20 most similar images of --data."""
    args, config, device, load = start_frozen("knn", argv)
    train, val, classes = open_tables(args, config, device, load)
    labels, ks = torch.tensor(train["labels"], device=device), (1, 5, 10, 20)
    right = torch.zeros(len(ks), dtype=torch.int64)
    begin, step = 1024 * vit.get_rank(), 1024 * vit.get_world_size()
    for at in data.progress(range(begin, len(val["labels"]), step), "neighbours"):
        queries = torch.tensor(val["features"][at:at + 1024], device=device)    # [m,D]
        truth = torch.tensor(val["labels"][at:at + 1024], device=device)        # [m]
        similarity, index = nearest(queries, train["features"], max(ks))    # [m,k] [m,k]
        for row, k in enumerate(ks):
            found = vote(similarity[:, :k], labels[index[:, :k]], len(classes))
            right[row] += (found == truth).sum().cpu()
    count = len(val["labels"])
    vit.report(args, {**{f"knn{k}": hits / count for k, hits in zip(
        ks, vit.all_reduce_sum(right).tolist())}, "count": count, "train": len(labels)})


# ======================================================================================
# Linear probe: logistic regression
# ======================================================================================

PENALTIES = 1e-2, 1e-3, 1e-4, 1e-5, 1e-6    # ours


def fit_linear(features, labels, K, penalty, sum_over_ranks=lambda tensor: tensor):
    """Logistic regression on features [n,D]: the head, weight [K,D] and bias [K], with the least
    mean cross-entropy plus penalty / 2 times the squared length of the weight that features of mean
    0 and variance 1 would have; the standardisation is folded into the head that is returned.

    L-BFGS on whole batches. With vit.all_reduce_sum the rows of all ranks count, any number on
    each: ranks get the same sums, so they take the same steps."""
    count = sum_over_ranks(torch.tensor(float(len(features)), device=features.device))
    mean = sum_over_ranks(features.sum(0)) / count                          # [D]
    variance = sum_over_ranks((features - mean).square().sum(0)) / count    # [D]
    scale = (variance + 1e-6).rsqrt()
    features = (features - mean).mul_(scale)                                # [n,D]
    weight = torch.zeros(K, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(K, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels, reduction="sum") / count
        value.backward()
        for parameter in (weight, bias):
            sum_over_ranks(parameter.grad)
        weight.grad.add_(weight.detach(), alpha=penalty)
        length = weight.detach().square().sum()
        return sum_over_ranks(value.detach()) + penalty / 2 * length

    optimizer.step(loss)
    weight = weight.detach() * scale
    return weight, bias.detach() - weight @ mean


def take_rows(table, rows, device):
    """This rank's share of some rows of a table: (features [n,D], labels [n])."""
    rows = np.sort(rows)[vit.get_rank()::vit.get_world_size()]
    return (torch.tensor(table["features"][rows], device=device),
            torch.tensor(table["labels"][rows], device=device))


def accuracy(head, features, labels):
    """The share of all ranks' features [n,D] whose class a head (weight [K,D], bias [K]) names."""
    right = (F.linear(features, *head).argmax(1) == labels).sum().item()
    right, count = vit.all_reduce_sum(torch.tensor([right, len(labels)])).tolist()
    return right / count


def linear(argv):
    """The task `linear`: top-1 of a linear classifier of features. Its penalty is chosen on a tenth
    of --data that is held back, never on --val; then it is fitted to all of --data. OUT/model.pt is
    the encoder with this head, for `classify --predict` and `--eval-only`."""
    args, config, device, load = start_frozen("linear", argv)
    train, val, classes = open_tables(args, config, device, load)
    K, count = len(classes), len(train["labels"])
    order = data.uniform(0, train["index"], "held back", 1)[:, 0].argsort(kind="stable")
    rest, held = np.split(order, [count - count // 10])
    if not len(held):
        raise UserError("linear holds back a tenth of --data to choose its penalty, but --data "
                        f"has {count} images with a class: give at least 10")
    rest, held = (take_rows(train, rows, device) for rows in (rest, held))
    shares = [accuracy(fit_linear(*rest, K, penalty, vit.all_reduce_sum), *held)
              for penalty in data.progress(PENALTIES, "penalties", "fit")]
    penalty = PENALTIES[shares.index(max(shares))]
    everything = [torch.cat(parts) for parts in zip(rest, held)]
    weight, bias = fit_linear(*everything, K, penalty, vit.all_reduce_sum)
    top1 = accuracy((weight, bias), *take_rows(val, np.arange(len(val["labels"])), device))

    encoder = load(args.pool)
    weights = {**vit.whole_weights(encoder), "head.weight": weight.cpu(), "head.bias": bias.cpu()}
    content = {"model": weights, "stage": "linear", "classes": classes, "config": {
        **asdict(config), "pool": encoder.pool, "crop": args.crop, "loss": "ce"}}
    vit.on_rank_0(lambda: vit.write_aside(
        Path(args.out) / "model.pt", lambda aside: torch.save(content, aside)))
    vit.report(args, {"top1": top1, "held_back": max(shares), "penalty": penalty,
                      "count": len(val["labels"]), "train": count})


# ======================================================================================
# Low-shot: a few labelled images of each class
# ======================================================================================

BATCH = 64                  # images per step (VPT's)
SMALLEST_CROP = 0.5         # smallest area of a random crop, as a share of the image's (ours)


class Prompted(nn.Module):
    """A frozen encoder with prompts before every block, and a linear head: images to logits [B,K].

    Visual Prompt Tuning, deep (arXiv 2203.12119, section 3.2; the paper's choice for low-shot):
    `prompts` tokens join the class token and the patches in each block and are dropped after it.
    They start as U(-v, v), v = sqrt(6 / (3 p^2 + D)); the head as zero (ours)."""

    def __init__(self, encoder, classes, prompts, seed):
        super().__init__()
        D, p = encoder.config.width, encoder.config.patch
        self.encoder, bound = encoder, math.sqrt(6 / (3 * p * p + D))
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(encoder.config.depth, prompts, D, generator=generator)   # [L,n,D]
        self.prompts = nn.Parameter((2 * start - 1) * bound)
        self.head = nn.Linear(D, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        x = self.encoder.embed(images)                                      # [B,1+N,D]
        for block, prompts in zip(self.encoder.blocks, self.prompts):
            prompts = prompts.expand(len(x), -1, -1)                        # [B,n,D]
            x = block(torch.cat([x[:, :1], prompts.to(x.dtype), x[:, 1:]], 1))  # [B,1+n+N,D]
            x = torch.cat([x[:, :1], x[:, 1 + prompts.shape[1]:]], 1)       # [B,1+N,D]
        return self.head(self.encoder.norm(x[:, 0]))                        # [B,K]


def few_of_each(labels, shots, split):
    """The numbers [n] of `shots` images of each class, all of those that have fewer, by chance; a
    pure function of the split's number. `labels` int64 [m], -1: none."""
    chance = data.uniform(split, np.arange(len(labels)), "few", 1)[:, 0]
    order = np.lexsort((chance, labels))                    # class by class
    ordered = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(ordered, ordered)      # in its class
    return np.sort(order[(ordered >= 0) & (place < shots)])


def tune_prompts(encoder, train, val, K, args, seed, device):
    """Train prompts and a head on a few images: the share of val's that they are right about.

    SGD with momentum 0.9, cosine, a tenth of the steps as warmup (VPT's); one process."""
    model = Prompted(encoder, K, args.prompts, seed).to(device)
    optimizer = torch.optim.SGD([model.prompts, *model.head.parameters()], lr=0, momentum=0.9)
    batch = min(BATCH, len(train))
    steps = max(1, args.epochs * len(train) // batch)
    positions = data.training_positions(0, steps, batch, batch, 0, 1)
    scale = 1024        # of the loss, for fp16; SGD's rate takes it back exactly
    for step, part in enumerate(data.load(train, positions, args.workers, device)):
        lr = vit.learning_rate(step, steps, args.lr, 0.1 * steps)
        optimizer.param_groups[0]["lr"] = lr / scale
        images = part["images"].to(device)                                  # [B,H,W,C]
        images = data.flip(images, data.uniform(seed, part["position"].to(device), "flip", 1))
        with vit.autocast(args, device):
            logits = model(data.normalise(images))                          # [B,K]
        loss = F.cross_entropy(logits.float(), part["targets"][:, 0].to(device))
        (scale * loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    right = []
    positions = data.validation_positions(len(val), args.micro_batch, 0, 1)
    for part in data.load(val, positions, args.workers, device):
        with torch.no_grad(), vit.autocast(args, device):
            found = model(data.normalise(part["images"].to(device))).argmax(1).cpu()    # [B]
        right += (found == part["targets"][:, 0])[part["weight"] > 0].tolist()
    return sum(right) / len(right)


def lowshot(argv):
    """The task `lowshot`: top-1 after 1, 5, 10 images of each class, mean and deviation over
    splits, of prompts (VPT) and of a linear classifier. The splits are shared out among ranks."""
    args, config, device, load = start_frozen("lowshot", argv)
    train, val, classes = open_tables(args, config, device, load)
    encoder = load("cls")
    tests = data.evaluation_samples(val["source"], config, evaluation_crop(args, config),
                                    val["index"], val["targets_of"])
    fewest = np.bincount(train["labels"], minlength=len(classes)).min()
    if fewest < max(args.shots):
        rank0_print(f"NOTE: a class has only {fewest} images: if --shots is more, all are used")
    crop = functools.partial(data.random_resized_crop, scale=(SMALLEST_CROP, 1.0))
    queries = torch.tensor(val["features"], device=device)                  # [m,D]
    truth, results = torch.tensor(val["labels"], device=device), []         # [m]
    jobs = [(shots, split) for shots in args.shots for split in range(args.splits)]
    mine = jobs[vit.get_rank()::vit.get_world_size()]
    for shots, split in data.progress(mine, "splits", "split"):
        rows = few_of_each(train["labels"], shots, split)
        head = fit_linear(torch.tensor(train["features"][rows], device=device),
                          torch.tensor(train["labels"][rows], device=device), len(classes), 1e-3)
        by_linear = (F.linear(queries, *head).argmax(1) == truth).float().mean().item()
        samples = data.Samples(train["source"], config.image, config.channels, crop, split,
                               rows=train["index"][rows], targets_of=train["targets_of"])
        by_prompts = tune_prompts(encoder, samples, tests, len(classes), args, split, device)
        results.append((shots, by_prompts, by_linear))
        print(f"{shots} a class, split {split}: vpt {by_prompts:.4f}, linear {by_linear:.4f}",
              flush=True)
    results, metrics = sum(vit.all_gather_objects(results), []), {}
    for shots in args.shots:
        rows = np.array([row[1:] for row in results if row[0] == shots])    # [splits,2]
        for name, column in zip(("vpt", "linear"), rows.T):
            metrics[f"{name}{shots}"] = float(column.mean())
            metrics[f"{name}{shots}_deviation"] = float(column.std())
    vit.report(args, {**metrics, "count": len(truth)})


# ======================================================================================
# Zero-shot: from text to tokens
# ======================================================================================

START, PAD, END, UNKNOWN = range(4)     # ids of <s> <pad> </s> <unk> (XLM-R)
SPECIAL = "<s>", "<pad>", "</s>", "<unk>", "<mask>"

# XLM-R's normaliser ("nmt_nfkc" of 2019) is NFKC with three exceptions: SPACES become spaces,
# CONTROLS are removed, and the full-width tilde stays.
SPACES = "\t\n\f\r\u1680\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd"
CONTROLS = [chr(code) for code in (*range(1, 9), 11, *range(14, 32), 127, 143, 159)]
REPLACED = str.maketrans({**dict.fromkeys(SPACES, " "), **dict.fromkeys(CONTROLS, "")})


def composes(characters):
    """True if these characters, in this order, are the parts of one, as "e" and an accent are."""
    parts = "".join(unicodedata.normalize("NFKD", character) for character in characters)
    whole = unicodedata.normalize("NFKC", characters)
    return len(whole) == 1 and len(parts) == len(characters) \
        and unicodedata.normalize("NFKD", whole) == parts


def normalise(text):
    """The text as XLM-R's normaliser writes it: NFKC of every character and of those that compose.

    NFKC of the whole text would also sort the marks of a letter, as in vowelled Arabic."""
    if not unicodedata.is_normalized("NFKC", text):
        runs = [""]
        for character in text:
            if composes(runs[-1] + character):
                runs[-1] += character
            else:
                runs.append(character)
        text = "".join(run if run == "～" else unicodedata.normalize("NFKC", run) for run in runs)
    return text.translate(REPLACED)


class Tokenizer:
    """A unigram tokenizer (arXiv 1804.10959), read from Hugging Face's tokenizer.json: XLM-R's.

    encode("text") gives ids without <s> and </s>; `size` is the number of ids, `content` the bytes
    of the file, which may be given. Raises UserError for any other kind of file."""

    def __init__(self, path, content=None):
        try:
            self.content = Path(path).read_bytes() if content is None else content
            model = json.loads(self.content)["model"]
            if model["type"] != "Unigram" or model["unk_id"] != UNKNOWN:
                raise ValueError(f"its type is {model['type']}, its unk_id {model['unk_id']}")
            # 32 bits, as in the sentencepiece library: long texts have sums that are almost equal.
            self.pieces = {piece: (np.float32(score), i)
                           for i, (piece, score) in enumerate(model["vocab"])
                           if piece not in SPECIAL}
            if any("▁" in piece[1:] for piece in self.pieces):
                raise ValueError("it has pieces of more than one word")
            self.size, self.longest = len(model["vocab"]), max(map(len, self.pieces))
            self.unknown = min(score for score, _ in self.pieces.values()) - np.float32(10)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no unigram tokenizer ({type(error).__name__}: {error}); "
                            "give XLM-R's tokenizer.json as --tokenizer") from error

    def encode(self, text):
        """The ids of the most probable pieces (Viterbi); unknown characters in a row are one."""
        text = "".join(f"▁{word}" for word in normalise(text).split(" ") if word)
        word = 0                                # where the word begins
        best = [(np.float32(0), 0, UNKNOWN)]    # of text[:end]: score, last piece's start and id
        for end in range(1, len(text) + 1):
            if text[end - 1] == "▁":
                word = end - 1
            paths = []
            for start in range(max(word, end - self.longest), end):
                if text[start:end] in self.pieces:
                    score, i = self.pieces[text[start:end]]
                    paths.append((best[start][0] + score, start, i))
            paths.append((best[end - 1][0] + self.unknown, end - 1, UNKNOWN))
            best.append(max(paths, key=lambda path: path[0]))       # the longest of equal ones
        ids, end = [], len(text)
        while end:
            _, end, i = best[end]
            if i != UNKNOWN or ids[-1:] != [UNKNOWN]:
                ids.append(i)
        return ids[::-1]


def encode_bytes(text):
    """The ids of a text without a tokenizer: its bytes, after the four special ids."""
    return [4 + byte for byte in text.encode("utf-8", "replace")]


def framed(ids, longest):
    """The ids between <s> and </s>, cut to `longest` with them."""
    return [START, *ids[:longest - 2], END]


def caption_tokens(sample, encode, longest):
    """The framed ids of a sample's caption. Raises ValueError where it has none."""
    caption = sample.get("caption", "")
    if not caption.strip():
        raise ValueError("it has no caption")
    return framed(encode(caption), longest)


# ======================================================================================
# Zero-shot: the model
# ======================================================================================

TEXT_SIZES = {
    # name:  width depth heads positions
    "nano":  (128,   4,   4,  104),     # ours
    "base":  (768,  12,  12,  514),     # XLM-R base, arXiv 1911.02116
    "large": (1024, 24,  16,  514),     # XLM-R large
}
# The text tower and the width of the common space, by image tower (paper, released models)
TOWERS = {
    **dict.fromkeys(("nano", "tiny", "small"), ("nano", 128)),      # ours
    "base": ("base", 768),
    **dict.fromkeys(("large", "huge"), ("large", 1024)),
    **dict.fromkeys(("2b", "6.5b"), ("large", 2048)),               # 6.5b: ours
}
LONGEST = 102       # tokens of a text, with <s> and </s> (released models)


@dataclass
class TextConfig:
    """The shape of a text tower. `positions` is the number of rows of its position table, of which
    XLM-R does not use the first two."""
    vocabulary: int
    width: int
    depth: int
    heads: int
    positions: int

    @property
    def longest(self):
        """The largest number of tokens of a text, with <s> and </s>."""
        return min(LONGEST, self.positions - 2)


class TextBlock(nn.Module):
    """A post-LayerNorm transformer block over tokens [B,N,D], as in BERT."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = vit.Attention(width, heads)
        self.norm1 = vit.LayerNorm(width, 1e-5)
        self.mlp = vit.MLP(width)
        self.norm2 = vit.LayerNorm(width, 1e-5)

    def forward(self, x, mask):
        x = self.norm1(x + self.attn(x, mask))
        return self.norm2(x + self.mlp(x))


class TextTransformer(nn.Module):
    """XLM-R (arXiv 1911.02116) as a text tower: ids [B,N] to the feature of <s> [B,D]."""

    def __init__(self, config):
        super().__init__()
        D, self.recompute = config.width, False
        self.token_embed = nn.Embedding(config.vocabulary, D)
        self.position_embed = nn.Embedding(config.positions, D)
        self.norm = vit.LayerNorm(D, 1e-5)
        self.blocks = nn.ModuleList(TextBlock(D, config.heads) for _ in range(config.depth))

    def forward(self, tokens):
        real = tokens != PAD                                                # [B,N]
        positions = real.cumsum(1) * real + PAD                             # [B,N], from PAD + 1 on
        x = self.norm(self.token_embed(tokens) + self.position_embed(positions))    # [B,N,D]
        mask = real[:, None, None]                                          # [B,1,1,N]
        for block in self.blocks:
            x = vit.run_block(block, x, self.recompute, mask)               # [B,N,D]
        return x[:, 0]                                                      # [B,D]


class Towers(nn.Module):
    """An image tower and a text tower that map into one space, as in CLIP (arXiv 2103.00020).

    With `locked` the image tower is not trained (LiT, arXiv 2111.07991; paper, section 4: "zero-
    shot"). Projections have no bias and start as N(0, D^-0.5), logit_scale as ln(1/0.07) (released
    models); it is a vector [1], since FSDP2 takes no scalars."""

    def __init__(self, config, text, embedding, pool="cls", locked=True):
        super().__init__()
        self.config, self.text_config = config, text
        self.vision_encoder = ViT(config, 0, pool).requires_grad_(not locked)
        self.text_encoder = TextTransformer(text)
        self.vision_projection = nn.Parameter(torch.empty(config.width, embedding))
        self.text_projection = nn.Parameter(torch.empty(text.width, embedding))
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self, seed=0):
        vit.init_weights(self, seed, {
            "vision_projection": self.config.width ** -0.5,
            "text_projection": self.text_config.width ** -0.5, "logit_scale": math.log(1 / 0.07),
            "text_encoder.token_embed.weight": 0.02,                        # XLM-R
            "text_encoder.position_embed.weight": 0.02})

    def trunk(self, images):
        """Images [B,C,H,W] to the image tower's features [B,D]."""
        return self.vision_encoder(images)

    def embed_images(self, images):
        """Images [B,C,H,W] to vectors [B,E] of length 1."""
        return project(self.vision_encoder(images), self.vision_projection)

    def embed_texts(self, tokens):
        """Ids [B,N] to vectors [B,E] of length 1."""
        return project(self.text_encoder(tokens), self.text_projection)

    def forward(self, images, tokens):
        """The vectors [B,E] of images [B,C,H,W], or of their features [B,D], those of their texts
        [B,N], and the scale [1] of logits."""
        x = self.vision_encoder(images) if images.dim() == 4 else images    # [B,D]
        return (project(x, self.vision_projection),
                project(self.text_encoder(tokens), self.text_projection), self.logit_scale.exp())


def project(x, matrix):
    """Features [B,D] to vectors [B,E] of length 1."""
    return F.normalize((x.to(matrix.dtype) @ matrix).to(matrix.dtype), dim=1)


# --------------------------------------------------------------------------------------
# Weights from files: ours, released zero-shot models in both layouts, Hugging Face XLM-R
# --------------------------------------------------------------------------------------

TEXT_RENAMES = (
    (r"^.*text_encoder\.(encoder\.transformer\.)?|^(xlm_)?roberta\.", ""),
    (r"^(encoder\.)?layers?\.(layers\.)?(?=\d)", "blocks."),
    (r"^token_embedding\.|^embeddings\.word_embeddings\.", "token_embed."),
    (r"^positional_embedding\.embedding\.|^embeddings\.position_embeddings\.", "position_embed."),
    (r"^embedding_layer_norm\.|^embeddings\.LayerNorm\.", "norm."),
    # the released layout and an older one
    (r"\.self_attn\.in_proj_|\.attention\.input_projection\.", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.|\.attention\.output_projection\.", ".attn.proj."),
    (r"\.linear1\.|\.residual_mlp\.mlp\.0\.", ".mlp.fc1."),
    (r"\.linear2\.|\.residual_mlp\.mlp\.3\.", ".mlp.fc2."),
    (r"\.attention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    # Hugging Face
    (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.output\.LayerNorm\.", ".norm2."))


def text_part(tensors):
    """The text tower's tensors of a zero-shot or XLM-R file, under TextTransformer's names. Hugging
    Face's type embedding, which is the same for all tokens, is added to the positions."""
    text = {name: tensor for name, tensor in tensors.items() if "text_encoder." in name} or tensors
    text = vit.our_names(text, TEXT_RENAMES)
    token_type = text.pop("embeddings.token_type_embeddings.weight", None)
    if token_type is not None:
        text["position_embed.weight"] = text["position_embed.weight"] + token_type[:1]
    return {name: tensor for name, tensor in text.items()
            if not name.startswith(("lm_head.", "pooler.", "classifier."))
            and not name.endswith("position_ids")}


def tower_names(tensors):
    """The tensors of a zero-shot file under the names of Towers."""
    vision = vit.our_names({name: tensor for name, tensor in tensors.items()
                            if "text_encoder." not in name})
    shared = {name: vision.pop(name) for name in (
        "vision_projection", "text_projection", "logit_scale") if name in vision}
    if "logit_scale" in shared:
        shared["logit_scale"] = shared["logit_scale"].reshape(1)
    return {**shared,
            **{f"vision_encoder.{name}": tensor for name, tensor in vision.items()},
            **{f"text_encoder.{name}": tensor for name, tensor in text_part(tensors).items()}}


def read_text_config(path):
    """The TextConfig of a file with a text tower, and what the file says of itself. Raises
    UserError."""
    tensors, file_info = vit.read_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in text_part(tensors).items()}
    if "text" in file_info.get("config", {}):
        return TextConfig(**file_info["config"]["text"]), file_info
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    try:
        vocabulary, width = shapes["token_embed.weight"]
        positions, _ = shapes["position_embed.weight"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds no text tower that is known here: it lacks {error}; give a "
                        "released zero-shot file or Hugging Face's XLM-R") from error
    heads = vit.find_heads(path, width, depth, TEXT_SIZES)
    return TextConfig(vocabulary, width, depth, heads, positions), file_info


# ======================================================================================
# Zero-shot: the loss
# ======================================================================================

def global_loss(images, texts, scale):
    """The loss over the batch of all ranks, and its gradients for this rank's `images` and `texts`
    [b,E] and for `scale` [1], which multiplies cosines. Images and texts are vectors of length 1.

    The loss of a pair is the mean of two cross-entropies, of finding the text of an image among all
    and the image of a text (CLIP; LiT, section 3). A rank compares its own pairs with everybody's,
    so that it never holds all B x B logits; the gradients that other ranks' comparisons give its
    vectors come back as a sum over ranks."""
    b, rank, world_size = len(images), vit.get_rank(), vit.get_world_size()
    all_images = vit.all_gather_rows(images.detach()).detach().requires_grad_()     # [B,E]
    all_texts = vit.all_gather_rows(texts.detach()).detach().requires_grad_()       # [B,E]
    scale = scale.detach().requires_grad_()                                         # [1]
    mine = slice(rank * b, rank * b + b)
    right = torch.arange(rank * b, rank * b + b, device=images.device)              # [b]
    of_images = F.cross_entropy(scale * all_images[mine] @ all_texts.T, right, reduction="none")
    of_texts = F.cross_entropy(scale * all_texts[mine] @ all_images.T, right, reduction="none")
    loss = ((of_images + of_texts) / 2).mean() / world_size
    loss.backward()
    image_gradients, text_gradients, scale_gradient = (
        vit.all_reduce_sum(tensor.grad) for tensor in (all_images, all_texts, scale))
    return vit.all_reduce_sum(loss.detach()), image_gradients[mine], text_gradients[mine], \
        scale_gradient


# ======================================================================================
# Zero-shot: evaluation
# ======================================================================================

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "{}",
             "a small {} in a picture.", "a drawing of a {}.", "there is a {} here.")   # ours


@torch.no_grad()
def embed_all(model, texts, encode, args, device):
    """Vectors [n,E] of texts, on the CPU, the same on every rank.

    Texts are sorted by length, so that little is computed for padding. Ranks share them, and all
    call the model equally often."""
    longest, ids = model.text_config.longest, [encode(text) for text in texts]
    cut = sum(len(some) > longest - 2 for some in ids)
    if cut:
        rank0_print(f"{cut:,} of {len(texts):,} texts are cut to their first {longest - 2} tokens")
    rows = [torch.tensor(framed(some, longest)) for some in ids]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = torch.zeros(len(texts), model.text_projection.shape[1])       # [n,E]
    size = 4 * args.micro_batch
    for at in data.progress(range(0, len(order), size * vit.get_world_size()), "texts"):
        mine = order[at + vit.get_rank() * size:][:size]
        tokens = nn.utils.rnn.pad_sequence([rows[i] for i in mine or order[:1]], True, PAD)  # [b,N]
        with vit.autocast(args, device):
            vectors[mine] = model.embed_texts(tokens.to(device))[:len(mine)].cpu()      # [b,E]
    return vit.all_reduce_sum(vectors)


def class_weights(model, classes, templates, encode, args, device):
    """What multiplies the vector of an image to the logits of classes [[name]]: [K,E].

    The vector of a class is the mean over its names in all templates, brought to length 1 (CLIP,
    section 3.1.4; released evaluation)."""
    pairs = [(template.replace("{}", name), number) for number, names in enumerate(classes)
             for name in names for template in templates]
    texts, owners = zip(*pairs)
    vectors = embed_all(model, texts, encode, args, device)                 # [n,E]
    sums = torch.zeros(len(classes), vectors.shape[1])                      # [K,E]
    sums.index_add_(0, torch.tensor(owners), vectors)
    return vit.whole(model.logit_scale.detach().exp()) * F.normalize(sums, dim=1).to(device)


@torch.no_grad()
def evaluate_towers(model, val, args, device, names, weights, encode):
    """The metrics of a source, every image once: zero-shot top-1 and top-5 and OUT/classes.txt
    where there are classes, with their `names` and class_weights [K,E], else None; retrieval where
    there are captions."""
    rows, pairs, count = [], [], torch.zeros(1, dtype=torch.int64)
    for images, batch in data.validate(val, args, device):
        with vit.autocast(args, device):
            x = model.embed_images(images)                                  # [B,E]
        if weights is not None:
            rows += answers(x.float() @ weights.T, batch, args)
        seen = batch["weight"] > 0
        count += seen.sum()
        for i, vector in zip(batch["position"][seen].tolist(), x.cpu()[seen].numpy()):
            if caption := val.sample(i).get("caption"):
                pairs.append((caption, vector))
    count = int(vit.all_reduce_sum(count))
    metrics = {"count": count, "bad": len(val) - count}
    if weights is not None:
        metrics = summarise(rows, len(val), args, names)
    pairs = sum(vit.all_gather_objects(pairs), [])
    if pairs:
        captions, vectors = zip(*pairs)
        images = torch.tensor(np.stack(vectors), device=device)             # [n,E]
        texts = sorted({*captions})
        number = {text: i for i, text in enumerate(texts)}
        own = torch.tensor([number[caption] for caption in captions], device=device)    # [n]
        every = torch.arange(len(texts), device=device)                     # [m]
        vectors = embed_all(model, texts, encode, args, device).to(device)  # [m,E]
        metrics |= {**recall("image_to_text", images, vectors, own, every, args),
                    **recall("text_to_image", vectors, images, every, own, args),
                    "captions": len(texts)}
    return metrics


def recall(name, queries, keys, query_texts, key_texts, args):
    """Recall at 1, 5, 10: the share of queries [n,E] that have a key [m,E] of the same text among
    the k most similar ones. `query_texts` [n] and `key_texts` [m] are the numbers of their texts:
    equal captions are one."""
    hits, size = torch.zeros(3), 4 * args.micro_batch
    for at in range(size * vit.get_rank(), len(queries), size * vit.get_world_size()):
        similar = queries[at:at + size] @ keys.T                            # [c,m]
        wrong = query_texts[at:at + size, None] != key_texts                # [c,m]
        right = similar.masked_fill(wrong, -2).max(1, keepdim=True).values  # [c,1]
        better = (similar.masked_fill(~wrong, -2) >= right).sum(1)          # [c]; ties count
        hits += torch.stack([(better < k).sum() for k in (1, 5, 10)]).cpu()
    shares = (vit.all_reduce_sum(hits) / len(queries)).tolist()
    return {f"{name}_recall{k}": share for k, share in zip((1, 5, 10), shares)}


# ======================================================================================
# Zero-shot: flags and main
# ======================================================================================

TOWER_RECIPES = {
    **dict.fromkeys(("nano", "tiny", "small"), dict(        # ours, for a classroom
        batch=128, samples=90_000, base_lr=2e-3, smallest_crop=0.6)),
    # one epoch: paper; not published: LiT's batch and rate, crop ours
    **dict.fromkeys(("base", "large", "huge", "2b", "6.5b"), dict(
        batch=16384, epochs=1, lr=1e-3, smallest_crop=0.9)),
}
TOWER_COMMON = {"weight_decay": 0.01, "warmup": 0.03, "clip_grad": 1.0}     # LiT


def parse_zeroshot_flags(argv):
    """All flags, with the recipe filled in: (args, Config, name of the recipe's row, what --init's
    file says of itself)."""
    parser = vit.stage_parser("finetune.py zeroshot", __doc__,
                              {**TOWER_RECIPES, "all": TOWER_COMMON})
    add = parser.add_argument_group("zero-shot").add_argument
    add("--tokenizer", metavar="FILE", help="XLM-R's tokenizer.json from Hugging Face, which the "
        "released models were trained with; default: the tokenizer of the text tower's file, else "
        "bytes")
    add("--text-init", metavar="FILE", help="start the text tower from this file: Hugging Face's "
        "XLM-R (paper: XLM-R), or any zero-shot model; default: that of --init, or random weights")
    add("--unlock", action="store_true", help="train the image tower, too; default off (LiT)")
    add("--cache-features", metavar="DIR", help="compute the locked image tower's features of each "
        "image once, without augmentation, and keep them there; default off")
    add_flags_by_recipe(add, "smallest-crop")
    add("--classes", metavar="FILE", help="to choose from: a line for each class, its names "
        "separated by commas; default: the classes of --val")
    add("--templates", metavar="FILE", help="lines with {} in the place of a name; default: the "
        f"world's own for the world, else {len(TEMPLATES)} of ours")
    add("--texts", nargs="+", metavar="TEXT", help="with --predict: to choose from as they are, in "
        "any language, instead of --classes")
    args = parser.parse_args(argv)
    config, name, file_info = vit.choose_config(args, "zeroshot")
    shapes = file_info.setdefault("shapes", {})
    if (args.predict or args.eval_only) and "text_projection" not in shapes:
        raise UserError(f"{args.init} has no text tower: --predict and --eval-only need a "
                        "zero-shot model, as runs/zeroshot/model.pt")
    if not args.init and not args.unlock and not args.plan:
        raise UserError("zeroshot trains a text tower for an image tower: give its file as --init, "
                        "or --unlock to train both from random weights")
    if args.predict and bool(args.texts) == bool(args.classes):
        raise UserError("--predict needs something to choose from: either --texts or --classes")
    if args.texts and len(args.texts) < 2:
        raise UserError("--texts needs two or more texts to choose from")
    if args.texts and not args.predict:
        raise UserError("--texts is for --predict; an evaluation takes --classes")
    if args.cache_features and args.unlock:
        raise UserError("--cache-features needs a locked image tower: leave --unlock out")
    vit.fill_recipe(args, {**TOWER_RECIPES[name], **TOWER_COMMON})
    data.choose_val(args)
    args.loss, args.crop = "ce", "all"
    args.pool = "mean" if "fc_norm.weight" in shapes else "cls"
    return args, config, name, file_info


def open_text(args, name, file_info):
    """(TextConfig, width of the common space, encode, the tokenizer.json as bytes, b"" where texts
    are bytes). Raises UserError where they do not fit together."""
    size, embedding = TOWERS[name]
    text, file = TextConfig(0, *TEXT_SIZES[size]), args.text_init
    if "text_projection" in file_info["shapes"]:
        embedding, file = file_info["shapes"]["text_projection"][1], file or args.init
    if file:
        text, file_info = read_text_config(file)
    encode, size, content = encode_bytes, 4 + 256, b""
    if args.tokenizer or "tokenizer" in file_info:
        content = None if args.tokenizer else file_info["tokenizer"].numpy().tobytes()
        tokenizer = Tokenizer(args.tokenizer or file, content)
        encode, size, content = tokenizer.encode, tokenizer.size, tokenizer.content
    if text.vocabulary not in (0, size):
        raise UserError(f"the text tower knows {text.vocabulary:,} ids, the tokenizer has "
                        f"{size:,}: give the one that it was trained with as --tokenizer (XLM-R's "
                        "tokenizer.json)")
    text.vocabulary = size
    return text, embedding, encode, content


def has_captions(source):
    """Whether any of 100 images, from all over a source, has a caption; as rank 0 finds them."""
    spread = np.linspace(0, len(source) - 1, min(100, len(source))).astype(int).tolist()
    return vit.on_rank_0(lambda: any(source[i].get("caption", "").strip() for i in spread))


def open_pairs(args, config, model, encode, device):
    """--data as data.Samples of images, or of their features with --cache-features, with the tokens
    of their captions as targets."""
    source, features, rows = data.open_data(*args.data, index_dir=args.index_dir), None, None
    if not has_captions(source):
        raise UserError('--data has no captions: give shards with .txt or a "caption" in .json, '
                        "a manifest with captions, or the world")
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    if args.cache_features:
        table = open_features(args.cache_features, lambda: model.trunk, source, args, config,
                              data.WHOLE_WIDTH, device)
        rows, features = table["index"], table["features"]
    tokens = functools.partial(caption_tokens, encode=encode, longest=model.text_config.longest)
    return data.Samples(source, config.image, config.channels, crop, args.seed, rows=rows,
                        targets_of=tokens, features=features)


def open_classes_and_val(args, config):
    """(--val as data.Samples or None, the classes to choose from [[name]], templates)."""
    templates = TEMPLATES
    if args.val and all(map(data.is_world, args.val)) and not args.classes:
        templates = [line.replace("{texture} {shape}", "{}") for line in data.TEMPLATES]
    if args.templates:
        templates = [line.strip() for _, line in data.read_lines(args.templates, "--templates")]
        if not all("{}" in line for line in templates):
            raise UserError(f"--templates {args.templates} has a line without {{}}, where the name "
                            "of a class goes")
    if args.texts:
        return None, [[text] for text in args.texts], ["{}"]
    classes = read_classes(args.classes) if args.classes else []
    if len(classes) == 1:
        raise UserError(f"--classes {args.classes} has one line: there is nothing to choose")
    if args.predict or not args.val:
        return None, classes, templates
    val = data.open_data(*args.val, index_dir=args.index_dir)
    classes = classes or [[name] for name in val.classes]
    if len(classes) < 2:
        if not has_captions(val):
            raise UserError("--val has neither classes nor captions: there is nothing to evaluate")
        return data.evaluation_samples(val, config, data.WHOLE_WIDTH), [], templates
    chosen = labelled(val, classes_of_val(classes, val), "--val")
    return data.evaluation_samples(val, config, data.WHOLE_WIDTH, *chosen), classes, templates


def load_towers(model, args, file_info):
    """Load --init, a zero-shot model or an image tower, and --text-init into the towers."""
    if "text_projection" in file_info["shapes"]:
        renew = ("text_encoder.*", "text_projection") if args.text_init else ()
        vit.load_weights(model, args.init, renew=renew, rename=tower_names)
    elif args.init:
        vit.load_weights(model.vision_encoder, args.init)
    if args.text_init:
        vit.load_weights(model.text_encoder, args.text_init, rename=text_part)


def zeroshot(argv):
    args, config, name, file_info = parse_zeroshot_flags(argv)
    text, embedding, encode, tokenizer = open_text(args, name, file_info)
    make = lambda: Towers(config, text, embedding, args.pool, locked=not args.unlock)
    image_tower = [(config.depth, config.width, 1 + config.num_patches)]
    text_tower = [(text.depth, text.width, text.longest)]
    trained = text_tower + image_tower if args.unlock else text_tower
    flops = vit.training_flops(text_tower) + (
        vit.training_flops if args.unlock else vit.forward_flops)(image_tower)
    if args.plan:
        return vit.plan(args, make, trained, flops)
    device = vit.start(args, trained)

    # ---- model: random weights, or --init and --text-init; a run that goes on replaces them
    val, classes, templates = open_classes_and_val(args, config)
    names = [some[0] for some in classes]
    model, wrapped = vit.build(make, args, device, ("trunk", "embed_images", "embed_texts"))
    load_towers(model, args, file_info)

    def logits_by(weights):
        """The function from images [B,C,H,W] to logits [B,K] of the classes."""
        def logits_of(images):
            x = model.embed_images(images).float()                          # [B,E]
            with torch.autocast(device.type, enabled=False):
                return x @ weights.T
        return logits_of

    def weights_now():
        return class_weights(model, classes, templates, encode, args, device) if classes else None

    if args.predict:
        return data.print_predictions(args, config, logits_by(weights_now()), names, device)
    if args.eval_only:
        return vit.report(args, evaluate_towers(model, val, args, device, names, weights_now(),
                                                encode))

    # ---- data
    train = open_pairs(args, config, model, encode, device)
    schedule = vit.make_schedule(args, len(train))
    if not vit.open_run(args, "zeroshot", model, train, val,
                        {"tokenizer": f"CRC {data.crc(tokenizer):08x}"}):
        return
    examples = val and classes and data.examples(val, device)

    def draw_and_evaluate():
        weights = weights_now()
        if examples:
            data.draw_predictions(args, examples, logits_by(weights), names, device)
        return evaluate_towers(model, val, args, device, names, weights, encode) if val else {}

    # ---- loop: the loss compares all vectors of the batch, whose graphs do not fit into memory.
    # GradCache (arXiv 2101.06983): first the gradients of the loss for all vectors, then from
    # these, one micro-batch at a time, the gradients for the weights.
    optimizer = torch.optim.AdamW(vit.decay_groups(model, args.weight_decay), betas=BETAS,
                                  fused=True)
    model_info = {"config": {**asdict(config), "text": asdict(text)}, "stage": "zeroshot"}
    if tokenizer:
        model_info["tokenizer"] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    run = vit.Run(args, model, wrapped, optimizer, device, schedule, model_info, flops,
                  state={"long_texts": 0})
    batches = data.training_batches(train, args, run.state["step"], schedule, device)
    accumulate, micro_batch = schedule.accumulate, schedule.micro_batch
    for _ in run.steps(draw_and_evaluate):
        # First pass: all vectors. A single micro-batch keeps its graph and is not computed again.
        inputs, outputs, long_texts = [], [], torch.zeros((), device=device)
        for batch in run.micro_batches(batches):
            images, tokens = batch["images"], batch["targets"]              # [B,H,W,C] [B,N]
            long_texts += (tokens >= 0).sum(1).eq(text.longest).sum()
            tokens = tokens.masked_fill(tokens < 0, PAD)
            with vit.autocast(args, device):
                if not args.cache_features:
                    images = data.normalise(images)                         # [B,C,H,W]
                    images = images if args.unlock else model.trunk(images)     # locked: [B,D]
                with torch.set_grad_enabled(accumulate == 1):
                    outputs.append(wrapped(images, tokens))                 # [B,E] [B,E] [1]
            inputs.append((images, tokens))
        all_images, all_texts = (torch.cat([output[i].detach() for output in outputs])
                                 for i in (0, 1))                           # [b,E] [b,E]
        run.loss, *gradients, of_scale = global_loss(all_images, all_texts, outputs[0][2])

        # Second pass. Ranks' gradients are averaged, but those of vectors have to be summed: hence
        # the number of ranks.
        factor = run.state["loss_scale"] * vit.get_world_size()
        of_scale = of_scale * (run.state["loss_scale"] / accumulate)        # [1]
        parts = zip(*((factor * gradient).split(micro_batch) for gradient in gradients))
        for i, (of_images, of_texts) in enumerate(parts):                   # [B,E] [B,E]
            with vit.accumulating(wrapped, last=i == accumulate - 1):
                if accumulate > 1:
                    with vit.autocast(args, device):
                        outputs[i] = wrapped(*inputs[i])
                torch.autograd.backward(outputs[i], (of_images, of_texts, of_scale))
        run.update({"long_texts": long_texts})
        vit.local(model.logit_scale).data.clamp_(max=math.log(100))         # CLIP


# ======================================================================================
# Video: the model
#
# An image encoder becomes a video encoder, which is finetuned as in classify. Values: "SF" is
# PySlowFast's finetuning of plain ViTs on Kinetics-400 (its configs/masked_ssl).
# ======================================================================================

TUBELET = 2         # frames (SF)


def cut_tubelets(clips, patch):
    """Cut clips [B,T,C,H,W] into tubelets [B,T/2*N,2*P]: the same patch of two frames."""
    patches = vit.patchify(clips.flatten(0, 1), patch)                      # [B*T,N,P]
    pairs = patches.unflatten(0, (len(clips), -1, TUBELET))                 # [B,T/2,2,N,P]
    return pairs.transpose(2, 3).flatten(3).flatten(1, 2)                   # [B,T/2*N,2*P]


class Video(nn.Module):
    """A Vision Transformer over all tubelets of clips [B,T,C,H,W] of T = `frames`: logits [B,K].

    The image model's position embeddings are joined by a table for the time, which starts at zero
    as relative positions do. There is no class token, whose share of attention would fall with the
    number of frames: the mean of all tokens goes to `fc_norm` and the head, N(0, 0.001) (SF). The
    class token's row of pos_embed is not used; so image files load and resize as they are."""

    def __init__(self, config, frames, classes, relative_positions=False):
        super().__init__()
        self.config, self.recompute = config, False
        D, p, times = config.width, config.patch, frames // TUBELET
        self.patch_embed = vit.PatchEmbed(config)
        self.patch_embed.proj = nn.Conv3d(config.channels, D, (TUBELET, p, p), (TUBELET, p, p))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, D))
        self.pos_embed_temporal = nn.Parameter(torch.empty(1, times, D))
        grid = (times, *config.grid) if relative_positions else ()
        self.blocks = nn.ModuleList(vit.Block(D, config.heads, grid) for _ in range(config.depth))
        self.fc_norm = vit.LayerNorm(D)
        self.head = nn.Linear(D, classes)
        self.init_weights()

    def init_weights(self, seed=0):
        vit.init_weights(self, seed, {"head.weight": 1e-3, "pos_embed_temporal": 0.0})

    def forward(self, clips, scales=None, dropped=None):
        """`scales` as of vit.run_blocks; `dropped` [B,D] multiply what the head gets (dropout). Of
        clips [B,V,T,C,H,W], seen in V views, the result is mean_of_views."""
        if clips.dim() == 6:
            logits = self.forward(clips.flatten(0, 1))                      # [B*V,K]
            return mean_of_views(logits.unflatten(0, clips.shape[:2]))
        x = self.patch_embed(cut_tubelets(clips, self.config.patch))        # [B,T/2*N,D]
        times = self.pos_embed_temporal[:, :, None]                         # [1,T/2,1,D]
        x = x + (times + self.pos_embed[:, None, 1:]).flatten(1, 2)
        x = vit.run_blocks(self.blocks, x, self.recompute, scales)
        x = self.fc_norm(x.mean(1))                                         # [B,D]
        return self.head(x if dropped is None else x * dropped)             # [B,K]


def mean_of_views(logits):
    """The logarithm of the probabilities [B,K] of clips, averaged over their views, from the logits
    [B,V,K] of these."""
    return logits.float().softmax(2).mean(1).clamp(min=1e-30).log()


# ======================================================================================
# Video: flags and main
# ======================================================================================

SLOWFAST = dict(        # SF; but its learning rates are for nodes of 16 clips, batch is ours
    batch=256, weight_decay=0.05, clip_grad=5.0, final_lr=1e-5, smallest_crop=0.08,
    randaugment=7.0, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, ema=0.0, frames=16,
    relative_positions=False)
VIDEO_RECIPES = {
    "k400": dict(**SLOWFAST, stride=4, segments=False, flip=True, views="5x3"),
    "ssv2": dict(**SLOWFAST, stride=1, segments=True, flip=False, views="1x3"),
    "ours": dict(       # for a classroom: nano, tiny, small
        batch=16, weight_decay=0.05, clip_grad=1.0, final_lr=0.0, smallest_crop=0.8,
        randaugment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1, ema=0.0, frames=4,
        relative_positions=False, stride=8, segments=False, flip=False, views="1x1",
        epochs=1, base_lr=1.6e-2, layer_decay=1.0, drop_path=0.0, dropout=0.0, warmup=0.1),
}
SLOWFAST_BY_MODEL = {   # warmup: 5 epochs; 2b and 6.5b are not published
    "base": dict(epochs=75, base_lr=9.6e-3, layer_decay=0.65, drop_path=0.1, dropout=0.3,
                 warmup=0.0667),
    "large": dict(epochs=50, base_lr=4.8e-3, layer_decay=0.75, drop_path=0.2, dropout=0.3,
                  warmup=0.1),
    **dict.fromkeys(("huge", "2b", "6.5b"), dict(
        epochs=75, base_lr=4.8e-3, layer_decay=0.8, drop_path=0.2, dropout=0.5, warmup=0.0667)),
}
CLIP_FLAGS = "frames", "stride", "segments", "relative_positions"      # kept in model.pt
NEW_IN_VIDEO = "pos_embed_temporal", "blocks.*.attn.rel_pos.*"


def read_views(text):
    """The type of --views."""
    if not re.fullmatch("[1-9][0-9]?x[1-9]", text):
        raise argparse.ArgumentTypeError(f"{text} is not temporal x spatial views, as 5x3")
    return text


def add_video_flags(add):
    add("--recipe", choices=VIDEO_RECIPES, help="k400: Kinetics-400, ssv2: Something-Something v2 "
        "(PySlowFast's); ours: for a classroom; default ours up to small, else k400")
    add("--frames", type=vit.positive, help="frames of a clip that the model sees; default that of "
        "--init, else by recipe")
    add("--stride", type=vit.positive, metavar="FRAMES", help="distance of these frames, from a "
        "random start on; default that of --init, else by recipe")
    yes_or_no = argparse.BooleanOptionalAction
    add("--segments", action=yes_or_no, help="instead: a frame of each of --frames equal parts of "
        "the clip; default that of --init, else by recipe")
    add("--relative-positions", action=yes_or_no, help="attention also depends on the difference "
        "in time, row and column (paper: +0.6 on Kinetics-400); default that of --init, else off")
    add("--flip", action=yes_or_no, help="mirror half of the clips; default by recipe")
    add("--views", type=read_views, metavar="TxS", help="views of an evaluation: T parts of the "
        "clip times S crops; default by recipe")
    add("--dropout", type=BELOW_1, metavar="SHARE", help="share of the head's inputs "
        "that are set to 0; 0 off; default by recipe")
    add_training_flags(add)


def parse_video_flags(argv):
    """All flags, with the recipe filled in: (args, Config, file_info of --init, data.Views)."""
    parser = vit.stage_parser("finetune.py video", __doc__, {
        **VIDEO_RECIPES,
        **{f"k400/ssv2 {name}": recipe for name, recipe in SLOWFAST_BY_MODEL.items()}})
    parser.set_defaults(data=["world-clips"], micro_batch=16, optimizer="adamw", loss="ce",
                        pool="mean", crop="centre")
    add_video_flags(parser.add_argument_group("video").add_argument)
    args = parser.parse_args(argv)
    config, name, file_info = vit.choose_config(args, "video")
    args.recipe = args.recipe or ("k400" if name in SLOWFAST_BY_MODEL else "ours")
    recipe = {**VIDEO_RECIPES[args.recipe]}
    if args.recipe != "ours":
        recipe |= SLOWFAST_BY_MODEL.get(name, SLOWFAST_BY_MODEL["base"])
    in_file = file_info.get("config", {})
    if (args.predict or args.eval_only) and "frames" not in in_file:
        raise UserError(f"{args.init} is no video model: train it by finetune.py video --init")
    vit.fill_recipe(args, recipe | {flag: in_file[flag] for flag in CLIP_FLAGS if flag in in_file})
    if args.frames % TUBELET:
        raise UserError(f"--frames {args.frames}: tokens are of {TUBELET} frames each; the nearest "
                        f"numbers are {args.frames - 1} and {args.frames + 1}")
    data.choose_val(args, "world-clips-val")
    views = data.Views(args.frames, args.stride, args.segments, *map(int, args.views.split("x")))
    return args, config, file_info, views


def video(argv):
    args, config, file_info, views = parse_video_flags(argv)
    make = lambda classes: Video(config, args.frames, classes, args.relative_positions)
    stacks = [(config.depth, config.width, args.frames // TUBELET * config.num_patches)]
    flops = vit.training_flops(stacks)
    if args.plan:
        return vit.plan(args, lambda: make(len(file_info.get("classes", range(400)))), stacks)
    device = vit.start(args, stacks)

    # ---- data, their classes, and the crops and RandAugment of training
    train, val, names = open_classes(args, config, file_info, views)

    # ---- model: random weights, or --init; a run that goes on replaces them (vit.Run)
    model, wrapped = vit.build(lambda: make(len(names)), args, device)
    if args.init:
        load_classifier(model, args, names, file_info, NEW_IN_VIDEO)
    if args.predict:
        return data.print_predictions(args, config, model, names, device, views=views)
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, names))
    model_info = {"config": {**asdict(config), "pool": args.pool, "loss": args.loss,
                             **{flag: getattr(args, flag) for flag in CLIP_FLAGS}},
                  "stage": "video", "classes": names}
    train_classifier(args, model, wrapped, device, train, val, model_info, flops)


# ======================================================================================
# Detection: recipes and flags
#
# `finetune.py detect` finds objects: of each a box, a class, a score and a mask. As in the paper it
# is ViTDet (arXiv 2203.16527): a plain ViT with attention in windows, a pyramid made from its last
# map, and Cascade Mask R-CNN (1703.06870, 1712.00726). Values without a source are those of
# ViTDet's code, detectron2. The order: boxes, parts of maps, network, images, masks, scores, main.
#
#     torchrun finetune.py detect --init runs/wsp/model.pt      # the world's shapes, half an hour
#     torchrun --nproc-per-node gpu finetune.py detect --init maws.pt --data train2017.json \
#         --images train2017 --val val2017.json --val-images val2017
#     python finetune.py detect --evaluate results.json --val val2017.json
#
# More letters: G objects of an image, A anchors, n boxes of an image, S those that are trained on,
# R boxes of a batch.
# ======================================================================================

class Heads(NamedTuple):
    """Sizes of what comes after the encoder."""
    channels: int       # of the pyramid and of all convolutions
    convs: int          # 3 x 3 convolutions in a box head or mask head
    hidden: int         # outputs of a box head's linear layer
    anchors: int        # of an image that the proposals are trained on
    boxes: int          # S
    before_nms: int     # best proposals of each level; also pairs of box and class at the end
    after_nms: int      # best proposals of an image


HEADS = {"vitdet": Heads(256, 4, 1024, 256, 512, 2000, 1000),
         "ours": Heads(64, 1, 256, 64, 32, 256, 64)}        # nano, tiny, small: for a laptop
DETECT_RECIPES = {
    "vitdet": dict(batch=64, epochs=100, lr=1e-4, weight_decay=0.1, warmup=0.0014, clip_grad=0.0,
                   jitter=[0.1, 2.0]),
    # With less warmup the maps of short runs lose what differs between images.
    "ours": dict(batch=16, epochs=1, lr=5e-4, weight_decay=0.05, warmup=0.25, clip_grad=1.0,
                 jitter=[0.5, 1.5], layer_decay=0.8, drop_path=0.0)}
DETECT_BY_MODEL = {"base": dict(layer_decay=0.7, drop_path=0.1),
                   "large": dict(layer_decay=0.8, drop_path=0.4),
                   **dict.fromkeys(("huge", "2b", "6.5b"),          # 2b, 6.5b: not published
                                   dict(layer_decay=0.9, drop_path=0.5, epochs=75))}
STAGES = {"cascade": (0.5, 0.6, 0.7), "one": (0.5,)}        # IoU from which on a box is an object
# What the offsets (x, y, width, height) of each head are multiplied by: later ones are smaller
SCALES = (10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)
# LVIS: classes that are judged in an image; what is taken from logits, so that they start at 0.01
FEDERATED, PRIOR = 50, math.log(99)
MASK_SIDE = 112         # of objects' masks in their boxes: four times that of predictions (ours)


def parse_detect_flags(argv):
    """All flags, with the recipe filled in: (args, Config, Heads, file_info of --init)."""
    parser = vit.stage_parser("finetune.py detect", __doc__, {
        **DETECT_RECIPES,
        **{f"vitdet {name}": recipe for name, recipe in DETECT_BY_MODEL.items()}})
    parser.set_defaults(data=["world-boxes"], micro_batch=16)
    add = parser.add_argument_group("detection").add_argument
    add("--images", metavar="DIR", help="folder of --data's images, for LVIS the one "
        "that has train2017 and val2017; default: that of its .json")
    add("--val-images", metavar="DIR", help="folder of --val's images; default: --images")
    add("--box-heads", choices=STAGES, help="cascade: three, each for the boxes of the one before; "
        "default cascade, or as --init")
    add("--masks", action=argparse.BooleanOptionalAction, help="masks as well as boxes; default "
        "yes, or as --init")
    add("--window", type=vit.positive, metavar="PATCHES", help="side of the windows that most "
        "blocks attend in; default 14, or as --init")
    add("--jitter", type=vit.number(0.01, 10), nargs=2, metavar="SIZE", help="smallest and largest "
        "size of images in training, relative to what fits; 1 1 is off; default by recipe")
    add_flags_by_recipe(add, "layer-decay", "drop-path")
    add("--evaluate", metavar="RESULTS", help="print the scores of a file of COCO's results on "
        "--val's .json and stop")
    args = parser.parse_args(argv)
    size, args.image_size = args.image_size, None       # it must fit patches of 16, not of 14
    config, name, file_info = vit.choose_config(args, "detect")
    in_use, trained = args.predict or args.eval_only, file_info.get("detector", {})
    if in_use and not trained:
        raise UserError(f"{args.init} is no detector: --predict and --eval-only need one, as "
                        "runs/detect/model.pt")
    recipe = "vitdet" if name in DETECT_BY_MODEL else "ours"
    size = size or (config.image if trained or recipe == "ours" else [1024])
    config = replace(config, image=size, patch=16 if config.patch == 14 else config.patch)
    kept = {flag: trained[flag] for flag in ("box_heads", "window", "masks") if trained}
    vit.fill_recipe(args, {"box_heads": "cascade", "window": 14, "masks": True,
                           **DETECT_RECIPES[recipe], **DETECT_BY_MODEL.get(name, {}), **kept})
    data.choose_val(args, "world-boxes-val")
    if args.evaluate and not args.val:
        raise UserError("--evaluate needs --val: the annotations of its images")
    if args.val and len(args.val) > 1:
        raise UserError("--val takes one source: another may repeat the ids of its images")
    return args, config, HEADS[recipe], file_info


# ======================================================================================
# Detection: boxes
#
# A box is (left, top, right, bottom) in pixels. Every image has equally many, so that a batch is
# one tensor; which of them count is said beside it.
# ======================================================================================

def box_iou(a, b):
    """The IoU [B,n,m] of boxes [B,n,4] and [B,m,4]: what two have in common, by what they cover."""
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    a, b = a[:, :, None].unbind(-1), b[:, None].unbind(-1)                  # [B,n,1] and [B,1,m]
    w = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)    # [B,n,m]
    h = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    return w * h / (area(a) + area(b) - w * h).clamp(min=1e-9)


def clip_boxes(boxes, seen):
    """Boxes [B,n,4] cut to images of (height, width) `seen` [B,2]; which have an area [B,n]."""
    boxes = torch.minimum(boxes.nan_to_num().clamp(min=0), seen.flip(1).repeat(1, 2)[:, None])
    return boxes, (boxes[..., 2:] > boxes[..., :2]).all(-1)


def centre_and_size(boxes):
    """The centres and sizes (x, y) of boxes [B,n,4], 2 x [B,n,2]."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encode_boxes(boxes, targets, scales=(1, 1, 1, 1)):
    """The offsets [B,n,4] from boxes to targets [B,n,4]: of the centre, by the box's size, and the
    logarithms of how much wider and higher; times `scales` (R-CNN, arXiv 1311.2524)."""
    (centre, size), (target, target_size) = centre_and_size(boxes), centre_and_size(targets)
    size, target_size = size.clamp(min=1e-6), target_size.clamp(min=1e-6)
    offsets = torch.cat([(target - centre) / size, (target_size / size).log()], -1)
    return offsets * offsets.new_tensor(scales)


def decode_boxes(offsets, boxes, scales=(1, 1, 1, 1)):
    """The inverse of encode_boxes: boxes [B,n,4] moved by offsets [B,n,4]. A side grows at most to
    1000 / 16 of itself."""
    offsets, (centre, size) = offsets / boxes.new_tensor(scales), centre_and_size(boxes)
    centre = centre + offsets[..., :2] * size
    half = size * offsets[..., 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def make_anchors(grids, patch, device):
    """The boxes to start from, [A,4], on a pyramid of `grids` [(rows, columns)]: at each place of
    each level three of the same area, 0.5, 1 and 2 times as high as wide. Their side is 8 strides:
    32 to 512 pixels for patches of 16."""
    anchors, ratio = [], torch.tensor([0.5, 1, 2], device=device).sqrt()
    for level, (rows, columns) in enumerate(grids):
        stride = patch * 2.0 ** (level - 2)
        half = 4 * stride * torch.stack([1 / ratio, ratio], 1)              # [3,2]
        y, x = torch.meshgrid(torch.arange(rows, device=device) * stride,
                              torch.arange(columns, device=device) * stride, indexing="ij")
        centre = torch.stack([x, y], -1).reshape(-1, 1, 2)                  # [places,1,2]
        anchors.append(torch.cat([centre - half, centre + half], -1).flatten(0, 1))
    return torch.cat(anchors)


def match(boxes, truth, known, low, high, nearest=False):
    """Which object each of boxes [B,n,4] belongs to, of those of `truth` [B,G,4] that are `known`
    [B,G]: the one of the largest IoU [B,n]; which boxes are that object (IoU from `high` on), and
    which are background (below `low`), bool [B,n]. With `nearest`, the boxes that are nearest to an
    object are it, however small their IoU."""
    iou = box_iou(truth, boxes).masked_fill(~known[..., None], -1)          # [B,G,n]
    best, which = iou.max(1)
    positive = best >= high
    if nearest:
        positive |= ((iou == iou.amax(2, keepdim=True)) & (iou > 0)).any(1)
    return which, positive, (best < low) & ~positive


def choose_boxes(positive, negative, uniforms, n, share):
    """Choose n boxes (or all, if there are fewer) of each image by chance: at most a `share` of
    `positive`, the rest `negative`, bool [B,m]. Their numbers [B,n], positive ones first, and
    whether each is one, bool [B,n], since there may be too few. A pure function of `uniforms`
    [B,m]."""
    n = min(n, positive.shape[1])
    last = torch.where(positive, uniforms, -1).topk(max(1, int(n * share))).values[:, -1:]
    rank = torch.where(negative, uniforms, -1)
    rank = torch.where(positive & (uniforms >= last), 2 + uniforms, rank).topk(n)
    return rank.indices, rank.values >= 0


def nms(boxes, scores, groups, threshold):
    """Non-maximum suppression: going from the surest of boxes [B,n,4] down, each that remains drops
    those after it, of its group [B,n], whose IoU with it is above the threshold. Returns which
    remain, bool [B,n].

    Without a loop over boxes: a box remains if none that remains drops it. This is applied to all
    until nothing changes. Only one answer agrees with it, since it asks surer boxes only."""
    order = scores.argsort(dim=1, descending=True, stable=True)             # [B,n]
    boxes, groups = vit.gather_tokens(boxes, order), groups.gather(1, order)
    drops = (box_iou(boxes, boxes) > threshold) & (groups[:, :, None] == groups[:, None])
    drops = drops.triu(1).to(scores.dtype)                                  # [B,n,n]
    remain, before = torch.ones_like(scores), None
    while before is None or not remain.equal(before):
        before, remain = remain, ((remain[:, None] @ drops)[:, 0] == 0).to(scores.dtype)
    return torch.empty_like(remain).scatter(1, order, remain) > 0


# ======================================================================================
# Detection: the parts of maps and masks that are in boxes
# ======================================================================================

def roi_align(maps, boxes, strides, side):
    """The part of a pyramid's maps [B,C,rows,columns] in each of boxes [B,n,4], as side x side
    numbers: [B*n,C,side,side] (ROIAlign, arXiv 1703.06870; "aligned", as detectron2's).

    Boxes of 14 patches' side are read from the patches' own level, smaller ones from finer maps. A
    box is cut into side x side bins. A bin is the mean of the map at evenly spread points, about
    one for each place, each point weighing the four places around it. One gather reads them all,
    with a bag of places for every bin."""
    table = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps])  # [places,C]
    (B, n, _), device = boxes.shape, boxes.device
    level = (2 + (centre_and_size(boxes)[1].prod(-1).sqrt() / (14 * strides[2]) + 1e-8).log2())
    level = level.floor().clamp(0, len(maps) - 1).long().flatten()          # [R]
    rows, columns = torch.tensor([m.shape[2:] for m in maps], device=device)[level].unbind(1)
    places = torch.tensor([0, *(m[:, 0].numel() for m in maps)], device=device).cumsum(0)
    first = places[level] + rows * columns * torch.arange(B, device=device).repeat_interleave(n)
    boxes = boxes.flatten(0, 1) / boxes.new_tensor(strides)[level][:, None] - 0.5
    start, bin_size = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]) / side    # [R,2]: x, y
    across, down = bin_size.ceil().clamp(min=1).long().unbind(1)            # points in a bin, [R]
    in_bin, in_box = across * down, across * down * side ** 2
    begin = in_box.cumsum(0) - in_box                                       # [R]
    box = torch.arange(B * n, device=device).repeat_interleave(in_box)      # [points]: their box,
    k = torch.arange(len(box), device=device) - begin[box]
    which, k = k // in_bin[box], k % in_bin[box]                            # bin, number in it
    place = torch.stack([which % side + (k % across[box] + 0.5) / across[box],
                         which // side + (k // across[box] + 0.5) / down[box]], 1)
    place = start[box] + bin_size[box] * place                              # [points,2]: x, y
    last = torch.stack([columns, rows], 1)[box] - 1
    weight = ((place >= -1) & (place <= last + 1)).all(1) / in_bin[box]     # nothing outside
    place = torch.minimum(place.clamp(min=0), last)
    low = place.floor().long()
    high, above = torch.minimum(low + 1, last), place - low
    xs, ys = ([(low[:, k], 1 - above[:, k]), (high[:, k], above[:, k])] for k in (0, 1))
    corners = [(first[box] + y * columns[box] + x, weight * (of_x * of_y))
               for y, of_y in ys for x, of_x in xs]
    index, weight = (torch.stack(part, 1) for part in zip(*corners))        # [points,4]
    bags = 4 * (begin[:, None] + in_bin[:, None] * torch.arange(side ** 2, device=device))
    pooled = F.embedding_bag(index.flatten(), table.to(boxes.dtype), bags.flatten(), mode="sum",
                             per_sample_weights=weight.flatten())           # [R*side*side,C]
    return pooled.unflatten(0, (B * n, side, side)).permute(0, 3, 1, 2)


def read_masks(masks, boxes, xs, ys):
    """Masks [B,n,m,m] that fill boxes [B,n,4], at the columns xs [B,n,w] and rows ys [B,n,h], by
    bilinear interpolation: [B,n,h,w]; 0 outside."""
    m = masks.shape[-1]

    def weights(places, low, high):         # of the m cells at each place: [B,n,places,m]
        cell = (places - low[..., None]) / (high - low).clamp(min=1e-6)[..., None] * m - 0.5
        return (1 - (cell[..., None] - torch.arange(m, device=cell.device)).abs()).clamp(min=0)

    left, top, right, bottom = boxes.unbind(-1)
    with torch.autocast(masks.device.type, enabled=False):
        return weights(ys, top, bottom) @ masks @ weights(xs, left, right).transpose(-1, -2)


def mask_targets(masks, truth, boxes, side):
    """What a mask head should predict in boxes [B,n,4]: 1 where the centre of one of side x side
    cells is inside of the masks [B,n,m,m] in the objects' boxes `truth`, else 0."""
    cells = (torch.arange(side, device=boxes.device) + 0.5) / side
    xs, ys = (boxes[..., k:k + 1] + (boxes[..., k + 2:k + 3] - boxes[..., k:k + 1]) * cells
              for k in (0, 1))                                              # 2 x [B,n,side]
    return (read_masks(masks, truth, xs, ys) >= 0.5).float()


# ======================================================================================
# Detection: the network
# ======================================================================================

class MapNorm(vit.LayerNorm):
    """LayerNorm over the channels of a map [B,C,H,W]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convs_of(heads):
    """The layers of 3 x 3 convolutions that a head begins with."""
    return [layer for _ in range(heads.convs)
            for layer in (*conv_norm(heads.channels, heads.channels, 3), nn.ReLU())]


def conv_norm(inputs, outputs, side):
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), MapNorm(outputs)


def simple_pyramid(D, C):
    """ViTDet's feature pyramid: modules from the encoder's map [B,D,rows,columns] to maps with C
    channels, 4, 2, 1 and 1/2 times as fine: of strides 4 to 32 for patches of 16."""
    up = lambda inputs: nn.ConvTranspose2d(inputs, inputs // 2, 2, 2)
    to_C = lambda inputs: (*conv_norm(inputs, C, 1), *conv_norm(C, C, 3))
    return nn.ModuleList((
        nn.Sequential(up(D), MapNorm(D // 2), nn.GELU(), up(D // 2), *to_C(D // 4)),
        nn.Sequential(up(D), *to_C(D // 2)),
        nn.Sequential(*to_C(D)),
        nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *to_C(D))))


def to_windows(x, grid, side):
    """Cut tokens [B,N,D] of a grid (rows, columns) into windows of side x side tokens, filled up
    with zeros at the bottom and on the right: [B * windows, side * side, D]."""
    x = x.transpose(1, 2).unflatten(2, grid)                                # [B,D,rows,columns]
    x = F.pad(x, (0, -grid[1] % side, 0, -grid[0] % side))
    return vit.patchify(x, side).unflatten(2, (side * side, -1)).flatten(0, 1)


def from_windows(windows, grid, side):
    """The inverse of to_windows: tokens [B,N,D]."""
    rows, columns = (math.ceil(n / side) for n in grid)
    x = windows.reshape(-1, rows * columns, side * side * windows.shape[-1])
    x = vit.unpatchify(x, side, (rows, columns), windows.shape[-1])         # [B,D,rows,columns]
    return x[..., :grid[0], :grid[1]].flatten(2).transpose(1, 2)


class Detector(nn.Module):
    """ViTDet for K classes; the encoder's parameters have the names of ViT's. `stages` are the IoUs
    of the box heads. `images_of` [K], the number of images with each class, is given for LVIS: each
    class is judged by itself, and only some are judged in an image (federated loss)."""

    def __init__(self, config, heads, K, window, stages, masks, seed=0, images_of=None):
        super().__init__()
        self.config, self.heads, self.K, self.window = config, heads, K, window
        self.stages, self.seed, self.images_of, self.recompute = stages, seed, images_of, False
        D, C, depth = config.width, heads.channels, config.depth
        self.patch_embed = vit.PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, D))
        # The last block of each quarter attends everywhere; so do all where one window is enough.
        everywhere = {depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}
        self.windowed = [i not in everywhere and window < max(config.grid) for i in range(depth)]
        self.blocks = nn.ModuleList(
            vit.Block(D, config.heads, (window, window) if windowed else config.grid)
            for windowed in self.windowed)
        self.pyramid = simple_pyramid(D, C)
        # Of each of the three anchors at a place: a logit that it is an object, and four offsets
        self.proposals = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1), nn.ReLU(),
            nn.Conv2d(C, 3 * 5, 1))
        # [R,C,7,7] to the logits of classes (the last one is the background) and four offsets
        self.box_heads = nn.ModuleList(nn.Sequential(
            *convs_of(heads), nn.Flatten(), nn.Linear(C * 49, heads.hidden), nn.ReLU(),
            nn.Linear(heads.hidden, K + (not images_of) + 4)) for _ in stages)
        # [R,C,14,14] to the logits of a mask for each class, [R,K,28,28]
        self.mask_head = nn.Sequential(*convs_of(heads), nn.ConvTranspose2d(C, C, 2, 2), nn.ReLU(),
                                       nn.Conv2d(C, K, 1)) if masks else None
        self.strides = [config.patch * 2.0 ** (level - 2) for level in range(4)]
        self.init_weights()

    def init_weights(self, seed=0):
        last = [head[-1] for head in (self.proposals, *self.box_heads, self.mask_head) if head]
        # ViTDet has 0.01 for classes and proposals, 0.001 for box offsets and masks.
        vit.init_weights(self, seed, {f"{name}.weight": 0.001 for name, module
                                      in self.named_modules() if module in last})

    def find(self, images, seen, scales=None):
        """The pyramid of images [B,C,H,W], whose (height, width) `seen` [B,2] are not filled up
        (nothing attends to the rest); the anchors [A,4], their logits [B,A] and offsets [B,A,4].
        `scales` [B,L,2] are drop_path_scales'."""
        grid, p = self.config.grid, self.config.patch
        x = self.patch_embed(vit.patchify(images, p)) + self.pos_embed[:, 1:]           # [B,N,D]
        row, column = (torch.arange(0, n * p, p, device=x.device) for n in grid)
        real = (row < seen[:, :1])[:, :, None] & (column < seen[:, 1:])[:, None]
        real = real.flatten(1)                                              # [B,N]
        inside = to_windows(real[..., None].float(), grid, self.window)[..., 0] > 0
        inside |= ~inside.any(1, keepdim=True)      # no softmax over nothing in an empty window
        for i, block in enumerate(self.blocks):
            scale, mask = None if scales is None else scales[:, i], real            # [B,2] [B,N]
            if self.windowed[i]:        # all but attention treats each token by itself
                x, mask = to_windows(x, grid, self.window), inside
                if scale is not None:
                    scale = scale.repeat_interleave(len(inside) // len(real), 0)
            x = vit.run_block(block, x, self.recompute, scale, mask[:, None, None])
            x = from_windows(x, grid, self.window) if self.windowed[i] else x
        x = x.transpose(1, 2).unflatten(2, grid)                            # [B,D,rows,columns]
        maps = [level(x) for level in self.pyramid]
        maps.append(maps[-1][..., ::2, ::2])
        found = torch.cat([self.proposals(x).permute(0, 2, 3, 1).reshape(len(x), -1, 5)
                           for x in maps], 1).float()                       # [B,A,5]
        anchors = make_anchors([x.shape[2:] for x in maps], p, x.device)
        return maps, anchors, found[..., 0], found[..., 1:]

    @torch.no_grad()
    def propose(self, maps, anchors, logits, offsets, seen):
        """The best boxes [B,n,4] of the proposals, and which of them are one, bool [B,n]."""
        counts, found = [3 * x[0, 0].numel() for x in maps], []
        for level in zip(logits.split(counts, 1), offsets.split(counts, 1), anchors.split(counts)):
            score, index = level[0].topk(min(self.heads.before_nms, level[0].shape[1]))
            boxes = decode_boxes(vit.gather_tokens(level[1], index), level[2][index])   # [B,n,4]
            boxes, sound = clip_boxes(boxes, seen)
            score = score.masked_fill(~sound, -math.inf)
            remain = nms(boxes, score, torch.zeros_like(index), 0.7)
            found.append((boxes, score.masked_fill(~remain, -math.inf)))
        boxes, score = (torch.cat(part, 1) for part in zip(*found))
        score, index = score.topk(min(self.heads.after_nms, score.shape[1]))
        return vit.gather_tokens(boxes, index), score > -math.inf

    def forward(self, images, batch, scales=None):
        """The loss of images [B,C,H,W] with the objects of a batch (see objects_layout). Each image
        counts alike and has a fixed number of anchors and boxes, so that ranks and micro-batches
        change nothing."""
        G = max(1, int((batch["classes"] >= 0).sum(1).max()))     # most objects of these images
        seen, truth, classes = batch["seen"], batch["boxes"][:, :G], batch["classes"][:, :G]
        known, heads = classes >= 0, self.heads                             # [B,G]
        draw = lambda stream, n: data.uniform(self.seed, batch["position"], stream, n)  # [B,n]
        maps, anchors, logits, offsets = self.find(images, seen, scales)
        loss = proposal_losses(anchors, logits, offsets, truth, known, draw, heads.anchors) # [B]

        # ---- boxes: proposals, and the objects themselves, get classes and better boxes
        boxes, sound = self.propose(maps, anchors, logits, offsets, seen)
        boxes, sound = torch.cat([boxes, truth], 1), torch.cat([sound, known], 1)
        _, positive, negative = match(boxes, truth, known, 0.5, 0.5)
        chosen, sound = choose_boxes(positive & sound, negative & sound,
                                     draw("boxes", boxes.shape[1]), heads.boxes, 0.25)  # [B,S]
        boxes = chosen = vit.gather_tokens(boxes, chosen)                   # [B,S,4]
        judged = federated(classes, draw("classes", self.K), self.images_of) if self.images_of \
            else None                                                       # [B,K]
        for head, overlap, sizes in zip(self.box_heads, self.stages, SCALES):
            which, positive, _ = match(boxes, truth, known, overlap, overlap)
            positive &= sound                                               # [B,S]
            x = roi_align(maps[:4], boxes, self.strides, 7)                 # [B*S,C,7,7]
            part = x / len(self.stages)         # of the gradient goes on: as much as of one head
            x = head(part + (x - part).detach()).float().unflatten(0, which.shape)
            logits, offsets = x[..., :-4], x[..., -4:]                      # [B,S,K'] [B,S,4]
            targets = classes.gather(1, which).masked_fill(~positive, self.K)
            wanted = encode_boxes(boxes, vit.gather_tokens(truth, which), sizes)
            losses = class_losses_of_boxes(logits, targets, judged) * sound
            losses = losses + (offsets - wanted).abs().sum(-1) * positive   # [B,S]
            loss = loss + losses.sum(1) / heads.boxes
            boxes, area = clip_boxes(decode_boxes(offsets.detach(), boxes, sizes), seen)
            sound = sound & area
        if not self.mask_head:
            return loss.mean()

        # ---- masks of the chosen boxes that are objects, which come first
        boxes = chosen[:, :max(1, heads.boxes // 4)]                        # [B,n,4]
        which, positive, _ = match(boxes, truth, known, 0.5, 0.5)           # [B,n]
        wanted = mask_targets(vit.gather_tokens(batch["masks"][:, :G].flatten(2), which).unflatten(
            2, 2 * [MASK_SIDE]) / 255, vit.gather_tokens(truth, which), boxes, 28)
        logits = self.masks(maps, boxes, classes.gather(1, which).clamp(min=0))     # [B,n,28,28]
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3))
        return (loss + (losses * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()

    def masks(self, maps, boxes, classes):
        """The logits [B,n,28,28] of the masks of boxes [B,n,4] of these classes [B,n]."""
        logits = self.mask_head(roi_align(maps[:4], boxes, self.strides, 14)).float()
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, classes.flatten()].unflatten(0, classes.shape)

    @torch.no_grad()
    def detect(self, images, seen):
        """What is found in images [B,C,H,W], the surest first: scores [B,n] (0: no more), classes
        [B,n], boxes [B,n,4], and, from a model with masks, masks [B,n,28,28], 0 … 1."""
        most, least = (300, 0.02) if self.images_of else (100, 0.05)
        (maps, *found), scores = self.find(images, seen), 0
        boxes, sound = self.propose(maps, *found, seen)                     # [B,n,4] [B,n]
        for head, sizes in zip(self.box_heads, SCALES):
            x = head(roi_align(maps[:4], boxes, self.strides, 7)).float().unflatten(0, sound.shape)
            chances = (x[..., :-4] - PRIOR).sigmoid() if self.images_of else \
                x[..., :-4].softmax(-1)[..., :self.K]
            scores = scores + chances / len(self.stages)                    # [B,n,K]
            boxes, _ = clip_boxes(decode_boxes(x[..., -4:], boxes, sizes), seen)
        scores = (scores * sound[..., None]).flatten(1)                     # [B,n*K]
        # detectron2 takes all above the threshold; hardly ever are there more than these.
        scores, index = scores.topk(min(self.heads.before_nms, scores.shape[1]))
        boxes, classes = vit.gather_tokens(boxes, index // self.K), index % self.K
        scores = scores * (nms(boxes, scores, classes, 0.5) & (scores > least))
        scores, index = scores.topk(min(most, scores.shape[1]))
        boxes, classes = vit.gather_tokens(boxes, index), classes.gather(1, index)
        found = scores, classes, boxes
        return (*found, self.masks(maps, boxes, classes).sigmoid()) if self.mask_head else found


def proposal_losses(anchors, logits, offsets, truth, known, draw, n):
    """The loss [B] of the proposals, logits [B,A] and offsets [B,A,4], on n anchors of each image:
    whether it is an object (cross-entropy), and where the object is (L1)."""
    which, positive, negative = match(anchors[None], truth, known, 0.3, 0.7, nearest=True)
    chosen, sound = choose_boxes(positive, negative, draw("anchors", logits.shape[1]), n, 0.5)
    positive = positive.gather(1, chosen) & sound
    wanted = encode_boxes(anchors[chosen], vit.gather_tokens(truth, which.gather(1, chosen)))
    losses = F.binary_cross_entropy_with_logits(logits.gather(1, chosen), positive.float(),
                                                reduction="none") * sound
    distances = (vit.gather_tokens(offsets, chosen) - wanted).abs().sum(-1)
    return (losses + distances * positive).sum(1) / n


def class_losses_of_boxes(logits, targets, judged):
    """The loss [B,S] of class logits [B,S,K'] for targets [B,S], K for the background: the cross-
    entropy of K + 1 classes, or the sum of the binary ones of the classes `judged` [B,K]."""
    if judged is None:
        return F.cross_entropy(logits.movedim(2, 1), targets, reduction="none")
    hot = F.one_hot(targets, logits.shape[2] + 1)[..., :-1].float()         # [B,S,K]
    losses = F.binary_cross_entropy_with_logits(logits - PRIOR, hot, reduction="none")
    return (losses * judged[:, None]).sum(-1)


def federated(classes, uniforms, images_of):
    """The classes that are judged in each image, bool [B,K]: those of its objects [B,G] and, by
    chance, others, each by the root of the number of its images `images_of` [K]."""
    K = len(images_of)
    weights = torch.tensor(images_of, device=classes.device).clamp(min=1).sqrt()
    own = F.one_hot(classes + 1, K + 1).amax(1)[:, 1:] > 0                  # [B,K]
    rank = torch.where(own, 1.0, uniforms.log() / weights)      # the largest: drawn by weight
    chosen = rank.topk(min(FEDERATED, K)).indices
    return torch.zeros_like(own).scatter(1, chosen, True)


def detector_flops(model):
    """Operations of a forward pass over one image, as torch counts them for a model without
    content (on the meta device)."""
    C, n = model.heads.channels, model.heads.boxes
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        model.find(torch.empty(1, model.config.channels, *model.config.image), torch.empty(1, 2))
        for head in model.box_heads:
            head(torch.empty(n, C, 7, 7))
        if model.mask_head:
            model.mask_head(torch.empty(max(1, n // 4), C, 14, 14))
    return counter.get_total_flops()


# ======================================================================================
# Detection: images for training
# ======================================================================================

def see_objects(sample, uniforms, size, channels, numbers, most=0, side=0, jitter=(1, 1),
                flip=False):
    """A sample of data.open_objects as a detector gets it: a canvas uint8 [H,W,C] with the image at
    its top left, and a row of objects_layout(most, side). `numbers` {category: class}. Raises what
    decoders raise."""
    height, width, flip = sample["height"], sample["width"], flip and uniforms[3] < 0.5
    (left, top, right, bottom), (h, w) = data.frame(width, height, size, uniforms, jitter)
    corner, last = np.array([left, top] * 2), np.array([right, bottom] * 2)
    scale, turn = np.array([w, h] * 2) / (last - corner), slice(None, None, -1 if flip else 1)

    def choose_box(found_width, found_height):
        if isinstance(sample["image"], dict):           # the world's: in shares of its sides
            return left / width, top / height, right / width, bottom / height
        if (found_width, found_height) != (width, height):
            raise ValueError(f"it is {found_width} x {found_height}, its annotations are for "
                             f"{width} x {height}")
        return left, top, right, bottom

    row, n = np.zeros((), objects_layout(most, side)), 0
    pixels = np.full((*size, channels), 116, np.uint8)          # about ImageNet's mean
    pixels[:h, :w] = data.read_pixels(sample["image"], choose_box, (h, w), channels)[:, turn]
    row["classes"], row["seen"], row["scale"] = -1, (h, w), scale[:2]
    inside = np.zeros((height, width), bool)
    inside[int(top):math.ceil(bottom), int(left):math.ceil(right)] = True
    for one in sample["objects"]:
        x, y, dx, dy = one["bbox"]
        box = x, y, x + dx, y + dy
        if side:            # the box is that of what can be seen of the mask
            mask = data.read_mask(one["segmentation"], height, width) & inside
            mask = Image.fromarray(mask.astype(np.uint8) * 255)
            box = mask.getbbox() or (0, 0, 0, 0)
        box = np.clip(box, corner, last)
        if one["iscrowd"] or (box[2:] <= box[:2]).any():
            continue
        if side:
            mask = mask.resize((side, side), Image.Resampling.BILINEAR, tuple(box.tolist()))
            row["masks"][n] = np.asarray(mask)[:, turn]
        x0, y0, x1, y1 = (box - corner) * scale
        row["boxes"][n] = (w - x1, y0, w - x0, y1) if flip else (x0, y0, x1, y1)
        row["classes"][n], n = numbers[one["category"]], n + 1
    return pixels, row


def objects_layout(most=0, side=0):
    """What see_objects says of an image with at most `most` objects, in pixels of the canvas: their
    boxes, classes (-1: no more), masks in their boxes (0 … 255), the (height, width) of the image,
    and what the image's x and y were multiplied by."""
    return [("boxes", np.float32, (most, 4)), ("classes", np.int64, (most,)), ("masks", np.uint8, (
        most, side, side)), ("seen", np.float32, (2,)), ("scale", np.float32, (2,))]


# ======================================================================================
# Detection: scores
#
# A truth is an image of data.open_objects, a result a dict of COCO's: "image_id", "category_id",
# "bbox", "score", "segmentation". All numbers are those of pycocotools and of the lvis package.
# ======================================================================================

OVERLAPS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
AREAS = np.array([(0, 1e10), (0, 32 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e10)])    # all, s, m, l


def overlaps_of(found, truths, crowd, kind, H, W):
    """The areas [D] of found boxes ("bbox") or masks ("segm") in an image of H x W, and their IoU
    [D,G] with the true ones. With a crowd, bool [G], it is the share of the found one inside."""
    if kind == "bbox":
        a, b = (np.array([one["bbox"] for one in some], float).reshape(-1, 4)
                for some in (found, truths))
        first = np.maximum(a[:, None, :2], b[:, :2])                        # [D,G,2]: left, top
        last = np.minimum((a[:, :2] + a[:, 2:])[:, None], b[:, :2] + b[:, 2:])
        common = (last - first).clip(0).prod(-1)                            # [D,G]
        area, other = a[:, 2:].prod(1), b[:, 2:].prod(1)                    # [D] [G]
    else:
        a, b = ([data.read_mask(one["segmentation"], H, W) for one in some]
                for some in (found, truths))
        area, other = (np.array([np.count_nonzero(mask) for mask in some]) for some in (a, b))
        common = np.array([[np.count_nonzero(x & y) for y in b] for x in a]).reshape(len(a), len(b))
    cover = np.where(crowd, area[:, None], area[:, None] + other - common)
    return area, common / cover.clip(1e-12)


def match_truths(overlaps, crowd, ignored):
    """Give each of D found objects, the surest first, the truth [G] that it overlaps most, if that
    is free: (matched, to an ignored truth), bool [4,10,D] for AREAS and OVERLAPS.

    Truths that count go before `ignored` [4,G] ones; a crowd may be given often; of equal overlaps
    the last wins."""
    D, G = overlaps.shape
    free, places = np.ones((4, 10, G), bool), np.ogrid[:4, :10]
    matched, wasted = np.zeros((2, 4, 10, D), bool)
    for d in range(D if G else 0):
        usable = (free | crowd) & (overlaps[d] >= OVERLAPS[:, None])        # [4,10,G]
        rank = np.where(usable, overlaps[d] - 2 * ignored[:, None], -9)
        best = G - 1 - rank[..., ::-1].argmax(-1)                           # [4,10]
        matched[..., d] = hit = usable[(*places, best)]
        wasted[..., d] = hit & ignored[places[0], best]
        free[(*places, best)] &= ~hit
    return matched, wasted


def compare(found, truths, kind, image, lvis):
    """The results, the surest first, and truths of one image and category: (scores [D], which are
    right and which wrong, bool [4,10,D] each, numbers of truths that count [4])."""
    crowd = np.array([one["iscrowd"] for one in truths], bool)              # [G]
    true_area = np.array([one["area"] for one in truths])                   # [G]
    outside = lambda area: (area < AREAS[:, :1]) | (area > AREAS[:, 1:])    # [4,n]
    ignored = outside(true_area) | crowd
    area, overlaps = overlaps_of(found, truths, crowd, kind, image["height"], image["width"])
    matched, wasted = match_truths(overlaps, crowd, ignored)
    wrong = ~matched & ~outside(area)[:, None] & (area > 0 if lvis else True)
    return np.array([one["score"] for one in found]), matched & ~wasted, wrong, (~ignored).sum(1)


def curves(rows, area, most):
    """(Precision [10,101] at OVERLAPS and RECALLS, final recall [10]) of one category, from
    `compare`'s rows, of which the surest `most` count; -1 where there is no truth."""
    count = sum(row[3][area] for row in rows)
    if not count:
        return np.full((10, 101), -1.0), np.full(10, -1.0)
    order = np.argsort(-np.concatenate([row[0][:most] for row in rows]), kind="stable")
    right, wrong = (np.cumsum(np.concatenate(
        [row[k][area, :, :most] for row in rows], 1)[:, order], 1) for k in (1, 2))     # [10,n]
    if not len(order):
        return np.zeros((10, 101)), np.zeros(10)
    best = right / (right + wrong + np.spacing(1))
    best = np.maximum.accumulate(best[:, ::-1], 1)[:, ::-1]         # at this recall or a higher one
    precision = [np.append(values, 0)[np.searchsorted(recall, RECALLS)]
                 for recall, values in zip(right / count, best)]
    return np.array(precision), right[:, -1] / count


def coco_scores(truths, results, categories, kind):
    """COCO's twelve numbers, 0 … 1, of "bbox" or "segm"; -1 where there is nothing to find.

    Of LVIS, an image knows only some of the categories: results of others do not count, nor wrong
    ones of those that are not exhaustive; AP is also given for rare, common and frequent ones."""
    lvis = all("neg_category_ids" in image for image in truths)
    rows, found = {one["id"]: [] for one in categories}, {image["id"]: [] for image in truths}
    ids = {one["name"]: one["id"] for one in categories}
    for one in sorted(results, key=lambda one: -one["score"]):
        found[one["image_id"]].append(one)
    for image in sorted(truths, key=lambda image: image["id"]):
        here = {k: ([], []) for k in rows}      # of each category the results and the truths
        for one in image["objects"]:
            here[ids[one["category"]]][1].append(one)
        for one in found[image["id"]][:300 if lvis else None]:
            k = one["category_id"]
            if k in rows and (not lvis or here[k][1] or k in image["neg_category_ids"]):
                here[k][0].append(one)
        for k, (mine, objects) in here.items():
            if mine or objects:
                rows[k].append(compare(mine, objects, kind, image, lvis))
                if lvis and k in image["not_exhaustive_category_ids"]:
                    rows[k][-1][2][:] = False           # none is wrong
    most = 300 if lvis else 100
    table = lambda area, n: [np.array(part) for part in zip(*(
        curves(some, area, n) for some in rows.values()))]      # [K,10,101] [K,10]; -1: no truth
    mean = lambda values: float(values[values >= 0].mean()) if (values >= 0).any() else -1.0
    precision, recall = zip(*(table(area, most) for area in range(4)))
    scores = {"AP": mean(precision[0]), "AP50": mean(precision[0][:, 0]),
              "AP75": mean(precision[0][:, 5])}
    scores |= {f"AP{size}": mean(precision[area]) for area, size in enumerate("sml", 1)}
    for letter in "rcf" if lvis else "":
        of = np.array([one["frequency"] == letter for one in categories])
        scores[f"AP{letter}"] = mean(precision[0][of])
    scores |= {f"AR{n}": mean(table(0, n)[1]) for n in ((most,) if lvis else (1, 10, most))}
    return scores | {f"AR{size}": mean(recall[area]) for area, size in enumerate("sml", 1)}


# ======================================================================================
# Detection: evaluation, pictures, main
# ======================================================================================

def results_of(found, sample, scale, categories):
    """What a detector has found in one sample as COCO's results, but for categories of None:
    `found` are scores [n], classes [n], boxes [n,4] and perhaps masks [n,28,28]; `scale` [2] is
    objects_layout's."""
    (scores, classes, boxes, *masks), H, W = found, sample["height"], sample["width"]
    boxes = torch.minimum(boxes / scale.repeat(2), torch.tensor([W, H, W, H]))      # [n,4]
    xs, ys = (torch.arange(side)[None, None] + 0.5 for side in (W, H))
    results = []
    for k, number in enumerate(classes[scores > 0].tolist()):       # the surest come first
        if not (category := categories[number]):
            continue
        x0, y0, x1, y1 = boxes[k].tolist()
        results.append({"image_id": sample["id"], "category_id": category["id"],
                        "category": category["name"], "score": float(scores[k]),
                        "bbox": [x0, y0, x1 - x0, y1 - y0]})
        if masks:
            mask = read_masks(masks[0][None, k:k + 1], boxes[None, k:k + 1], xs, ys)[0, 0] >= 0.5
            runs = data.runs_of_mask(mask.numpy())
            results[-1]["segmentation"] = {"size": [H, W], "counts": data.text_of_runs(runs)}
    return results


def find_objects(model, val, categories, args, device):
    """[(position, sample, results)] of all of `val` that can be read, in order, on rank 0."""
    rows = []
    for images, batch in data.validate(val, args, device):
        with vit.autocast(args, device):
            found = [x.cpu() for x in model.detect(images, batch["seen"].to(device))]
        for k in batch["weight"].nonzero()[:, 0].tolist():      # not past the end, and read
            i = int(batch["position"][k])
            sample, scale = val.sample(i), batch["scale"][k]
            rows.append((i, sample, results_of([x[k] for x in found], sample, scale, categories)))
    return sorted(sum(vit.objects_in_turn(rows), []), key=lambda row: row[0])


def evaluate_detector(model, val, categories, args, device):
    """COCO's scores over a source, every image once at any number of ranks. Writes
    OUT/results.json and OUT/detections.png."""
    rows = find_objects(model, val, categories, args, device)

    def score():
        truths, results = [row[1] for row in rows], [one for row in rows for one in row[2]]
        draw_detections(args, rows[::math.ceil(len(rows) / 8)])
        content = json.dumps(results)
        vit.write_aside(Path(args.out) / "results.json", lambda aside: aside.write_text(content))
        judged = [category for category in categories if category]
        return {**{kind: coco_scores(truths, results, judged, kind)
                   for kind in ("bbox", "segm")[:1 + args.masks]},
                "count": len(rows), "bad": len(val) - len(rows)}

    return vit.on_rank_0(score)


def predict_objects(model, categories, args, config, device):
    """Print what is in --predict's pictures, and draw it. Raises UserError."""
    samples = []
    for path in args.predict:
        try:
            with data.open_image(path) as image:
                W, H = ImageOps.exif_transpose(image).size
        except Exception as error:      # what decoders raise on damage has no common class
            raise UserError(f"--predict {path} cannot be read: {error}") from error
        samples.append({"id": path, "image": path, "where": path, "height": H, "width": W,
                        "objects": []})
    see = functools.partial(see_objects, size=config.image, channels=config.channels, numbers={})
    val = data.Samples(samples, config.image, config.channels, shuffle=False, annotate=see,
                       rows=np.arange(len(samples)), layout=objects_layout())
    rows = find_objects(model, val, categories, args, device)
    for _, sample, found in rows:
        objects = [f"{one['category']} {one['score']:.2f} at {[*map(round, one['bbox'])]}"
                   for one in found if one["score"] >= 0.5]
        rank0_print(f"{sample['id']}: " + (", ".join(objects) or "nothing"))

    vit.on_rank_0(lambda: draw_detections(args, rows))


def evaluate_results(args):
    """Print the scores of the file --evaluate on the annotations --val, as a line of JSON."""
    source = data.open_objects(args.val, None, (64, 64))
    truths = [source[i] for i in range(len(source))]
    try:
        results = json.loads(Path(args.evaluate).read_text())
        unknown = {one["image_id"] for one in results} - {image["id"] for image in truths}
        if unknown or not results:
            raise ValueError(f"{len(unknown)} of its images are not in --val, as {min(unknown)}"
                             if unknown else "it is empty")
        masks = all("segmentation" in one for one in results) and source.masks
        boxes = all("bbox" in one for one in results)
        scores = {kind: coco_scores(truths, results, source.categories, kind)
                  for kind, given in (("bbox", boxes), ("segm", masks)) if given}
        if not scores:
            raise ValueError("it has neither boxes nor masks that --val has")
    except (OSError, *data.RECORD_ERRORS) as error:
        raise UserError(f"--evaluate {args.evaluate} cannot be scored as COCO's results: "
                        f"{type(error).__name__}: {error}") from error
    rank0_print(json.dumps(scores))


def draw_objects(sample, objects, masks):
    """A sample with objects on it, with `masks` or without, as a PIL image: results of a score of
    0.5 or more, or truths."""
    H, W, labels = sample["height"], sample["width"], []
    zoom = max(1, 320 // max(H, W))
    pixels = data.read_pixels(sample["image"], data.whole_image, (H, W)).astype(float)
    for one in objects:
        colour = ImageColor.getrgb(f"hsl({zlib.crc32(one['category'].encode()) % 360},90%,50%)")
        if one.get("score", 1) >= 0.5:
            score = f" {one['score']:.2f}" if "score" in one else ""
            labels.append((one["bbox"], colour, one["category"] + score))
            if masks and "segmentation" in one:
                mask = data.read_mask(one["segmentation"], H, W)
                pixels[mask] = 0.6 * pixels[mask] + 0.4 * np.array(colour)
    picture = Image.fromarray(pixels.astype(np.uint8)).resize((zoom * W, zoom * H), 0)
    pen = ImageDraw.Draw(picture)
    for (x, y, w, h), colour, text in labels:
        pen.rectangle([zoom * side for side in (x, y, x + w, y + h)], outline=colour, width=2)
        pen.text((zoom * x + 3, zoom * y + 1), text, "white", stroke_width=1, stroke_fill="black")
    return picture


def draw_detections(args, rows):
    """Draw find_objects' rows and, but for --predict, the truths beside them, in
    OUT/detections.png."""
    columns = 1 if args.predict else 2
    pictures = [draw_objects(sample, objects, args.masks) for _, sample, found in rows
                for objects in (found, sample["objects"])[:columns]]
    width, height = (4 + max(sides) for sides in zip(*(picture.size for picture in pictures)))
    sheet = Image.new("RGB", (width * columns, 20 + height * len(rows)), "white")
    for k, title in enumerate(("found", "true")[:columns]):
        ImageDraw.Draw(sheet).text((k * width + 4, 4), title, "black")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, 20 + i // columns * height))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    vit.write_aside(Path(args.out) / "detections.png", lambda aside: sheet.save(aside, "PNG"))


def object_samples(source, where, classes, args, config):
    """A source of objects as data.Samples: --data's images with objects, in random sizes, or all of
    --val's. Raises UserError.

    In an epoch, images with rare classes of LVIS come max(1, sqrt(0.001 / f)) times, where f is the
    share of images with their rarest class."""
    training, objects = where == "--data", np.concatenate([one.objects for one in source.sources])
    rows = np.flatnonzero(objects if training else objects >= 0)
    if not len(rows):
        raise UserError(f"{where} has no objects to learn")
    if args.masks and not source.masks:
        raise UserError(f"{where} has objects without masks: give --no-masks")
    if len(rows) < len(objects):
        rank0_print(f"{len(objects) - len(rows):,} images without objects are left out")
    if training and source.federated:
        here = [{one["category"] for one in source[i]["objects"]} for i in rows.tolist()]
        images = Counter(name for some in here for name in some)
        times = [max(1, math.sqrt(0.001 * len(rows) / min(images[name] for name in some)))
                 for some in here]
        chance = data.uniform(args.seed, rows, "repeat", 1)[:, 0]
        rows = np.repeat(rows, (np.array(times) + chance).astype(int))
    most, side = int(objects.max()), MASK_SIDE * args.masks
    see = functools.partial(
        see_objects, size=config.image, channels=config.channels, most=most, side=side,
        numbers={name: k for k, name in enumerate(classes)}, flip=training,
        jitter=args.jitter if training else (1, 1))
    return data.Samples(source, config.image, config.channels, seed=args.seed, shuffle=training,
                        rows=rows, annotate=see, layout=objects_layout(most, side))


def encoder_16(tensors):
    """A file's tensors under our names, without class token, and with a kernel for patches of 16
    pixels: one of 14 is resized bicubically."""
    tensors = vit.our_names(tensors)
    tensors.pop("cls_token", None)
    if tensors["patch_embed.proj.weight"].shape[-1] == 14:
        tensors["patch_embed.proj.weight"] = F.interpolate(
            tensors["patch_embed.proj.weight"].float(), (16, 16), mode="bicubic")
    return tensors


def detect(argv):
    args, config, heads, file_info = parse_detect_flags(argv)
    if args.evaluate:
        return evaluate_results(args)
    device = None if args.plan else vit.start(args)

    # ---- data
    in_use = file_info["detector"] if args.predict or args.eval_only else {}
    classes = file_info["classes"] if "detector" in file_info else [""] * 80    # --plan: COCO's 80
    train = val = None
    images_of = [1] * len(classes) if in_use.get("federated") else None
    if not in_use and not args.plan:
        train = data.open_objects(args.data, args.images, config.image)
        classes = train.classes
        images_of = [one["image_count"] for one in train.categories] if train.federated else None
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
    if args.val and not (args.plan or args.predict):
        val = data.open_objects(args.val, args.val_images or args.images, config.image)
        known = {one["name"]: one for one in val.categories}
        if missing := sorted({*known} - {*classes}):
            raise UserError(f"--val has {len(missing)} categories that the model lacks: "
                            f"{', '.join(missing[:5])}")
        categories = [known.get(name) for name in classes]      # None: --val does not have it
        val = object_samples(val, "--val", classes, args, config)

    # ---- model: random weights, or --init; a run that goes on replaces them (vit.Run)
    make = lambda: Detector(config, heads, len(classes), args.window, STAGES[args.box_heads],
                            in_use.get("masks", args.masks), args.seed, images_of)
    with torch.device("meta"):
        flops = 3 * detector_flops(make())
    if args.plan:
        rank0_print("activations are those of the encoder; pyramid and heads need more")
        return vit.plan(args, make, [(config.depth, config.width, config.num_patches)], flops)
    model, wrapped = vit.build(make, args, device, ("detect",))
    if args.init:
        by_class = ("box_heads.*", "mask_head.*")       # not loaded where the classes are others
        parts = ("*.rel_pos.*", "pyramid.*", "proposals.*", *by_class)
        vit.load_weights(model, args.init, rename=encoder_16, new=() if in_use else parts,
                         renew=() if file_info.get("classes") == classes else by_class)
    if args.predict:
        return predict_objects(model, categories, args, config, device)
    if args.eval_only:
        return vit.report(args, evaluate_detector(model, val, categories, args, device))
    train = object_samples(train, "--data", classes, args, config)
    schedule = vit.make_schedule(args, len(train))
    if not vit.open_run(args, "detect", model, train, val, {"classes": classes}):
        return

    def draw_and_evaluate():
        metrics = evaluate_detector(model, val, categories, args, device) if val else {}
        return {**metrics, **{f"{kind}_{name}": metrics[kind][name] for kind in ("bbox", "segm")
                              if kind in metrics for name in ("AP", "AP50", "AP75")}}

    # ---- loop
    groups = vit.decay_groups(model, args.weight_decay, NO_DECAY, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    model_info = {"config": asdict(config), "stage": "detect", "classes": classes, "detector": {
        "box_heads": args.box_heads, "window": args.window, "masks": args.masks,
        "federated": bool(images_of)}}
    run = vit.Run(args, model, wrapped, optimizer, device, schedule, model_info, flops)
    batches = data.training_batches(train, args, run.state["step"], schedule, device)
    for _ in run.steps(draw_and_evaluate):
        for batch in run.micro_batches(batches):
            images, scales = data.normalise(batch["images"]), None          # [B,C,H,W]
            if args.drop_path:
                uniforms = data.uniform(args.seed, batch["position"], "drop path", 2 * config.depth)
                scales = vit.drop_path_scales(uniforms, args.drop_path)     # [B,L,2]
            with vit.autocast(args, device):
                loss = wrapped(images, batch, scales)
            run.backward(loss)
        run.update()


# ======================================================================================
# Main
# ======================================================================================

TASKS = {"classify": classify, "features": features, "knn": knn, "linear": linear,
         "lowshot": lowshot, "zeroshot": zeroshot, "video": video, "detect": detect}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return rank0_print(__doc__ or f"the tasks: {' '.join(TASKS)}")   # with python -OO, none
    if argv[0] not in TASKS:
        raise UserError(f"the first word is the task, one of: {' '.join(TASKS)}; found {argv[0]!r}")
    TASKS[argv[0]](argv[1:])


if __name__ == "__main__":
    vit.run(main)
