"""Stage 3: use a pretrained encoder.

Each task is a command of its own, `finetune.py TASK` (`finetune.py TASK --help`), and a section of
this file that can be read alone. The first, classify, is full finetuning on labelled images ("The
effectiveness of MAE pre-pretraining for billion-scale pretraining", arXiv 2303.13496, section 4;
the recipe at 224 pixels is that of "Masked Autoencoders Are Scalable Vision Learners", arXiv
2111.06377, table 9, "MAE" below).

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

    torchrun finetune.py linear --init runs/wsp/model.pt --data photos/train --val photos/val

zeroshot trains a text tower for an encoder, or uses a released one: classes are given in words.

    python finetune.py zeroshot --init maws_clip.pt --tokenizer tokenizer.json --predict cat.jpg \\
        --texts "une photo de chat" "a photo of a dog"

video finetunes an image encoder on clips: folders of frames, or animated files.

    torchrun finetune.py video --init runs/wsp/model.pt         # motions of the built-in world
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import data
import vit
from vit import UserError, ViT, rank0_print

# ======================================================================================
# classify: recipes and flags
# ======================================================================================

RECIPES = {
    "mae": dict(        # MAE's table 9, at the encoder's own image size, 224
        optimizer="adamw", batch=1024, weight_decay=0.05, clip_grad=0.0, final_lr=1e-6,
        pool="mean", crop="centre", smallest_crop=0.08, randaugment=9.0, erasing=0.25, mixup=0.8,
        cutmix=1.0, smoothing=0.1, ema=0.0),
    "maws": dict(       # crop: paper; warmup, smallest crop: ours; others: SWAG's issues 8 and 9
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
MAE_BY_MODEL = {        # of the recipe mae; warmup: 5 epochs; 2b and 6.5b are not published
    "base": dict(epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1, warmup=0.05),
    "large": dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2, warmup=0.1),
    **dict.fromkeys(("huge", "2b", "6.5b"), dict(
        epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3, warmup=0.1)),
}
BETAS = 0.9, 0.999                              # MAE
HEAD_STD = {"mae": 2e-5, "maws": 0.0, "ours": 2e-5}     # MAE; SWAG; ours
NO_DECAY = "pos_embed", "cls_token", "pos_embed_temporal"      # no weight decay (MAE)


def add_classify_flags(add):
    add("--recipe", choices=RECIPES, help="mae: at 224 pixels (MAE); maws: at 512 or 518 (paper; "
        "not published in full); ours: for a classroom; default ours up to small, else mae")
    add("--loss", choices=("ce", "bce", "softmax"), help="ce: one class per image; softmax: 1/k on "
        "each of k classes; bce: binary cross-entropy for every class; default ce, but that of "
        "--init with --predict and --eval-only")
    add("--pool", choices=("cls", "mean"), help="input of the head: the class token or the mean of "
        "the patches; default by recipe, but mean if --init has fc_norm")
    add("--freeze", action="store_true", help="train only the head (and the norm of --pool mean) "
        "on the encoder of --init; default off")
    add("--crop", choices=("centre", "squash"), help="for evaluation. centre: the central 7/8, or "
        "the whole central square above 224 pixels (MAE); squash: the whole image (released MAWS); "
        "default: that of --init, else by recipe")
    add("--optimizer", choices=("adamw", "sgd"), help="sgd: nesterov, 0.9; default by recipe")
    add_training_flags(add)


def add_training_flags(add):
    """What classify and video share."""
    add("--classes", metavar="FILE", help="meaning of --init's outputs: a line each, names "
        "separated by commas; default: what the file says, or the classes of the data")
    add("--class-map", metavar="FILE", help="lines of: model's class, TAB, class of --val, where "
        "they differ; several model classes may be correct for one; default: by name")
    below_1 = vit.number(0, 0.999)
    for flag, kind, metavar, text in (
            ("final-lr", vit.number(0), "RATE", "learning rate at the end, before --layer-decay"),
            ("layer-decay", vit.number(1e-9, 1), "FACTOR", "learning rate of a layer relative to "
             "the layer above it; 1 off"),
            ("drop-path", below_1, "SHARE", "share of images that skip a branch of the last "
             "block; 0 off"),
            ("smallest-crop", vit.number(1e-9, 1), "SHARE", "smallest area of a random crop, as a "
             "share of the image's"),
            ("randaugment", vit.number(0, 10), "LEVEL", "strength of RandAugment's two "
             "operations; 0 off"),
            ("erasing", vit.share, "SHARE", "share of images with an erased rectangle; 0 off"),
            ("mixup", vit.share, "ALPHA", "mix pairs of images by Beta(ALPHA, ALPHA); 0 off"),
            ("cutmix", vit.share, "ALPHA", "paste a part of the partner instead; with mixup each "
             "is used half of the time; 0 off"),
            ("smoothing", below_1, "SHARE", "share of the target that is spread over all classes; "
             "0 off"),
            ("ema", vit.number(0, 0.999999), "DECAY", "evaluate and save an exponential moving "
             "average of the weights; 0 off")):
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
        **{f"recipe {name}:": recipe for name, recipe in RECIPES.items()},
        **{f"recipe mae, {name}:": recipe for name, recipe in MAE_BY_MODEL.items()}})
    parser.set_defaults(data=["world-labelled"], flip=True, dropout=0.0)
    add_classify_flags(parser.add_argument_group("classification").add_argument)
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
    return data.whole if args.crop == "squash" else functools.partial(
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
    same = file_info.get("classes") == names and \
        file_info.get("config", {}).get("pool", "cls") == args.pool
    keep_head = in_use or same
    vit.load_weights(model, args.init, new=() if in_use else ("norm.*", "fc_norm.*", *new),
                     renew=() if keep_head else ("head.*",))
    if "head.weight" in file_info["shapes"] and not keep_head:
        rank0_print(f"a new head for {len(names)} classes: --init has one for "
                    f"{file_info['shapes']['head.weight'][0]} "
                    + ("hashtags" if "vocabulary" in file_info else "other classes or pooling"))


def train_classifier(args, model, wrapped, logits_of, device, train, val, model_info, flops):
    """The training of classify and video. `logits_of` is what is evaluated, a function of images
    [B,C,H,W], of clips [B,V,T,C,H,W]; `model_info` and `flops` as of vit.Run."""
    names, mixing = model_info["classes"], bool(args.mixup or args.cutmix)
    schedule = vit.make_schedule(args, len(train), together=2 if mixing else 1)
    if not vit.open_run(args, model_info["stage"], model, train, val,
                        {"classes": names, "ema": bool(args.ema)}):
        return
    examples = data.examples(val or train, device)

    def draw_and_evaluate():
        with vit.ema_weights(model, run.ema):
            images = data.normalise(examples["images"])                     # [B,C,H,W]
            probabilities = vit.probabilities(logits_of, images, args, device)    # [B,K]
            data.draw_predictions(args, examples, probabilities, names)
            metrics = evaluate(logits_of, val, args, device, names) if val else {}
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
            images, scales, dropped = data.normalise(images), None, ()      # [B,C,H,W]
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
            for name in counts:
                counts[name] += batch["short"].sum()
        run.update(counts)
        if run.state.get("short_clips"):
            data.say_once(f"NOTE: some clips of --data have fewer than {train.views.span} frames: "
                          "the last one is repeated (log.jsonl has their number)")


def classify(argv):
    args, config, file_info = parse_classify_flags(argv)
    towers = [(config.depth, config.width, 1 + config.num_patches)]
    flops = (vit.forward_flops if args.freeze else vit.training_flops)(towers)
    if args.plan:
        outputs = len(file_info.get("classes", range(1000)))
        if args.freeze:     # nothing is kept for a backward pass: one block's activations at a time
            towers = [(1, config.width, 1 + config.num_patches)]
        return vit.plan(args, lambda: make_classifier(args, config, outputs), towers, flops)
    device = vit.start(args, towers)

    # ---- data and classes
    train, val, names = open_classes(args, config, file_info)

    # ---- model: a checkpoint in --out, else --init, else random weights
    model, wrapped = vit.build(lambda: make_classifier(args, config, len(names)), args, device)
    if args.init:
        load_classifier(model, args, names, file_info)
    if args.predict:
        pictures = data.read_pictures(args, config, evaluation_crop(args, config))
        images = data.normalise(pictures.pixels)                            # [B,C,H,W]
        probabilities = vit.probabilities(model, images, args, device)      # [B,K]
        return data.print_predictions(pictures, probabilities, names)
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, names))
    model_info = {"config": {**asdict(config), "pool": args.pool, "crop": args.crop,
                             "loss": args.loss}, "stage": "classify", "classes": names}
    train_classifier(args, model, wrapped, model, device, train, val, model_info, flops)


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
    rows = zip(batch["position"].tolist(), classes.tolist(), top.tolist(), losses.tolist(), kept)
    return [Answer(position, [k for k in correct if k >= 0], best, loss, some)
            for weight, (position, correct, best, loss, some) in zip(batch["weight"].tolist(), rows)
            if weight]


def summarise(mine, total, args, names):
    """The metrics of all ranks' Answers; `total` images were tried. Writes OUT/classes.txt."""
    parts = vit.gather_objects(mine)

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
    return data.class_names_of(set().union(*vit.all_gather_objects(mine)))


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
    if not args.classes and "classes" in file_info:
        return [[name] for name in file_info["classes"]]
    if not args.classes:        # Hugging Face's config.json beside the file may name its outputs
        labels = vit.read_json(Path(args.init).with_name("config.json")).get("id2label", {})
        labels = [labels.get(str(i)) for i in range(K)]
        if not all(labels) or labels[0] == "LABEL_0":
            labels = map(str, range(K))
        return [[label, *re.split(" *, *", label)] for label in labels]
    classes = read_classes(args.classes)
    if len(classes) != K:
        raise UserError(f"--classes {args.classes} has {len(classes)} lines, but {args.init} has "
                        f"{K} outputs")
    return classes


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
        crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
        augment = functools.partial(rand_augment, magnitude=args.randaugment)
        train = data.training_samples(source, args, config, crop, rows, targets_of,
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
            os.path.getsize(args.init), vit.file_crc(args.init), config, args.pool, args.crop,
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
            rows = encoder(images).float().cpu().numpy()                    # [B,D]
        seen = batch["weight"].numpy() > 0
        mine = rows[seen], batch["label"].numpy()[seen], batch["position"].numpy()[seen]
        for part in vit.gather_objects(mine) or ():
            end = n + len(part[0])
            table[n:end], labels[n:end], index[n:end] = part
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
        Path(args.out).mkdir(parents=True, exist_ok=True)
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
    features = (features - mean) * scale                                    # [n,D]
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

    def write():
        Path(args.out).mkdir(parents=True, exist_ok=True)
        vit.write_aside(Path(args.out) / "model.pt", lambda aside: torch.save(content, aside))
    vit.on_rank_0(write)
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
    order = np.argsort(data.uniform(split, np.arange(len(labels)), "few", 1)[:, 0], kind="stable")
    rank = np.zeros(len(labels), np.int64)      # of each image among those of its class
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    return np.flatnonzero((labels >= 0) & (rank < shots))


def tune_prompts(encoder, train, val, K, args, seed, device):
    """Train prompts and a head on a few images: the share of val's that they are right about.

    SGD with momentum 0.9, cosine, a tenth of the steps as warmup (VPT's); one process."""
    model = Prompted(encoder, K, args.prompts, seed).to(device)
    optimizer = torch.optim.SGD([model.prompts, *model.head.parameters()], lr=0, momentum=0.9)
    batch = min(BATCH, len(train))
    steps = max(1, args.epochs * len(train) // batch)
    positions = data.training_positions(0, steps, batch, batch, 0, 1)
    for step, part in enumerate(data.load(train, positions, 0, device)):
        optimizer.param_groups[0]["lr"] = vit.learning_rate(step, steps, args.lr, 0.1 * steps)
        images = part["images"].to(device)                                  # [B,H,W,C]
        images = data.flip(images, data.uniform(seed, part["position"].to(device), "flip", 1))
        with vit.autocast(args, device):
            logits = model(data.normalise(images))                          # [B,K]
        F.cross_entropy(logits.float(), part["targets"][:, 0].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(2, dtype=torch.float64)
    positions = data.validation_positions(len(val), args.micro_batch, 0, 1)
    for part in data.load(val, positions, args.workers, device):
        with torch.no_grad(), vit.autocast(args, device):
            found = model(data.normalise(part["images"].to(device))).argmax(1).cpu()    # [B]
        right = (found == part["targets"][:, 0]) * part["weight"]
        sums += torch.stack([right.sum(), part["weight"].sum()]).double()
    return float(sums[0] / sums[1])


def lowshot(argv):
    """The task `lowshot`: top-1 after 1, 5, 10 images of each class, mean and deviation over
    splits, of prompts (VPT) and of a linear classifier. The splits are shared out among ranks."""
    args, config, device, load = start_frozen("lowshot", argv)
    train, val, classes = open_tables(args, config, device, load)
    encoder = load("cls")
    tests = data.evaluation_samples(val["source"], config, evaluation_crop(args, config),
                                    val["index"], val["targets_of"])
    counts = np.bincount(train["labels"], minlength=len(classes))
    for shots in args.shots:
        if (few := int((counts < shots).sum())):
            rank0_print(f"{few} of {len(classes)} classes have fewer than {shots} images: all are "
                        "used")
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
            x = vit.run_block(block, x, mask, self.recompute)               # [B,N,D]
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
    vision = {name: tensor for name, tensor in tensors.items() if "text_encoder." not in name}
    vision = vit.our_names(vision)
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
    texts, owners = [], []
    for number, names in enumerate(classes):
        for name in names:
            texts += [template.replace("{}", name) for template in templates]
            owners += [number] * len(templates)
    vectors = embed_all(model, texts, encode, args, device)                 # [n,E]
    sums = torch.zeros(len(classes), vectors.shape[1])                      # [K,E]
    sums.index_add_(0, torch.tensor(owners), vectors)
    return vit.whole(model.logit_scale.detach().exp()) * F.normalize(sums, dim=1).to(device)


@torch.no_grad()
def evaluate_towers(model, val, args, device, names, weights, encode):
    """The metrics of a source, every image once: zero-shot top-1 and top-5 and OUT/classes.txt
    where there are classes, with their `names` and class_weights [K,E], else None; retrieval where
    there are captions."""
    rows, vectors, captions = [], [], []
    for images, batch in data.validate(val, args, device):
        with vit.autocast(args, device):
            x = model.embed_images(images)                                  # [B,E]
            if weights is not None:
                rows += answers(x @ weights.T, batch, args)
        seen = batch["weight"] > 0
        vectors.append(x.cpu()[seen])
        captions += [val.sample(i).get("caption", "") for i in batch["position"][seen].tolist()]
    count = int(vit.all_reduce_sum(torch.tensor(len(captions))))
    metrics = {"count": count, "bad": len(val) - count}
    if weights is not None:
        metrics = summarise(rows, len(val), args, names)
    known = [i for i, caption in enumerate(captions) if caption]
    parts = vit.all_gather_objects(
        ([captions[i] for i in known], torch.cat(vectors)[known].numpy()))
    captions = [caption for some, _ in parts for caption in some]
    if captions:
        images = torch.from_numpy(np.concatenate([part for _, part in parts])).to(device)   # [n,E]
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
        better = (similar > right).sum(1)                                   # [c]
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
    add("--smallest-crop", type=vit.number(1e-9, 1), metavar="SHARE",
        help="smallest area of a random crop, as a share of the image's; default by model")
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

    # ---- model: a checkpoint in --out, else --init and --text-init, else random weights
    val, classes, templates = open_classes_and_val(args, config)
    names = [some[0] for some in classes]
    model, wrapped = vit.build(make, args, device, ("trunk", "embed_images", "embed_texts"))
    load_towers(model, args, file_info)

    def probabilities(pixels, weights):
        """The probabilities [B,K] of the classes for pictures [B,H,W,C]."""
        logits_of = lambda images: model.embed_images(images) @ weights.T   # [B,K]
        return vit.probabilities(logits_of, data.normalise(pixels), args, device)

    def weights_now():
        return class_weights(model, classes, templates, encode, args, device) if classes else None

    if args.predict:
        pictures = data.read_pictures(args, config)
        return data.print_predictions(pictures, probabilities(pictures.pixels, weights_now()),
                                      names)
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
            data.draw_predictions(args, examples, probabilities(examples["images"], weights), names)
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
        """`scales` as of vit.run_blocks; `dropped` [B,D] multiply what the head gets (dropout)."""
        x = self.patch_embed(cut_tubelets(clips, self.config.patch))        # [B,T/2*N,D]
        times = self.pos_embed_temporal[:, :, None]                         # [1,T/2,1,D]
        x = x + (times + self.pos_embed[:, None, 1:]).flatten(1, 2)
        x = vit.run_blocks(self.blocks, x, self.recompute, scales)
        x = self.fc_norm(x.mean(1))                                         # [B,D]
        return self.head(x if dropped is None else x * dropped)             # [B,K]


def mean_of_views(model, clips, micro_batch):
    """The logarithm of the probabilities of clips [B,V,T,C,H,W], averaged over V views: [B,K]."""
    parts = clips.flatten(0, 1).split(micro_batch)
    probabilities = torch.cat([model(part) for part in parts]).float().softmax(1)   # [B*V,K]
    return probabilities.unflatten(0, clips.shape[:2]).mean(1).clamp(min=1e-30).log()


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
        "the clip; default by recipe")
    add("--relative-positions", action=yes_or_no, help="attention also depends on the difference "
        "in time, row and column (paper: +0.6 on Kinetics-400); default that of --init, else off")
    add("--flip", action=yes_or_no, help="mirror half of the clips; default by recipe")
    add("--views", type=read_views, metavar="TxS", help="views of an evaluation: T parts of the "
        "clip times S crops; default by recipe")
    add("--dropout", type=vit.number(0, 0.999), metavar="SHARE", help="share of the head's inputs "
        "that are set to 0; 0 off; default by recipe")
    add_training_flags(add)


def parse_video_flags(argv):
    """All flags, with the recipe filled in: (args, Config, file_info of --init, data.Views)."""
    parser = vit.stage_parser("finetune.py video", __doc__, {
        **{f"recipe {name}:": recipe for name, recipe in VIDEO_RECIPES.items()},
        **{f"k400 and ssv2, {name}:": recipe for name, recipe in SLOWFAST_BY_MODEL.items()}})
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
    if args.val is None and all(map(data.is_world, args.data)):
        args.val = ["world-clips-val"]
    data.choose_val(args)
    views = data.Views(args.frames, args.stride, args.segments, *map(int, args.views.split("x")))
    return args, config, file_info, views


def predict_clips(args, config, views, logits_of, names, device):
    """Print what --predict's folders of frames and animated files most probably are."""
    clips = data.read_pictures(args, config, views=views)                   # [B,V,T,H,W,C]
    rows = [vit.probabilities(logits_of, data.normalise(clip[None]), args, device)
            for clip in clips.pixels]                                       # [1,K] each
    data.print_predictions(clips, torch.cat(rows), names)


def video(argv):
    args, config, file_info, views = parse_video_flags(argv)
    make = lambda classes: Video(config, args.frames, classes, args.relative_positions)
    towers = [(config.depth, config.width, args.frames // TUBELET * config.num_patches)]
    flops = vit.training_flops(towers)
    if args.plan:
        return vit.plan(args, lambda: make(len(file_info.get("classes", range(400)))), towers)
    device = vit.start(args, towers)

    # ---- data and classes
    train, val, names = open_classes(args, config, file_info, views)

    # ---- model: a checkpoint in --out, else --init, else random weights
    model, wrapped = vit.build(lambda: make(len(names)), args, device)
    if args.init:
        load_classifier(model, args, names, file_info, NEW_IN_VIDEO)
    logits_of = functools.partial(mean_of_views, model, micro_batch=args.micro_batch)
    if args.predict:
        return predict_clips(args, config, views, logits_of, names, device)
    if args.eval_only:
        return vit.report(args, evaluate(logits_of, val, args, device, names))
    model_info = {"config": {**asdict(config), "pool": args.pool, "loss": args.loss,
                             **{flag: getattr(args, flag) for flag in CLIP_FLAGS}},
                  "stage": "video", "classes": names}
    train_classifier(args, model, wrapped, logits_of, device, train, val, model_info, flops)


# ======================================================================================
# Main
# ======================================================================================

TASKS = {"classify": classify, "features": features, "knn": knn, "linear": linear,
         "lowshot": lowshot, "zeroshot": zeroshot, "video": video}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return rank0_print(__doc__)
    if argv[0] not in TASKS:
        raise UserError(f"the first word is the task, one of: {' '.join(TASKS)}; found {argv[0]!r}")
    TASKS[argv[0]](argv[1:])


if __name__ == "__main__":
    vit.run(main)
