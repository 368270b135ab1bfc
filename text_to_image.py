"""
Fine-tune Stable Diffusion 1 or 2 with the PU risk: a prompt should no longer draw what S shows.

    pip install diffusers transformers safetensors peft
    python text_to_image.py --model OWNER/NAME --data_dir my_images --prompt "a man" --prior 0.2

my_images/unlabeled/ holds images of the prompt, a fraction --prior of them sensitive, and
my_images/sensitive/ a few sensitive ones: in the paper 64 normal and 16 sensitive, and 20.
--out_dir gets before_after.png, and model/ for StableDiffusionPipeline.from_pretrained or, with
--lora, lora/ for load_lora_weights. Run on small models only: with guidance, training all weights
worked with one seed of two, --lora with both. Not prevented: prompts that name the person, and
image-to-image.

GPU memory for version 1.5 (860 M weights), by arithmetic: 16 bytes per weight, 13.8 GB, and a
16-bit copy, 1.7 GB; with --lora 3.4 GB. Activations come on top, less with --grad_accum.
"""
import time

import torch

import runtime
from diffusion import GaussianDiffusion
from formats import load_folder
from images import grid, save_png, side_by_side, to_float, to_uint8
from pu_loss import pu_loss
from runtime import UserError, say

parser = runtime.make_parser(__doc__, "python text_to_image.py [--flag value ...]")
add = parser.add_argument
add("--model", required=True, help="a name on the hub, or a folder")
add("--data_dir", required=True, type=runtime.user_path, help="holds unlabeled/ and sensitive/")
add("--prompt", required=True, help="what the unlabeled images show")
add("--prior", required=True, type=runtime.fraction, help="the fraction of them that is sensitive")
add("--lora", type=int, metavar="RANK", help="train adapters (default: all of the U-Net)")
add("--batch_size", type=int, default=16, help="images per step, of U and S together (default: 16)")
add("--grad_accum", type=int, default=1, help="micro-batches per step, to save memory (default: 1)")
add("--max_steps", type=int, default=1000, help="at most 60 passes over S (default: 1000)")
add("--lr", type=float, help="learning rate of the first step (default: 1e-5, with --lora 1e-4)")
add("--seed", type=int, default=0, help="(default: 0)")
add("--out_dir", type=runtime.user_path, default="out/text_to_image", help="(default: %(default)s)")
add("--resume", action="store_true", help="go on from ckpt.pt; repeat the other flags")
runtime.device_flags(parser)
parser.set_defaults(compile=False)    # for set_precision
args = parser.parse_args()
runtime.require_positive(args, "lora", "batch_size", "grad_accum", "max_steps", "lr")
args.lr = args.lr or (1e-4 if args.lora else 1e-5)
ckpt_path = args.out_dir / "ckpt.pt"
if ckpt_path.exists() and not args.resume:
    raise UserError(f"--out_dir {args.out_dir} holds a run: add --resume, or name another folder")
args.out_dir.mkdir(parents=True, exist_ok=True)
device = runtime.find_device(args.device)
runtime.set_precision(args, device)
try:
    import peft
    from diffusers import StableDiffusionPipeline
except ImportError as error:
    raise UserError(f"{error}: pip install diffusers transformers safetensors peft") from None

# the model: all weights of its U-Net are trained, or adapters of its attention
pipe = StableDiffusionPipeline.from_pretrained(args.model)
vae, unet, config, schedule = pipe.vae, pipe.unet, pipe.unet.config, pipe.scheduler
if config.in_channels != vae.config.latent_channels or config.addition_embed_type:
    raise UserError(f"--model {args.model} is for inpainting, or no Stable Diffusion 1 or 2")
prediction = dict(epsilon="eps", v_prediction="v")[schedule.config.prediction_type]
diffusion = GaussianDiffusion(schedule.alphas_cumprod, prediction).to(device)
torch.manual_seed(args.seed)
if args.lora:
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=layers))
unet.enable_gradient_checkpointing()
vae.enable_slicing()    # it decodes one image at a time
pipe.to(device)

def draw():    # 8 images of the prompt, always from the same noise -> one uint8 [3, H, W]
    with runtime.autocast(args, device):
        x = pipe([args.prompt] * 8, generator=torch.manual_seed(args.seed), output_type="pt").images
    return grid(to_uint8(2 * x.float() - 1))

def network(x_t, t, prompt):    # called as unet.py's
    return unet(x_t, t, prompt).sample

# images, prompt, and no prompt (for guidance, a tenth of U gets it) are encoded once
images, labels, *_ = load_folder(args.data_dir, config.sample_size * pipe.vae_scale_factor, 3)
with torch.no_grad():
    means = [vae.encode(to_float(part).to(device)).latent_dist.mean for part in images.split(4)]
    text, no_text = pipe.encode_prompt(args.prompt, device, 1, True)    # [1, tokens, D]
latents = torch.cat(means) * vae.config.scaling_factor    # [N, 4, h, w]
u, s = latents[labels == 0], latents[labels == 1]
before = draw()
pipe.to("cpu")
unet.to(device)
weights = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
n_s = max(1, int(args.prior / (1 + args.prior) * args.batch_size / args.grad_accum))
n_u = max(1, args.batch_size // args.grad_accum - n_s)    # the risk is least noisy at this ratio
most = 60 * len(s) // (n_s * args.grad_accum)    # 60 passes over S: more, and it is memorised
step, steps = 0, min(args.max_steps, most)
optimizer = torch.optim.AdamW(weights.values())
scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
# what --resume must repeat: of --data_dir the sum of its pixels, not what is None
plan = dict(vars(args), data_dir=int(images.sum()), device=None, out_dir=None, resume=None)
if ckpt_path.exists():
    ckpt = runtime.load_verified(ckpt_path, "a checkpoint of text_to_image.py")
    if changed := [f"--{name}" for name in plan if plan[name] != ckpt["plan"][name]]:
        raise UserError(f"{', '.join(changed)} cannot change on --resume")
    unet.load_state_dict(ckpt["weights"], strict=False)
    optimizer.load_state_dict(ckpt["optimizer"])
    scaler.load_state_dict(ckpt["scaler"])
    step = ckpt["step"]
say(f"U: {len(u)} images, S: {len(s)}, which lasts for {most} steps; {device}, {args.dtype}")
say(f"steps {step + 1} to {steps} minimise the PU risk, {args.prior:.4g} E_S[-log(1 - exp(-l))] + "
    f"|E_U[l] - {args.prior:.4g} E_S[l]|, on {n_u} images of U and {n_s} of S per micro-batch")

watch, first_step, start, losses = runtime.SignalWatch(), step, time.monotonic(), []
while step < steps:
    torch.manual_seed(1_000_003 * args.seed + step)
    for _ in range(args.grad_accum):    # a micro-batch has its own risk
        x_0 = torch.cat([u[torch.randint(len(u), (n_u,))], s[torch.randint(len(s), (n_s,))]])
        pair = torch.tensor([*range(n_u), *range(n_s)])    # S shares with U, as in train.py
        t = (diffusion.T * ((torch.rand(1) + 0.6180339887 * pair) % 1)).long().to(device)
        eps = torch.randn(n_u, *u.shape[1:])[pair].to(device)
        prompt = torch.where((torch.rand(n_u, 1, 1) < 0.1)[pair].to(device), no_text, text)
        with runtime.autocast(args, device):
            loss = diffusion.per_image_loss(network, x_0, t, eps, prompt=prompt)    # [B]
        loss_u, loss_s = loss.split([n_u, n_s])
        risk = pu_loss(loss_u, loss_s, args.prior)
        scaler.scale(risk / args.grad_accum).backward()
        losses.append(torch.stack([risk, loss_u.mean(), loss_s.mean()]).detach())
    optimizer.param_groups[0]["lr"] = args.lr * (1 - step / steps)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    step += 1
    signal_number = watch.received(step, device)
    if step % 10 == 0 or step == steps or signal_number:
        if not runtime.all_finite([*losses, *weights.values()]):
            raise UserError(f"the risk or a weight is not finite at step {step}: lower --lr")
        risk, l_u, l_s = torch.stack(losses).mean(0).tolist()
        left = (time.monotonic() - start) / (step - first_step) * (steps - step) / 60
        say(f"step {step}/{steps} risk {risk:.2f} l_U {l_u:.2f} l_S {l_s:.2f} {left:.1f} min left")
        losses = []
    if step % 100 == 0 or step == steps or signal_number:
        runtime.save_whole(dict(weights=weights, optimizer=optimizer.state_dict(), plan=plan,
                                scaler=scaler.state_dict(), step=step), ckpt_path)
    if signal_number:
        say(f"interrupted: step {step} is saved, --resume goes on from there")
        raise SystemExit(128 + signal_number)
pipe.to(device)
save_png(side_by_side([before, draw()]), args.out_dir / "before_after.png")
if args.lora:
    pipe.save_lora_weights(args.out_dir / "lora", peft.get_peft_model_state_dict(unet))
else:
    pipe.save_pretrained(args.out_dir / "model")
