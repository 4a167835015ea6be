"""Stage 2: weakly supervised pretraining (WSP) on hashtags.

People have written billions of hashtags under pictures. They are noisy, but cost nothing. A Vision
Transformer learns to predict them: hashtags are mapped to a vocabulary, images with rare ones are
repeated, and the loss is a softmax over the vocabulary ("The effectiveness of MAE pre-pretraining
for billion-scale pretraining", arXiv 2303.13496, section 3; after SWAG, arXiv 2201.08371).

The one idea of the paper is where this training starts: from the encoder of stage 1, whose decoder
is thrown away, instead of from random weights. Nothing else changes, and the result is better than
that of either stage alone.

    torchrun wsp.py --init runs/mae/model.pt              # built-in world, nano: minutes on a CPU
    torchrun wsp.py                                       # without MAE, to compare: the same recipe
    torchrun wsp.py --data 'shards/*.tar' --vocabulary-only --synonyms words.tsv   # look first
    torchrun --nnodes 8 --nproc-per-node 8 … wsp.py --init runs/mae/model.pt --data '/data/*.tar'
    python wsp.py --init runs/wsp/model.pt --predict cat.jpg dog.jpg               # their tags

Expected of the first, in ten minutes: a validation loss of about 3.41 (the entropy of the tags,
3.78, is the lowest loss that is possible without looking at the picture), and 0.41 of an image's
tags among the five most probable; of the second 3.47 and 0.39. The recipe of this stage is not
published: our choices are marked. The next stage is finetune.py, which starts from
runs/wsp/model.pt.
"""

import functools
import json
import math
import unicodedata
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import vit
from vit import UserError, ViT, rank0_print

# ======================================================================================
# Hashtags: from what people write to a vocabulary
# ======================================================================================

@functools.lru_cache(1 << 18, typed=True)      # most tags of a shard are on many others too
def canonical(tag):
    """The form in which hashtags are compared: Unicode NFKC, casefold, no # and no separators.

    "#Beach_Life" and "beach-life" are one; accents, CJK and emoji stay, but not the marks that
    choose how an emoji is drawn. "" where nothing is left."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", str(tag)).casefold())
    # Letters, marks, numbers and symbols stay; punctuation, spaces and control characters do not.
    return "".join(c for c in text if unicodedata.category(c)[0] in "LMNS"
                   and c not in "\ufe0e\ufe0f")


def read_synonyms(path):
    """A file of lines "alias TAB canonical tag" as {alias: the tag at the end of its chain}.

    Raises UserError for a line of another form, an alias of two meanings, and a cycle."""
    meaning = {}
    for number, line in data.read_lines(path, "--synonyms"):
        if line.startswith("# "):
            continue
        words = [canonical(word) for word in line.split("\t")]
        if len(words) != 2 or not all(words):
            raise UserError(f"{path}, line {number}: not an alias, a TAB and a tag: {line!r}")
        alias, tag = words
        if alias != tag and meaning.setdefault(alias, tag) != tag:
            raise UserError(f"{path}, line {number}: {alias} means {meaning[alias]} and {tag}")
    ends = {}
    for alias in meaning:
        chain = [alias]
        while chain[-1] in meaning:
            chain.append(meaning[chain[-1]])
            if chain[-1] in chain[:-1]:
                raise UserError(f"{path}: a cycle: {' → '.join(chain)}")
        ends[alias] = chain[-1]
    return ends


def tag_number(numbers, tag):
    """The number of a tag, spelled in any way, among {canonical tag: number}, or -1."""
    return numbers.get(canonical(tag), -1)


def number_in(vocabulary, synonyms):
    """The function from a tag to its number in a vocabulary [tag]; workers can pickle it."""
    numbers = {tag: i for i, tag in enumerate(vocabulary)}
    numbers |= {alias: numbers[tag] for alias, tag in synonyms.items() if tag in numbers}
    return functools.partial(tag_number, numbers)


def tag_targets(sample, number_of):
    """The numbers of a sample's tags, each once."""
    return sorted({number_of(tag) for tag in sample.get("tags", ())} - {-1})


def count_tags(source, synonyms):
    """On how many images each canonical tag is: a Counter, empty on all ranks but 0."""
    numbers, counts, total = {}, Counter(), Counter()

    def number_of(tag):
        tag = canonical(tag)
        return numbers.setdefault(synonyms.get(tag, tag), len(numbers)) if tag else -1

    for c in data.my_part(len(source.chunks), "counting tags"):
        found, images = np.unique(data.pairs(source, c, number_of)[1], return_counts=True)
        counts.update(dict(zip(found.tolist(), images.tolist())))
    # Rare tags may be many millions: rank 0 alone needs them, and takes one rank's at a time.
    for part in vit.objects_in_turn({tag: counts[number] for tag, number in numbers.items()}):
        total.update(part)
    return total


def choose_vocabulary(counts, min_count, size):
    """The most frequent tags, [(tag, images)], from the most frequent to the rarest one."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = [(tag, count) for tag, count in ranked[:size] if count >= min_count]
    if not kept:
        raise UserError("the vocabulary is empty: " + (
            f"the most frequent tag, {ranked[0][0]}, is on {ranked[0][1]} images, --min-count is "
            f"{min_count}" if ranked else "no image of --data has a hashtag (.json tags, a "
            "manifest's tags, or # in a caption)"))
    return kept


# ======================================================================================
# Resampling: images of rare tags are shown more often
# ======================================================================================

def repeats(frequency, t):
    """r(tag) = clip(sqrt(t / f), 1, MAX_REPEAT): float64 [K]. `frequency` [K] is f, the number of
    images that have the tag.

    Images whose rarest tag it is are shown r(tag) times in an epoch, on average over these images.
    The inverse square root is that of the paper's predecessors (SWAG); the paper's own rule is not
    published."""
    return np.clip(np.sqrt(t / frequency), 1, MAX_REPEAT)


def solve_t(frequency, by_rarest):
    """The t for which an epoch has 5/3 as many samples as there are images with a known tag (paper:
    5B of 3B). There is one, since MAX_REPEAT is more.

    `by_rarest` [K] is the number of images whose rarest tag is each tag, so an epoch shows the sum
    of by_rarest x r(tag). This sum grows with t: bisection, from a t that repeats no image to one
    that repeats all of them MAX_REPEAT times."""
    low, high = frequency.min(), frequency.max() * MAX_REPEAT ** 2
    for _ in range(100):
        t = math.sqrt(low * high)
        if (by_rarest * repeats(frequency, t)).sum() < EPOCH_REPEAT * by_rarest.sum():
            low = t
        else:
            high = t
    return high


def rarest_tags(rows, tags):
    """The rarest tag of each image with a tag: (rows, tags), int64 [m] each. data.pairs sorts the
    tags of an image by number, and rarer tags have larger numbers: it is the last of each row."""
    last = np.diff(rows, append=-1) != 0
    return rows[last], tags[last]


def times_shown(c, source, number_of, r, pairs=None):
    """How often an epoch shows each image of chunk c: int64 [n]; 0 without a known tag. `pairs` are
    the chunk's data.pairs if they are read already.

    It is r [K] of the image's rarest tag, rounded up or down at random. The random number is a hash
    of the image's number, so that it is the same in every epoch and nothing has to be stored."""
    rows, rarest = rarest_tags(*(pairs or data.pairs(source, c, number_of)))    # [m] [m]
    first = int(source.chunks[:c].sum())
    times = np.zeros(int(source.chunks[c]), np.int64)
    times[rows] = r[rarest] + data.uniform(0, first + rows, "repeat", 1)[:, 0]
    return times


def constant_loss(mass, images, count):
    """The loss, in nats, of the best constant prediction for `count` images: {"softmax", "bce"}.

    softmax: the entropy of the shares of `mass` [K], the sum of 1/k over the images with a tag.
    bce: the mean entropy of having a tag or not; `images` [K] have it."""
    share = images / count
    return {"softmax": float(torch.special.entr(mass / mass.sum()).sum()),
            "bce": float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())}


def resample(args, source, synonyms):
    """The vocabulary of a source and what an epoch shows of it, as a dict of arrays.

    Three passes over the tags, shared among ranks: count the images of each tag; count the images
    whose rarest tag it is, and solve for t; count how often the images of each chunk are shown."""
    counted = count_tags(source, synonyms)
    kept = vit.on_rank_0(lambda: choose_vocabulary(counted, args.min_count, args.vocabulary_size))
    vocabulary, K = [tag for tag, _ in kept], len(kept)
    frequency = np.array([images for _, images in kept])                    # [K]
    number_of = number_in(vocabulary, synonyms)

    by_rarest = torch.zeros(K, dtype=torch.int64)
    for c in data.my_part(len(source.chunks), "rarest tags"):
        _, rarest = rarest_tags(*data.pairs(source, c, number_of))
        by_rarest += torch.from_numpy(np.bincount(rarest, minlength=K))
    by_rarest = vit.all_reduce_sum(by_rarest).numpy()                       # [K]
    t = solve_t(frequency, by_rarest) if args.resample == "sqrt" else 0.0
    r = repeats(frequency, t)                                               # [K]; 1 for t = 0

    shown = torch.zeros(len(source.chunks), dtype=torch.int64)
    mass, images = torch.zeros(2, K, dtype=torch.float64)
    for c in data.my_part(len(source.chunks), "resampling"):
        rows, tags = data.pairs(source, c, number_of)                       # [m] [m]
        times = times_shown(c, source, number_of, r, (rows, tags))          # [n]
        shown[c] = int(times.sum())
        k = np.bincount(rows, minlength=len(times))     # known tags of each image, [n]
        mass += torch.from_numpy(np.bincount(tags, times[rows] / k[rows], K))
        images += torch.from_numpy(np.bincount(tags, times[rows], K))
    shown, mass, images = (vit.all_reduce_sum(part) for part in (shown, mass, images))
    return {"vocabulary": np.array(vocabulary), "counts": frequency, "r": r,
            "shown": shown.numpy(), "tagged": by_rarest.sum(),
            **constant_loss(mass, images, int(shown.sum()))}


def open_tags(args, source):
    """Count the tags of --data and resample it: (data.Rows, targets_of, what is known of the tags).

    What was counted is kept in --index-dir or --out, so that a resumed run need not count again."""
    synonyms = read_synonyms(args.synonyms) if args.synonyms else {}
    if not args.synonyms and all(map(data.is_world, args.data)):
        synonyms = {canonical(alias): tag for alias, tag in data.SYNONYMS.items()}
    key = data.crc(repr([source.fingerprint(), sorted(synonyms.items()), args.min_count,
                         args.resample, args.vocabulary_size]))
    path = Path(args.index_dir or args.out) / f"tags-{key:08x}.npz"
    found = data.kept_arrays(path, lambda: resample(args, source, synonyms))
    tag_info = {name: np.asarray(value).tolist() for name, value in found.items()}
    tag_info["synonyms"] = sorted(synonyms.items())
    number_of = number_in(tag_info["vocabulary"], synonyms)
    times = functools.partial(times_shown, source=source, number_of=number_of, r=found["r"])
    rows = data.Rows(source.chunks, times, found["shown"])
    rank0_print(f"{len(tag_info['vocabulary']):,} tags on {tag_info['tagged']:,} of "
                f"{len(source):,} images, the others are left out; an epoch shows {len(rows):,}; "
                f"entropy of the tags {tag_info[args.loss]:.4f}")
    return rows, functools.partial(tag_targets, number_of=number_of), tag_info


def show_vocabulary(tag_info):
    """--vocabulary-only: the most frequent and the rarest tags."""
    pairs = [f"{tag} ({count:,})" for tag, count in zip(tag_info["vocabulary"], tag_info["counts"])]
    rank0_print("most frequent: " + " ".join(pairs[:40]))
    if pairs[40:]:
        rank0_print("rarest: " + " ".join(pairs[40:][-40:]))


# ======================================================================================
# The loss
# ======================================================================================

def tag_losses(logits, targets, kind="softmax"):
    """The loss of each image [B], from logits [B,K] and the numbers of its tags [B,k], filled up
    with -1.

    softmax: the cross-entropy against 1/k on each of the image's k tags (the authors, on SWAG).
    Since -sum_t 1/k log softmax(z)_t = logsumexp(z) - mean_t z_t over the tags t, no matrix [B,K]
    of targets is made. bce: the mean over all K of the binary cross-entropy."""
    logits, known = logits.float(), targets >= 0                            # [B,K] [B,k]
    tag_logits = (logits.gather(1, targets.clamp(min=0)) * known).sum(1)    # [B]
    if kind == "bce":
        return (F.softplus(logits).sum(1) - tag_logits) / logits.shape[1]
    return logits.logsumexp(1) - tag_logits / known.sum(1).clamp(min=1)


# ======================================================================================
# Flags and recipes
# ======================================================================================

RECIPES = {     # not published; base and up: 4e-4 at a batch of 8192, usual values for such runs
    "nano": dict(batch=64, samples=100_000, base_lr=0.004, smallest_crop=0.5),      # ours
    "tiny": dict(batch=256, samples=2_000_000, base_lr=1e-3, smallest_crop=0.35),   # ours
    "small": dict(batch=1024, epochs=30, base_lr=2.5e-4, smallest_crop=0.2),        # ours
    **dict.fromkeys(("base", "large", "huge", "2b", "6.5b"), dict(
        batch=8192, epochs=1, base_lr=1.25e-5, smallest_crop=0.08)),        # one epoch: paper
}
ALL_MODELS = dict(loss="softmax", weight_decay=0.1, clip_grad=1.0, warmup=0.05)
BETAS = 0.9, 0.999                      # not published; AdamW's own
NO_DECAY = "pos_embed", "cls_token"     # no weight decay, as in MAE's finetuning
EPOCH_REPEAT = 5 / 3                    # 3 billion images make an epoch of 5 billion (paper)
MAX_REPEAT = 10                         # most repeats of an image in an epoch (ours)


def parse_flags(argv):
    """All flags, with the recipe filled in: (args, Config, file_info of --init)."""
    parser = vit.stage_parser("wsp.py", __doc__, {**RECIPES, "all": ALL_MODELS})
    parser.set_defaults(data=["world:100000"])          # all tags are counted first
    add = parser.add_argument_group("hashtags").add_argument
    add("--synonyms", metavar="FILE", help="lines of: alias, TAB, canonical tag; the paper merges "
        "by WordNet, see README; default: none, but the world's own for the world")
    add("--min-count", type=vit.positive, default=5, metavar="IMAGES",
        help="leave out tags of fewer images; default %(default)s (ours)")
    add("--vocabulary-size", type=vit.positive, default=28_000, metavar="TAGS",
        help="the most frequent tags are kept; default %(default)s (paper)")
    add("--vocabulary-only", action="store_true", help="print the vocabulary and stop")
    add("--resample", choices=("sqrt", "none"), default="sqrt", help="sqrt (default): repeat "
        "images of rare tags, by the inverse square root of their rarest tag's frequency, so that "
        "an epoch has 5/3 as many samples as images (its length: paper; the rule: ours); none: "
        "show each image once")
    add("--loss", choices=("softmax", "bce"), help="softmax (default; SWAG's authors): "
        "cross-entropy with 1/k on each of k tags; bce: binary cross-entropy for every tag")
    add("--smallest-crop", type=vit.number(1e-9, 1), metavar="SHARE",
        help="smallest area of a random crop, as a share of the image's; default by model")
    args = parser.parse_args(argv)
    config, name, file_info = vit.choose_config(args, "wsp")
    recipe = {**ALL_MODELS, **RECIPES[name]}
    if args.predict or args.eval_only:
        recipe["loss"] = file_info.get("config", {}).get("loss", "softmax")
    vit.fill_recipe(args, recipe)
    data.choose_val(args)
    return args, config, file_info


# ======================================================================================
# Evaluation
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device, tag_info):
    """Loss and recall over a source, every image with a known tag once at any number of ranks;
    "entropy" is the lowest loss that is possible without looking at the picture.

    Recall at n is the share of an image's tags that are among the n most probable, averaged over
    images. OUT/tags.txt gets each tag's recall at 5."""
    K, tops = len(tag_info["vocabulary"]), (1, 5, 10)
    sums = torch.zeros(5, dtype=torch.float64)          # images, their losses, their 3 recalls
    by_tag = torch.zeros(3, K, dtype=torch.float64)     # images with it, found in top 5, sum of 1/k
    for images, batch in data.validate(val, args, device):
        targets, weight = batch["targets"].to(device), batch["weight"].double()     # [B,k] [B]
        with vit.autocast(args, device):
            logits = model(images)                                          # [B,K]
        losses = tag_losses(logits, targets, args.loss).cpu().double()      # [B]
        top = logits.topk(min(10, K)).indices                               # [B,top]
        hits = (targets[:, :, None] == top[:, None]).cpu()                  # [B,k,top]
        targets, known = targets.cpu(), targets.cpu() >= 0                  # [B,k] [B,k]
        share = known / known.sum(1, keepdim=True).clamp(min=1)             # [B,k]: 1/k
        recalls = [(hits[..., :n].any(-1) * share).sum(1) for n in tops]    # 3 x [B]
        # Images that could not be read have weight 0 and no tags, so they add nothing.
        sums += torch.stack([weight, losses * weight, *recalls]).sum(1)
        found = hits[..., :5].any(-1)[known].double()
        by_tag[0].index_add_(0, targets[known], torch.ones_like(found))
        by_tag[1].index_add_(0, targets[known], found)
        by_tag[2].index_add_(0, targets[known], share[known].double())
    (count, *sums), by_tag = vit.all_reduce_sum(sums).tolist(), vit.all_reduce_sum(by_tag)
    if vit.get_rank() == 0:
        write_tags(Path(args.out) / "tags.txt", tag_info, *by_tag[:2].tolist())
    metrics = {name: value / count for name, value in zip(
        ("loss", *(f"recall{n}" for n in tops)), sums)}
    return {**metrics, "entropy": constant_loss(by_tag[2], by_tag[0], count)[args.loss],
            "count": int(count), "bad": len(val) - int(count)}


def write_tags(path, tag_info, images, found):
    """Write tags.txt: each tag with its recall at 5, the worst first, those without images last."""
    rows = sorted((hits / n if n else math.inf, tag, count, int(n)) for tag, count, n, hits in zip(
        tag_info["vocabulary"], tag_info["counts"], images, found))
    lines = ["# tag, images of --data, images of --val, recall at 5 on them: the worst first",
             *(f"{tag}\t{count}\t{n}\t{recall if n else math.nan:.3f}"
               for recall, tag, count, n in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    vit.write_aside(path, lambda aside: aside.write_text("\n".join(lines) + "\n",
                                                         encoding="utf-8"))


# ======================================================================================
# Main
# ======================================================================================

def open_all(args, config, file_info):
    """The data with their tags: (--data and --val as data.Samples, what is known of the tags); None
    for what is not needed. A model that is only used brings its vocabulary."""
    train = val = None
    if args.predict or args.eval_only:
        if file_info.get("stage") != "wsp":
            raise UserError(f"{args.init} has no vocabulary: --predict and --eval-only need a file "
                            "of this stage, as runs/wsp/model.pt")
        tag_info = file_info
    else:
        source = data.open_data(*args.data, index_dir=args.index_dir)
        rows, targets_of, tag_info = open_tags(args, source)
        train = data.training_samples(source, args, config, args.smallest_crop, rows, targets_of)
    if args.val and not args.predict and not args.vocabulary_only:
        source = data.open_data(*args.val, index_dir=args.index_dir)
        number_of = number_in(tag_info["vocabulary"], dict(tag_info["synonyms"]))
        once = np.ones(len(tag_info["vocabulary"]))         # each image with a known tag
        rows = data.Rows(source.chunks, functools.partial(
            times_shown, source=source, number_of=number_of, r=once))
        if not len(rows):
            raise UserError("no image of --val has a tag of the vocabulary, "
                            f"{' '.join(tag_info['vocabulary'][:8])} …")
        targets_of = functools.partial(tag_targets, number_of=number_of)
        val = data.evaluation_samples(source, config, rows=rows, targets_of=targets_of)
    return train, val, tag_info


def main(argv):
    args, config, file_info = parse_flags(argv)
    stacks = [(config.depth, config.width, 1 + config.num_patches)]         # depth, width, tokens
    if args.plan:
        rank0_print(f"planned for {args.vocabulary_size:,} tags: see --vocabulary-size")
        return vit.plan(args, lambda: ViT(config, args.vocabulary_size), stacks)
    device = vit.start(args, stacks)

    # ---- data, and the vocabulary, which decides how many outputs the model has
    train, val, tag_info = open_all(args, config, file_info)
    if args.vocabulary_only:
        return show_vocabulary(tag_info)

    # ---- model: random weights, or --init; a run that goes on replaces them (vit.Run, below)
    make = lambda: ViT(config, len(tag_info["vocabulary"]), pool="cls", head_std=0.0)   # head: SWAG
    model, wrapped = vit.build(make, args, device)
    if args.init:
        # The paper's idea. A file of stage 1 has an encoder, which is loaded, a decoder, which is
        # not used, and no head: the head keeps its zeros, as without --init. So it does if the file
        # is of this stage but for other tags.
        same = file_info.get("vocabulary") == tag_info["vocabulary"]
        vit.load_weights(model, args.init, renew=() if same else ("head.*",))
    if args.predict:
        return data.print_predictions(args, config, model, tag_info["vocabulary"], device)
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device, tag_info))
    schedule = vit.make_schedule(args, len(train))
    vocabulary_crc = data.crc(json.dumps([tag_info["vocabulary"], tag_info["synonyms"]]))
    if not vit.open_run(args, "wsp", model, train, val, {
            "vocabulary": f"{len(tag_info['vocabulary'])} tags (CRC {vocabulary_crc:08x})"}):
        return
    examples = data.examples(val or train, device)

    def draw_and_evaluate():
        data.draw_predictions(args, examples, model, tag_info["vocabulary"], device)
        return evaluate(model, val, args, device, tag_info) if val else {}

    # ---- loop
    optimizer = torch.optim.AdamW(vit.decay_groups(model, args.weight_decay, NO_DECAY),
                                  betas=BETAS, fused=True)
    model_info = {"config": {**asdict(config), "loss": args.loss}, "stage": "wsp",
                  **{name: tag_info[name] for name in ("vocabulary", "counts", "synonyms")}}
    run = vit.Run(args, model, wrapped, optimizer, device, schedule, model_info,
                  vit.training_flops(stacks), constants={"entropy": tag_info[args.loss]})
    batches = data.training_batches(train, args, run.state["step"], schedule, device)
    for _ in run.steps(draw_and_evaluate):
        for batch in run.micro_batches(batches):
            position, images = batch["position"], batch["images"]           # [B] [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images = data.normalise(images)                                 # [B,C,H,W]
            with vit.autocast(args, device):
                logits = wrapped(images)                                    # [B,K]
            run.backward(tag_losses(logits, batch["targets"], args.loss).mean())
        run.update()


if __name__ == "__main__":
    vit.run(main)
