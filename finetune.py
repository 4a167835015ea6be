"""Stage 3: what a pretrained encoder is good for.

Each task is a command of its own, `finetune.py TASK`, with flags of its own (`finetune.py TASK
--help`), and a section of this file that can be read alone. The first is what everybody does:

classify: full finetuning on labelled pictures ("The effectiveness of MAE pre-pretraining for
billion-scale pretraining", arXiv 2303.13496, section 4; the recipe at 224 pixels is that of "Masked
Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, table 9, "MAE" below).

    torchrun finetune.py classify --init runs/wsp/model.pt        # built-in world: minutes on a CPU
    torchrun finetune.py classify --init runs/mae/model.pt --data photos/train --val photos/val
    torchrun --nproc-per-node gpu finetune.py classify --init mae_pretrain_vit_base.pth \\
        --data imagenet/train --val imagenet/val                  # 83.6 (MAE), 83.5 (IG-3B; paper)
    torchrun --nproc-per-node gpu finetune.py classify --init maws.pt --recipe maws --data …
    python finetune.py classify --init maws_ft_in1k.pt --eval-only --val imagenet/val --crop squash
    python finetune.py classify --init runs/classify/model.pt --predict cat.jpg dog.jpg

Expected of the first: 46% of the world's pictures named right, 43% where one starts from nothing.

features, knn, linear and lowshot leave the encoder as it is: they compute its features of images
once, and judge them by the nearest neighbours, a linear classifier, or a few images a class.

    torchrun finetune.py linear --init runs/wsp/model.pt --data photos/train --val photos/val

zeroshot trains a text tower that speaks to an encoder, or uses a released one: classes are words.

    python finetune.py zeroshot --init maws_clip.pt --tokenizer sentencepiece.bpe.model --predict \\
        cat.jpg --texts "une photo de chat" "a photo of a dog"
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import data
import vit
from vit import UserError, ViT, rank0_print

# ======================================================================================
# classify: recipes and flags
# ======================================================================================

RECIPES = {
    # MAE's table 9; image size: the encoder's own, 224
    "mae": dict(
        optimizer="adamw", batch=1024, weight_decay=0.05, clip_grad=0.0, final_lr=1e-6,
        pool="mean", crop="centre", smallest_crop=0.08, randaugment=9.0, erasing=0.25, mixup=0.8,
        cutmix=1.0, smoothing=0.1, ema=0.0),
    # Not published; SWAG's (its issues 8 and 9), warmup and smallest crop ours; squashed: paper
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
BY_MODEL = vit.table("epochs base_lr layer_decay drop_path warmup", {    # of "mae"
    "base":  (100, 5e-4, 0.65, 0.1, 0.05),      # warmup: 5 epochs (MAE)
    "large": (50,  1e-3, 0.75, 0.2, 0.1),
    "huge … 6.5b": (50, 1e-3, 0.75, 0.3, 0.1),  # 2b, 6.5b: not published
})
BETAS = 0.9, 0.999                              # MAE
HEAD_STD = {"mae": 2e-5, "maws": 0.0, "ours": 2e-5}     # MAE; SWAG; ours
NO_DECAY = "pos_embed", "cls_token"               # from weight decay (MAE)


def parse_classify_flags(argv):
    """All flags, with the recipe filled in: (args, Config, what --init's file says of itself)."""
    parser = vit.stage_parser("finetune.py classify", __doc__, {
        **{f"recipe {name}:": recipe for name, recipe in RECIPES.items()},
        **{f"recipe mae, {name}:": row for name, row in BY_MODEL.items()}})
    parser.set_defaults(data=["world-labelled"])
    add = parser.add_argument_group("classification").add_argument
    add("--recipe", choices=RECIPES, help="mae: at 224 pixels (MAE); maws: at 512 or 518 (paper; "
        "not published in full); ours: for a classroom; default ours up to small, else mae")
    add("--classes", metavar="FILE", help="what --init's outputs stand for: a line each, names "
        "separated by commas; default: what the file says, or the classes of the data")
    add("--class-map", metavar="FILE", help="lines of: model's class, TAB, class of --val, where "
        "they differ; several model classes may be right for one; default: by name")
    add("--loss", choices=("ce", "bce", "softmax"), default="ce", help="ce (default): one class an "
        "image; softmax: 1/k on each of k; bce: a yes or no for every class")
    add("--pool", choices=("cls", "mean"), help="what the head reads: the class token or the mean "
        "of the patches; default by recipe, or what a finetuned --init has")
    add("--freeze", action="store_true", help="train the head alone (and the norm of --pool mean) "
        "on the encoder of --init as it is; default off")
    add("--crop", choices=("centre", "squash"), help="of an evaluation: the central 7/8, all of it "
        "above 224 pixels (MAE), or the whole image squashed (released MAWS); default by recipe")
    add("--optimizer", choices=("adamw", "sgd"), help="sgd: nesterov, 0.9; default by recipe")
    for flag, metavar, text in (
            ("final-lr", "RATE", "where the learning rate ends, before --layer-decay"),
            ("layer-decay", "FACTOR", "of the learning rate, from a layer to the one below; 1 off"),
            ("drop-path", "SHARE", "of images that skip a branch of the last block; 0 off"),
            ("smallest-crop", "SHARE", "of the image's area that a random crop has"),
            ("randaugment", "LEVEL", "of RandAugment's two operations, up to 10; 0 off"),
            ("erasing", "SHARE", "of images in which a rectangle is erased; 0 off"),
            ("mixup", "ALPHA", "mix pairs of images by Beta(ALPHA, ALPHA), up to 1; 0 off"),
            ("cutmix", "ALPHA", "paste a part of the partner instead, half of the time; 0 off"),
            ("smoothing", "SHARE", "of the target that all classes share; 0 off"),
            ("ema", "DECAY", "keep, evaluate and save a running average of the weights; 0 off")):
        add(f"--{flag}", type=float, metavar=metavar, help=f"{text}; default by recipe")
    args = parser.parse_args(argv)
    config, name, told = vit.choose_config(args, "classify")
    args.recipe = args.recipe or ("mae" if name in BY_MODEL else "ours")
    if args.recipe == "maws" and not args.image_size and not (args.predict or args.eval_only):
        config.image = (config.patch * (512 // config.patch + (config.patch == 14)),) * 2
    recipe = {**RECIPES[args.recipe], **(BY_MODEL.get(name, BY_MODEL["base"])
                                         if args.recipe == "mae" else {})}
    if args.predict or args.eval_only or "fc_norm.weight" in told.get("shapes", {}):
        recipe["pool"] = told.get("config", {}).get(
            "pool", "mean" if "fc_norm.weight" in told["shapes"] else "cls")
    vit.fill_recipe(args, {**recipe, "crop": told.get("config", {}).get("crop", recipe["crop"])})
    if args.freeze and not args.init:
        raise UserError("--freeze trains a head on an encoder as it is: give its file as --init")
    if args.randaugment and config.channels == 4:
        raise UserError("--randaugment knows no alpha channel; give --randaugment 0")
    data.choose_val(args)
    return args, config, told


# ======================================================================================
# classify: targets, mixing, loss
# ======================================================================================

def targets(classes, K, smoothing, loss):
    """What the logits should say, [B,K], of images whose classes are [B,k], -1 for none.

    1 for each class with bce, else 1/k; less `smoothing`, which is spread over all K."""
    known = classes >= 0                                                    # [B,k]
    hot = torch.zeros(len(classes), K + 1, device=classes.device)
    hot = hot.scatter(1, torch.where(known, classes, K), 1.0)[:, :K]        # [B,K]
    if loss != "bce":
        hot = hot / known.sum(1, keepdim=True).clamp(min=1)
    return (1 - smoothing) * hot + smoothing / K                            # [B,K]


def beta(numbers, alpha):
    """Numbers distributed as Beta(alpha, alpha), alpha in (0, 1], from uniforms [B,2,n]: [B].

    Jöhnk's method: of points (u^(1/alpha), v^(1/alpha)) the first below the diagonal x + y = 1;
    half of them or more are, so that sixteen tries hardly ever fail."""
    x, y = (numbers.double() + 2.0 ** -25).pow(1 / alpha).unbind(1)         # 2 x [B,n]
    first = (x + y <= 1).int().argmax(1, keepdim=True)                      # [B,1]
    x, y = (value.gather(1, first)[:, 0] for value in (x, y))               # 2 x [B]
    return (x / (x + y)).float()


def mix(images, wanted, numbers, mixup, cutmix):
    """Mix the pairs 2i and 2i+1 of images [B,C,H,W] and of their targets [B,K].

    mixup (arXiv 1710.09412) takes λ of an image and 1 - λ of its partner, cutmix (1905.04899)
    pastes a rectangle of 1 - λ of the partner's area, around a uniform point and cut at the edges;
    λ ~ Beta(alpha, alpha), one a pair. With both on, each is done half of the time (MAE).
    `numbers` [B/2, 35] are uniforms; 0 for an alpha is off."""
    H, W = images.shape[2:]
    cut = numbers[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))  # [B/2]
    draws = numbers[:, 3:].reshape(len(numbers), 2, -1)                     # [B/2,2,n]
    share = torch.where(cut, beta(draws, cutmix or 1.0), beta(draws, mixup or 1.0))     # λ [B/2]
    inside, area = True, 1.0
    for side, at, shape in ((H, 1, (-1, 1, H, 1)), (W, 2, (-1, 1, 1, W))):
        half = (side * (1 - share).sqrt()).int()[:, None] // 2              # [B/2,1]
        middle = (side * numbers[:, at:at + 1]).int()
        along = torch.arange(side, device=images.device)
        part = (along >= middle - half) & (along < middle + half)           # [B/2,side]
        inside, area = inside & part.reshape(shape), area * part.float().mean(1)
    own = torch.where(cut[:, None, None, None], (~inside).float(), share[:, None, None, None])
    share = torch.where(cut, 1 - area, share)                               # [B/2]
    own, share = own.repeat_interleave(2, 0), share.repeat_interleave(2)[:, None]
    partner = lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return (own * images + (1 - own) * partner(images),                     # [B,C,H,W]
            share * wanted + (1 - share) * partner(wanted))                 # [B,K]


def losses(logits, wanted, loss):
    """The loss of each image [B] from logits and targets [B,K]: cross-entropy, or with bce the mean
    over all classes of the binary one."""
    logits = logits.float()
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    return -(wanted * logits.log_softmax(1)).sum(1)


# ======================================================================================
# classify: evaluation
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device, rank, world, names):
    """Top-1 and top-5 over a source, every image once, whatever the ranks; also in OUT/classes.txt.

    An image with several right classes (as in "Are we done with ImageNet?", arXiv 2006.07159) is
    right where any of them is predicted. With --loss bce or softmax also "map", the mean over
    classes of the average precision (rank 0 then holds the logits of all images)."""
    rows = []
    for images, batch in data.validate(val, args, device, rank, world):
        with vit.autocast(args, device):
            logits = model(images)                                          # [B,K]
        rows += answers(logits, batch, args)
    parts = vit.gather_objects(rows)
    return vit.on_rank_0(lambda: summarise(sum(parts, []), len(val.source), args, names))


def answers(logits, batch, args):
    """(position, right classes, five most probable, loss, logits where several may be right) of
    each image that counts."""
    right, K = batch["tags"].to(logits.device), logits.shape[1]             # [B,k]
    loss = losses(logits, targets(right, K, 0.0, args.loss), args.loss)     # [B]
    top = logits.topk(min(5, K)).indices                                    # [B,5]
    scores = [None] * len(top) if args.loss == "ce" else logits.float().cpu().numpy()
    return [row[1:] for row in zip(batch["weight"].tolist(), batch["position"].tolist(),
                                   right.tolist(), top.tolist(), loss.tolist(), scores) if row[0]]


def summarise(rows, total, args, names):
    """The metrics of all images' (position, right classes, five most probable, loss, logits)."""
    rows.sort(key=lambda row: row[0])       # the same sums, whatever the ranks
    right = [[i for i in row[1] if i >= 0] for row in rows]
    first = [row[2][0] in some for row, some in zip(rows, right)]
    among = [bool({*row[2]} & {*some}) for row, some in zip(rows, right)]
    metrics = {"loss": sum(row[3] for row in rows) / len(rows), "top1": sum(first) / len(rows),
               "top5": sum(among) / len(rows)}
    if args.loss != "ce":
        scores = torch.stack([torch.from_numpy(row[4]) for row in rows])    # [n,K]
        hot = torch.zeros_like(scores, dtype=torch.bool)                    # [n,K]
        for row, some in zip(hot, right):
            row[some] = True
        precisions = [average_precision(scores[:, c], hot[:, c]) for c in range(len(names))
                      if hot[:, c].any()]
        metrics["map"] = sum(precisions) / len(precisions)
    images = Counter(i for some in right for i in some)
    found = Counter(i for some, hit in zip(right, first) if hit for i in some)
    wrong = Counter((some[0], row[2][0]) for some, row, hit in zip(right, rows, first) if not hit)
    recall = sorted((found[i] / images[i], names[i], images[i]) for i in images)
    path = Path(args.out) / "classes.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    vit.write_aside(path, lambda aside: aside.write_text("\n".join([
        "# class, images, top-1; from the worst on",
        *(f"{name}\t{count}\t{share:.3f}" for share, name, count in recall),
        "# most often mistaken: right class, predicted one, times",
        *(f"{names[a]}\t{names[b]}\t{times}" for (a, b), times in wrong.most_common(30))]) + "\n",
        encoding="utf-8", errors="surrogateescape"))
    return {**metrics, "count": len(rows), "bad": total - len(rows)}


def average_precision(scores, right):
    """The mean, over right images, of the share of right ones among those that score as high."""
    right = right[scores.argsort(descending=True, stable=True)].double()    # [n]
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return float((precision * right).sum() / right.sum())


# ======================================================================================
# classify: main
# ======================================================================================

def central_box(args, config):
    """How an evaluation crops: all of it above 224 pixels, else the central 7/8 (MAE); or all."""
    return data.whole if args.crop == "squash" else functools.partial(
        data.centre_crop, share=224 / 256 if max(config.image) <= 224 else 1.0)


def classify(argv):
    args, config, told = parse_classify_flags(argv)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),)

    def make_with(K):
        model = ViT(config, K, args.pool, HEAD_STD[args.recipe])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not args.freeze or name.startswith(("head.", "fc_norm.")))
        return model

    if args.plan:
        return vit.plan(args, lambda: make_with(len(told.get("classes", range(1000)))), example)
    device, rank, world = vit.start(args)

    # ---- data and classes
    train, val, names = data.open_classes(args, told)
    K = len(names)
    choose_box = central_box(args, config)
    val = val and data.unshuffled(val, args, config, choose_box)

    # ---- model: a checkpoint in --out, else --init, else random weights
    make = lambda: make_with(K)
    model, wrapped = vit.build(make, args, device)
    if args.init:
        using, outputs = args.predict or args.eval_only, told["shapes"].get("head.weight", [0])[0]
        same = using or told.get("classes") == names
        vit.load_weights(model, args.init, new=() if using else ("norm.*", "fc_norm.*"),
                         renew=() if same else ("head.*",))
        if outputs and not same:
            rank0_print(f"a new head for {K} classes: the file's is for {outputs} "
                        + ("hashtags" if "vocabulary" in told else "other classes"))
    if args.predict:
        return data.print_predictions(model, config, args, device, names, choose_box)
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, rank, world, names))
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    augment = functools.partial(data.rand_augment, magnitude=args.randaugment)
    train = data.Samples(train, config.image, config.channels, crop, args.seed,
                         max_pixels=args.max_pixels, augment=augment if args.randaugment else None)
    mixing = bool(args.mixup or args.cutmix)
    steps, micro, accumulate, peak = vit.derive(args, len(train.source), world, 1 + mixing)
    if not vit.open_run(args, "classify", {
            "what --data holds": train.source.source.fingerprint(),
            "what --val holds": val and val.source.source.fingerprint(),
            "classes": f"{K} (CRC {data.crc(repr(names)):08x})",
            "averaged weights": "on" if args.ema else "off"}, model):
        return
    examples = data.examples(val or data.unshuffled(train.source, args, config), device)

    # ---- optimizer and state
    groups = vit.decay_groups(model, args.weight_decay, NO_DECAY, args.layer_decay)
    optimizer = (torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
                 if args.optimizer == "adamw" else
                 torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if args.ema else {}
    state = {**vit.fresh_state(args, device), "best": -1.0}
    state = vit.restore(args, model, optimizer, state, ema)
    data.cut_bad_list(args, state)
    log = vit.Log(args, device, state["step"], steps, 3 * vit.forward_flops(make, example))
    positions = data.training_positions(state["step"], steps, args.batch, micro, rank, world)
    batches = data.load(train, positions, args.workers, device)
    about = {"config": {**asdict(config), "pool": args.pool, "crop": args.crop, "loss": args.loss},
             "stage": "classify", "classes": names}

    def draw_and_evaluate():
        with vit.averaged(model, ema):
            data.draw_predictions(model, examples, args, device, names)
            metrics = evaluate(model, val, args, device, rank, world, names) if val else {}
        if (score := metrics.get("map", metrics.get("top1", -1.0))) > state["best"]:
            state["best"] = score
            vit.export(args, model, {**about, "samples": state["step"] * args.batch}, ema,
                       "best.pt")
        return metrics

    # ---- loop
    while state["step"] < steps:
        if log.evaluation_due(state["step"]):
            log.evaluated(draw_and_evaluate())
        lr = vit.learning_rate(state["step"], steps, peak, args.warmup * steps, args.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss, bad = torch.zeros((), device=device), []
        for part in range(accumulate):
            batch = log.wait(batches)
            bad += batch["bad"]
            position = batch["position"].to(device, non_blocking=True)      # [B]
            right = batch["tags"].to(device, non_blocking=True)             # [B,k]
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images, keep = data.normalise(images), None                     # [B,C,H,W]
            if args.erasing:
                images = data.erase(images, position, args.seed, args.erasing)
            wanted = targets(right, K, args.smoothing, args.loss)           # [B,K]
            if mixing:
                numbers = data.uniform(args.seed, position[::2], "mix", 35)     # [B/2,35]
                images, wanted = mix(images, wanted, numbers, args.mixup, args.cutmix)
            if args.drop_path:
                numbers = data.uniform(args.seed, position, "drop path", 2 * config.depth)
                keep = vit.drop_path(numbers.reshape(len(images), -1, 2), args.drop_path)
            with vit.accumulating(wrapped, last=part == accumulate - 1):
                with vit.autocast(args, device):
                    logits = wrapped(images, keep)                          # [B,K]
                part_loss = losses(logits, wanted, args.loss).mean() / accumulate
                (part_loss * state["scale"]).backward()
            loss += part_loss.detach()
        norm = vit.clip_gradients(model, args.clip_grad, state["scale"])
        loss, norm, stop, due, found = vit.all_reduce_floats(
            (loss / world, norm / world), (vit.stop_requested(), log.save_due(), len(bad)))
        finite = math.isfinite(norm)
        if finite:
            optimizer.step()
            vit.average(ema, model, args.ema, state["step"])
        optimizer.zero_grad(set_to_none=True)
        vit.note_step(state, finite, args.batch)
        data.note_bad(found, bad, args, state)
        log.step(state["step"], {"loss": loss, "lr": lr, "grad_norm": norm,
                                 "bad_samples": state["bad_samples"]})

        done = state["step"] == steps
        # Before an evaluation too: what interrupts it costs no step.
        if stop or due or done or log.evaluation_due(state["step"]):
            vit.save(args, model, optimizer, state,
                     {**about, "samples": state["step"] * args.batch}, ema)
            log.saved()
        if stop and not done:
            return rank0_print(f"stopped after step {state['step']} of {steps}; the same command goes on")

    # ---- end
    metrics = draw_and_evaluate()
    log.evaluated(metrics)
    vit.report(args, {**metrics, "samples": steps * args.batch,
                      **({"best": state["best"]} if val else {})})
    vit.finish(args)


# ======================================================================================
# Frozen encoders: features, which the tasks knn, linear and lowshot share
# ======================================================================================

def parse_frozen_flags(task, argv, add_flags=lambda add: None):
    """The flags of a task on features of a frozen encoder: (args, Config, what --init's file says
    of itself). Raises UserError."""
    parser = vit.stage_parser(f"finetune.py {task}", __doc__)
    parser.set_defaults(data=["world-labelled"])
    add = parser.add_argument_group("features").add_argument
    add("--pool", choices=("cls", "mean"), default="cls", help="the class token (default) or the "
        "mean of the patches")
    add("--crop", choices=("centre", "squash"), default="centre", help="centre (default): the "
        "central 7/8, all of it above 224 pixels (MAE); squash: the whole image")
    add("--features", metavar="DIR", default="runs/features", help="where features are kept, to be "
        "used again by any task; default runs/features")
    add_flags(parser.add_argument_group(task).add_argument)
    args = parser.parse_args(argv)
    if not args.init:
        raise UserError(f"{task} needs an encoder: give its file as --init")
    if task != "features":
        data.choose_val(args)
        if not args.val:
            raise UserError(f"{task} needs --val: the images to be right about")
    config, _, told = vit.choose_config(args, task)
    return args, config, told


def load_encoder(args, config, told, device, pool):
    """The encoder of --init, without a head and without gradients."""
    if pool == "mean":      # of a finetuned file, as its head saw it, or of any other, normalised
        pool = "mean" if "fc_norm.weight" in told["shapes"] else "patches"
    model, _ = vit.build(lambda: ViT(config, 0, pool), args, device, frozen=True)
    vit.load_weights(model, args.init)
    return model


def file_mark(path):
    """Bytes that tell a file from others, and from what it was before a change: its size, its time
    of change and 16 pieces of 4 kB from all over it, which is all of a file of up to 64 kB. Of a
    larger one a change is missed if it keeps size and time, and lies between the pieces."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            starts = np.linspace(0, max(0, status.st_size - 4096), 16).astype(int).tolist()
            pieces = [os.pread(file.fileno(), 4096, start) for start in starts]
    except OSError as error:
        return str(error.strerror).encode()     # an image that cannot be read is not an error here
    return b"%d %d " % (status.st_size, status.st_mtime_ns) + b"".join(pieces)


def fingerprint(args, config, source, device):
    """Of which encoder, images and settings features are, in 16 hex digits: rank 0's answer.

    The encoder's file counts as a whole (seconds for gigabytes), of each image or shard what
    file_mark says: the same names, sizes and times do not make the same images. 32 threads read
    them, since over a network each file is a round trip."""
    def compute():
        digest = hashlib.sha256(repr((
            os.path.getsize(args.init), vit.crc(args.init), config, args.pool, args.crop,
            str(vit.autocast_dtype(args, device)), source.fingerprint())).encode())
        files = source.files()
        with ThreadPoolExecutor(32) as threads:
            while some := [*itertools.islice(files, 4096)]:
                for mark in threads.map(file_mark, some):
                    digest.update(mark)
        return digest.hexdigest()[:16]
    return vit.on_rank_0(compute)


@torch.no_grad()
def write_features(folder, encoder, samples, width, args, device):
    """Write what an encoder makes of samples into a folder: features.npy float32 [n,D], a row for
    each image that can be read, in order; labels.npy int64 [n] (-1: none); index.npy int64 [n], the
    numbers of these images in the source; about.json, for people.

    Rank 0 writes what all ranks compute; memory is bounded. Images that cannot be read are listed
    in OUT/bad_val_samples.txt; as many rows at the end of features.npy are not used."""
    rank, world_size = vit.get_rank(), vit.get_world_size()
    count, n = len(samples.source), 0
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
    for images, batch in data.validate(samples, args, device, rank, world_size):
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
        (aside / "about.json").write_text(json.dumps(vars(args), indent=1))
        table.flush()
        if folder.exists():     # another process was faster
            return shutil.rmtree(aside)
        aside.rename(folder)
    vit.on_rank_0(finish)


def open_features(place, load, source, args, config, choose_box, device):
    """What an encoder makes of a source's whole images, from where it is kept below `place`, or
    computed now by the encoder that load() returns: {"features" float32 [n,D], in a file, "labels"
    int64 [n], "index" int64 [n]}, as write_features says."""
    folder = Path(place) / fingerprint(args, config, source, device)
    if vit.on_rank_0(folder.exists):
        rank0_print(f"features of {len(source):,} images are kept in {folder}")
    else:
        samples = data.unshuffled(source, args, config, choose_box)
        write_features(folder, load(), samples, config.width, args, device)
    table = {name: np.load(folder / f"{name}.npy") for name in ("labels", "index")}
    rows = np.load(folder / "features.npy", mmap_mode="r")
    return {**table, "features": rows[:len(table["index"])]}


def features(argv):
    """The task `features`: OUT/features.npz, for other programs."""
    args, config, told = parse_frozen_flags("features", argv)
    device, *_ = vit.start(args)
    source = data.open_data(*args.data, index_dir=args.index_dir,
                            fallback=Path(args.out) / "index")
    load = lambda: load_encoder(args, config, told, device, args.pool)
    table = open_features(args.features, load, source, args, config, central_box(args, config),
                          device)
    count = len(table["index"])

    def write():
        names = [source.about(i)["where"].encode("utf-8", "replace") for i in table["index"]]
        Path(args.out).mkdir(parents=True, exist_ok=True)
        data.write_arrays(Path(args.out) / "features.npz", {
            **table, "names": np.array(names), "classes": np.array(source.classes, str)})
    vit.on_rank_0(write)
    vit.report(args, {"count": count, "bad": len(source) - count, "width": config.width,
                      "classes": len(source.classes)})


def open_tables(args, config, told, device):
    """The features of --data and --val, of images that have a class: two dicts as open_features
    returns, with their "source" and with "labels" that count the classes of --data, and the names
    of these classes. Those of --val are compared by name. Raises UserError."""
    sources = [data.open_data(*specs, index_dir=args.index_dir, fallback=Path(args.out) / "index")
               for specs in (args.data, args.val)]
    classes, theirs = (source.classes for source in sources)
    if len(classes) < 2:
        raise UserError(f"--data has {len(classes)} classes: there is nothing to tell apart; "
                        "images have the class of their folder, or a label")
    outputs = data.outputs_of([[name] for name in classes], theirs, "--val")
    load = functools.cache(lambda: load_encoder(args, config, told, device, args.pool))
    tables = [open_features(args.features, load, source, args, config, central_box(args, config),
                            device) for source in sources]
    numbers = np.array([outputs[name][0] for name in theirs] + [-1])
    tables[1]["labels"] = numbers[tables[1]["labels"]]
    for flag, table, source in zip(("--data", "--val"), tables, sources):
        known = table["labels"] >= 0
        if not known.all():
            rank0_print(f"{flag}: {(~known).sum():,} of {len(known):,} images have no class and "
                        "are left out")
            table.update({name: values[known] for name, values in table.items()})
        if not len(table["labels"]):
            raise UserError(f"no image of {flag} has a class: a folder each, or a label each")
        table["source"] = source
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
    args, config, told = parse_frozen_flags("knn", argv)
    device, rank, world_size = vit.start(args)
    train, val, classes = open_tables(args, config, told, device)
    labels, ks = torch.tensor(train["labels"], device=device), (1, 5, 10, 20)
    right = torch.zeros(len(ks), dtype=torch.int64)
    for at in range(1024 * rank, len(val["labels"]), 1024 * world_size):
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
    args, config, told = parse_frozen_flags("linear", argv)
    device, *_ = vit.start(args)
    train, val, classes = open_tables(args, config, told, device)
    K, count = len(classes), len(train["labels"])
    order = data.uniform(0, train["index"], "held back", 1)[:, 0].argsort(kind="stable")
    rest, held = np.split(order, [count - count // 10])
    if not len(held):
        raise UserError(f"linear holds back a tenth of --data, but it has {count} images")
    rest, held = (take_rows(train, rows, device) for rows in (rest, held))
    shares = [accuracy(fit_linear(*rest, K, penalty, vit.all_reduce_sum), *held)
              for penalty in PENALTIES]
    penalty = PENALTIES[shares.index(max(shares))]
    everything = [torch.cat(parts) for parts in zip(rest, held)]
    weight, bias = fit_linear(*everything, K, penalty, vit.all_reduce_sum)
    top1 = accuracy((weight, bias), *take_rows(val, np.arange(len(val["labels"])), device))

    encoder = load_encoder(args, config, told, device, args.pool)
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
    batch = min(args.batch, len(train.source))
    steps = max(1, args.epochs * len(train.source) // batch)
    positions = data.training_positions(0, steps, batch, batch, 0, 1)
    for step, part in enumerate(data.load(train, positions, 0, device)):
        optimizer.param_groups[0]["lr"] = vit.learning_rate(step, steps, args.lr, 0.1 * steps)
        images = part["images"].to(device)                                  # [B,H,W,C]
        images = data.flip(images, data.uniform(seed, part["position"].to(device), "flip", 1))
        with vit.autocast(args, device):
            logits = model(data.normalise(images))                          # [B,K]
        F.cross_entropy(logits.float(), part["tags"][:, 0].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(2, dtype=torch.float64)
    positions = data.validation_positions(len(val.source), args.micro_batch, 0, 1)
    for part in data.load(val, positions, args.workers, device):
        with torch.no_grad(), vit.autocast(args, device):
            found = model(data.normalise(part["images"].to(device))).argmax(1).cpu()    # [B]
        right = (found == part["tags"][:, 0]) * part["weight"]
        sums += torch.stack([right.sum(), part["weight"].sum()]).double()
    return float(sums[0] / sums[1])


def add_lowshot_flags(add):
    add("--shots", type=vit.positive, nargs="+", default=[1, 5, 10], metavar="IMAGES",
        help="of each class; default 1 5 10 (paper)")
    add("--splits", type=vit.positive, default=5, help="random choices of these; default 5 "
        "(paper)")
    add("--prompts", type=vit.positive, default=10, help="in each block; default 10 (not "
        "published: ours)")
    add("--epochs", type=vit.positive, default=100, help="of prompts; default 100 (VPT's)")
    add("--batch", type=vit.positive, default=64, help="of prompts, of one rank; default 64 "
        "(VPT's)")
    add("--lr", type=float, default=0.05, help="of prompts; default 0.05 (not published: ours)")
    add("--smallest-crop", type=float, default=0.5, metavar="SHARE", help="of the image's area "
        "that a random crop has; default 0.5 (ours)")


def lowshot(argv):
    """The task `lowshot`: top-1 after 1, 5, 10 images of each class, mean and deviation over
    splits, of prompts (VPT) and of a linear classifier. The splits are shared out among ranks."""
    args, config, told = parse_frozen_flags("lowshot", argv, add_lowshot_flags)
    if args.parallel in ("fsdp", "hsdp"):
        raise UserError("lowshot gives each rank splits of its own, which need the whole encoder: "
                        "leave --parallel out")
    args.parallel = "ddp"
    device, rank, world_size = vit.start(args)
    train, val, classes = open_tables(args, config, told, device)
    encoder = load_encoder(args, config, told, device, "cls")
    tests = data.unshuffled(data.Chosen(val["source"], val["index"], val["labels"]), args, config,
                            central_box(args, config))
    counts = np.bincount(train["labels"], minlength=len(classes))
    for shots in args.shots:
        if (few := int((counts < shots).sum())):
            rank0_print(f"{few} of {len(classes)} classes have fewer than {shots} images: all are "
                        "used")
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    queries = torch.tensor(val["features"], device=device)                  # [m,D]
    truth, results = torch.tensor(val["labels"], device=device), []         # [m]
    jobs = [(shots, split) for shots in args.shots for split in range(args.splits)]
    for shots, split in jobs[rank::world_size]:
        rows = few_of_each(train["labels"], shots, split)
        head = fit_linear(torch.tensor(train["features"][rows], device=device),
                          torch.tensor(train["labels"][rows], device=device), len(classes), 1e-3)
        by_linear = (F.linear(queries, *head).argmax(1) == truth).float().mean().item()
        samples = data.Samples(
            data.Chosen(train["source"], train["index"][rows], train["labels"][rows]),
            config.image, config.channels, crop, split, max_pixels=args.max_pixels)
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

START, PAD, END, UNKNOWN = range(4)     # <s> <pad> </s> <unk> (XLM-R)


def protobuf(message):
    """The fields of a protobuf message: yields (number, value), an int or bytes.

    Raises ValueError or IndexError where it is none, or not a whole one."""
    at = 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            value |= (message[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if message[at - 1] < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, len(message))
        yield number, message[at:at + size]
        at += size
        if at > len(message):
            raise ValueError(f"field {number} is cut short")


def read_charsmap(blob):
    """The normaliser's map in a SentencePiece file: {text: what replaces it}.

    4 bytes with the size of a double array (as the Darts-clone library lays it out), its units of 4
    bytes, then strings that end with a zero. Of a unit, bits 0 to 7 are the byte that leads to it,
    bit 8 says that a key ends here, and the upper ones are an offset: the unit's place xor that is
    the place of the key's value; this xor a byte, that of a child."""
    size = int.from_bytes(blob[:4], "little")
    units, strings = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64), blob[4 + size:]
    offsets, labels = (units >> 10 << ((units & 512) >> 6)).tolist(), (units & 255).tolist()
    below, found = {}, {}
    for place in np.flatnonzero(units >> 31 == 0).tolist():     # the others are values
        below.setdefault(place ^ labels[place], []).append(place)
    todo = [(b"", offsets[0])]
    while todo:
        key, base = todo.pop()
        for place in below.get(base, ()):
            if not labels[place]:
                continue
            longer, beyond = key + bytes([labels[place]]), place ^ offsets[place]
            if units[place] & 256:
                begin = int(units[beyond]) & 0x7fffffff
                found[longer.decode()] = strings[begin:strings.index(b"\0", begin)].decode()
            if len(longer) > 1000:
                raise ValueError("its map of characters runs in circles")
            todo.append((longer, beyond))
    return found


class SentencePiece:
    """A SentencePiece unigram model (arXiv 1804.10959, 1808.06226), read from its .model file, or
    from the bytes of one that `path` names.

    encode("text") gives ids as XLM-R numbers them, a piece's number + 1 and 3 for what is unknown,
    without <s> and </s>; `size` is how many ids there are, XLM-R's <mask> the last. Raises
    UserError for a file that is none, not a whole one or of another kind."""

    def __init__(self, path, content=None):
        try:
            self.read(Path(path).read_bytes() if content is None else content)
        except (OSError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{path} is no whole SentencePiece model ({error}); give a file like "
                            "XLM-R's sentencepiece.bpe.model") from error

    def read(self, content):
        messages = {1: [], 2: [], 3: []}    # pieces, the trainer's settings, the normaliser's
        for number, value in protobuf(content):
            messages.setdefault(number, []).append(value)
        if not all(messages[number] for number in (1, 2, 3)):
            raise ValueError("it lacks pieces or settings")
        trained, normaliser = (dict(protobuf(messages[number][-1])) for number in (2, 3))
        if trained.get(3, 1) != 1:
            raise ValueError("it is of another kind than unigram")
        pieces = [{2: bytes(4), 3: 1, **dict(protobuf(message))} for message in messages[1]]
        pieces = [(piece[1].decode(), *struct.unpack("<f", piece[2]),
                   (None, "normal", "unknown", "control", "own", "unused", "byte")[piece[3]])
                  for piece in pieces]
        kinds = [kind for _, _, kind in pieces]
        if kinds.count("unknown") != 1 or {"normal", "own"} & {*kinds[:3]}:
            raise ValueError("its first three pieces are not XLM-R's <unk>, <s> and </s>")
        scores = [score for _, score, kind in pieces if kind == "normal"]
        top = max([2.0 ** -126, *scores])   # the smallest float: log-probabilities are not above 0
        self.unknown_score = float(np.float32(min(scores, default=0.0)) - np.float32(10))
        # Every prefix of a piece, so that a search ends early: None for what is no piece itself.
        self.table, self.bytes, own = {}, {}, []
        for number, (text, score, kind) in enumerate(pieces, 1):
            if kind == "own":               # user-defined: always taken
                own.append(text)
                score = len(text.encode()) * top - 0.1
            if kind == "byte" and trained.get(35):      # <0x41>, instead of the unknown
                self.bytes[int(text[1:-1], 16)] = number
            if kind in ("normal", "own"):
                for end in range(1, len(text)):
                    self.table.setdefault(text[:end])
                self.table[text] = number, score
        self.size = len(pieces) + 2
        own.sort(key=len, reverse=True)
        self.own = re.compile("(" + "|".join(map(re.escape, own)) + ")") if own else None
        self.map = read_charsmap(normaliser[2]) if normaliser.get(2) else {}
        self.one = {ord(key): value for key, value in self.map.items() if len(key) == 1}
        self.later = {character for key in self.map for character in key[1:]}
        self.longest = max(map(len, self.map), default=0)
        self.prefix, self.squeeze, self.escape = (normaliser.get(field, 1) for field in (3, 4, 5))
        self.suffix = trained.get(24, 0)    # spaces belong to the word before

    def replaced(self, text):
        """A text by the normaliser's map: of what begins at a place, one's own piece stays, else
        the longest key is replaced."""
        if self.later.isdisjoint(text):     # the usual case: no key of several characters
            parts = self.own.split(text) if self.own else [text]    # every second is one's own
            return "".join(part if i % 2 else part.translate(self.one)
                           for i, part in enumerate(parts))
        parts, at = [], 0
        while at < len(text):
            match, end = self.own and self.own.match(text, at), at + 1
            if match:
                end, part = match.end(), match[0]
            else:
                end = next((end for end in range(at + self.longest, at, -1)
                            if text[at:end] in self.map), at + 1)
                part = self.map.get(text[at:end], text[at:end])
            parts.append(part)
            at = end
        return "".join(parts)

    def normalise(self, text):
        """A text as pieces are looked for in it: spaces single, one before it, written as ▁."""
        text = text.encode("utf-8", "replace").decode()     # half of a surrogate pair is no text
        if not text or self.squeeze and not text.strip(" "):
            return ""
        text, space = self.replaced(text), "▁" if self.escape else " "
        if self.squeeze:
            text = re.sub(" +", " ", text).lstrip(" ")
        text = (" " * (self.prefix and not self.suffix) + text).replace(" ", space)
        if self.squeeze:
            text = text.rstrip(space)
        return text + space * bool(text and self.prefix and self.suffix)

    def encode(self, text):
        """The ids of the most probable pieces (Viterbi), those of unknown characters in a row as
        one: linear in the length of the text."""
        text = self.normalise(text)
        # Sums of 32 bits, as the library has them: long texts have many that are nearly equal.
        best, sum32 = array("f", bytes(4 * len(text) + 4)), array("f", [0])
        ids, starts, missing = [0] * (len(text) + 1), [-1] * (len(text) + 1), object()
        table = self.table
        for start in range(len(text)):
            before, alone = best[start], True
            for end in range(start + 1, len(text) + 1):
                entry = table.get(text[start:end], missing)
                if entry is missing:
                    break
                if entry:
                    alone = alone and end > start + 1
                    sum32[0] = before + entry[1]
                    if starts[end] < 0 or sum32[0] > best[end]:
                        best[end], starts[end], ids[end] = sum32[0], start, entry[0]
            if alone:                       # no piece is this one character
                sum32[0], end = before + self.unknown_score, start + 1
                if starts[end] < 0 or sum32[0] > best[end]:
                    best[end], starts[end], ids[end] = sum32[0], start, UNKNOWN
        found, end = [], len(text)
        while end:
            start = starts[end]
            if ids[end] != UNKNOWN:
                found.append(ids[end])
            elif self.bytes:
                found += [self.bytes[byte] for byte in reversed(text[start:end].encode())]
            elif not (found and found[-1] == UNKNOWN):
                found.append(UNKNOWN)
            end = start
        return found[::-1]


def encode_bytes(text):
    """The ids of a text without a SentencePiece file: its bytes, after the four special ones."""
    return [4 + byte for byte in text.encode("utf-8", "surrogateescape")]


def open_tokenizer(args, told):
    """--tokenizer, or what --init's file says it was trained with, or bytes: (encode, the number of
    ids, the file's content as uint8 [n] or None). Raises UserError."""
    content = told.get("tokenizer")
    if args.tokenizer:
        try:
            content = torch.frombuffer(bytearray(Path(args.tokenizer).read_bytes()),
                                       dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer {args.tokenizer} cannot be read: {error}") from error
    if content is None:
        return encode_bytes, 4 + 256, None
    pieces = SentencePiece(args.tokenizer or args.init, content.numpy().tobytes())
    return pieces.encode, pieces.size, content


def framed(ids, longest):
    """The ids of a text, as many as fit, between <s> and </s>."""
    return [START, *ids[:longest - 2], END]


def encode_framed(text, encode, longest):
    return framed(encode(text), longest)


def padded(rows):
    """Lists of ids as one tensor [n,N], N the longest, filled up with <pad>."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


# ======================================================================================
# Zero-shot: the model
# ======================================================================================

TEXT_SIZES = {
    # name:  width depth heads hidden positions
    "nano":  (128,   4,   4,   512,  104),      # ours
    "base":  (768,  12,  12,  3072,  514),      # XLM-R base, arXiv 1911.02116
    "large": (1024, 24,  16,  4096,  514),      # XLM-R large
}
TOWERS = vit.table("text_model embedding", {    # of both towers together (paper, released models)
    "nano … small": ("nano", 128),              # ours
    "base":         ("base", 768),
    "large … huge": ("large", 1024),
    "2b … 6.5b":    ("large", 2048),            # 6.5b: not published
})
LONGEST = 102       # tokens of a text, with <s> and </s> (released models)


@dataclass
class TextConfig:
    """The shape of a text tower; `hidden` is the width inside its MLPs, `positions` the rows of its
    table, of which the first two are of no token (XLM-R's)."""
    vocabulary: int
    width: int
    depth: int
    heads: int
    hidden: int
    positions: int

    @property
    def longest(self):
        """The tokens of a text at most, with <s> and </s>."""
        return min(LONGEST, self.positions - 2)


class TextAttention(nn.Module):
    """Multi-head self-attention over tokens [B,N,D], none of which looks at padding."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, real):
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)           # [B,N,3D]
        q, k, v = qkv.reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)   # 3 x [B,h,N,D/h]
        x = F.scaled_dot_product_attention(q, k, v, real[:, None, None])    # [B,h,N,D/h]
        return self.out_proj(x.transpose(1, 2).reshape(B, N, D))            # [B,N,D]


class TextBlock(nn.Module):
    """A post-LayerNorm transformer block over tokens [B,N,D], as in BERT."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.self_attn = TextAttention(width, heads)
        self.norm1 = vit.LayerNorm(width, 1e-5)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = vit.LayerNorm(width, 1e-5)

    def forward(self, x, real):
        x = self.norm1(x + self.self_attn(x, real))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class TextTransformer(nn.Module):
    """XLM-R (arXiv 1911.02116) as a text tower: ids [B,N] to the feature of <s> [B,D].

    Positions are counted from PAD + 1 on, over what is no padding. Parameters have the names of the
    released zero-shot files."""

    def __init__(self, config):
        super().__init__()
        D, self.recompute = config.width, False
        self.token_embedding = nn.Embedding(config.vocabulary, D)
        self.positional_embedding = nn.ModuleDict({"embedding": nn.Embedding(config.positions, D)})
        self.embedding_layer_norm = vit.LayerNorm(D, 1e-5)
        self.layers = nn.ModuleDict({"layers": nn.ModuleList(
            TextBlock(D, config.heads, config.hidden) for _ in range(config.depth))})

    def forward(self, tokens):
        real = tokens != PAD                                                # [B,N]
        positions = real.cumsum(1) * real + PAD                             # [B,N]
        x = self.token_embedding(tokens) + self.positional_embedding["embedding"](positions)
        x = self.embedding_layer_norm(x)                                    # [B,N,D]
        for block in self.layers["layers"]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, real, use_reentrant=False)
            else:
                x = block(x, real)
        return x[:, 0]                                                      # [B,D]


class Towers(nn.Module):
    """An image tower and a text tower that map into one space, as in CLIP (arXiv 2103.00020).

    With `locked` the image tower is left as it is (LiT, arXiv 2111.07991; paper, section 4: "zero-
    shot"). Projections have no bias and start as N(0, D^-0.5), logit_scale as ln(1/0.07) (released
    models); it is a vector [1], since FSDP2 takes no scalars."""

    def __init__(self, config, text, embedding, pool="cls", locked=True):
        super().__init__()
        self.config, self.text_config = config, text
        self.vision_encoder = ViT(config, 0, pool).requires_grad_(not locked)
        self.text_encoder = nn.ModuleDict({"encoder": nn.ModuleDict({
            "transformer": TextTransformer(text)})})
        self.vision_projection = nn.Parameter(torch.empty(config.width, embedding))
        self.text_projection = nn.Parameter(torch.empty(text.width, embedding))
        self.logit_scale = nn.Parameter(torch.empty(1))
        transformer = "text_encoder.encoder.transformer"
        self.starts = {"vision_projection": config.width ** -0.5,
                       "text_projection": text.width ** -0.5, "logit_scale": math.log(1 / 0.07),
                       f"{transformer}.token_embedding.weight": 0.02,       # XLM-R
                       f"{transformer}.positional_embedding.embedding.weight": 0.02}
        vit.init_weights(self)

    def text(self, tokens):
        return self.text_encoder["encoder"]["transformer"](tokens)          # [B,D]

    def trunk(self, images):
        """Images [B,C,H,W] to what the image tower makes of them, [B,D]."""
        return self.vision_encoder(images)

    def embed_images(self, images):
        """Images [B,C,H,W] to vectors [B,E] of length 1."""
        return project(self.vision_encoder(images), self.vision_projection)

    def embed_texts(self, tokens):
        """Ids [B,N] to vectors [B,E] of length 1."""
        return project(self.text(tokens), self.text_projection)

    def forward(self, images, tokens):
        """The vectors [B,E] of images [B,C,H,W] or of their trunk's [B,D], those of their texts
        [B,N], and the factor [1] of logits."""
        x = self.vision_encoder(images) if images.dim() == 4 else images    # [B,D]
        return project(x, self.vision_projection), project(
            self.text(tokens), self.text_projection), self.logit_scale.exp()


def project(x, matrix):
    """Features [B,D] to the common space [B,E], brought to length 1."""
    return F.normalize((x.to(matrix.dtype) @ matrix).to(matrix.dtype), dim=1)


METHODS = "trunk", "embed_images", "embed_texts"        # called besides forward


# --------------------------------------------------------------------------------------
# Weights from files: ours, released zero-shot models in both layouts, Hugging Face XLM-R
# --------------------------------------------------------------------------------------

TEXT_RENAMES = [(re.compile(pattern), new) for pattern, new in (
    (r"^text_encoder\.encoder\.transformer\.|^(xlm_)?roberta\.", ""),
    (r"^(encoder\.layer|layers(\.layers)?)\.(?=\d)", "layers.layers."),
    (r"\.attention\.input_projection\.", ".self_attn.in_proj_"),        # the older layout
    (r"\.attention\.output_projection\.", ".self_attn.out_proj."),
    (r"\.residual_mlp\.mlp\.0\.", ".linear1."),
    (r"\.residual_mlp\.mlp\.3\.", ".linear2."),
    (r"\.attention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"^embeddings\.word_embeddings\.", "token_embedding."),            # Hugging Face
    (r"^embeddings\.position_embeddings\.", "positional_embedding.embedding."),
    (r"^embeddings\.LayerNorm\.", "embedding_layer_norm."),
    (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".self_attn.\1."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".linear1."),
    (r"\.output\.dense\.", ".linear2."),
    (r"\.output\.LayerNorm\.", ".norm2."))]


def text_names(tensors):
    """Rename a file's tensors to those of TextTransformer; join query, key and value; fold the
    type of Hugging Face's tokens, which is always the same, into their positions."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in TEXT_RENAMES:
            name = pattern.sub(new, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".self_attn.q." in name]:
        parts = [renamed.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        renamed[name.replace(".q.", ".in_proj_")] = torch.cat(parts)
    kind = renamed.pop("embeddings.token_type_embeddings.weight", None)
    if kind is not None:
        renamed["positional_embedding.embedding.weight"] = \
            renamed["positional_embedding.embedding.weight"] + kind[:1]
    return {name: tensor for name, tensor in renamed.items()
            if not name.startswith(("lm_head.", "pooler.", "classifier."))
            and not name.endswith("position_ids")}


def tower_names(tensors):
    """Rename the tensors of a zero-shot file to those of Towers."""
    named = {re.sub(r"^((module|model|_orig_mod|clip)\.)+", "", name): tensor
             for name, tensor in tensors.items()}
    text = {name: tensor for name, tensor in named.items() if name.startswith("text_encoder.")}
    own = {name: tensor.reshape(1) if name == "logit_scale" else tensor
           for name, tensor in named.items() if name in (
               "vision_projection", "text_projection", "logit_scale")}
    vision = {name: tensor for name, tensor in named.items()
              if name not in text and name not in own}
    return {**own, **{f"vision_encoder.{name}": tensor
                      for name, tensor in vit.our_names(vision).items()},
            **{f"text_encoder.encoder.transformer.{name}": tensor
               for name, tensor in text_names(text).items()}}


def text_part(tensors):
    """The text tower's tensors of a file of any kind, under TextTransformer's names."""
    start = "text_encoder.encoder.transformer."
    own = {name.removeprefix(start): tensor for name, tensor in tower_names(tensors).items()
           if name.startswith(start)}
    return own or text_names(tensors)


def text_config(path):
    """The TextConfig of a file, and what it says of itself. Raises UserError."""
    tensors, told = vit.read_weights(path)
    if "text" in told.get("config", {}):
        return TextConfig(**told["config"]["text"]), told
    shapes = {name: tuple(tensor.shape) for name, tensor in text_part(tensors).items()}
    depth = len({name.split(".")[2] for name in shapes if name.startswith("layers.layers.")})
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        hidden, _ = shapes["layers.layers.0.linear1.weight"]
        positions, _ = shapes["positional_embedding.embedding.weight"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds no text tower that is known here: it lacks {error}; give a "
                        "released zero-shot file or Hugging Face's XLM-R") from error
    said = vit.read_json(Path(path).with_name("config.json"))
    heads = said.get("num_attention_heads") if said.get("hidden_size") == width else \
        {row[:2]: row[2] for row in TEXT_SIZES.values()}.get((width, depth))
    if heads is None:
        raise UserError(f"the text tower of {path} is {width} wide and {depth} deep, which none of "
                        f"{', '.join(TEXT_SIZES)} is, so its number of heads is unknown")
    return TextConfig(vocabulary, width, depth, heads, hidden, positions), told


# ======================================================================================
# Zero-shot: the loss
# ======================================================================================

def contrastive_loss(images, texts, all_images, all_texts, scale, right):
    """The loss of each pair [b]: how surely an image finds its text among all, and the text its
    image (CLIP; LiT, section 3). `images`, `texts` [b,E] are those of the pairs number `right` [b]
    of `all_images`, `all_texts` [B,E], vectors of length 1; `scale` [1] multiplies cosines."""
    by_image = F.cross_entropy(scale * images @ all_texts.T, right, reduction="none")      # [b]
    by_text = F.cross_entropy(scale * texts @ all_images.T, right, reduction="none")
    return (by_image + by_text) / 2


def global_loss(images, texts, scale, rank, world):
    """The loss over the batch of all ranks, and its derivatives by this rank's `images` and `texts`
    [b,E] and by `scale` [1].

    A rank compares its own pairs with everybody's, so that it never holds all B x B logits; what
    others' comparisons say of its vectors comes back as a sum over ranks."""
    b = len(images)
    all_images, all_texts, scale = (x.detach().requires_grad_() for x in (
        vit.all_gather_rows(images.detach()), vit.all_gather_rows(texts.detach()), scale))    # [B,E] [B,E] [1]
    mine = slice(rank * b, rank * b + b)
    right = torch.arange(rank * b, rank * b + b, device=images.device)      # [b]
    loss = contrastive_loss(all_images[mine], all_texts[mine], all_images, all_texts, scale, right)
    (loss.mean() / world).backward()
    by_images, by_texts, by_scale = (vit.all_reduce_sum(x.grad) for x in (
        all_images, all_texts, scale))
    return vit.all_reduce_sum(loss.detach().mean() / world), by_images[mine], by_texts[mine], \
        by_scale


def factor(model):
    """What multiplies cosines, a tensor [1]; every rank has to call it."""
    scale = model.logit_scale.detach().exp()
    return scale.full_tensor() if isinstance(scale, DTensor) else scale


@torch.no_grad()
def clamp_scale(model):
    """Keep the factor of cosines at 100 or below (CLIP)."""
    scale = model.logit_scale
    (scale.to_local() if isinstance(scale, DTensor) else scale).clamp_(max=math.log(100))


# ======================================================================================
# Zero-shot: evaluation
# ======================================================================================

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "{}",
             "a small {} in a picture.", "a drawing of a {}.", "there is a {} here.")   # ours


@torch.no_grad()
def embed_all(model, texts, encode, args, device, rank, world):
    """Vectors [n,E] of texts, on the CPU, the same on every rank.

    Sorted by length, so that little is computed for padding; ranks share them, and all call the
    model equally often."""
    longest, ids = model.text_config.longest, [encode(text) for text in texts]
    cut = sum(len(some) > longest - 2 for some in ids)
    if cut:
        rank0_print(f"{cut:,} of {len(texts):,} texts have more than {longest - 2} pieces: cut there")
    rows = [framed(some, longest) for some in ids]
    order, size = sorted(range(len(rows)), key=lambda i: len(rows[i])), 4 * args.micro_batch
    vectors = torch.zeros(len(texts), model.text_projection.shape[1])       # [n,E]
    for at in range(0, len(order), size * world):
        mine = order[at + rank * size:][:size]
        with vit.autocast(args, device):
            found = model.embed_texts(padded([rows[i] for i in mine or order[:1]]).to(device))
        vectors[mine] = found[:len(mine)].cpu()
    return vit.all_reduce_sum(vectors)


def class_vectors(model, classes, templates, encode, args, device, rank, world):
    """The vector [K,E] of each class [[name]]: the mean over its names in all templates, brought to
    length 1 (CLIP, section 3.1.4; released evaluation): {"": that, "single_": by the first
    template alone}."""
    texts = [(number, k, template.replace("{}", name)) for number, some in enumerate(classes)
             for name in some for k, template in enumerate(templates)]
    vectors = embed_all(model, [text for *_, text in texts], encode, args, device, rank, world)
    sums = torch.zeros(2, len(classes), vectors.shape[1])                   # [2,K,E]
    sums[0].index_add_(0, torch.tensor([number for number, _, _ in texts]), vectors)
    first = torch.tensor([k == 0 for _, k, _ in texts])
    sums[1].index_add_(0, torch.tensor([number for number, k, _ in texts if k == 0]),
                       vectors[first])
    full, single = F.normalize(sums, dim=2)
    return {"": full, "single_": single}


@torch.no_grad()
def evaluate_towers(model, val, args, device, rank, world, names, vectors, encode):
    """Of a source, every image once: with names and `vectors` of classes zero-shot top-1 and top-5,
    also by a single template, and OUT/classes.txt; with captions, retrieval."""
    vectors = {name: factor(model) * table.to(device) for name, table in vectors.items()}
    rows, kept, positions = {name: [] for name in vectors}, [], []
    for images, batch in data.validate(val, args, device, rank, world):
        with vit.autocast(args, device):
            x = model.embed_images(images)                                  # [B,E]
            for name, table in vectors.items():
                rows[name] += answers(x @ table.T, batch, args)
        seen = batch["weight"] > 0
        kept.append(x[seen.to(device)].cpu())
        positions += batch["position"][seen].tolist()
    metrics = {"count": int(vit.all_reduce_sum(torch.tensor(len(positions))))}
    metrics["bad"] = len(val.source) - metrics["count"]
    for name in sorted(vectors, reverse=True):      # the last leaves its classes.txt
        parts = vit.gather_objects(rows[name])
        found = vit.on_rank_0(lambda: summarise(sum(parts, []), len(val.source), args, names))
        metrics = {**{name + key: found[key] for key in ("loss", "top1", "top5")}, **metrics}
    if data.has_captions(val.source):
        captions = [val.source.caption(i) for i in positions]
        told = [i for i, caption in enumerate(captions) if caption]
        parts = vit.all_gather_objects(([captions[i] for i in told], torch.cat(kept)[told].numpy()))
        captions = [caption for some, _ in parts for caption in some]
        images = torch.from_numpy(np.concatenate([part for _, part in parts]))
        metrics |= retrieval(model, images, captions, encode, args, device, rank, world)
    return metrics


def retrieval(model, images, captions, encode, args, device, rank, world):
    """Recall at 1, 5, 10 of an image's caption among all captions, and of an image of a caption
    among all images, for vectors of images [n,E] and their n captions. Equal captions are one."""
    texts = sorted({*captions})
    number = {text: i for i, text in enumerate(texts)}
    own = torch.tensor([number[caption] for caption in captions], device=device)        # [n]
    images = images.to(device)                                              # [n,E]
    texts = embed_all(model, texts, encode, args, device, rank, world).to(device)       # [m,E]
    hits, size = torch.zeros(2, 3), 4 * args.micro_batch
    for at in range(size * rank, len(images), size * world):
        similar = images[at:at + size] @ texts.T                            # [c,m]
        right = similar.gather(1, own[at:at + size, None])                  # [c,1]
        before = (similar > right).sum(1)                                   # [c]
        hits[0] += torch.stack([(before < k).sum() for k in (1, 5, 10)]).cpu()
    for at in range(size * rank, len(texts), size * world):
        similar = texts[at:at + size] @ images.T                            # [c,n]
        wrong = own != torch.arange(at, at + len(similar), device=device)[:, None]      # [c,n]
        right = similar.masked_fill(wrong, -2).max(1, keepdim=True).values
        before = (similar > right).sum(1)
        hits[1] += torch.stack([(before < k).sum() for k in (1, 5, 10)]).cpu()
    hits = vit.all_reduce_sum(hits) / torch.tensor([[len(images)], [len(texts)]])
    return {f"{way}_recall{k}": share for way, row in zip(("image_to_text", "text_to_image"),
                                                         hits.tolist())
            for k, share in zip((1, 5, 10), row)} | {"captions": len(texts)}


# ======================================================================================
# Zero-shot: flags and main
# ======================================================================================

TOWER_RECIPES = vit.table("batch length smallest_crop", {
    "nano … small": (128, {"samples": 90e3, "base_lr": 2e-3}, 0.6),     # ours, for a classroom
    # not published, but one epoch (paper): LiT's batch and rate; crop ours
    "base … 6.5b": (16384, {"epochs": 1, "lr": 1e-3}, 0.9),
})
TOWER_COMMON = {"weight_decay": 0.01, "warmup": 0.03, "clip_grad": 1.0}     # LiT


def parse_zeroshot_flags(argv):
    """All flags, with the recipe filled in: (args, Config, name of the recipe's row, what --init's
    file says of itself)."""
    parser = vit.stage_parser("finetune.py zeroshot", __doc__,
                              {**TOWER_RECIPES, "all": TOWER_COMMON})
    add = parser.add_argument_group("zero-shot").add_argument
    add("--tokenizer", metavar="FILE", help="a SentencePiece model, for released models XLM-R's "
        "sentencepiece.bpe.model; default: what --init was trained with, else bytes")
    add("--text-model", choices=TEXT_SIZES, help="size of the text tower; default by model: nano, "
        "base for base, large from large on (paper)")
    add("--text-init", metavar="FILE", help="start the text tower from this file: Hugging Face's "
        "XLM-R (paper: XLM-R), or any zero-shot model; default: that of --init, or random weights")
    add("--unlock", action="store_true", help="train the image tower, too; default off (LiT)")
    add("--cache-features", metavar="DIR", help="compute what the locked image tower makes of each "
        "image once, without augmentation, and keep it there; default off")
    add("--smallest-crop", type=float, metavar="SHARE", help="of the image's area that a random "
        "crop has; default by model, below")
    add("--classes", metavar="FILE", help="to choose from: a line each, names separated by commas; "
        "default: the classes of --val")
    add("--templates", metavar="FILE", help="lines with {} in the place of a name; default: the "
        f"world's own for the world, else {len(TEMPLATES)} of ours")
    add("--texts", nargs="+", metavar="TEXT", help="with --predict: to choose from as they are, in "
        "any language, instead of --classes")
    args = parser.parse_args(argv)
    config, name, told = vit.choose_config(args, "zeroshot")
    whole, using = "text_projection" in told.get("shapes", {}), args.predict or args.eval_only
    if using and not whole:
        raise UserError(f"{args.init} has no text tower: --predict and --eval-only need a "
                        "zero-shot model, as runs/zeroshot/model.pt")
    if not args.init and not args.unlock:
        raise UserError("zeroshot trains a text tower for an image tower: give its file as --init, "
                        "or --unlock to train both from random weights")
    if args.predict and bool(args.texts) == bool(args.classes):
        raise UserError("--predict needs something to choose from: --texts or --classes")
    if args.texts and not args.predict:
        raise UserError("--texts is for --predict; an evaluation takes --classes")
    if args.cache_features and args.unlock:
        raise UserError("--cache-features keeps what a locked image tower says: leave --unlock out")
    if (args.text_init or whole) and args.text_model:
        raise UserError("the text tower is that of a file: leave --text-model out")
    vit.fill_recipe(args, {**TOWER_RECIPES[name], **TOWER_COMMON})
    data.choose_val(args)
    args.loss, args.pool = "ce", "mean" if "fc_norm.weight" in told.get("shapes", {}) else "cls"
    args.crop = "all"
    return args, config, name, told


def open_text(args, name, told):
    """(TextConfig, width of the common space, encode, the tokenizer's file as uint8 [n] or None).
    Raises UserError where they do not fit together."""
    whole = "text_projection" in told.get("shapes", {})
    size = args.text_model or TOWERS[name]["text_model"]
    text, said = TextConfig(0, *TEXT_SIZES[size]), told
    if args.text_init or whole:
        text, said = text_config(args.text_init or args.init)
    encode, size, content = open_tokenizer(args, said)
    if text.vocabulary and (size > text.vocabulary or content is None and size < text.vocabulary):
        raise UserError(f"the text tower knows {text.vocabulary:,} ids, the tokenizer has "
                        f"{size:,}: give the one that it was trained with as --tokenizer (XLM-R's: "
                        "sentencepiece.bpe.model)")
    text.vocabulary = text.vocabulary or size
    if size < text.vocabulary:
        rank0_print(f"NOTE: the text tower knows {text.vocabulary:,} ids, the tokenizer has {size:,}: is "
                    "it the one that it was trained with?")
    return (text, told["shapes"]["text_projection"][1] if whole else TOWERS[name]["embedding"],
            encode, content)


def open_pairs(args, config, model, encode, device, rank, world):
    """--data as data.Samples of images, or of what --cache-features keeps of them, with the tokens
    of their captions as "tags"; and what tells these data from others."""
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
    source, features = data.open_data(*args.data, **places), None
    mark = source.fingerprint()
    if not data.has_captions(source):
        raise UserError('--data has no captions: give shards with .txt or a "caption" in .json, '
                        "a manifest with captions, or the world")
    choose_box = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    if args.cache_features:
        table = open_features(args.cache_features, lambda: model.trunk, source, args, config,
                              data.WHOLE_WIDTH, device)
        source = data.Chosen(source, table["index"], table["labels"])
        features = table["features"]
    encode = functools.partial(encode_framed, encode=encode, longest=model.text_config.longest)
    return data.Samples(data.Captioned(source, encode), config.image, config.channels, choose_box,
                        args.seed, max_pixels=args.max_pixels, features=features), mark


def open_classes_and_val(args, config):
    """(--val as data.Samples or None, the classes to choose from [[name]], templates)."""
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
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
    classes = data.read_classes(args.classes) if args.classes else []
    if args.predict or not args.val:
        return None, classes, templates
    val = data.open_data(*args.val, **places)
    classes = classes or [[name] for name in val.classes]
    if not classes and not data.has_captions(val):
        raise UserError("--val has neither classes nor captions: there is nothing to evaluate")
    if classes:
        val = data.labelled(val, classes, "--val")
    return data.unshuffled(val, args, config, data.WHOLE_WIDTH), classes, templates


def zeroshot(argv):
    args, config, name, told = parse_zeroshot_flags(argv)
    text, width, encode, content = open_text(args, name, told)
    make = lambda: Towers(config, text, width, args.pool, locked=not args.unlock)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),
                             torch.zeros(batch, text.longest, dtype=torch.int64))
    image = vit.forward_flops(lambda: ViT(config), lambda batch: example(batch)[:1])
    flops = 3 * vit.forward_flops(make, example) - (0 if args.unlock else 2 * image)
    if args.plan:
        return vit.plan(args, make, example, flops)
    device, rank, world = vit.start(args)

    # ---- model: a checkpoint in --out, else --init and --text-init, else random weights
    val, classes, templates = open_classes_and_val(args, config)
    names = [some[0] for some in classes]
    model, wrapped = vit.build(make, args, device, METHODS)
    if "text_projection" in told.get("shapes", {}):
        again = ("text_encoder.*", "text_projection") if args.text_init else ()
        vit.load_weights(model, args.init, renew=again, rename=tower_names)
    elif args.init:
        vit.load_weights(model.vision_encoder, args.init)
    if args.text_init:
        vit.load_weights(model.text_encoder["encoder"]["transformer"], args.text_init,
                         rename=text_part)

    def vectors_now():
        return class_vectors(model, classes, templates, encode, args, device, rank, world) \
            if classes else {}

    if args.predict or args.eval_only:
        key = data.crc(repr([vit.file_fingerprint(args.init), args.tokenizer and vit.file_fingerprint(
            args.tokenizer), classes, templates, args.precision]))
        path = Path(args.out) / f"classes-{key:08x}.npz"
        vectors = {name: torch.from_numpy(value) for name, value in data.kept_arrays(
            path, lambda: {name or "all": table.numpy() for name, table in vectors_now().items()}
        ).items()} if classes else {}
        if args.predict:
            table = factor(model) * vectors["all"].to(device)               # [K,E]
            logits = lambda images: model.embed_images(images) @ table.T
            return data.print_predictions(logits, config, args, device, names)
        vectors = {name.replace("all", ""): table for name, table in vectors.items()}
        return vit.report(args, evaluate_towers(model, val, args, device, rank, world, names,
                                                vectors, encode))

    # ---- data
    train, mark = open_pairs(args, config, model, encode, device, rank, world)
    steps, micro, accumulate, peak = vit.derive(args, len(train.source), world)
    if not vit.open_run(args, "zeroshot", {
            "what --data holds": mark,
            "tokenizer": "bytes" if content is None else f"{len(content):,} bytes (CRC "
            f"{data.crc(content.numpy().tobytes()):08x})"}, model):
        return

    # ---- optimizer and state
    groups = vit.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
    state = vit.restore(args, model, optimizer, {**vit.fresh_state(args, device), "long_texts": 0})
    data.cut_bad_list(args, state)
    log = vit.Log(args, device, state["step"], steps, flops)
    positions = data.training_positions(state["step"], steps, args.batch, micro, rank, world)
    batches = data.load(train, positions, args.workers, device)
    about = {"config": {**asdict(config), "text": asdict(text)}, "stage": "zeroshot",
             **({} if content is None else {"tokenizer": content})}
    examples = val and classes and data.examples(val, device)

    def draw_and_evaluate():
        vectors = vectors_now()
        if examples:
            table = factor(model) * vectors[""].to(device)                  # [K,E]
            data.draw_predictions(lambda images: model.embed_images(images) @ table.T, examples,
                                  args, device, names)
        return evaluate_towers(model, val, args, device, rank, world, names, vectors,
                               encode) if val else {}

    # ---- loop
    while state["step"] < steps:
        if log.evaluation_due(state["step"]):
            log.evaluated(draw_and_evaluate())
        lr = vit.learning_rate(state["step"], steps, peak, args.warmup * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts, found, bad, long = [], [], [], 0
        for _ in range(accumulate):
            batch = log.wait(batches)
            bad += batch["bad"]
            tokens = batch["tags"].to(device, non_blocking=True)            # [B,N]
            long += int((batch["tags"] >= 0).sum(1).eq(text.longest).sum())
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C] or [B,D]
            with vit.autocast(args, device):
                if not args.cache_features:
                    images = data.normalise(images)                         # [B,C,H,W]
                if not args.cache_features and not args.unlock:
                    images = model.trunk(images)                            # [B,D]
                tokens = tokens.masked_fill(tokens < 0, PAD)
                # Of several parts none can be kept for a backward: they are computed again.
                with torch.set_grad_enabled(accumulate == 1):
                    found.append(wrapped(images, tokens))                   # [B,E] [B,E] [1]
            parts.append((images, tokens))
        vectors = [torch.cat([vector.detach() for vector in some])
                   for some in zip(*(vectors[:2] for vectors in found))]    # 2 x [b,E]
        loss, by_images, by_texts, by_scale = global_loss(*vectors, found[0][2], rank, world)
        slopes = zip(by_images.split(micro), by_texts.split(micro))         # [B,E] [B,E]
        for part, (by_image, by_text) in enumerate(slopes):
            with vit.accumulating(wrapped, last=part == accumulate - 1):
                if accumulate > 1:
                    with vit.autocast(args, device):
                        found[part] = wrapped(*parts[part])
                image_vectors, text_vectors, scale = found[part]
                # A number with the batch's derivatives. Ranks are averaged, these are to be summed.
                chain = world * ((image_vectors * by_image).sum() + (text_vectors * by_text).sum())
                chain = chain + (scale * by_scale).sum() / accumulate
                (chain * state["scale"]).backward()
        norm = vit.clip_gradients(model, args.clip_grad, state["scale"])
        loss, norm, stop, due, count, long = vit.all_reduce_floats(
            (loss / world, norm / world), (vit.stop_requested(), log.save_due(), len(bad), long))
        finite = math.isfinite(norm)
        if finite:
            optimizer.step()
            clamp_scale(model)
        optimizer.zero_grad(set_to_none=True)
        vit.note_step(state, finite, args.batch)
        data.note_bad(count, bad, args, state)
        state["long_texts"] += int(long)
        log.step(state["step"], {"loss": loss, "lr": lr, "grad_norm": norm,
                                 "bad_samples": state["bad_samples"],
                                 "long_texts": state["long_texts"]})

        done = state["step"] == steps
        # Before an evaluation too: what interrupts it costs no step.
        if stop or due or done or log.evaluation_due(state["step"]):
            vit.save(args, model, optimizer, state,
                     {**about, "samples": state["step"] * args.batch})
            log.saved()
        if stop and not done:
            return rank0_print(f"stopped after step {state['step']} of {steps}; the same command goes on")

    # ---- end
    metrics = draw_and_evaluate()
    log.evaluated(metrics)
    vit.report(args, {**metrics, "samples": steps * args.batch})
    vit.finish(args)


# ======================================================================================
# Main
# ======================================================================================

TASKS = {"classify": classify, "features": features, "knn": knn, "linear": linear,
         "lowshot": lowshot, "zeroshot": zeroshot}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return rank0_print(__doc__)
    if argv[0] not in TASKS:
        raise UserError(f"the first word is the task, one of: {' '.join(TASKS)}; found {argv[0]!r}")
    TASKS[argv[0]](argv[1:])


if __name__ == "__main__":
    vit.run(main)
