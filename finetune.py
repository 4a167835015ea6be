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

    python finetune.py zeroshot --init maws_clip.pt --tokenizer sentencepiece.bpe.model --predict \\
        cat.jpg --texts "une photo de chat" "a photo of a dog"
"""

import functools
import math
import re
import struct
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
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
# classify: augmentation of pixels
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
    third of the area, of an aspect from 0.3 to 3.3, becomes normal noise (timm's, MAE's)."""
    B, C, H, W = images.shape
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
    return torch.where(inside[:, None], noise.reshape(images.shape), images)


# ======================================================================================
# classify: what the outputs of a model stand for
# ======================================================================================

def read_classes(path):
    """A file of a line an output, all names of its class separated by commas: [[name]]."""
    names = [[name.strip() for name in line.split(",")]
             for _, line in data.read_lines(path, "--classes")]
    for name, count in Counter(name for some in names for name in set(some)).items():
        if count > 1:
            raise UserError(f"--classes {path} has {name!r} in {count} lines; a name is of one "
                            "class")
    return names


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

    `classes` [[name]] are the model's, or K if its K outputs have no names; `names` are the data's,
    from `where`. They are matched by name; whole numbers that are no name, by number; K unnamed
    outputs and K classes, in order (ImageNet's). Raises UserError for classes of the data that the
    model lacks, unless a `class_map` says what counts."""
    if isinstance(classes, int):
        if len(names) == classes:
            rank0_print(f"the model does not name its {classes} outputs: taken as the {classes} "
                        f"classes of {where}, in alphabetical order")
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


def check_several(classes, where):
    """Raises UserError for fewer than two classes."""
    if len(classes) < 2:
        raise UserError(f"{where} has {len(classes)} classes: there is nothing to tell apart; "
                        "images have the class of their folder, or a label")


def names_of(sample, source):
    """The classes of a sample: that of its folder or label; or several, where labels are lists."""
    if not source.classes:
        return sample.get("tags", [])
    return [source.classes[sample["label"]]] if "label" in sample else []


def class_targets(sample, source, outputs):
    """The outputs that are right for a sample, each once."""
    return sorted({i for name in names_of(sample, source) for i in outputs.get(name, ())})


def times_labelled(c, source, outputs, part):
    """1 for each sample of a chunk that has a known class and is in `part`, else 0: int64 [n].

    A hash gives each sample a number in 0 … 1; `part` (low, high) are those from low to below
    high."""
    number_of = lambda name: 0 if name in outputs else -1
    rows, _ = data.pairs(source, c, number_of, "labels" if source.classes else "tags")
    chance = data.uniform(0, int(source.chunks[:c].sum()) + rows, "part", 1)[:, 0]
    rows = rows[(part[0] <= chance) & (chance < part[1])]
    return np.bincount(rows, minlength=int(source.chunks[c]))


def labelled(source, classes, where, class_map=None, part=(0, 1)):
    """(The data.Rows of a source whose class is known, targets_of(sample)), for data.Samples.

    `classes` as of outputs_of; `part` (low, high) takes a share of the images: parts of 0 … 1 that
    do not overlap have no image in common. Raises UserError where no image has a class."""
    if not isinstance(classes, int):
        check_several(classes, where)
    outputs = outputs_of(classes, source.classes or all_tags(source), where, class_map)
    rows = data.Rows(source.chunks, functools.partial(
        times_labelled, source=source, outputs=outputs, part=part))
    if len(rows) < len(source) and part == (0, 1):
        rank0_print(f"{where}: {len(source) - len(rows):,} of {len(source):,} images have no "
                    f"{'known ' if class_map else ''}class and are left out")
    if not len(rows):
        raise UserError(f"no image of {where} has a class: a folder each, or a label each")
    return rows, functools.partial(class_targets, source=source, outputs=outputs)


def all_tags(source):
    """All tags of a source as they are written, sorted; all ranks have to call it."""
    mine = {tag for c in data.my_part(len(source.chunks), "tags")
            for tag in source.words(c, "tags")[0]}
    return data.class_names_of(set().union(*vit.all_gather_objects(mine)))


def open_classes(args, config, told):
    """(--data as data.Samples or None, --val or None, the name of each output)."""
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
        source = data.open_data(*args.data, index_dir=args.index_dir)
        classes = read_classes(args.classes) if args.classes else [
            [name] for name in source.classes or all_tags(source)]
        rows, targets_of = labelled(source, classes, "--data")
        if args.loss == "ce" and not source.classes:
            raise UserError("labels of --data are lists, of several classes: give --loss bce or "
                            "softmax")
        crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
        augment = functools.partial(rand_augment, magnitude=args.randaugment)
        train = data.training_samples(source, args, config, crop, rows, targets_of,
                                      augment if args.randaugment else None)
    if args.val and not args.predict:
        source = data.open_data(*args.val, index_dir=args.index_dir)
        val = data.evaluation_samples(source, config, central_box(args, config),
                                      *labelled(source, classes, "--val", args.class_map))
        if classes == len(source.classes):
            classes = [[name] for name in source.classes]
    return train, val, [str(i) for i in range(classes)] if isinstance(classes, int) else [
        some[0] for some in classes]


# ======================================================================================
# classify: evaluation
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device, names):
    """Top-1 and top-5 over a source, every image once, whatever the ranks; also in OUT/classes.txt.

    An image with several right classes (as in "Are we done with ImageNet?", arXiv 2006.07159) is
    right where any of them is predicted. With --loss bce or softmax also "map", the mean over
    classes of the average precision (rank 0 then holds the logits of all images)."""
    rows = []
    for images, batch in data.validate(val, args, device):
        with vit.autocast(args, device):
            logits = model(images)                                          # [B,K]
        rows += answers(logits, batch, args)
    parts = vit.gather_objects(rows)
    return vit.on_rank_0(lambda: summarise(sum(parts, []), len(val), args, names))


def answers(logits, batch, args):
    """(position, right classes, five most probable, loss, logits where several may be right) of
    each image that counts."""
    right, K = batch["targets"].to(logits.device), logits.shape[1]             # [B,k]
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


@torch.no_grad()
def probabilities(model, pixels, args, device):
    """The probability of each output for pictures [B,H,W,C]: [B,K]. Every rank has to call it."""
    with vit.autocast(args, device):
        logits = torch.cat([model(data.normalise(part.to(device)))
                            for part in pixels.split(args.micro_batch)]).float()
    return logits.sigmoid() if args.loss == "bce" else logits.softmax(1)


def classify(argv):
    args, config, told = parse_classify_flags(argv)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),)
    make_with = lambda K: ViT(config, K, args.pool, HEAD_STD[args.recipe])
    if args.plan:
        return vit.plan(args, lambda: make_with(len(told.get("classes", range(1000)))), example)
    device, rank, world = vit.start(args)

    # ---- data and classes
    train, val, names = open_classes(args, config, told)
    K = len(names)

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
        pixels = data.read_pictures(args, config, central_box(args, config))
        return data.print_predictions(args, probabilities(model, pixels, args, device), names)
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, names))
    mixing = bool(args.mixup or args.cutmix)
    steps, micro, accumulate, peak = vit.derive(args, len(train), world, 1 + mixing)
    if not vit.open_run(args, "classify", {
            "what --data holds": train.source.fingerprint(),
            "what --val holds": val and val.source.fingerprint(),
            "classes": f"{K} (CRC {data.crc(repr(names)):08x})",
            "averaged weights": "on" if args.ema else "off"}, model):
        return
    examples = data.examples(val or data.evaluation_samples(
        train.source, config, rows=train.rows, targets_of=train.targets_of), device)

    # ---- optimizer and state
    groups = vit.decay_groups(model, args.weight_decay, NO_DECAY, args.layer_decay)
    optimizer = (torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
                 if args.optimizer == "adamw" else
                 torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if args.ema else {}
    state = {**vit.fresh_state(args, device), "best": -1.0}
    state = vit.restore(args, model, optimizer, state, ema)
    log = vit.Log(args, device, state["step"], steps, 3 * vit.forward_flops(make, example))
    batches = data.training_batches(train, args, state["step"], steps, micro, device)
    about = {"config": {**asdict(config), "pool": args.pool, "crop": args.crop, "loss": args.loss},
             "stage": "classify", "classes": names}

    def draw_and_evaluate():
        with vit.averaged(model, ema):
            data.draw_predictions(args, examples, probabilities(
                model, examples["images"], args, device), names)
            metrics = evaluate(model, val, args, device, names) if val else {}
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
            right = batch["targets"].to(device, non_blocking=True)             # [B,k]
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images, keep = data.normalise(images), None                     # [B,C,H,W]
            if args.erasing:
                images = erase(images, position, args.seed, args.erasing)
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
    source = data.open_data(*args.data, index_dir=args.index_dir)
    encoder = load_encoder(args, config, told, device, args.pool)
    path = Path(args.out) / "features.npz"
    samples = data.evaluation_samples(source, config, central_box(args, config))
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
        source = data.open_data(*specs, index_dir=args.index_dir)
        about = about_features(args, config, source)
        path = Path(args.features) / f"{data.crc(repr(about)):08x}.npz"
        if vit.on_rank_0(path.is_file):
            rank0_print(f"features of {' '.join(specs)} are kept in {path}")
        else:
            encoder = encoder or load_encoder(args, config, told, device, args.pool)
            vit.on_rank_0(lambda: path.parent.mkdir(parents=True, exist_ok=True))
            samples = data.evaluation_samples(source, config, central_box(args, config))
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
    check_several(classes, "--data")
    outputs = outputs_of([[name] for name in classes], tables[1]["classes"].tolist(), "--val")
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
        for images, batch in data.validate(samples, args, device):
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
    for images, batch in data.validate(samples, args, device):
        with vit.autocast(args, device):
            x = encoder(images).float()                                     # [B,D] or [B,1+N,D]
        logits = [*probe(pooled(x, args.pool)),
                  *(probe.attend(x, i) for i in range(len(probe.attentive)))]
        found = torch.stack(logits).argmax(-1).cpu()                        # [heads,B]
        right = (found[..., None] == batch["targets"]).any(-1) * batch["weight"]
        sums += torch.cat([batch["weight"].sum()[None], right.sum(1)]).double()
    probe.train()
    count, *right = vit.all_reduce_sum(sums).tolist()
    return [hits / count for hits in right]


def open_probe_data(args, config):
    """(What of --data is trained on, what of it chooses the head, --val or None: data.Samples each,
    and the names of the classes)."""
    source = data.open_data(*args.data, index_dir=args.index_dir)
    classes, box = [[name] for name in source.classes], central_box(args, config)
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    share = 1 - args.held_back
    train = data.training_samples(source, args, config, crop, *labelled(
        source, classes, "--data", part=(0, share)))
    held = data.evaluation_samples(source, config, box, *labelled(
        source, classes, "--data", part=(share, 1)))
    val = None
    if args.val:
        val_source = data.open_data(*args.val, index_dir=args.index_dir)
        val = data.evaluation_samples(val_source, config, box, *labelled(
            val_source, classes, "--val"))
    return train, held, val, source.classes


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
    steps, micro, accumulate, peak = vit.derive(args, len(train), world)
    if not vit.open_run(args, "linear", {
            "what --data holds": train.source.fingerprint(),
            "what --val holds": val and val.source.fingerprint(),
            "classes": f"{len(names)} (CRC {data.crc(repr(names)):08x})"}, probe):
        return

    # ---- optimizer and state
    optimizer = torch.optim.SGD([{"params": [*head.parameters()], "scale": rate}
                                 for heads in (probe.heads, probe.attentive)
                                 for head, rate in zip(heads, args.rates)], lr=peak, momentum=0.9)
    state = vit.restore(args, probe, optimizer, {**vit.fresh_state(args, device), "half": False})
    if args.attentive and not state["step"]:
        probe.measure(encoder, held, args, device, rank, world)
    log = vit.Log(args, device, state["step"], steps, vit.forward_flops(
        lambda: ViT(config, 0, pool), example))
    batches = data.training_batches(train, args, state["step"], steps, micro, device)

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
            labels.append(batch["targets"][:, 0].to(device, non_blocking=True))    # [B]
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
    metrics = evaluate(chosen, val, args, device, names) if val else {}
    metrics |= {"held_back": shares[best], "rate": args.rates[best]}
    if args.attentive:
        best = shares.index(max(shares[len(args.rates):]), len(args.rates)) - len(args.rates)
        attend = lambda images: probe.attend(encoder(images).float(), best)
        found = evaluate(attend, val, args, device, names) if val else {}
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
    batch = min(args.batch, len(train))
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
    sources = [data.open_data(*specs, index_dir=args.index_dir) for specs in (args.data, args.val)]
    targets_of = [functools.partial(class_targets, source=source, outputs=outputs_of(
        [[name] for name in classes], source.classes, "--val")) for source in sources]
    tests = data.evaluation_samples(sources[1], config, central_box(args, config), val["index"],
                                    targets_of[1])
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
        samples = data.Samples(sources[0], config.image, config.channels, crop, split,
                               rows=train["index"][chosen], targets_of=targets_of[0])
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


def has_captions(source):
    """Whether any of 100 images, from all over a source, has a caption; as rank 0 finds them."""
    spread = np.linspace(0, len(source) - 1, min(100, len(source))).astype(int).tolist()
    return vit.on_rank_0(lambda: any(source[i].get("caption", "").strip() for i in spread))


def caption_tokens(sample, encode, longest):
    """The framed ids of a sample's caption. Raises ValueError where it has none."""
    caption = sample.get("caption", "")
    if not caption.strip():
        raise ValueError("it has no caption")
    return framed(encode(caption), longest)


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
    for images, batch in data.validate(val, args, device):
        with vit.autocast(args, device):
            x = model.embed_images(images)                                  # [B,E]
            for name, table in vectors.items():
                rows[name] += answers(x @ table.T, batch, args)
        seen = batch["weight"] > 0
        kept.append(x[seen.to(device)].cpu())
        positions += batch["position"][seen].tolist()
    metrics = {"count": int(vit.all_reduce_sum(torch.tensor(len(positions))))}
    metrics["bad"] = len(val) - metrics["count"]
    for name in sorted(vectors, reverse=True):      # the last leaves its classes.txt
        parts = vit.gather_objects(rows[name])
        found = vit.on_rank_0(lambda: summarise(sum(parts, []), len(val), args, names))
        metrics = {**{name + key: found[key] for key in ("loss", "top1", "top5")}, **metrics}
    if has_captions(val.source):
        captions = [val.sample(i).get("caption") for i in positions]
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
    of their captions as "targets"."""
    source, features, rows = data.open_data(*args.data, index_dir=args.index_dir), None, None
    if not has_captions(source):
        raise UserError('--data has no captions: give shards with .txt or a "caption" in .json, '
                        "a manifest with captions, or the world")
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    if args.cache_features:
        about = about_features(args, config, source)
        path = Path(args.cache_features) / f"{data.crc(repr(about)):08x}.npz"
        if not vit.on_rank_0(path.is_file):
            vit.on_rank_0(lambda: path.parent.mkdir(parents=True, exist_ok=True))
            samples = data.evaluation_samples(source, config, data.WHOLE_WIDTH)
            data.write_features(path, model.trunk, samples, args, device, rank, world, about)
        table = data.read_features(path)
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
        classes = []
        if not has_captions(val):
            raise UserError("--val has neither classes nor captions: there is nothing to evaluate")
    chosen = labelled(val, classes, "--val") if classes else ()
    return data.evaluation_samples(val, config, data.WHOLE_WIDTH, *chosen), classes, templates


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
            chances = probabilities(logits, data.read_pictures(args, config), args, device)
            return data.print_predictions(args, chances, names)
        vectors = {name.replace("all", ""): table for name, table in vectors.items()}
        return vit.report(args, evaluate_towers(model, val, args, device, rank, world, names,
                                                vectors, encode))

    # ---- data
    train = open_pairs(args, config, model, encode, device, rank, world)
    steps, micro, accumulate, peak = vit.derive(args, len(train), world)
    if not vit.open_run(args, "zeroshot", {
            "what --data holds": train.source.fingerprint(),
            "tokenizer": "bytes" if content is None else f"{len(content):,} bytes (CRC "
            f"{data.crc(content.numpy().tobytes()):08x})"}, model):
        return

    # ---- optimizer and state
    groups = vit.decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
    state = vit.restore(args, model, optimizer, {**vit.fresh_state(args, device), "long_texts": 0})
    log = vit.Log(args, device, state["step"], steps, flops)
    batches = data.training_batches(train, args, state["step"], steps, micro, device)
    about = {"config": {**asdict(config), "text": asdict(text)}, "stage": "zeroshot",
             **({} if content is None else {"tokenizer": content})}
    examples = val and classes and data.examples(val, device)

    def draw_and_evaluate():
        vectors = vectors_now()
        if examples:
            table = factor(model) * vectors[""].to(device)                  # [K,E]
            logits = lambda images: model.embed_images(images) @ table.T
            chances = probabilities(logits, examples["images"], args, device)
            data.draw_predictions(args, examples, chances, names)
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
            tokens = batch["targets"].to(device, non_blocking=True)            # [B,N]
            long += int((batch["targets"] >= 0).sum(1).eq(text.longest).sum())
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
