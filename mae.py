"""Stage 1: pretraining without labels, by masked autoencoding (MAE).

An image is cut into patches and three quarters of them are masked. An encoder sees the rest, and a
small decoder predicts the pixels of the masked ones. This needs nothing but images, and the encoder
is a better start for everything that follows ("The effectiveness of MAE pre-pretraining for
billion-scale pretraining", arXiv 2303.13496, section 3; the method is that of "Masked Autoencoders
Are Scalable Vision Learners", arXiv 2111.06377, section 3, called "the MAE paper" below).

    torchrun mae.py                                       # built-in world, nano: minutes on a CPU
    torchrun mae.py --data photos/ --val more-photos/     # your own images
    torchrun --nproc-per-node gpu mae.py --model large --data imagenet/train --epochs 1600 \
        --warmup 0.025                                    # the MAE paper's run
    torchrun --nnodes 8 --nproc-per-node 8 … mae.py --model 2b --data '/data/{00000..29999}.tar'
    python mae.py --model 2b --plan 64                    # memory and time on 64 GPUs
    python mae.py --init runs/mae/model.pt --predict cat.jpg dog.jpg

Expected of the first: a validation loss of about 0.62 (1.0 is a decoder that predicts each patch's
mean), and in runs/mae/reconstruction.png colours and textures in the masked patches. Of the paper:
base to 6.5B, one epoch on 3 billion images, then finetuned on ImageNet-1k at 224 pixels (stage 3):
83.5 (base) to 88.3 (6.5b) percent. The next stage, wsp.py, starts from runs/mae/model.pt.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

import data
import vit
from vit import (
    Block, LayerNorm, PatchEmbed, UserError, gather_tokens, patchify, rank0_print, run_blocks,
    unpatchify)

# ======================================================================================
# The algorithm
# ======================================================================================

def num_visible(num_patches, mask_ratio):
    """The number of patches that the encoder sees: rounded down as in MAE's code, at least one."""
    return max(1, int(num_patches * (1 - mask_ratio)))


def random_masking(noise, mask_ratio):
    """Split the patches by uniform random numbers `noise` [B,N] into kept [B,V] and masked [B,N-V]
    ones: indices in raster order.

    "We sample random patches without replacement, following a uniform distribution" (the MAE
    paper, section 3): the patches with the smallest noise are kept."""
    V = num_visible(noise.shape[1], mask_ratio)
    order = noise.argsort(dim=1, stable=True)                               # [B,N]
    return order[:, :V].sort(1).values, order[:, V:].sort(1).values


def patch_statistics(patches):
    """Mean and standard deviation of each patch [B,N,P]: [B,N,1] each (unbiased variance + 1e-6, as
    in MAE's code)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def pixel_targets(patches, norm_pix):
    """What the decoder has to predict for patches [B,N,P]: their pixels, or with `norm_pix` "the
    normalized pixel values of each masked patch", which "improves representation quality" (the MAE
    paper, Reconstruction target)."""
    if not norm_pix:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


# ======================================================================================
# The model
# ======================================================================================

class MAE(nn.Module):
    """The masked autoencoder. It is asymmetric: a large encoder for the few visible patches, a
    small decoder for all of them. After this stage the decoder is thrown away.

    Images are [B,C,H,W], normalised; noise is [B,N], uniform. Parameters have the names of the
    released files. Positions are fixed sine-cosine tables, which is why they are buffers."""

    def __init__(self, config, decoder_width=512, decoder_depth=8, decoder_heads=16,
                 norm_pix=True, mask_ratio=0.75):
        super().__init__()
        self.config, self.norm_pix, self.mask_ratio = config, norm_pix, mask_ratio
        self.recompute = False
        D, d, N = config.width, decoder_width, config.num_patches
        self.patch_embed = PatchEmbed(config)
        # Nothing is predicted from the class token here. It takes part in attention, so that later
        # stages, which read it, start from an encoder that is used to it (the MAE paper, A.1).
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
        self.init_weights()

    def init_weights(self, seed=0):
        vit.init_weights(self, seed)

    def encode(self, patches, keep):
        """Patches [B,N,P], of which `keep` [B,V] are visible, to tokens [B,1+V,D].

        "Our encoder is a ViT but applied only on visible, unmasked patches": only they are
        projected, so that the cost of the encoder falls with the number of masked patches."""
        x = self.patch_embed(gather_tokens(patches, keep))                  # [B,V,D]
        x = x + self.pos_embed[0, 1:][keep]                                 # [B,V,D]
        cls = self.cls_token + self.pos_embed[:, :1]                        # [1,1,D]
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)                   # [B,1+V,D]
        return self.norm(run_blocks(self.blocks, x, self.recompute))        # [B,1+V,D]

    def decode(self, x, keep, masked):
        """Tokens [B,1+V,D] to decoder tokens [B,1+N,d], in the order class token, kept, masked.

        "Each mask token is a shared, learned vector that indicates the presence of a missing patch
        to be predicted. We add positional embeddings to all tokens in this full set; without this,
        mask tokens would have no information about their location in the image." The MAE paper's
        "simple implementation" first moves all tokens back to raster order. Attention does not
        depend on the order of tokens, so it is enough to add to each token its own position."""
        mask_tokens = self.mask_token.expand(*masked.shape, -1)             # [B,N-V,d]
        x = torch.cat([self.decoder_embed(x), mask_tokens], 1)              # [B,1+N,d]
        cls = torch.zeros_like(keep[:, :1])                                 # [B,1]
        places = torch.cat([cls, 1 + keep, 1 + masked], 1)                  # [B,1+N]
        x = x + self.decoder_pos_embed[0][places]                           # [B,1+N,d]
        return self.decoder_norm(run_blocks(self.decoder_blocks, x, self.recompute))    # [B,1+N,d]

    def forward(self, images, noise):
        """The loss of each image [B]: the mean squared error of its masked patches.

        "We compute the loss only on masked patches" (the MAE paper, Reconstruction target). It is 0
        where no patch is masked."""
        patches = patchify(images, self.config.patch)                       # [B,N,P]
        keep, masked = random_masking(noise, self.mask_ratio)               # [B,V] [B,N-V]
        x = self.decode(self.encode(patches, keep), keep, masked)           # [B,1+N,d]
        predicted = self.decoder_pred(x[:, 1 + keep.shape[1]:])             # [B,N-V,P]
        targets = pixel_targets(gather_tokens(patches, masked), self.norm_pix)      # [B,N-V,P]
        error = (predicted.to(targets.dtype) - targets).square().mean(-1)   # [B,N-V]
        return error.sum(1) / max(1, masked.shape[1])                       # [B]

    def predict(self, images, noise):
        """The decoder's prediction for every patch, also for visible ones, in raster order
        [B,N,P]."""
        patches = patchify(images, self.config.patch)                       # [B,N,P]
        keep, masked = random_masking(noise, self.mask_ratio)               # [B,V] [B,N-V]
        x = self.decode(self.encode(patches, keep), keep, masked)           # [B,1+N,d]
        to_raster = torch.cat([keep, masked], 1).argsort(1)                 # [B,N]
        return gather_tokens(self.decoder_pred(x[:, 1:]), to_raster)        # [B,N,P]


# ======================================================================================
# Flags and recipes
# ======================================================================================

RECIPES = {
    "nano": dict(decoder_width=96, decoder_depth=2, decoder_heads=4, batch=32, samples=72_000,
                 base_lr=0.012),                        # ours, for a classroom
    "tiny": dict(decoder_width=192, decoder_depth=4, decoder_heads=6, batch=256, samples=2_000_000,
                 base_lr=6e-4),                         # ours
    "small": dict(decoder_width=256, decoder_depth=4, decoder_heads=8, batch=1024, epochs=100,
                  base_lr=3e-4),                        # ours
    # MAE; one epoch: paper; the decoders of 2b and 6.5b are not published: MAE's
    **dict.fromkeys(("base", "large", "huge", "2b", "6.5b"), dict(
        decoder_width=512, decoder_depth=8, decoder_heads=16, batch=4096, epochs=1,
        base_lr=1.5e-4)),
}
ALL_MODELS = dict(mask_ratio=0.75, norm_pix=True, weight_decay=0.05, clip_grad=0.0,     # MAE
                  warmup=0.05)                          # not published for one epoch: ours
BETAS = 0.9, 0.95                                       # of AdamW: MAE
SMALLEST_CROP = 0.2                                     # share of an image's area: MAE
MODEL_FLAGS = "decoder_width", "decoder_depth", "decoder_heads", "norm_pix", "mask_ratio"


def parse_flags(argv):
    """All flags, with the recipe filled in: (args, Config, file_info of --init)."""
    parser = vit.stage_parser("mae.py", __doc__, {**RECIPES, "all": ALL_MODELS})
    add = parser.add_argument_group("masked autoencoder").add_argument
    add("--mask-ratio", type=vit.number(0, 0.999), metavar="SHARE",
        help="share of the patches that are masked; default that of --init, else 0.75 (MAE)")
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=None,
        help="predict pixels minus their patch's mean, divided by its standard deviation; default "
        "as --init, else on (MAE)")
    for part in ("width", "depth", "heads"):
        add(f"--decoder-{part}", type=vit.positive, help="default that of --init, else by "
            "model, see the end")
    args = parser.parse_args(argv)
    config, name, file_info = vit.choose_config(args, "mae")
    in_file = {flag: value for flag, value in file_info.get("config", {}).items()
               if flag in MODEL_FLAGS}
    vit.fill_recipe(args, {**ALL_MODELS, **RECIPES[name], **in_file})
    if args.decoder_width % args.decoder_heads or args.decoder_width % 4:
        raise UserError(f"--decoder-width {args.decoder_width} must be divisible by "
                        f"--decoder-heads {args.decoder_heads} and by 4")
    data.choose_val(args)
    if args.data == ["world"] and config.width > 192:
        rank0_print("NOTE: the built-in world is made for nano and tiny; see --data")
    if num_visible(config.num_patches, args.mask_ratio) == config.num_patches:
        rank0_print(f"NOTE: --mask-ratio {args.mask_ratio} masks none of {config.num_patches} "
                    "patches: there is nothing to learn")
    return args, config, file_info


# ======================================================================================
# Evaluation and pictures
# ======================================================================================

@torch.no_grad()
def evaluate(model, val, args, device):
    """The mean loss over a source, every image once at any number of ranks: {"loss", "count",
    "bad"}. Images are cropped centrally; masks depend only on --seed and the image's number."""
    sums = torch.zeros(2, dtype=torch.float64)
    for images, batch in data.validate(val, args, device):
        noise = data.uniform(args.seed, batch["position"].to(device), "val",
                             model.config.num_patches)                      # [B,N]
        with vit.autocast(args, device):
            losses = model(images, noise).cpu().double()                    # [B]
        weight = batch["weight"].double()                                   # [B]
        sums += torch.stack([losses * weight, weight]).sum(1)
    total, count = vit.all_reduce_sum(sums).tolist()
    return {"loss": total / count, "count": int(count), "bad": len(val) - int(count)}


@torch.no_grad()
def draw_reconstruction(model, pixels, positions, args, device, names=()):
    """Draw pictures [B,H,W,C] into OUT/reconstruction.png, a row each: the visible patches; with
    norm_pix, the true mean of each masked patch; the prediction; the original.

    With norm_pix the model does not predict a patch's mean and deviation, so the true ones are
    used. They already show outlines and contrast: only what the prediction adds is the model's.
    `names` are written beside the rows. Every rank has to call this; rank 0 writes."""
    config = model.config
    images = data.normalise(pixels.to(device))                              # [B,C,H,W]
    noise = data.uniform(args.seed, positions.to(device), "val", config.num_patches)    # [B,N]
    with vit.autocast(args, device):
        parts = zip(images.split(args.micro_batch), noise.split(args.micro_batch))
        predicted = torch.cat([model.predict(*part) for part in parts]).float()     # [B,N,P]
    if vit.get_rank():
        return
    true = patchify(images, config.patch)                                   # [B,N,P]
    mean, deviation = patch_statistics(true)                                # [B,N,1]
    keep, _ = random_masking(noise, model.mask_ratio)                       # [B,V]
    visible = torch.zeros_like(noise).scatter(1, keep, 1.0)[..., None] > 0  # [B,N,1]
    columns = {"visible patches": torch.where(visible, true, 0)}
    if model.norm_pix:
        columns["no prediction:\ntrue means"] = torch.where(visible, true, mean)
        columns["prediction, with\ntrue mean, deviation"] = torch.where(
            visible, true, predicted * deviation + mean)
    else:
        columns["prediction"] = torch.where(visible, true, predicted)
    columns["original"] = true
    height, width = (side * max(1, 128 // max(config.image)) for side in config.image)
    sheet = Image.new("RGB", (len(columns) * (width + 4) + 120 * bool(names),
                              len(pixels) * (height + 4) + 32), "white")
    pen = ImageDraw.Draw(sheet)
    for x, (title, patches) in enumerate(columns.items()):
        pen.text((x * (width + 4), 2), title, "black")
        column = unpatchify(patches, config.patch, config.grid, config.channels)    # [B,C,H,W]
        for y, image in enumerate(data.denormalise(column).cpu().numpy()):
            picture = Image.fromarray(image[..., :3].squeeze()).resize((width, height), 0)
            sheet.paste(picture, (x * (width + 4), y * (height + 4) + 32))
    for y, name in enumerate(names):
        pen.text((len(columns) * (width + 4), y * (height + 4) + 32), Path(name).name, "black")
    path = Path(args.out) / "reconstruction.png"
    vit.write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def predict(model, args, device):
    """--predict: reconstruct the user's pictures in OUT/reconstruction.png."""
    names, pixels, problem = data.read_pictures(args, model.config)         # [B,H,W,C]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    draw_reconstruction(model, pixels, torch.arange(len(pixels)), args, device, names)
    rank0_print(f"wrote {args.out}/reconstruction.png: {len(pixels)} pictures, "
                f"{100 * args.mask_ratio:.0f}% masked")
    if problem:
        raise UserError(problem)


# ======================================================================================
# Main
# ======================================================================================

def main(argv):
    args, config, file_info = parse_flags(argv)
    model_flags = {flag: getattr(args, flag) for flag in MODEL_FLAGS}
    make = lambda: MAE(config, **model_flags)
    visible = num_visible(config.num_patches, args.mask_ratio)
    stacks = [(config.depth, config.width, 1 + visible),        # depth, width, tokens
              (args.decoder_depth, args.decoder_width, 1 + config.num_patches)]
    if args.plan:
        return vit.plan(args, make, stacks)
    device = vit.start(args, stacks)

    # ---- model: random weights, or --init; a run that goes on replaces them (vit.Run, below)
    model, wrapped = vit.build(make, args, device, methods=("predict",))
    if args.init:
        loaded = vit.load_weights(model, args.init, new=("decoder_*", "mask_token"))
        if (args.predict or args.eval_only) and loaded["new"]:
            raise UserError(f"{args.init} holds an encoder only: a reconstruction needs the "
                            "decoder too, as in runs/mae/model.pt or MAE's full files")
        if (args.predict or args.eval_only) and "norm_pix" not in file_info.get("config", {}):
            rank0_print(f"{args.init} does not say what it predicts: taken as "
                        f"{'normalised' if args.norm_pix else 'plain'} pixels; see --norm-pix")
    if args.predict:
        return predict(model, args, device)

    # ---- data
    val = args.val and data.evaluation_samples(
        data.open_data(*args.val, index_dir=args.index_dir), config)
    if args.eval_only:
        return vit.report(args, evaluate(model, val, args, device))
    source = data.open_data(*args.data, index_dir=args.index_dir)
    train = data.training_samples(source, args, config, SMALLEST_CROP)
    schedule = vit.make_schedule(args, len(train))
    if not vit.open_run(args, "mae", model, train, val):
        return
    examples = data.examples(val or train, device)

    def draw_and_evaluate():
        draw_reconstruction(model, examples["images"], examples["position"], args, device)
        return evaluate(model, val, args, device) if val else {}

    # ---- loop
    optimizer = torch.optim.AdamW(vit.decay_groups(model, args.weight_decay), betas=BETAS,
                                  fused=True)
    model_info = {"config": {**asdict(config), **model_flags}, "stage": "mae"}
    run = vit.Run(args, model, wrapped, optimizer, device, schedule, model_info,
                  vit.training_flops(stacks))
    batches = data.training_batches(train, args, run.state["step"], schedule, device)
    for _ in run.steps(draw_and_evaluate):
        for batch in run.micro_batches(batches):
            position, images = batch["position"], batch["images"]           # [B] [B,H,W,C]
            images = data.flip(images, data.uniform(args.seed, position, "flip", 1))
            images = data.normalise(images)                                 # [B,C,H,W]
            # Uniform random numbers, a function of --seed and position alone: masks are the same
            # after a resume and with any number of ranks.
            noise = data.uniform(args.seed, position, "mask", config.num_patches)   # [B,N]
            with vit.autocast(args, device):
                loss = wrapped(images, noise).mean()
            run.backward(loss)
        run.update()


if __name__ == "__main__":
    vit.run(main)
