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
"""

import functools
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import vit
from vit import UserError, ViT, say

# ======================================================================================
# classify: recipes and flags
# ======================================================================================

RECIPES = {
    # MAE's table 9; image size: the encoder's own, 224
    "mae": dict(
        optimizer="adamw", batch=1024, weight_decay=0.05, clip_grad=0.0, final_lr=1e-6,
        pool="mean", crop="centre", smallest_crop=0.08, randaugment=9.0, erasing=0.25, mixup=0.8,
        cutmix=1.0, smoothing=0.1, ema=0.0),
    # Not published; SWAG's (its issues 8 and 9). Warmup, smallest crop: not published, ours.
    # 512 pixels, 518 for patches of 14, squashed: paper, released code
    "maws": dict(
        optimizer="sgd", batch=512, weight_decay=0.0, clip_grad=0.0, final_lr=0.0,
        pool="cls", crop="squash", smallest_crop=0.08, randaugment=0.0, erasing=0.0, mixup=0.1,
        cutmix=0.0, smoothing=0.0, ema=0.9999,
        epochs=8, base_lr=3e-3, layer_decay=1.0, drop_path=0.0, warmup=0.0),
    # Ours, for a classroom: nano, tiny, small
    "ours": dict(
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
EXEMPT = "pos_embed", "cls_token"               # from weight decay (MAE)


def parse_classify_flags(argv):
    """All flags, with the recipe filled in: (args, Config, what --init's file says of itself)."""
    parser = vit.stage_parser("finetune.py classify", __doc__, {
        **{f"--recipe {name}:": recipe for name, recipe in RECIPES.items()},
        **{f"mae, {name}:": row for name, row in BY_MODEL.items()}})
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
    add("--optimizer", choices=("adamw", "sgd"), help="sgd: nesterov, momentum 0.9; default by "
        "recipe")
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
        recipe["pool"] = "mean" if "fc_norm.weight" in told["shapes"] else "cls"
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
    K, several, rows = len(names), args.loss != "ce", []
    for images, batch in data.validate(val, args, device, rank, world):
        with vit.autocast(args, device):
            logits = model(images)                                          # [B,K]
        right = batch["tags"].to(device)                                    # [B,k]
        loss = losses(logits, targets(right, K, 0.0, args.loss), args.loss)     # [B]
        top = logits.topk(min(5, K)).indices                                # [B,5]
        scores = logits.float().cpu().numpy() if several else [None] * len(logits)
        rows += [row[1:] for row in zip(
            batch["weight"].tolist(), batch["position"].tolist(), right.tolist(), top.tolist(),
            loss.tolist(), scores) if row[0]]
    parts = vit.to_rank_0(rows)
    return vit.on_rank_0(lambda: summarise(sum(parts, []), len(val.source), args, names))


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
    line = lambda share, name, count: f"{name}\t{count}\t{share:.3f}"
    path = Path(args.out) / "classes.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    vit.write_aside(path, lambda aside: aside.write_text("\n".join([
        "# class, images, top-1; from the worst on", *(line(*row) for row in recall),
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

def open_classes(args, told):
    """(--data as data.Tagged or None, --val or None, the name of each output)."""
    places = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}
    train, val = None, None
    if args.predict or args.eval_only:
        if "head.weight" not in told["shapes"]:
            raise UserError(f"{args.init} has no head: --predict and --eval-only need a finetuned "
                            "file, as runs/classify/model.pt")
        K, args.loss = told["shapes"]["head.weight"][0], told.get("config", {}).get("loss", "ce")
        classes = data.read_classes(args.classes) if args.classes else [
            [name] for name in told.get("classes", ())] or K
        if classes != K and len(classes) != K:
            raise UserError(f"--classes {args.classes} has {len(classes)} lines, but {args.init} "
                            f"has {K} outputs")
    else:
        source = data.open_data(*args.data, **places)
        found = [[name] for name in source.classes or data.all_names(source, "tags")]
        classes = data.read_classes(args.classes) if args.classes else found
        if len(classes) < 2:
            raise UserError(f"--data has {len(classes)} classes: there is nothing to tell apart; "
                            "images have the class of their folder, or a label")
        if args.loss == "ce" and not source.classes:
            raise UserError("labels of --data are lists, of several classes: give --loss bce or "
                            "softmax")
        train = data.labelled(source, classes, "--data")
    if args.val and not args.predict:
        val = data.labelled(data.open_data(*args.val, **places), classes, "--val", args.class_map)
        if classes == len(val.source.classes):
            classes = [[name] for name in val.source.classes]
    return train, val, [str(i) for i in range(classes)] if isinstance(classes, int) else [
        some[0] for some in classes]


def classify(argv):
    args, config, told = parse_classify_flags(argv)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),)
    make_with = lambda K: ViT(config, K, args.pool, HEAD_STD[args.recipe])
    if args.plan:
        return vit.plan(args, lambda: make_with(len(told.get("classes", range(1000)))), example)
    device, rank, world = vit.start(args)

    # ---- data and classes
    train, val, names = open_classes(args, told)
    K = len(names)
    choose_box = data.whole if args.crop == "squash" else functools.partial(
        data.centre_crop, share=224 / 256 if max(config.image) <= 224 else 1.0)
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
            say(f"a new head for {K} classes: the file's is for {outputs} "
                + ("hashtags" if "vocabulary" in told else "other classes"))
    if args.predict:
        return data.print_predictions(model, args, device, names, choose_box)
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
    groups = vit.decay_groups(model, args.weight_decay, EXEMPT, args.layer_decay)
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
        loss, norm, stop, due, found = vit.agree(
            (loss / world, norm / world), (vit.asked_to_stop(), log.save_due(), len(bad)))
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
            return say(f"stopped after step {state['step']} of {steps}; the same command goes on")

    # ---- end
    metrics = draw_and_evaluate()
    log.evaluated(metrics)
    vit.report(args, {**metrics, "samples": steps * args.batch,
                      **({"best": state["best"]} if val else {})})
    vit.finish(args)


# ======================================================================================
# Main
# ======================================================================================

TASKS = {"classify": classify}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        return say(__doc__)
    if argv[0] not in TASKS:
        raise UserError(f"the first word is the task, one of: {' '.join(TASKS)}; found {argv[0]!r}")
    TASKS[argv[0]](argv[1:])


if __name__ == "__main__":
    vit.run(main)
