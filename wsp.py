"""Stage 2: weakly supervised pretraining (WSP), on hashtags.

People have written billions of hashtags under pictures. They are noisy, many say nothing of what
is seen, and nobody was paid for them. A Vision Transformer learns to predict them: hashtags are
merged to a vocabulary, pictures with rare ones are shown more often, and the loss is a softmax over
all tags ("The effectiveness of MAE pre-pretraining for billion-scale pretraining", arXiv
2303.13496, section 3; the lineage is SWAG, arXiv 2201.08371). Done after stage 1, from its
encoder, the result is better than that of either stage alone: the paper's claim.

    torchrun wsp.py --init runs/mae/model.pt              # built-in world, nano: minutes on a CPU
    torchrun wsp.py                                       # from scratch, to compare: same values
    torchrun wsp.py --data 'shards/*.tar' --vocabulary-only --synonyms words.tsv   # look first
    torchrun --nnodes 8 --nproc-per-node 8 … wsp.py --init runs/mae/model.pt --data '/data/*.tar'
    python wsp.py --init runs/wsp/model.pt --predict cat.jpg dog.jpg               # their tags

Expected of the first, in ten minutes: a validation loss of about 3.41, where knowing nothing scores
3.78, and 0.41 of the tags among the five most probable; of the second 3.47 and 0.39. Nobody has
published the recipe of this stage: what is ours is marked so. The next stage is finetune.py, which
starts from runs/wsp/model.pt.
"""

import functools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import vit
from vit import UserError, ViT, rank0_print

RECIPES = vit.table("batch length base_lr smallest_crop", {
    # not published; base and up: 4e-4 at a batch of 8192, the usual values of such runs
    "nano":  (64,   {"samples": 100e3}, 0.004,   0.5),      # ours, for a classroom
    "tiny":  (256,  {"samples": 2e6},   1e-3,    0.35),     # ours
    "small": (1024, {"epochs": 30},     2.5e-4,  0.2),      # ours
    "base … 6.5b": (8192, {"epochs": 1}, 1.25e-5, 0.08),    # one epoch: paper
})
COMMON = {"weight_decay": 0.1, "clip_grad": 1.0, "warmup": 0.05}
BETAS = 0.9, 0.999          # not published; AdamW's own
EPOCH_REPEAT = 5 / 3               # 3 billion images make an epoch of 5 billion (paper)
NO_DECAY = "pos_embed", "cls_token"       # from weight decay, as in MAE's finetuning


def parse_flags(argv):
    """All flags, with the recipe filled in: (args, Config, what --init's file says of itself)."""
    parser = vit.stage_parser("wsp.py", __doc__, {**RECIPES, "all": COMMON})
    parser.set_defaults(data=["world:100000"])
    add = parser.add_argument_group("hashtags").add_argument
    add("--synonyms", metavar="FILE", help="lines of: alias, TAB, canonical tag; the paper merges "
        "by WordNet, see README; default: none, and the world's own for the world")
    add("--min-count", type=vit.positive, default=5, metavar="IMAGES",
        help="leave out tags of fewer; default 5 (ours)")
    add("--vocabulary-size", type=vit.positive, default=28_000, metavar="TAGS",
        help="the most frequent are kept; default 28,000 (paper)")
    add("--vocabulary-only", action="store_true", help="print the vocabulary and stop")
    add("--resample", choices=("sqrt", "none"), default="sqrt",
        help="sqrt (default): show images of rare tags more often, by the inverse root of the "
        "frequency of their rarest one, so that an epoch shows 5/3 of the tagged images (its size: "
        "paper; its rule: ours); none: each once")
    add("--max-repeat", type=vit.positive, default=10, metavar="TIMES",
        help="the most often that one image is shown in an epoch; default 10 (ours)")
    add("--loss", choices=("softmax", "bce"), help="softmax (default; the "
        "authors): cross-entropy with 1/k on each of k tags; bce: a yes or no for every tag")
    add("--drop-path", type=float, default=0.0, metavar="SHARE",
        help="of images that skip a branch of the last block; default 0, off (ours)")
    add("--smallest-crop", type=float, metavar="SHARE",
        help="of the image's area that a random crop has; default by model, below")
    args = parser.parse_args(argv)
    config, name, about = vit.choose_config(args, "wsp")
    vit.fill_recipe(args, {"loss": "softmax", **RECIPES[name], **COMMON})
    if args.vocabulary_only and (args.predict or args.eval_only):
        raise UserError("--vocabulary-only is about --data: leave --predict and --eval-only out")
    data.choose_val(args)
    return args, config, about


# ======================================================================================
# Vocabulary and resampling
# ======================================================================================

def choose_vocabulary(counts, min_count, size):
    """The most frequent tags [(tag, images)], those of many images first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = [(tag, count) for tag, count in ranked[:size] if count >= min_count]
    if not kept:
        raise UserError("the vocabulary is empty: " + (
            f"the most frequent tag, {ranked[0][0]}, is on {ranked[0][1]} images, --min-count is "
            f"{min_count}" if ranked else "no image of --data has a hashtag (.json tags, a "
            "manifest's tags, or # in a caption)"))
    return kept


def repeats(counts, scale, most):
    """How often, on average, an image is shown whose rarest tag is each of the tags: [K].

    clip(sqrt(t / f), 1, most): the inverse square root of the hashtag's frequency (the lineage's;
    the paper's own rule is not published). `counts` [K]: the images that have the tag, for f;
    `scale`: t, in images."""
    return np.clip(np.sqrt(scale / counts), 1, most)


def solve_scale(counts, by_rarest, most):
    """The scale with which an epoch shows 5/3 of the images (paper: 5B samples of 3B images).

    `counts` [K]: the images that have a tag; `by_rarest` [K]: those whose rarest tag it is."""
    low, high = counts.min(), counts.max() * most ** 2
    for _ in range(100):
        middle = math.sqrt(low * high)
        if (repeats(counts, middle, most) * by_rarest).sum() < EPOCH_REPEAT * by_rarest.sum():
            low = middle
        else:
            high = middle
    return high


def open_tags(args, source, places):
    """Count the tags of --data and resample it: (Tagged, what is known of the tags).

    What was found is kept beside the indexes of shards, so that a resumed run need not count."""
    synonyms = data.read_synonyms(args.synonyms) if args.synonyms else {}
    if not args.synonyms and all(map(data.is_world, args.data)):
        synonyms = {data.canonical(alias): tag for alias, tag in data.SYNONYMS.items()}
    key = data.crc(json.dumps([data.INDEX_VERSION, source.fingerprint(), synonyms, args.min_count,
                               args.resample, args.vocabulary_size, args.max_repeat]))
    cache = Path(places["index_dir"] or places["fallback"]) / f"tags-{key:08x}.npz"
    found = data.kept_arrays(cache, lambda: count_and_resample(args, source, synonyms))
    about = {**json.loads(found["about"].tobytes()), "synonyms": sorted(synonyms.items())}
    tagged = data.Tagged(source, numbers_in(about["vocabulary"], synonyms), found["repeats"],
                         found["sums"])
    rank0_print(f"{len(about['vocabulary']):,} tags on {about['tagged']:,} of {len(source):,} images, the "
                f"others are left out; an epoch shows {len(tagged):,}"
                + (f" (t is {about['scale']:.4g} images)" if about["scale"] else "")
                + f"; knowing nothing scores {about[args.loss]:.4f}")
    return tagged, about


def numbers_in(vocabulary, synonyms):
    """The numbers of a tag as it was written, as data.Tagged takes it."""
    number = {tag: i for i, tag in enumerate(vocabulary)}
    return functools.partial(data.tag_numbers, number=number, synonyms=synonyms)


def count_and_resample(args, source, synonyms):
    """The work of open_tags: {"repeats" by tag, "sums" of the chunks, "about": the rest, as JSON}.

    Three passes over the tags, which the ranks share: how many images have each; how many have it
    as their rarest; what an epoch that shows them repeatedly consists of."""
    counted = data.count_tags(source, synonyms)
    pairs = vit.on_rank_0(
        lambda: choose_vocabulary(counted, args.min_count, args.vocabulary_size))
    vocabulary, counts = [tag for tag, _ in pairs], np.array([n for _, n in pairs], np.float64)
    numbers = numbers_in(vocabulary, synonyms)
    by_rarest, by_length = data.count_rarest(source, numbers, len(counts))
    scale = solve_scale(counts, by_rarest, args.max_repeat) if args.resample == "sqrt" else 0.0
    tagged = data.Tagged(source, numbers, repeats(counts, scale, args.max_repeat))
    about = {"vocabulary": vocabulary, "counts": counts.astype(int).tolist(), "scale": scale,
             **entropy_baseline(*data.count_shown(tagged, len(counts)), len(tagged)),
             "tagged": int(by_rarest.sum()), "tags_an_image": by_length.astype(int).tolist()}
    return {"repeats": tagged.repeats, "sums": tagged.chunks,
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8)}


def entropy_baseline(mass, images, count):
    """The loss, in nats, of the best constant answer to `count` images, of either --loss.

    `mass` [K]: the sum of 1/k over the images that have a tag, whose entropy is softmax's; `images`
    [K]: how many these are, each of which is a yes or no for bce."""
    share = images / count
    return {"softmax": float(torch.special.entr(mass / mass.sum()).sum()),
            "bce": float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())}


def show_vocabulary(about):
    """--vocabulary-only: the most frequent and the rarest tags, and how many an image has."""
    pairs = [f"{tag} ({count:,})" for tag, count in zip(about["vocabulary"], about["counts"])]
    rank0_print("most frequent: " + " ".join(pairs[:40]))
    rank0_print("rarest: " + " ".join(pairs[40:][-40:]))
    for k, images in enumerate(about["tags_an_image"]):
        if images:
            rank0_print(f"{images:12,} images have {k if k < 64 else '64 or more'} known tags")


# ======================================================================================
# The loss
# ======================================================================================

def tag_losses(logits, tags, kind="softmax"):
    """The loss of each image [B] from logits [B,K] and the numbers of its tags [B,k], -1 for none.

    softmax: cross-entropy against 1/k on each of the image's k tags (the authors, on SWAG), so
    logsumexp less the mean logit of its tags: no multi-hot matrix [B,K] is made. bce: the mean over
    all K of the binary cross-entropy."""
    logits, known = logits.float(), tags >= 0                               # [B,K] [B,k]
    picked = (logits.gather(1, tags.clamp(min=0)) * known).sum(1)           # [B]
    if kind == "bce":
        return (F.softplus(logits).sum(1) - picked) / logits.shape[1]
    return logits.logsumexp(1) - picked / known.sum(1).clamp(min=1)


# ======================================================================================
# Evaluation
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device, rank, world, about):
    """Loss and recall over a source, every image with a known tag once, whatever the ranks.

    Recall at k is the share of an image's tags that are among the k most probable, averaged over
    images; "entropy" is what knowing nothing scores. OUT/tags.txt gets each tag's recall at 5."""
    K, tops = len(about["vocabulary"]), (1, 5, 10)
    sums = torch.zeros(5, dtype=torch.float64)          # images, their losses, their recalls
    by_tag = torch.zeros(3, K, dtype=torch.float64)     # images with it, of those found, mass
    for images, batch in data.validate(val, args, device, rank, world):
        tags, weight = batch["tags"].to(device), batch["weight"].double()   # [B,k] [B]
        with vit.autocast(args, device):
            logits = model(images)                                          # [B,K]
        losses = tag_losses(logits, tags, args.loss).cpu().double()         # [B]
        top = logits.topk(min(10, K)).indices                               # [B,10]
        hits = (tags[:, :, None] == top[:, None]).cpu()                     # [B,k,10]
        tags, known = tags.cpu(), tags.cpu() >= 0                           # [B,k] [B,k]
        share = known / known.sum(1, keepdim=True).clamp(min=1)             # [B,k]: 1/k
        recalls = [(hits[..., :k].any(-1) * share).sum(1) for k in tops]    # 3 x [B]
        sums += torch.stack([weight, losses * weight, *recalls]).sum(1)     # no weight: no tags
        found = hits[..., :5].any(-1)[known].double()
        for row, value in zip(by_tag, (torch.ones_like(found), found, share[known].double())):
            row.index_add_(0, tags[known], value)
    (count, *sums), by_tag = vit.all_reduce_sum(sums).tolist(), vit.all_reduce_sum(by_tag)
    if rank == 0:
        write_tags(Path(args.out) / "tags.txt", about, *by_tag[:2].tolist())
    metrics = {name: value / count for name, value in zip(
        ("loss", *(f"recall{k}" for k in tops)), sums)}
    return {**metrics, "entropy": entropy_baseline(by_tag[2], by_tag[0], count)[args.loss],
            "count": int(count), "bad": len(val.source) - int(count)}


def write_tags(path, about, images, found):
    """tags.txt: every tag with its recall at 5, the worst first, those without images last."""
    rows = sorted((hits / n if n else math.inf, tag, count, int(n)) for tag, count, n, hits in zip(
        about["vocabulary"], about["counts"], images, found))
    lines = ["# tag, images of --data, images of --val, recall at 5 on them: from the worst on",
             *(f"{tag}\t{count}\t{n}\t{recall if n else math.nan:.3f}"
               for recall, tag, count, n in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    vit.write_aside(path, lambda aside: aside.write_text("\n".join(lines) + "\n"))


# ======================================================================================
# Main
# ======================================================================================

def open_all(args, config, told):
    """The data with their tags: (--data as data.Tagged, --val as data.Samples, what is known of
    the tags); None for what is not needed. A model that is only used brings its vocabulary."""
    places, tagged = {"index_dir": args.index_dir, "fallback": Path(args.out) / "index"}, None
    if args.predict or args.eval_only:
        if told.get("stage") != "wsp":
            raise UserError(f"{args.init} has no vocabulary: --predict and --eval-only need a file "
                            "of this stage, as runs/wsp/model.pt")
        about, args.loss = told, told["config"]["loss"]
    else:
        tagged, about = open_tags(args, data.open_data(*args.data, **places), places)
    if not args.val or args.predict or args.vocabulary_only:
        return tagged, None, about
    val = data.Tagged(data.open_data(*args.val, **places),
                      numbers_in(about["vocabulary"], dict(about["synonyms"])))
    if not len(val):
        raise UserError("no image of --val has a tag of the vocabulary, "
                        f"{' '.join(about['vocabulary'][:8])} …")
    return tagged, data.unshuffled(val, args, config), about


def main(argv):
    args, config, told = parse_flags(argv)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),)
    if args.plan:
        rank0_print(f"planned for {args.vocabulary_size:,} tags: see --vocabulary-size")
        return vit.plan(args, lambda: ViT(config, args.vocabulary_size), example)
    device, rank, world = vit.start(args)

    # ---- data, and the vocabulary, which decides how many outputs the model has
    tagged, val, about = open_all(args, config, told)
    if args.vocabulary_only:
        return show_vocabulary(about)

    # ---- model: a checkpoint in --out, else --init, else random weights
    make = lambda: ViT(config, len(about["vocabulary"]))
    model, wrapped = vit.build(make, args, device)
    if args.init:
        same = told.get("vocabulary") == about["vocabulary"]
        vit.load_weights(model, args.init, renew=() if same else ("head.*",))
        if "vocabulary" in told and not same:
            rank0_print(f"NOTE: a new head for {len(about['vocabulary'])} tags: --init's vocabulary of "
                        f"{len(told['vocabulary'])} is another one")
    if args.predict:
        return data.print_predictions(model, config, args, device, about["vocabulary"])
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, rank, world, about))
    crop = functools.partial(data.random_resized_crop, scale=(args.smallest_crop, 1.0))
    train = data.Samples(tagged, config.image, config.channels, crop, args.seed,
                         max_pixels=args.max_pixels)
    steps, micro, accumulate, peak = vit.derive(args, len(tagged), world)
    words = data.crc(json.dumps([about["vocabulary"], about["synonyms"]]))
    if not vit.open_run(args, "wsp", {
            "what --data holds": tagged.source.fingerprint(),
            "what --val holds": val and val.source.source.fingerprint(),
            "vocabulary": f"{len(about['vocabulary'])} tags (CRC {words:08x})"}, model):
        return
    examples = data.examples(val or data.unshuffled(tagged, args, config), device)

    # ---- optimizer and state
    groups = vit.decay_groups(model, args.weight_decay, NO_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
    state = vit.restore(args, model, optimizer, vit.fresh_state(args, device))
    data.cut_bad_list(args, state)
    log = vit.Log(args, device, state["step"], steps, 3 * vit.forward_flops(make, example))
    positions = data.training_positions(state["step"], steps, args.batch, micro, rank, world)
    batches = data.load(train, positions, args.workers, device)
    describe = {"config": {**asdict(config), "loss": args.loss}, "stage": "wsp",
                **{key: about[key] for key in ("vocabulary", "counts", "synonyms")}}

    def draw_and_evaluate():
        data.draw_predictions(model, examples, args, device, about["vocabulary"])
        return evaluate(model, val, args, device, rank, world, about) if val else {}

    # ---- loop
    while state["step"] < steps:
        if log.evaluation_due(state["step"]):
            log.evaluated(draw_and_evaluate())
        lr = vit.learning_rate(state["step"], steps, peak, args.warmup * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, bad = torch.zeros((), device=device), []
        for part in range(accumulate):
            batch = log.wait(batches)
            bad += batch["bad"]
            position = batch["position"].to(device, non_blocking=True)      # [B]
            tags = batch["tags"].to(device, non_blocking=True)              # [B,k]
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images, keep = data.normalise(images), None                     # [B,C,H,W]
            if args.drop_path:
                numbers = data.uniform(args.seed, position, "drop path", 2 * config.depth)
                keep = vit.drop_path(numbers.reshape(len(images), -1, 2), args.drop_path)
            with vit.accumulating(wrapped, last=part == accumulate - 1):
                with vit.autocast(args, device):
                    logits = wrapped(images, keep)                          # [B,K]
                part_loss = tag_losses(logits, tags, args.loss).mean() / accumulate
                (part_loss * state["scale"]).backward()
            loss += part_loss.detach()
        norm = vit.clip_gradients(model, args.clip_grad, state["scale"])
        loss, norm, stop, due, found = vit.all_reduce_floats(
            (loss / world, norm / world), (vit.stop_requested(), log.save_due(), len(bad)))
        finite = math.isfinite(norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        vit.note_step(state, finite, args.batch)
        data.note_bad(found, bad, args, state)
        log.step(state["step"], {"loss": loss, "entropy": about[args.loss], "lr": lr,
                                 "grad_norm": norm, "bad_samples": state["bad_samples"]})

        done = state["step"] == steps
        # Before an evaluation too: what interrupts it costs no step.
        if stop or due or done or log.evaluation_due(state["step"]):
            vit.save(args, model, optimizer, state,
                     {**describe, "samples": state["step"] * args.batch})
            log.saved()
        if stop and not done:
            return rank0_print(f"stopped after step {state['step']} of {steps}; the same command goes on")

    # ---- end
    metrics = draw_and_evaluate()
    log.evaluated(metrics)
    vit.report(args, {**metrics, "samples": steps * args.batch})
    vit.finish(args)


if __name__ == "__main__":
    vit.run(main)
