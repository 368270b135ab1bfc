"""
What happens to l while the headline command runs: on normal images, on sensitive ones, and on S?

    python results/mechanism.py    # takes flags of train.py, but none that change U or S

It runs train.py, and at each checkpoint measures l on 1,000 images of each kind, by the averaged
weights. Labels, which training does not have, tell the kinds apart. It appends to mechanism.jsonl,
which plot.py draws: delete that first. The sample grids become a film, assets/mnist.gif.
"""
import json
import runpy
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import runtime  # noqa: E402
from images import to_float  # noqa: E402
from pretrained import load_checkpoint  # noqa: E402

mnist = data.load("mnist")
u, s, test_normal = data.split("mnist", mnist)
is_odd = mnist.train_labels[u] % 2 == 1
kinds = {"normal, held out": mnist.test[test_normal],
         "sensitive, held out": mnist.test[mnist.test_labels % 2 == 1],
         "sensitive, hidden in U": mnist.train[u[is_odd]], "sensitive, in S": mnist.train[s]}
save_whole = runtime.save_whole


@torch.no_grad()
def save_and_measure(state, path, keep=None):
    save_whole(state, path, keep)
    model, diffusion = load_checkpoint(state)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1000) * diffusion.T // 1000    # each image at its own timestep
    line = dict(step=state["step"], pu_start=state["pu_start"])
    for kind, images in kinds.items():
        eps = torch.randn(1000, 1, 28, 28, generator=generator)
        loss = [diffusion.per_image_loss(model, *parts) for parts in zip(
            to_float(images[:1000]).split(250), t.split(250), eps.split(250))]
        line[kind] = float(torch.cat(loss).mean())
    with (ROOT / "results" / "mechanism.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


runtime.save_whole = save_and_measure    # train.py saves its checkpoints by it
sys.argv = ["train.py", "--dataset", "mnist", "--prior", "0.5", *sys.argv[1:]]
run = runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

frames = []
for path in sorted(run["args"].out_dir.glob("samples_*.png")):
    step = int(path.stem[-6:])
    part = "minimises E_U[l]" if step <= run["pu_start"] else "minimises the PU risk"
    grid = ImageOps.expand(Image.open(path).convert("L"), (0, 24, 0, 0), "white")
    ImageDraw.Draw(grid).text((4, 5), f"step {step:,} {part}", "black", font_size=13)
    frames.append(grid.resize((2 * grid.width, 2 * grid.height)).quantize(16))
frames[0].save(ROOT / "assets" / "mnist.gif", save_all=True, append_images=frames[1:], loop=0,
               duration=[700] * (len(frames) - 1) + [3000], optimize=True)
