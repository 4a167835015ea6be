"""Stage 1: masked autoencoding, without labels.

A picture is cut into patches, three quarters of them are hidden, an encoder sees the rest, and a
small decoder has to paint what is hidden. Nothing but pictures is needed, and the encoder is a
better start for everything after ("The effectiveness of MAE pre-pretraining for billion-scale
pretraining", arXiv 2303.13496, section 3; the method is that of "Masked Autoencoders Are Scalable
Vision Learners", arXiv 2111.06377, section 3, "the MAE paper" below).

    torchrun mae.py                                       # built-in world, nano: minutes on a CPU
    torchrun mae.py --data photos/ --val more-photos/     # your own pictures
    torchrun --nproc-per-node gpu mae.py --model large --data imagenet/train --epochs 1600
    torchrun --nnodes 8 --nproc-per-node 8 … mae.py --model 2b --data '/data/{00000..29999}.tar'
    python mae.py --model 2b --ranks 64 --plan            # what would that need?
    python mae.py --init runs/mae/model.pt --predict cat.jpg dog.jpg

Expected of the first: a validation loss of about 0.62, and in runs/mae/reconstruction.png shapes
and colours that come back where they were hidden. Of the paper: base to 6.5B on 3 billion images,
one epoch, then finetuned on ImageNet-1k at 224 (stage 3): 83.5 (base) to 88.3 (6.5b) percent.
The next stage is wsp.py, which starts from runs/mae/model.pt.
"""

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

import data
import vit
from vit import (
    Block, LayerNorm, PatchEmbed, UserError, patchify, run_blocks, rank0_print, gather_tokens, unpatchify)

RECIPES = vit.table("decoder_width decoder_depth decoder_heads batch length base_lr", {
    "nano":  (96,   2,    4,        32,  {"samples": 72e3},  0.012),    # ours, for a classroom
    "tiny":  (192,  4,    6,       256,  {"samples": 2e6},   6e-4),     # ours
    "small": (256,  4,    8,      1024,  {"epochs": 100},    3e-4),     # ours
    # MAE; one epoch: paper; decoder of 2b and 6.5b not published: MAE's
    "base … 6.5b": (512, 8, 16, 4096, {"epochs": 1}, 1.5e-4),
})
# AdamW's betas and weight decay, no clipping: MAE. Warmup of 5%: not published for one epoch, ours.
BETAS, COMMON = (0.9, 0.95), {"weight_decay": 0.05, "clip_grad": 0.0, "warmup": 0.05}

# What a model is made with besides the encoder's Config: arguments of MAE, flags, kept in model.pt
MODEL_FLAGS = ("decoder_width", "decoder_depth", "decoder_heads", "norm_pix", "mask_ratio")


def parse_flags(argv):
    """All flags, with the recipe filled in: (args, Config, what --init's file says of itself)."""
    parser = vit.stage_parser("mae.py", __doc__, {**RECIPES, "all": COMMON})
    add = parser.add_argument_group("masked autoencoder").add_argument
    add("--mask-ratio", type=float, metavar="SHARE",
        help="of patches that are hidden, from 0 to below 1; default 0.75 (MAE)")
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=None,
        help="predict each patch's pixels less their mean, over their deviation; default on (MAE)")
    for part in ("width", "depth", "heads"):
        add(f"--decoder-{part}", type=vit.positive, help="default by model, below")
    args = parser.parse_args(argv)
    config, name, about = vit.choose_config(args, "mae")
    told = {flag: value for flag, value in about.get("config", {}).items() if flag in MODEL_FLAGS}
    vit.fill_recipe(args, {"norm_pix": True, "mask_ratio": 0.75, **RECIPES[name], **COMMON, **told})
    if args.decoder_width % args.decoder_heads or args.decoder_width % 4:
        raise UserError(f"--decoder-width {args.decoder_width} must be divisible by "
                        f"--decoder-heads {args.decoder_heads} and by 4")
    data.choose_val(args)
    return args, config, about


# ======================================================================================
# The algorithm
# ======================================================================================

def num_visible(patches, ratio):
    """How many of the patches the encoder sees: at least one (MAE's code rounds down)."""
    return max(1, int(patches * (1 - ratio)))


def random_masking(noise, ratio):
    """Split the patches by noise [B,N]: indices of kept [B,V] and of masked ones [B,N-V].

    "We sample random patches without replacement, following a uniform distribution" (the MAE
    paper, section 3): those of the smallest noise are kept, N * (1 - ratio) of them, at least one.
    Both lists are in raster order."""
    kept = num_visible(noise.shape[1], ratio)
    shuffled = noise.argsort(dim=1, stable=True)                              # [B,N]
    return shuffled[:, :kept].sort(1).values, shuffled[:, kept:].sort(1).values


def patch_statistics(patches):
    """Mean and deviation of each patch [B,N,P]: two of [B,N,1]. Unbiased, + 1e-6: MAE's code."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def pixel_targets(patches, norm_pix):
    """What the decoder has to predict for patches [B,N,P]: their pixels, normalised if asked.

    "The normalized pixel values of each masked patch" (the MAE paper, Reconstruction target)."""
    if not norm_pix:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


# ======================================================================================
# The model
# ======================================================================================

class MAE(nn.Module):
    """Masked autoencoder: a ViT encoder on visible patches, a lightweight decoder on all.

    Images are [B,C,H,W], normalised; noise is [B,N], the patches of the smallest are kept. Names
    of parameters are those of the released files; positions are fixed sine-cosine tables."""

    def __init__(self, config, decoder_width=512, decoder_depth=8, decoder_heads=16,
                 norm_pix=True, mask_ratio=0.75):
        super().__init__()
        self.config, self.norm_pix, self.mask_ratio = config, norm_pix, mask_ratio
        self.recompute = False
        D, d, N = config.width, decoder_width, config.patches
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.register_buffer("pos_embed", torch.empty(1, 1 + N, D))
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.norm = LayerNorm(D)

        self.decoder_embed = nn.Linear(D, d)
        self.mask_token = nn.Parameter(torch.empty(1, 1, d))
        self.register_buffer("decoder_pos_embed", torch.empty(1, 1 + N, d))
        self.decoder_blocks = nn.ModuleList(Block(d, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = LayerNorm(d)
        self.decoder_pred = nn.Linear(d, config.patch ** 2 * config.channels)
        vit.init_weights(self)

    def encode(self, patches, keep):
        """Patches [B,N,P], of which `keep` [B,V] are seen, to tokens [B,1+V,D].

        "A ViT but applied only on visible, unmasked patches" (MAE encoder)."""
        x = self.patch_embed(gather_tokens(patches, keep)) + gather_tokens(self.pos_embed[:, 1:], keep)  # [B,V,D]
        first = self.cls_token + self.pos_embed[:, :1]                      # [1,1,D]
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)                 # [B,1+V,D]
        return self.norm(run_blocks(self.blocks, x, self.recompute))        # [B,1+V,D]

    def decode(self, x, keep, masked):
        """Tokens [B,1+V,D] to decoder tokens [B,1+N,d]: class token, kept patches, masked ones.

        "Each mask token is a shared, learned vector that indicates the presence of a missing patch
        to be predicted. We add positional embeddings to all tokens" (MAE decoder). Positions are
        picked by index, so the tokens need not be put back in raster order."""
        B, hidden = masked.shape
        x = torch.cat([self.decoder_embed(x), self.mask_token.expand(B, hidden, -1)], 1)
        first = torch.zeros_like(keep[:, :1])                               # [B,1]
        index = torch.cat([first, 1 + keep, 1 + masked], 1)                 # [B,1+N]
        x = x + gather_tokens(self.decoder_pos_embed, index)                         # [B,1+N,d]
        return self.decoder_norm(run_blocks(self.decoder_blocks, x, self.recompute))

    def losses(self, images, noise):
        """The mean squared error of each image [B], on masked patches only; 0 if none is masked.

        "We compute the loss only on masked patches" (Reconstruction target)."""
        patches = patchify(images, self.config.patch)                       # [B,N,P]
        keep, masked = random_masking(noise, self.mask_ratio)               # [B,V] [B,N-V]
        x = self.decode(self.encode(patches, keep), keep, masked)           # [B,1+N,d]
        predicted = self.decoder_pred(x[:, 1 + keep.shape[1]:])             # [B,N-V,P]
        target = pixel_targets(gather_tokens(patches, masked), self.norm_pix)        # [B,N-V,P]
        error = (predicted.to(target.dtype) - target).square().mean(-1)     # [B,N-V]
        return error.sum(1) / max(1, masked.shape[1])                       # [B]

    def forward(self, images, noise):
        return self.losses(images, noise).mean()

    def predict(self, images, noise):
        """What the decoder says of every patch, kept ones too, in raster order: [B,N,P]."""
        patches = patchify(images, self.config.patch)                       # [B,N,P]
        keep, masked = random_masking(noise, self.mask_ratio)               # [B,V] [B,N-V]
        x = self.decode(self.encode(patches, keep), keep, masked)           # [B,1+N,d]
        place = torch.cat([keep, masked], 1).argsort(1)                     # [B,N]
        return gather_tokens(self.decoder_pred(x[:, 1:]), place)                     # [B,N,P]


# ======================================================================================
# Evaluation and pictures
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device):
    """Mean loss over a source, every image once, whatever the ranks: {"loss", "count", "bad"}.

    Central crops, and a mask that depends on the image's number alone."""
    sums = torch.zeros(2, dtype=torch.float64)
    for images, batch in data.validate(val, args, device):
        noise = data.uniform(args.seed, batch["position"].to(device), "val", model.config.patches)
        with vit.autocast(args, device):
            losses = model.losses(images, noise).cpu().double()             # [B]
        sums += torch.stack([(losses * batch["weight"]).sum(), batch["weight"].sum().double()])
    total, count = vit.all_reduce_sum(sums).tolist()
    return {"loss": total / count, "count": int(count), "bad": len(val) - int(count)}


@torch.no_grad()
def draw_reconstruction(model, pixels, positions, args, device, path):
    """Paint masked, reconstructed and original pictures [B,H,W,C] below each other, into a PNG.

    A prediction of normalised pixels is given back the mean and deviation of the true patch: the
    picture shows the decoder's structure, not its guess of brightness. Patches that the encoder
    saw are shown as they were. Every rank has to call this; rank 0 writes."""
    config = model.config
    images = data.normalise(pixels.to(device))                              # [B,C,H,W]
    noise = data.uniform(args.seed, positions.to(device), "val", config.patches)
    with vit.autocast(args, device):
        parts = zip(images.split(args.micro_batch), noise.split(args.micro_batch))
        patches = torch.cat([model.predict(*part) for part in parts]).float()   # [B,N,P]
    true = patchify(images, config.patch)                                   # [B,N,P]
    if model.norm_pix:
        mean, deviation = patch_statistics(true)
        patches = patches * deviation + mean
    keep, _ = random_masking(noise, model.mask_ratio)                       # [B,V]
    seen = torch.zeros_like(noise).scatter(1, keep, 1.0)[..., None]         # [B,N,1]
    if vit.environment().rank:
        return
    rows = {"masked": true * seen, "reconstruction": torch.where(seen > 0, true, patches),
            "original": true}
    height, width = (side * max(1, 128 // max(config.image)) for side in config.image)
    sheet = Image.new("RGB", (len(pixels) * (width + 4), len(rows) * (height + 20)), "white")
    for y, (name, part) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((4, y * (height + 20) + 4), name, "black")
        part = unpatchify(part, config.patch, config.grid, config.channels)
        for x, image in enumerate(data.denormalise(part).cpu().numpy()):
            picture = Image.fromarray(image[..., :3].squeeze()).resize((width, height), 0)
            sheet.paste(picture, (x * (width + 4), y * (height + 20) + 20))
    vit.write_aside(Path(path), lambda aside: sheet.save(aside, "PNG"))


def predict(model, args, device):
    """--predict: reconstruct the user's pictures into OUT/reconstruction.png."""
    pixels = data.read_pictures(args, model.config)
    path = Path(args.out) / "reconstruction.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_reconstruction(model, pixels, torch.arange(len(pixels)), args, device, path)
    rank0_print(f"wrote {path}: {len(pixels)} pictures, {100 * args.mask_ratio:.0f}% masked, predicted as "
                + ("pixels normalised by patch, shown with each true patch's mean and deviation"
                   if args.norm_pix else "plain pixels"))


# ======================================================================================
# Main
# ======================================================================================

def main(argv):
    args, config, about = parse_flags(argv)
    own = {flag: getattr(args, flag) for flag in MODEL_FLAGS}
    make = lambda: MAE(config, **own)
    example = lambda batch: (torch.empty(batch, config.channels, *config.image),
                             torch.empty(batch, config.patches))
    if args.plan:
        return vit.plan(args, make, example)
    device, rank, world = vit.start(args)

    # ---- model: a checkpoint in --out, else --init, else random weights
    model, wrapped = vit.build(make, args, device, ("losses", "predict"))
    using = bool(args.predict or args.eval_only)
    if args.init:
        loaded = vit.load_weights(model, args.init, new=("decoder_*", "mask_token"))
        if using and loaded["new"]:
            raise UserError(f"{args.init} holds an encoder only: a reconstruction needs the "
                            "decoder too, as in runs/mae/model.pt or MAE's full files")
        if using and "norm_pix" not in about.get("config", {}):
            rank0_print(f"{args.init} does not say what it predicts: taken as "
                        f"{'normalised' if args.norm_pix else 'plain'} pixels; see --norm-pix")
    if args.predict:
        return predict(model, args, device)

    # ---- data
    val = data.evaluation_samples(data.open_data(*args.val, index_dir=args.index_dir),
                                  config) if args.val else None
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device))
    train_data = data.open_data(*args.data, index_dir=args.index_dir)
    if args.data == ["world"] and config.width > 192:
        rank0_print("NOTE: training on the built-in world, which is made for nano and tiny; see --data")
    if num_visible(config.patches, args.mask_ratio) == config.patches:
        rank0_print(f"NOTE: --mask-ratio {args.mask_ratio} hides none of {config.patches} patches: there "
                    "is nothing to learn")
    train = data.training_samples(train_data, args, config)
    steps, micro, accumulate, peak = vit.derive(args, len(train_data), world)
    if not vit.open_run(args, "mae", {"what --data holds": train_data.fingerprint(),
                                      "what --val holds": val and val.source.fingerprint()}, model):
        return
    examples = data.examples(val or data.evaluation_samples(train_data, config), device)

    # ---- optimizer and state
    optimizer = torch.optim.AdamW(vit.decay_groups(model, args.weight_decay), lr=peak, betas=BETAS,
                                  fused=True)
    state = vit.restore(args, model, optimizer, vit.fresh_state(args, device))
    log = vit.Log(args, device, state["step"], steps, 3 * vit.forward_flops(make, example))
    batches = data.training_batches(train, args, state["step"], steps, micro, device)
    describe = {"config": {**asdict(config), **own}, "stage": "mae"}

    def draw_and_evaluate():
        draw_reconstruction(model, examples["images"], examples["position"], args, device,
                            Path(args.out) / "reconstruction.png")
        return evaluate(model, val, args, device) if val else {}

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
            images = batch["images"].to(device, non_blocking=True)          # [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images = data.normalise(images)                                 # [B,C,H,W]
            noise = data.uniform(args.seed, position, "mask", config.patches)  # [B,N]
            with vit.accumulating(wrapped, last=part == accumulate - 1):
                with vit.autocast(args, device):
                    part_loss = wrapped(images, noise=noise) / accumulate
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
        log.step(state["step"], {"loss": loss, "lr": lr, "grad_norm": norm,
                                 "bad_samples": state["bad_samples"]})

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
