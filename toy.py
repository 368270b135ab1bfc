"""
The whole idea on points of the plane. Read this file first; `python toy.py` takes half a minute.

Two moons stand for two kinds of images. Points of the upper moon are normal. Points of the lower
moon are sensitive: a model must not generate them. We have

    U       the unlabeled set: many points of both moons; nobody knows which are sensitive
    S       the sensitive set, also called positive: a few more points of the lower moon, labeled
    prior   the fraction of sensitive points in U, estimated by counting in a small part of U
    N       the normal points of U: what a model must learn; none of them is labeled
    l(x)    the loss at x: the squared error of a network that must separate x from added noise

Ordinary training minimises E_U[l], the mean of l over U, and learns both moons. But S is like the
sensitive points of U, so E_U[l] = (1 - prior) E_N[l] + prior E_S[l], and E_U[l] - prior E_S[l] is
the loss on N, times 1 - prior. Positive-unlabeled (PU) training minimises it in this form:

    risk = prior E_S[-log(1 - exp(-l))] + |E_U[l] - prior E_S[l]|        (arXiv:2503.03789)

exp(-l) is read as the probability that x is normal: the first term is large while S looks normal.
The absolute value reverses training where l on S is so large that the difference is negative.
"""
import copy

import torch
from PIL import Image, ImageDraw
from torch.nn import Linear, ReLU, Sequential

from diffusion import GaussianDiffusion
from pu_loss import log1mexp, pu_loss
from runtime import fraction, make_parser, require_positive, say

parser = make_parser(__doc__, "python toy.py [flags]")
parser.add_argument("--prior", type=fraction, default=0.5, help="(default: 0.5)")
parser.add_argument("--n_labeled", type=int, default=200, help="points in S (default: 200)")
parser.add_argument("--steps", type=int, default=2000, help="per network (default: 2000)")
parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
args = parser.parse_args()
require_positive(args, "n_labeled", "steps")
torch.manual_seed(args.seed)
torch.set_num_threads(1)    # the networks are small: more threads would wait for one another
diffusion = GaussianDiffusion("lognormal", "v")    # adds noise to points, and removes it


def moon(n: int, blur: float = 0.05) -> torch.Tensor:
    """-> n random points of the upper moon, [n, 2] in [-1, 1]. The lower moon is -moon(n)."""
    angle = torch.pi * torch.rand(n)
    points = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    return (points + blur * torch.randn(n, 2)) / 1.7


hidden, normal = -moon(round(args.prior * 10_000)), moon(round((1 - args.prior) * 10_000))
unlabeled, labeled = torch.cat([hidden, normal]), -moon(args.n_labeled)    # U and S; N is normal


class Network(Sequential):
    """Sees noisy points x_t [B, 2] and how noisy they are, t [B] from 0 to 999. Predicts v [B, 2],
    from which diffusion.py computes point and noise. Sines and cosines show it fine detail."""
    def forward(self, x_t, t):
        z = torch.pi * torch.cat([x_t, t[:, None] / 1000], dim=1)
        return super().forward(torch.cat([z, z.sin(), z.cos(), (2 * z).sin(), (2 * z).cos()], 1))


def train(name: str, network: Network, steps: int, u: torch.Tensor, s=None) -> Network:
    """Trains a copy of the network on E_U[l] or, given S, on the PU risk. u, s: points [n, 2]"""
    network, n_negative = copy.deepcopy(network), 0
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        t, eps = torch.randint(1000, (512,)), torch.randn(512, 2)    # how noisy, and the noise
        loss_u = diffusion.per_image_loss(network, u[torch.randint(len(u), (512,))], t, eps)
        risk = loss_u.mean()
        if s is not None:    # S gets the same noise: much of it cancels in the difference
            loss_s = diffusion.per_image_loss(network, s[torch.randint(len(s), (512,))], t, eps)
            risk = pu_loss(loss_u, loss_s, args.prior)
            n_negative += int(loss_u.mean() < args.prior * loss_s.mean())
        optimizer.zero_grad()
        risk.backward()
        optimizer.step()
    # means over 20,000 draws of t and eps; hidden is U without N
    l_n, l_hidden, l_s, l_u = [diffusion.per_image_loss(network, x.repeat(20_000 // len(x) + 1, 1))
                               for x in (normal, hidden, labeled, unlabeled)]
    columns = [l_n, l_hidden, l_s, args.prior * -log1mexp(l_s), l_u, args.prior * l_s]
    say(f"{name:14}" + "".join(f"{column.mean():13.3f}" for column in columns))
    if s is not None:
        say(f"E_U[l] - prior E_S[l] was negative in {n_negative / steps:.1%} of the PU steps")
    return network


say("mean l on:                N    U minus N            S   first term       E_U[l] prior E_S[l]")

# The difference of two means is noisy, so E_U[l] alone comes first, for half of the steps.
half = (args.steps + 1) // 2
new = Network(Linear(15, 128), ReLU(), Linear(128, 128), ReLU(), Linear(128, 128), ReLU(),
              Linear(128, 2))
half_way = train("at the switch", new, half, unlabeled)
networks = {"ordinary training": train("ordinary", half_way, half, unlabeled),
            "PU training": train("PU", half_way, half, unlabeled, labeled),
            "oracle": train("oracle", new, 2 * half, normal)}    # it knows N

# Panel 0 shows U and S, the others samples. Rate: the share of samples nearer to the upper moon.
picture = Image.new("RGB", (3360, 760), "white")    # twice as large, for smooth dots
draw, upper = ImageDraw.Draw(picture), moon(2000, blur=0)
for panel, name in enumerate(["U in grey, S in red", *networks]):
    dots = diffusion.sample(networks[name], (5000, 2)) if panel else labeled
    good = torch.cdist(dots, upper).amin(1) < torch.cdist(dots, -upper).amin(1)
    below = f"rate {good.float().mean():.3f}" if panel else f"{len(hidden):,} of 10,000 sensitive"
    say(f"{name}: {below}")
    for y, text in (60, name), (700, below):
        draw.text((840 * panel + 420, y), text, "black", font_size=56, anchor="mm")
    for part, colour in (unlabeled, "silver"), (dots[good], "steelblue"), (dots[~good], "crimson"):
        for x, y in part.tolist():
            draw.circle((840 * panel + 420 + 400 * x, 380 - 400 * y), 3, colour)
picture.resize((1680, 380)).save("toy.png")
