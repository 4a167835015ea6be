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

features, knn, linear leave the encoder as it is: they write what it makes of pictures, and judge
that by the most similar ones and by a linear layer (MAE's appendix A.1).

    torchrun finetune.py linear --init runs/wsp/model.pt --data photos/train --val photos/val

zeroshot trains a text tower that speaks to an encoder, or uses a released one: classes are words.

    python finetune.py zeroshot --init maws_clip.pt --tokenizer tokenizer.json --predict \\
        cat.jpg --texts "une photo de chat" "a photo of a dog"
"""

import functools
import json
import math
import re
import unicodedata
from collections import Counter
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
    make_with = lambda K: ViT(config, K, args.pool, HEAD_STD[args.recipe])
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
# Frozen encoders: features, for this file's tasks and for anybody
# ======================================================================================

def parse_frozen_flags(task, argv, add_flags=lambda add: None):
    """The flags of a task on features of a frozen encoder: (args, Config or None, what --init's
    file says of itself)."""
    parser = vit.stage_parser(f"finetune.py {task}", __doc__)
    parser.set_defaults(data=["world-labelled"])
    add = parser.add_argument_group("features").add_argument
    add("--pool", choices=("cls", "mean"), default="cls", help="the class token (default; MAE's "
        "linear probe) or the mean of the patches")
    add("--crop", choices=("centre", "squash"), default="centre", help="centre (default): the "
        "central 7/8, all of it above 224 pixels (MAE); squash: the whole image")
    if task != "features":
        add("--features", metavar="DIR", default="runs/features", help="where features are kept, "
            "to be used again by any task; default runs/features. Files of the task `features` can "
            "be given as --data and --val, too")
    add_flags(parser.add_argument_group(task).add_argument)
    args = parser.parse_args(argv)
    if task == "features":
        args.val = []
    else:
        data.choose_val(args)
        if not args.val:
            raise UserError(f"{task} needs --val: the images to be right about")
    given = [spec.endswith(".npz") for spec in (*args.data, *args.val)]
    if any(given) and (task == "features" or not all(given)):
        raise UserError("features.npz can be given as --data and --val, to both, and to no other "
                        "task than those that work on features")
    if not args.init and not any(given):
        raise UserError(f"{task} needs an encoder: give its file as --init")
    if any(given):
        args.out = args.out or f"runs/{task}"
        return args, None, {}
    return args, *vit.choose_config(args, task)[::2]


def load_encoder(args, config, told, device, pool):
    """The encoder of --init, without a head and without gradients."""
    if pool == "mean":      # of a finetuned file, as its head saw it, or of any other, normalised
        pool = "mean" if "fc_norm.weight" in told["shapes"] else "patches"
    model, _ = vit.build(lambda: ViT(config, 0, pool), args, device, frozen=True)
    vit.load_weights(model, args.init)
    return model


def features(argv):
    """The task `features`: OUT/features.npz."""
    args, config, told = parse_frozen_flags("features", argv)
    device, rank, world = vit.start(args)
    source = data.open_data(*args.data, index_dir=args.index_dir,
                            fallback=Path(args.out) / "index")
    encoder = load_encoder(args, config, told, device, args.pool)
    path = Path(args.out) / "features.npz"
    samples = data.unshuffled(source, args, config, central_box(args, config))
    data.write_features(path, encoder, samples, args, device, rank, world,
                        about_features(args, config, source))
    table = data.read_features(path)
    vit.report(args, {"count": len(table["labels"]), "bad": len(source) - len(table["labels"]),
                      "width": config.width, "classes": len(source.classes)})


def about_features(args, config, source):
    """Of which encoder and data features are: equal where they can be used again."""
    return {"encoder": vit.file_fingerprint(args.init), "image": list(config.image), "pool": args.pool,
            "crop": args.crop, "precision": args.precision, "data": source.fingerprint()}


def open_features(args, config, told, task):
    """The features of --data and --val that have a label, from where they are kept or computed
    now: two dicts of "features" [n,D], "labels" int64 [n], and the names of the classes.

    Classes are those of --data; those of --val are compared by name. Raises UserError."""
    device, rank, world = vit.start(args)
    tables, encoder = [], None
    for specs in (args.data, args.val):
        if config is None:
            if len(specs) > 1:
                raise UserError(f"one features.npz each for --data and --val; found {len(specs)}")
            tables.append(data.read_features(specs[0]))
            continue
        source = data.open_data(*specs, index_dir=args.index_dir,
                                fallback=Path(args.out) / "index")
        about = about_features(args, config, source)
        path = Path(args.features) / f"{data.crc(repr(about)):08x}.npz"
        if vit.on_rank_0(path.is_file):
            rank0_print(f"features of {' '.join(specs)} are kept in {path}")
        else:
            encoder = encoder or load_encoder(args, config, told, device, args.pool)
            vit.on_rank_0(lambda: path.parent.mkdir(parents=True, exist_ok=True))
            samples = data.unshuffled(source, args, config, central_box(args, config))
            data.write_features(path, encoder, samples, args, device, rank, world, about)
        tables.append(data.read_features(path))
    encoders = [{key: value for key, value in table["about"].items() if key != "data"}
                for table in tables]
    if encoders[0] != encoders[1]:
        raise UserError("the features of --data and --val are of different encoders or sizes: "
                        f"{encoders[0]} and {encoders[1]}")
    if config is None and args.init and encoders[0]["encoder"] != vit.file_fingerprint(args.init):
        raise UserError(f"the features are not of --init {args.init}; make them again by "
                        "`finetune.py features`, or leave --init out")
    classes = tables[0]["classes"].tolist()
    if len(classes) < 2:
        raise UserError(f"--data has {len(classes)} classes: there is nothing to tell apart; "
                        "images have the class of their folder, or a label")
    outputs = data.outputs_of([[name] for name in classes], tables[1]["classes"].tolist(), "--val")
    numbers = np.array([outputs[name][0] for name in tables[1]["classes"].tolist()] + [-1])
    tables[1]["labels"] = numbers[tables[1]["labels"]]
    for flag, table in zip(("--data", "--val"), tables):
        known = table["labels"] >= 0
        if not known.all():
            rank0_print(f"{flag}: {(~known).sum():,} of {len(known):,} images have no class and are left "
                        "out")
            for name in ("features", "labels", "index"):
                table[name] = table[name][known]
        if not len(table["labels"]):
            raise UserError(f"no image of {flag} has a class: a folder each, or a label each")
    return *tables, classes, device, rank, world


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
    train, val, classes, device, rank, world = open_features(args, config, told, "knn")
    labels, ks = torch.tensor(train["labels"], device=device), (1, 5, 10, 20)
    right = torch.zeros(len(ks), dtype=torch.int64)
    for at in range(1024 * rank, len(val["labels"]), 1024 * world):
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
# Linear probe
# ======================================================================================

PROBE_RECIPES = vit.table("batch length base_lr", {     # MAE's table 10; warmup: 10 epochs
    "nano … small": (256,   {"epochs": 20}, 5.0),       # ours, for a classroom
    "base":         (16384, {"epochs": 90}, 0.1),
    "large … 6.5b": (16384, {"epochs": 50}, 0.1),       # 2b, 6.5b: not published
})
PROBE_COMMON = {"weight_decay": 0.0, "clip_grad": 0.0, "warmup": 0.1, "smallest_crop": 0.08}
RATES = 0.25, 0.5, 1.0, 2.0, 4.0, 8.0       # of the learning rate; ours


def parse_linear_flags(argv):
    """All flags, with the recipe filled in: (args, Config, what --init's file says of itself)."""
    parser = vit.stage_parser("finetune.py linear", __doc__,
                              {**PROBE_RECIPES, "all": PROBE_COMMON})
    parser.set_defaults(data=["world-labelled"])
    add = parser.add_argument_group("linear probe").add_argument
    add("--pool", choices=("cls", "mean"), default="cls", help="what is probed: the class token "
        "(default; MAE) or the mean of the patches")
    add("--crop", choices=("centre", "squash"), default="centre", help="of an evaluation: the "
        "central 7/8 (default), all of it above 224 pixels (MAE), or the whole image squashed")
    add("--rates", type=float, nargs="+", default=RATES, metavar="FACTOR", help="of --lr: a head "
        "is trained with each, on the same features; default " + " ".join(map(str, RATES)))
    add("--held-back", type=float, default=0.1, metavar="SHARE", help="of --data, on which the "
        "best head is chosen; default 0.1 (ours)")
    add("--smallest-crop", type=float, metavar="SHARE", help="of the image's area that a random "
        "crop has; default 0.08 (MAE)")
    add("--attentive", action="store_true", help="also train, with each rate, a head that chooses "
        "by attention which tokens it reads; default off")
    args = parser.parse_args(argv)
    config, name, told = vit.choose_config(args, "linear")
    if args.predict or args.eval_only or not args.init:
        raise UserError("linear trains a head on an encoder, --init; use the result by finetune.py "
                        "classify --init runs/linear/model.pt --predict … or --eval-only")
    vit.fill_recipe(args, {**PROBE_RECIPES[name], **PROBE_COMMON})
    if not 0 < args.held_back < 1 or min(args.rates) <= 0:
        raise UserError("--held-back is above 0 and below 1, and --rates are above 0; found "
                        f"{args.held_back} and {args.rates}")
    data.choose_val(args)
    args.loss = "ce"
    return args, config, told


class AttentiveHead(nn.Module):
    """Attention pooling with one learned query, and a linear layer: tokens [B,1+N,D] to [B,K]."""

    def __init__(self, width, classes, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, width))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        B, N, D = x.shape
        kv = self.kv(x).reshape(B, N, 2, self.heads, D // self.heads)       # [B,1+N,2,h,D/h]
        k, v = kv.permute(2, 0, 3, 1, 4)                                    # 2 x [B,h,1+N,D/h]
        q = self.query.reshape(1, self.heads, 1, -1).expand(B, -1, -1, -1)  # [B,h,1,D/h]
        return self.head(F.scaled_dot_product_attention(q, k, v).reshape(B, D))     # [B,K]


class Probe(nn.Module):
    """Linear heads on features [B,D] that are normalised over the batch: [heads,B,K].

    BatchNorm without affine and a linear layer (MAE, appendix A.1); each head has a learning rate
    of its own. Weights start as N(0, 0.01), alike in all heads. With `attention`, a number of
    heads, there are as many AttentiveHeads, on tokens that `measure` has made alike in scale."""

    def __init__(self, width, classes, heads, seed, attention=0):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        self.attentive = nn.ModuleList(AttentiveHead(width, classes, attention)
                                       for _ in range(heads if attention else 0))
        self.register_buffer("token_mean", torch.zeros(width))
        self.register_buffer("token_scale", torch.ones(width))
        with torch.no_grad():
            for name, p in self.named_parameters():
                own = {"weight": "head.weight", "query": "head.weight"}.get(name.split(".")[-1])
                own = "kv.weight" if "kv" in name else own          # alike in all heads
                starts = {"head.weight": 0.01}
                p.copy_(vit.initial_value(own, p.shape, None, seed, starts) if own else
                        torch.zeros(()))

    def forward(self, features):
        x = self.norm(features)                                             # [B,D]
        return torch.stack([head(x) for head in self.heads])                # [heads,B,K]

    @torch.no_grad()
    def measure(self, encoder, samples, args, device, rank, world):
        """Set mean and scale of tokens [B,1+N,D] to what they are over a source: fixed from then
        on, since statistics of a batch would need all ranks' tokens in one place (ours)."""
        sums = torch.zeros(3, len(self.token_mean), dtype=torch.float64)
        for images, batch in data.validate(samples, args, device, rank, world):
            with vit.autocast(args, device):
                x = encoder(images).float()                                 # [B,1+N,D]
            x = x[batch["weight"].to(device) > 0].flatten(0, 1).double()    # [n,D]
            sums += torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)]).cpu()
        count, total, squares = vit.all_reduce_sum(sums)                    # 3 x [D]
        mean = total / count
        self.token_mean.copy_(mean)
        self.token_scale.copy_((squares / count - mean.square() + 1e-6).rsqrt())

    def attend(self, x, number):
        """Logits [B,K] of one attentive head for tokens [B,1+N,D]."""
        return self.attentive[number]((x - self.token_mean) * self.token_scale)

    def folded(self, number):
        """One head and the normalisation before it as one linear layer: weight [K,D], bias [K]."""
        scale = (self.norm.running_var + self.norm.eps).rsqrt()             # [D]
        weight = self.heads[number].weight * scale                          # [K,D]
        return weight, self.heads[number].bias - weight @ self.norm.running_mean


@torch.no_grad()
def lars(parameters, weight_decay, trust=0.001):
    """Scale gradients in place, of parameters of 2 or more dimensions, by trust * |p| / |g| (LARS,
    arXiv 1708.03888, as in MAE's linear probe); 1 where either norm is 0. Momentum comes after."""
    for p in parameters:
        if p.dim() > 1 and p.grad is not None:
            p.grad.add_(p, alpha=weight_decay)
            weight, gradient = p.norm(), p.grad.norm()
            scale = torch.where((weight > 0) & (gradient > 0), trust * weight / gradient, 1.0)
            p.grad.mul_(scale)


def pooled(x, pool):
    """The feature [B,D] of what an encoder gives: it itself, or of tokens [B,1+N,D] the first or
    the mean of the others."""
    return x if x.dim() == 2 else x[:, 0] if pool == "cls" else x[:, 1:].mean(1)


@torch.no_grad()
def right_answers(encoder, probe, samples, args, device, rank, world):
    """The share of a source's images that each head is right about: [heads], then the attentive
    ones."""
    sums = torch.zeros(1 + len(probe.heads) + len(probe.attentive), dtype=torch.float64)
    probe.eval()
    for images, batch in data.validate(samples, args, device, rank, world):
        with vit.autocast(args, device):
            x = encoder(images).float()                                     # [B,D] or [B,1+N,D]
        logits = [*probe(pooled(x, args.pool)),
                  *(probe.attend(x, i) for i in range(len(probe.attentive)))]
        found = torch.stack(logits).argmax(-1).cpu()                        # [heads,B]
        right = (found[..., None] == batch["tags"]).any(-1) * batch["weight"]
        sums += torch.cat([batch["weight"].sum()[None], right.sum(1)]).double()
    probe.train()
    count, *right = vit.all_reduce_sum(sums).tolist()
    return [hits / count for hits in right]


def open_probe_data(args, config):
    """(What of --data is trained on, what of it chooses the head, --val or None: data.Samples each,
    and the names of the classes)."""
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
    source = data.open_data(*args.data, **places)
    if len(source.classes) < 2:
        raise UserError(f"--data has {len(source.classes)} classes: there is nothing to tell "
                        "apart; images have the class of their folder, or a label")
    classes, box = [[name] for name in source.classes], central_box(args, config)
    train, held = (data.labelled(source, classes, "--data", part=part)
                   for part in ((0, 1 - args.held_back), (1 - args.held_back, 1)))
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    train = data.Samples(train, config.image, config.channels, crop, args.seed,
                         max_pixels=args.max_pixels)
    val = args.val and data.unshuffled(data.labelled(
        data.open_data(*args.val, **places), classes, "--val"), args, config, box)
    return train, data.unshuffled(held, args, config, box), val, source.classes


def linear(argv):
    args, config, told = parse_linear_flags(argv)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),)
    pool = args.pool if args.pool == "cls" else (
        "mean" if "fc_norm.weight" in told["shapes"] else "patches")
    if args.attentive and pool == "mean":
        raise UserError("--attentive reads normalised tokens, which a model with fc_norm has not")
    if args.plan:
        return vit.plan(args, lambda: ViT(config, 0, pool), example)
    device, rank, world = vit.start(args)

    # ---- data, and a model: a frozen encoder, and heads that are the same on every rank
    train, held, val, names = open_probe_data(args, config)
    encoder = load_encoder(args, config, told, device, "none" if args.attentive else args.pool)
    probe = Probe(config.width, len(names), len(args.rates), args.seed,
                  config.heads if args.attentive else 0).to(device)
    steps, micro, accumulate, peak = vit.derive(args, len(train.source), world)
    if not vit.open_run(args, "linear", {
            "what --data holds": train.source.source.fingerprint(),
            "what --val holds": val and val.source.source.fingerprint(),
            "classes": f"{len(names)} (CRC {data.crc(repr(names)):08x})"}, probe):
        return

    # ---- optimizer and state
    optimizer = torch.optim.SGD([{"params": [*head.parameters()], "scale": rate}
                                 for heads in (probe.heads, probe.attentive)
                                 for head, rate in zip(heads, args.rates)], lr=peak, momentum=0.9)
    state = vit.restore(args, probe, optimizer, {**vit.fresh_state(args, device), "half": False})
    if args.attentive and not state["step"]:
        probe.measure(encoder, held, args, device, rank, world)
    data.cut_bad_list(args, state)
    log = vit.Log(args, device, state["step"], steps, vit.forward_flops(
        lambda: ViT(config, 0, pool), example))
    positions = data.training_positions(state["step"], steps, args.batch, micro, rank, world)
    batches = data.load(train, positions, args.workers, device)

    def about():
        """What model.pt holds: the encoder with the head that is best on what was held back, a
        model for `classify --predict` and `--eval-only`; which head that is; all their shares."""
        shares = right_answers(encoder, probe, held, args, device, rank, world)
        best = shares.index(max(shares[:len(args.rates)]))
        weight, bias = probe.folded(best)
        weights = {**vit.whole_weights(encoder), "head.weight": weight.detach().cpu(),
                   "head.bias": bias.detach().cpu()}
        return {"model": weights, "stage": "linear", "classes": names, "config": {
            **asdict(config), "pool": pool, "crop": args.crop, "loss": "ce"},
            "samples": state["step"] * args.batch}, best, shares

    # ---- loop
    while state["step"] < steps:
        if log.evaluation_due(state["step"]):
            log.evaluated({"held_back": max(about()[2])})
        lr = vit.learning_rate(state["step"], steps, peak, args.warmup * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        features, labels, bad = [], [], []
        for _ in range(accumulate):
            batch = log.wait(batches)
            bad += batch["bad"]
            position = batch["position"].to(device, non_blocking=True)      # [B]
            labels.append(batch["tags"][:, 0].to(device, non_blocking=True))    # [B]
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            with torch.no_grad(), vit.autocast(args, device):
                x = encoder(data.normalise(images)).float()                 # [B,D] or [B,1+N,D]
            features.append(pooled(x, args.pool))                           # [B,D]
            for number in range(len(probe.attentive)):
                loss = F.cross_entropy(probe.attend(x, number), labels[-1])
                (loss / accumulate).backward()
        features, labels = (vit.all_gather_rows(torch.cat(part)) for part in (features, labels))
        logits = probe(features)                                            # [heads,B,K]
        per_head = torch.stack([F.cross_entropy(some, labels) for some in logits])  # [heads]
        per_head.sum().backward()
        vit.average_gradients(probe.attentive.parameters())
        lars(probe.parameters(), args.weight_decay)
        norm = vit.clip_gradients(probe, args.clip_grad)
        loss, norm, stop, due, found = vit.all_reduce_floats(
            (per_head.detach().min() / world, norm / world),
            (vit.stop_requested(), log.save_due(), len(bad)))
        finite = math.isfinite(norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        vit.note_step(state, finite, args.batch)
        data.note_bad(found, bad, args, state)
        log.step(state["step"], {"loss": loss, "lr": lr, "grad_norm": norm,
                                 "bad_samples": state["bad_samples"]})
        done = state["step"] == steps
        if stop or due or done or log.evaluation_due(state["step"]):
            vit.save(args, probe, optimizer, state, about()[0])
            log.saved()
        if stop and not done:
            return rank0_print(f"stopped after step {state['step']} of {steps}; the same command goes on")

    # ---- end: the chosen head, on --val
    content, best, shares = about()
    weight, bias = (content["model"][f"head.{part}"].to(device) for part in ("weight", "bias"))
    chosen = lambda images: F.linear(pooled(encoder(images).float(), args.pool), weight, bias)
    metrics = evaluate(chosen, val, args, device, rank, world, names) if val else {}
    metrics |= {"held_back": shares[best], "rate": args.rates[best]}
    if args.attentive:
        best = shares.index(max(shares[len(args.rates):]), len(args.rates)) - len(args.rates)
        attend = lambda images: probe.attend(encoder(images).float(), best)
        found = evaluate(attend, val, args, device, rank, world, names) if val else {}
        metrics |= {f"attentive_{name}": found[name] for name in ("loss", "top1", "top5")
                    if val}
        metrics |= {"attentive_rate": args.rates[best]}
    log.evaluated(metrics)
    vit.report(args, {**metrics, "samples": steps * args.batch})
    vit.finish(args)


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


def fit_linear(features, labels, K, penalty=1e-3):
    """Logistic regression on features [n,D], brought to length sqrt(D): weight [K,D] and bias [K]
    with the least mean cross-entropy plus penalty / 2 times the weight's squared length (ours)."""
    features = F.normalize(features, dim=1) * math.sqrt(features.shape[1])
    weight = torch.zeros(K, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(K, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) \
            + penalty / 2 * weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return weight.detach(), bias.detach()


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
    if config is None:
        raise UserError("lowshot needs pictures, not features: prompts are learned inside the "
                        "encoder")
    if args.parallel in ("fsdp", "hsdp"):
        raise UserError("lowshot gives each rank splits of its own, which need the whole encoder: "
                        "leave --parallel out")
    args.parallel = "ddp"
    train, val, classes, device, rank, world = open_features(args, config, told, "lowshot")
    encoder = load_encoder(args, config, told, device, "cls")
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
    sources = [data.open_data(*specs, **places) for specs in (args.data, args.val)]
    numbers = [table["index"] for table in (train, val)]
    tests = data.unshuffled(data.Chosen(sources[1], numbers[1], val["labels"]), args, config,
                            central_box(args, config))
    counts = np.bincount(train["labels"], minlength=len(classes))
    for shots in args.shots:
        if (few := int((counts < shots).sum())):
            rank0_print(f"{few} of {len(classes)} classes have fewer than {shots} images: all are used")
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    queries = torch.tensor(np.array(val["features"]), device=device)        # [m,D]
    queries = F.normalize(queries, dim=1) * math.sqrt(config.width)
    truth, results = torch.tensor(val["labels"], device=device), []
    jobs = [(shots, split) for shots in args.shots for split in range(args.splits)]
    for shots, split in jobs[rank::world]:
        chosen = few_of_each(train["labels"], shots, split)
        labels = torch.tensor(train["labels"][chosen], device=device)
        weight, bias = fit_linear(torch.tensor(train["features"][chosen], device=device), labels,
                                  len(classes))
        by_linear = (F.linear(queries, weight, bias).argmax(1) == truth).float().mean().item()
        samples = data.Samples(
            data.Chosen(sources[0], numbers[0][chosen], train["labels"][chosen]), config.image,
            config.channels, crop, split, max_pixels=args.max_pixels)
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

    encode("text") gives ids without <s> and </s>; `size` is the number of ids. `content` are the
    bytes of the file if they are known already. Raises UserError for any other kind of file."""

    def __init__(self, path, content=None):
        try:
            content = Path(path).read_bytes() if content is None else content
            model = json.loads(content)["model"]
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


def open_tokenizer(args, file_info):
    """The tokenizer of --tokenizer, or the one in --init's file, or bytes: returns (encode, number
    of ids, the tokenizer.json as uint8 [n] or None). Raises UserError."""
    content = file_info.get("tokenizer")
    if args.tokenizer:
        try:
            content = torch.frombuffer(bytearray(Path(args.tokenizer).read_bytes()),
                                       dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer {args.tokenizer} cannot be read: {error}") from error
    if content is None:
        return encode_bytes, 4 + 256, None
    tokenizer = Tokenizer(args.tokenizer or args.init, content.numpy().tobytes())
    return tokenizer.encode, tokenizer.size, content


def framed(ids, longest):
    """The ids between <s> and </s>, cut to `longest` with them."""
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
    # name:  width depth heads positions
    "nano":  (128,   4,   4,  104),     # ours
    "base":  (768,  12,  12,  514),     # XLM-R base, arXiv 1911.02116
    "large": (1024, 24,  16,  514),     # XLM-R large
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
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
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
        self.starts = {"vision_projection": config.width ** -0.5,
                       "text_projection": text.width ** -0.5, "logit_scale": math.log(1 / 0.07),
                       "text_encoder.token_embed.weight": 0.02,             # XLM-R
                       "text_encoder.position_embed.weight": 0.02}
        vit.init_weights(self)

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
        """Images [B,C,H,W], or their features [B,D], and their texts [B,N] to vectors [B,E] and
        [B,E], and the scale [1] of logits."""
        x = self.vision_encoder(images) if images.dim() == 4 else images    # [B,D]
        return project(x, self.vision_projection), self.embed_texts(tokens), self.logit_scale.exp()


def project(x, matrix):
    """Features [B,D] to vectors [B,E] of length 1."""
    return F.normalize((x.to(matrix.dtype) @ matrix).to(matrix.dtype), dim=1)


METHODS = "trunk", "embed_images", "embed_texts"        # called besides forward


# --------------------------------------------------------------------------------------
# Weights from files: ours, released zero-shot models in both layouts, Hugging Face XLM-R
# --------------------------------------------------------------------------------------

TEXT_RENAMES = [(re.compile(pattern), new) for pattern, new in (
    (r"^text_encoder\.(encoder\.transformer\.)?|^(xlm_)?roberta\.", ""),
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
    (r"\.output\.LayerNorm\.", ".norm2."))]


def text_names(tensors):
    """Rename a text tower's tensors to those of TextTransformer. Hugging Face's type embedding,
    which is the same for all tokens, is added to the positions."""
    renamed = vit.our_names(tensors, TEXT_RENAMES)
    token_type = renamed.pop("embeddings.token_type_embeddings.weight", None)
    if token_type is not None:
        renamed["position_embed.weight"] = renamed["position_embed.weight"] + token_type[:1]
    return {name: tensor for name, tensor in renamed.items()
            if not name.startswith(("lm_head.", "pooler.", "classifier."))
            and not name.endswith("position_ids")}


def tower_names(tensors):
    """Rename the tensors of a zero-shot file to those of Towers."""
    shared, text, vision = {}, {}, {}
    for name, tensor in tensors.items():
        name = re.sub(r"^((module|model|_orig_mod|clip)\.)+", "", name)
        if name in ("vision_projection", "text_projection", "logit_scale"):
            shared[name] = tensor.reshape(1) if name == "logit_scale" else tensor
        elif name.startswith("text_encoder."):
            text[name] = tensor
        else:
            vision[name] = tensor
    return {**shared,
            **{f"vision_encoder.{name}": tensor for name, tensor in vit.our_names(vision).items()},
            **{f"text_encoder.{name}": tensor for name, tensor in text_names(text).items()}}


def text_part(tensors):
    """The text tower's tensors of a zero-shot or XLM-R file, under TextTransformer's names."""
    towers = tower_names(tensors)
    text = {name.removeprefix("text_encoder."): tensor for name, tensor in towers.items()
            if name.startswith("text_encoder.")}
    return text or text_names(tensors)


def read_text_config(path):
    """The TextConfig of a file with a text tower, and what the file says of itself. Raises
    UserError."""
    tensors, file_info = vit.read_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in text_part(tensors).items()}
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    try:
        vocabulary, width = shapes["token_embed.weight"]
        positions, _ = shapes["position_embed.weight"]
        hidden, _ = shapes["blocks.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds no text tower that is known here: it lacks {error}; give a "
                        "released zero-shot file or Hugging Face's XLM-R") from error
    if hidden != 4 * width:
        raise UserError(f"the text tower of {path} has MLPs of {hidden} for a width of {width}; "
                        "only four times the width is supported")
    if "text" in file_info.get("config", {}):
        heads = file_info["config"]["text"]["heads"]
    else:
        beside = vit.read_json(Path(path).with_name("config.json"))
        heads = beside.get("num_attention_heads") if beside.get("hidden_size") == width else \
            {row[:2]: row[2] for row in TEXT_SIZES.values()}.get((width, depth))
    if heads is None:
        raise UserError(f"the text tower of {path} is {width} wide and {depth} deep, which none of "
                        f"{', '.join(TEXT_SIZES)} is, so its number of heads is unknown")
    return TextConfig(vocabulary, width, depth, heads, positions), file_info


# ======================================================================================
# Zero-shot: the loss
# ======================================================================================

def contrastive_loss(images, texts, all_images, all_texts, scale, right):
    """The loss of each pair [b]: the mean of two cross-entropies, of finding the text of an image
    among all and the image of a text (CLIP; LiT, section 3). `images`, `texts` [b,E] are the pairs
    number `right` [b] of `all_images`, `all_texts` [B,E], vectors of length 1; `scale` [1]
    multiplies cosines."""
    of_images = F.cross_entropy(scale * images @ all_texts.T, right, reduction="none")     # [b]
    of_texts = F.cross_entropy(scale * texts @ all_images.T, right, reduction="none")      # [b]
    return (of_images + of_texts) / 2


def global_loss(images, texts, scale):
    """The loss over the batch of all ranks, and its gradients for this rank's `images` and `texts`
    [b,E] and for `scale` [1].

    A rank compares its own pairs with everybody's, so that it never holds all B x B logits; the
    gradients that other ranks' comparisons give its vectors come back as a sum over ranks."""
    b, rank, world_size = len(images), vit.get_rank(), vit.get_world_size()
    all_images = vit.all_gather_rows(images.detach()).detach().requires_grad_()     # [B,E]
    all_texts = vit.all_gather_rows(texts.detach()).detach().requires_grad_()       # [B,E]
    scale = scale.detach().requires_grad_()                                         # [1]
    mine = slice(rank * b, rank * b + b)
    right = torch.arange(rank * b, rank * b + b, device=images.device)              # [b]
    loss = contrastive_loss(all_images[mine], all_texts[mine], all_images, all_texts, scale,
                            right).mean() / world_size
    loss.backward()
    image_gradients, text_gradients, scale_gradient = (
        vit.all_reduce_sum(tensor.grad) for tensor in (all_images, all_texts, scale))
    return vit.all_reduce_sum(loss.detach()), image_gradients[mine], text_gradients[mine], \
        scale_gradient


def logit_scale(model):
    """The factor [1] of cosines in logits, whole on every rank; every rank has to call it."""
    scale = model.logit_scale.detach().exp()
    return scale.full_tensor() if isinstance(scale, DTensor) else scale


@torch.no_grad()
def clamp_logit_scale(model):
    """Keep the factor of cosines at 100 or below (CLIP)."""
    scale = model.logit_scale
    (scale.to_local() if isinstance(scale, DTensor) else scale).clamp_(max=math.log(100))


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
    rows = [framed(some, longest) for some in ids]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = torch.zeros(len(texts), model.text_projection.shape[1])       # [n,E]
    size = 4 * args.micro_batch
    for at in range(0, len(order), size * vit.get_world_size()):
        mine = order[at + vit.get_rank() * size:][:size]
        with vit.autocast(args, device):
            tokens = padded([rows[i] for i in mine or order[:1]]).to(device)        # [b,N]
            vectors[mine] = model.embed_texts(tokens)[:len(mine)].cpu()     # [b,E]
    return vit.all_reduce_sum(vectors)


def class_vectors(model, classes, templates, encode, args, device):
    """The vector [K,E] of each class [[name]]: the mean over its names in all templates, brought to
    length 1 (CLIP, section 3.1.4; released evaluation)."""
    texts, owners = [], []
    for number, names in enumerate(classes):
        for name in names:
            texts += [template.replace("{}", name) for template in templates]
            owners += [number] * len(templates)
    vectors = embed_all(model, texts, encode, args, device)
    sums = torch.zeros(len(classes), vectors.shape[1])                      # [K,E]
    return F.normalize(sums.index_add_(0, torch.tensor(owners), vectors), dim=1)


@torch.no_grad()
def evaluate_towers(model, val, args, device, names, weights, encode):
    """The metrics of a source, every image once: zero-shot top-1 and top-5 and OUT/classes.txt
    where there are classes, with their `names` and their logits' `weights` [K,E], else None;
    retrieval where there are captions."""
    rows, vectors, positions = [], [], []
    for images, batch in data.validate(val, args, device, vit.get_rank(), vit.get_world_size()):
        with vit.autocast(args, device):
            x = model.embed_images(images)                                  # [B,E]
            if weights is not None:
                rows += answers(x @ weights.T, batch, args)
        seen = batch["weight"] > 0
        vectors.append(x[seen.to(device)].cpu())
        positions += batch["position"][seen].tolist()
    count = int(vit.all_reduce_sum(torch.tensor(len(positions))))
    metrics = {"count": count, "bad": len(val.source) - count}
    if weights is not None:
        parts = vit.gather_objects(rows)
        metrics = vit.on_rank_0(lambda: summarise(sum(parts, []), len(val.source), args, names))
    if data.has_captions(val.source):
        captions = [val.source.caption(i) for i in positions]
        told = [i for i, caption in enumerate(captions) if caption]
        parts = vit.all_gather_objects(
            ([captions[i] for i in told], torch.cat(vectors)[told].numpy()))
        captions = [caption for some, _ in parts for caption in some]
        images = torch.from_numpy(np.concatenate([part for _, part in parts]))      # [n,E]
        metrics |= retrieval(model, images, captions, encode, args, device)
    return metrics


def retrieval(model, images, captions, encode, args, device):
    """Recall at 1, 5, 10 of an image's caption among all captions, and of an image of a caption
    among all images, for vectors of images [n,E] and their n captions. Equal captions are one."""
    texts = sorted({*captions})
    number = {text: i for i, text in enumerate(texts)}
    own = torch.tensor([number[caption] for caption in captions], device=device)        # [n]
    images = images.to(device)                                              # [n,E]
    texts = embed_all(model, texts, encode, args, device).to(device)        # [m,E]
    hits, size = torch.zeros(2, 3), 4 * args.micro_batch
    first, step = size * vit.get_rank(), size * vit.get_world_size()
    for at in range(first, len(images), step):
        similar = images[at:at + size] @ texts.T                            # [c,m]
        right = similar.gather(1, own[at:at + size, None])                  # [c,1]
        better = (similar > right).sum(1)                                   # [c]
        hits[0] += torch.stack([(better < k).sum() for k in (1, 5, 10)]).cpu()
    for at in range(first, len(texts), step):
        similar = texts[at:at + size] @ images.T                            # [c,n]
        wrong = own != torch.arange(at, at + len(similar), device=device)[:, None]      # [c,n]
        right = similar.masked_fill(wrong, -2).max(1, keepdim=True).values
        better = (similar > right).sum(1)
        hits[1] += torch.stack([(better < k).sum() for k in (1, 5, 10)]).cpu()
    hits = vit.all_reduce_sum(hits) / torch.tensor([[len(images)], [len(texts)]])
    recalls = {f"{way}_recall{k}": share
               for way, row in zip(("image_to_text", "text_to_image"), hits.tolist())
               for k, share in zip((1, 5, 10), row)}
    return {**recalls, "captions": len(texts)}


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
    add("--tokenizer", metavar="FILE", help="XLM-R's tokenizer.json from Hugging Face, which the "
        "released models were trained with; default: the tokenizer of --init, else bytes")
    add("--text-model", choices=TEXT_SIZES, help="size of the text tower; default by model: nano, "
        "base for base, large from large on (paper)")
    add("--text-init", metavar="FILE", help="start the text tower from this file: Hugging Face's "
        "XLM-R (paper: XLM-R), or any zero-shot model; default: that of --init, or random weights")
    add("--unlock", action="store_true", help="train the image tower, too; default off (LiT)")
    add("--cache-features", metavar="DIR", help="compute the locked image tower's features of each "
        "image once, without augmentation, and keep them there; default off")
    add("--smallest-crop", type=float, metavar="SHARE", help="of the image's area that a random "
        "crop has; default by model, below")
    add("--classes", metavar="FILE", help="to choose from: a line for each class, its names "
        "separated by commas; default: the classes of --val")
    add("--templates", metavar="FILE", help="lines with {} in the place of a name; default: the "
        f"world's own for the world, else {len(TEMPLATES)} of ours")
    add("--texts", nargs="+", metavar="TEXT", help="with --predict: to choose from as they are, in "
        "any language, instead of --classes")
    args = parser.parse_args(argv)
    config, name, file_info = vit.choose_config(args, "zeroshot")
    is_zeroshot = "text_projection" in file_info.get("shapes", {})
    if (args.predict or args.eval_only) and not is_zeroshot:
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
        raise UserError("--cache-features needs a locked image tower: leave --unlock out")
    if (args.text_init or is_zeroshot) and args.text_model:
        raise UserError("the text tower is that of a file: leave --text-model out")
    vit.fill_recipe(args, {**TOWER_RECIPES[name], **TOWER_COMMON})
    data.choose_val(args)
    args.loss, args.crop = "ce", "all"
    args.pool = "mean" if "fc_norm.weight" in file_info.get("shapes", {}) else "cls"
    return args, config, name, file_info


def open_text(args, name, file_info):
    """(TextConfig, width of the common space, encode, the tokenizer.json as uint8 [n] or None).
    Raises UserError where they do not fit together."""
    embedding, shapes = TOWERS[name]["embedding"], file_info.get("shapes", {})
    if "text_projection" in shapes:
        embedding = shapes["text_projection"][1]
    if args.text_init or "text_projection" in shapes:
        text, file_info = read_text_config(args.text_init or args.init)
    else:
        text = TextConfig(0, *TEXT_SIZES[args.text_model or TOWERS[name]["text_model"]])
    encode, size, content = open_tokenizer(args, file_info)
    if text.vocabulary and (size > text.vocabulary or content is None and size < text.vocabulary):
        raise UserError(f"the text tower knows {text.vocabulary:,} ids, the tokenizer has "
                        f"{size:,}: give the one that it was trained with as --tokenizer (XLM-R's "
                        "tokenizer.json)")
    text.vocabulary = text.vocabulary or size
    if size < text.vocabulary:
        rank0_print(f"NOTE: the text tower knows {text.vocabulary:,} ids, the tokenizer has "
                    f"{size:,}: was it trained with this one?")
    return text, embedding, encode, content


def open_pairs(args, config, model, encode, device):
    """--data as data.Samples of images, or of their features with --cache-features, and the tokens
    of their captions; and a fingerprint of --data."""
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
    source, features = data.open_data(*args.data, **places), None
    fingerprint = source.fingerprint()
    if not data.has_captions(source):
        raise UserError('--data has no captions: give shards with .txt or a "caption" in .json, '
                        "a manifest with captions, or the world")
    choose_box = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    if args.cache_features:
        about = about_features(args, config, source)
        path = Path(args.cache_features) / f"{data.crc(repr(about)):08x}.npz"
        if not vit.on_rank_0(path.is_file):
            vit.on_rank_0(lambda: path.parent.mkdir(parents=True, exist_ok=True))
            samples = data.unshuffled(source, args, config, data.WHOLE_WIDTH)
            data.write_features(path, model.trunk, samples, args, device, vit.get_rank(),
                                vit.get_world_size(), about)
        table = data.read_features(path)
        source = data.Chosen(source, table["index"], table["labels"])
        features = table["features"]
    encode = functools.partial(encode_framed, encode=encode, longest=model.text_config.longest)
    return data.Samples(data.Captioned(source, encode), config.image, config.channels, choose_box,
                        args.seed, max_pixels=args.max_pixels, features=features), fingerprint


def read_class_names(path):
    """The classes [[name]] of --classes, a line each, names separated by commas; lines may be
    equal, as in CLIP's list of ImageNet's classes. Raises UserError."""
    classes = []
    for number, line in data.read_lines(path, "--classes"):
        names = [name.strip() for name in line.split(",") if name.strip()]
        if not names:
            raise UserError(f"--classes {path}, line {number} has no name: {line!r}")
        classes.append(names)
    return classes


def classes_of_val(classes, val):
    """Classes [[name]] to label `val` by: `classes`, or val's own in sorted order where none of
    their names is in `classes`, which then are in this order (ImageNet's n01440764, …)."""
    lines = Counter(name for names in classes for name in set(names))
    twice = [name for name in val.classes if lines[name] > 1]
    if twice:
        raise UserError(f"--classes has {twice[0]!r} in {lines[twice[0]]} lines, and --val has a "
                        "class of this name: name it in one line")
    if len(classes) != len(val.classes) or any(lines[name] for name in val.classes):
        return classes
    rank0_print(f"--classes names --val's {len(classes)} classes in order: {val.classes[0]} is "
                f"{classes[0][0]}, …, {val.classes[-1]} is {classes[-1][0]}")
    return [[name] for name in val.classes]


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
    classes = read_class_names(args.classes) if args.classes else []
    if args.predict or not args.val:
        return None, classes, templates
    val = data.open_data(*args.val, **places)
    classes = classes or [[name] for name in val.classes]
    if not classes and not data.has_captions(val):
        raise UserError("--val has neither classes nor captions: there is nothing to evaluate")
    if classes:
        val = data.labelled(val, classes_of_val(classes, val), "--val")
    return data.unshuffled(val, args, config, data.WHOLE_WIDTH), classes, templates


def zeroshot(argv):
    args, config, name, file_info = parse_zeroshot_flags(argv)
    text, embedding, encode, tokenizer = open_text(args, name, file_info)
    make = lambda: Towers(config, text, embedding, args.pool, locked=not args.unlock)
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
    if "text_projection" in file_info.get("shapes", {}):
        renew = ("text_encoder.*", "text_projection") if args.text_init else ()
        vit.load_weights(model, args.init, renew=renew, rename=tower_names)
    elif args.init:
        vit.load_weights(model.vision_encoder, args.init)
    if args.text_init:
        vit.load_weights(model.text_encoder, args.text_init, rename=text_part)

    def class_weights():
        """What multiplies the vector of an image to logits, [K,E], or None without classes."""
        if not classes:
            return None
        vectors = class_vectors(model, classes, templates, encode, args, device)    # [K,E]
        return logit_scale(model) * vectors.to(device)

    if args.predict:
        weights = class_weights()
        return data.print_predictions(lambda images: model.embed_images(images) @ weights.T, config,
                                      args, device, names)
    if args.eval_only:
        return vit.report(args, evaluate_towers(model, val, args, device, names, class_weights(),
                                                encode))

    # ---- data
    train, fingerprint = open_pairs(args, config, model, encode, device)
    steps, micro, accumulate, peak = vit.derive(args, len(train.source), world)
    if not vit.open_run(args, "zeroshot", {
            "what --data holds": fingerprint,
            "tokenizer": "bytes" if tokenizer is None else f"{len(tokenizer):,} bytes (CRC "
            f"{data.crc(tokenizer.numpy().tobytes()):08x})"}, model):
        return

    # ---- optimizer and state
    groups = vit.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
    state = vit.restore(args, model, optimizer, {**vit.fresh_state(args, device), "long_texts": 0})
    data.cut_bad_list(args, state)
    log = vit.Log(args, device, state["step"], steps, flops)
    positions = data.training_positions(state["step"], steps, args.batch, micro, rank, world)
    batches = data.load(train, positions, args.workers, device)
    model_info = {"config": {**asdict(config), "text": asdict(text)}, "stage": "zeroshot",
                  **({} if tokenizer is None else {"tokenizer": tokenizer})}
    examples = val and classes and data.examples(val, device)

    def draw_and_evaluate():
        weights = class_weights()
        if examples:
            data.draw_predictions(lambda images: model.embed_images(images) @ weights.T, examples,
                                  args, device, names)
        return evaluate_towers(model, val, args, device, names, weights, encode) if val else {}

    # ---- loop: the loss compares all vectors of the batch, whose graphs do not fit into memory.
    # GradCache (arXiv 2101.06983): first the gradients of the loss for all vectors, then from
    # these, a micro-batch at a time, the gradients for the weights.
    while state["step"] < steps:
        if log.evaluation_due(state["step"]):
            log.evaluated(draw_and_evaluate())
        lr = vit.learning_rate(state["step"], steps, peak, args.warmup * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # First pass: all vectors. A single micro-batch keeps its graph, and is not computed again.
        inputs, outputs, bad, long = [], [], [], 0
        for _ in range(accumulate):
            batch = log.wait(batches)
            bad += batch["bad"]
            tokens = batch["tags"].to(device, non_blocking=True)            # [B,N]
            long += int((batch["tags"] >= 0).sum(1).eq(text.longest).sum())
            tokens = tokens.masked_fill(tokens < 0, PAD)
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C] or [B,D]
            with vit.autocast(args, device):
                if not args.cache_features:
                    images = data.normalise(images)                         # [B,C,H,W]
                if not args.cache_features and not args.unlock:
                    images = model.trunk(images)                            # [B,D]
                with torch.set_grad_enabled(accumulate == 1):
                    outputs.append(wrapped(images, tokens))                 # [B,E] [B,E] [1]
            inputs.append((images, tokens))
        all_images, all_texts = (torch.cat([output[i].detach() for output in outputs])
                                 for i in (0, 1))                           # [b,E] [b,E]
        loss, image_gradients, text_gradients, scale_gradient = global_loss(
            all_images, all_texts, outputs[0][2])

        # Second pass: gradients for the weights, by the chain rule.
        gradients = zip(image_gradients.split(micro), text_gradients.split(micro))
        for i, (image_gradient, text_gradient) in enumerate(gradients):     # [B,E] [B,E]
            with vit.accumulating(wrapped, last=i == accumulate - 1):
                if accumulate > 1:
                    with vit.autocast(args, device):
                        outputs[i] = wrapped(*inputs[i])
                images, texts, scale = outputs[i]
                # Its gradients are the loss's. Ranks are averaged, these are to be summed.
                product = world * ((images * image_gradient).sum() + (texts * text_gradient).sum())
                product = product + (scale * scale_gradient).sum() / accumulate
                (product * state["scale"]).backward()

        norm = vit.clip_gradients(model, args.clip_grad, state["scale"])
        loss, norm, stop, due, count, long = vit.all_reduce_floats(
            (loss / world, norm / world), (vit.stop_requested(), log.save_due(), len(bad), long))
        finite = math.isfinite(norm)
        if finite:
            optimizer.step()
            clamp_logit_scale(model)
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
                     {**model_info, "samples": state["step"] * args.batch})
            log.saved()
        if stop and not done:
            return rank0_print(f"stopped after step {state['step']} of {steps}; "
                               "the same command goes on")

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
