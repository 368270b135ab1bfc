"""
What becomes of a run and its files after kills, signals, full disks, flipped bits, mutated files
and senseless flags? With real processes and files, and a fixed seed for what is random.

    python tests/faults.py            # the full counts: some minutes on two cores
    python tests/faults.py --quick    # a few of each kind, as in the tests

It prints a line a kind. "undetected" is other data from a format without a checksum. Anywhere else
that is "silent", and a failure, as a traceback is: then the exit status is 1.
"""
import contextlib
import copy
import csv
import errno
import gc
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import cache, partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from conftest import same  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import files  # noqa: E402
import formats  # noqa: E402
import pretrained  # noqa: E402
import recipe  # noqa: E402
import runtime  # noqa: E402
from pu_filter import read_scores  # noqa: E402

conftest.MINI = dict(channels=(4,), attention=(), groups=4, blocks=1)    # all here is about files
data.load_idx = cache(data.load_idx)    # read once; the processes inherit it
pretrained.HUB = "http://127.0.0.1:9"    # where nobody answers
torch.set_num_threads(1)    # a fork has no other threads
PHOTOS = ["--device", "cpu", "--dataset", "folder", "--prior", 0.5, "--image_size", 4,
          "--channels", 1, "--data_dir"]    # and their folder
LAST_SAVE = 21    # number of the event after which a training only writes grids
FULL = dict(kills=20, flips=60, mutations=500, flags=150)
QUICK = dict(kills=2, flips=3, mutations=30, flags=15)


def report(kind: str, outcomes: list) -> bool:
    """Prints how often each outcome occurred. -> was all as it should be?"""
    n = Counter(outcomes)
    words = dict(right="right results", sentence="sentences", traceback="tracebacks",
                 silent="silent")
    found = [f"{n[name]} {text}" for name, text in words.items()]
    found += [f"{n[name]} {name}" for name in n.keys() - words.keys()]
    print(f"{kind}: {len(outcomes)} tried, {', '.join(found)}", flush=True)
    return not n.keys() - {"right", "sentence", "undetected"}


# -----------------------------------------------------------------------------
# processes

def start(*command, first=lambda: None) -> tuple:
    """Forks a process that calls first(), then runs a script -> its id, and a pipe for its words"""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, reader
    status, said = 99, ""
    try:
        gc.freeze()    # what it inherits
        first()
        result = conftest.run(*command, check=False)
        status, said = result.returncode, result.stdout + result.stderr
    except BaseException:
        said = traceback.format_exc()
    finally:
        os.write(writer, said[-60_000:].encode(errors="replace"))    # less than a pipe holds
        os._exit(status)


def end(pid: int, reader: int) -> tuple:
    """-> the exit status of a process, or -N where signal N killed it, and what it said"""
    with open(reader, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def outcome(status: int, said: str, good: int = 0) -> str:
    """Did the process end with the status `good`, or with one sentence?"""
    if "Traceback" in said or "Exception ignored" in said:
        print(said, file=sys.stderr)
        return "traceback"
    if status == good:
        return "right"
    one = len(re.findall(r"\w\.py: error: .*[^:\s]", said)) == 1
    return "sentence" if one and status in (1, 2) else f"exit status {status} ({said[-200:]})"


def at(moment: int, pattern: str, act):
    """Returns a function after whose call the process does act() just before it opens or renames a
    path that matches, for the time number `moment`."""
    def hook(event, args):
        nonlocal moment
        if event in ("open", "os.rename") and re.search(pattern, str(args[0])):
            moment -= 1
            if moment == 0:
                act()
    return lambda: sys.addaudithook(hook)


def no_file_above(size: int, deadly: bool = False):
    """Writing more to a file fails, as on a full disk; deadly: or kills the process meanwhile."""
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def works(*command):
    status, said = end(*start(*command))
    assert status == 0, said


def send(number: int):
    os.kill(os.getpid(), number)


# -----------------------------------------------------------------------------
# files of every kind

def prepare(root: Path) -> list:
    """Writes small data sets, and trains -> the flags of that training"""
    conftest.make_folder(root / "photos", n=24)
    conftest.write_cifar10(root / "cifar10" / "cifar-10-batches-bin", batches=1, n=6)
    conftest.write_celeba(root / "celeba", as_zip=True)
    (root / "stl10" / "stl10_binary").mkdir(parents=True)
    for part in ["train", "test"]:
        images = conftest.random_bytes(2 * 3 * 96 * 96)
        images.tofile(root / "stl10" / "stl10_binary" / f"{part}_X.bin")
        (root / "stl10" / "stl10_binary" / f"{part}_y.bin").write_bytes(b"\1\12")
    for i, kind in product(range(2), formats.FORMATS):
        path = root / "images" / kind / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(KeyError, OSError):    # AVIF may be missing
            Image.fromarray(conftest.random_bytes(32, 32, 3)).save(path, kind)
    train = ["train.py", *PHOTOS, root / "photos", "--dtype", "float32", "--batch_size", 16,
             "--pu_start", 3, "--limit", 2, "--max_steps", 6, "--log_interval", 1,
             "--sample_interval", 2]
    works(*train, "--out_dir", root / "whole")
    works("pu_filter.py", *PHOTOS, root / "photos", "--steps", 1, "--out_dir", root / "filter")
    works("sample.py", "--ckpt", root / "whole" / "ckpt.pt", "--save_diffusers", root / "bin",
          "--device", "cpu")
    return train


def readers(root: Path) -> dict:
    """-> {kind: (path, a function that reads it, does a checksum cover it?, what is read)}"""
    photos = data.load("folder", root / "photos", 4, 1)
    u, s, _ = data.split("folder", photos)
    toys = data.load("cifar10", root)
    weights, idx = f"{pretrained.WEIGHTS}.bin", formats.IDX_FILES[3]
    shutil.copytree(root / "bin", root / "safe")
    shutil.copytree(ROOT / "data" / "mnist", root / "mnist")
    shutil.copytree(root / "mnist", root / "idx")    # conftest.py reads root / "mnist" once
    columns = (root / "whole" / "log.csv").read_text().splitlines()[0].split(",")

    def judge(path):
        classifier, accuracy = evaluate.load_judge(toys, False, path, torch.device("cpu"))
        return classifier.state_dict(), accuracy

    def diffusers(path):
        model, diffusion = pretrained.load_pretrained(path.parent)
        return model.state_dict(), diffusion.prediction

    def named(name, *size):
        return lambda path: vars(data.load(name, root, *size))

    def celeba(path):
        shutil.rmtree(root / "celeba" / "img_align_celeba", ignore_errors=True)
        return named("celeba", 8)(path)

    def log(path):
        files.open_log(path, columns, 99)
        return path.read_text()

    judge(root / "judge.pt")
    cifar10, stl10 = root / "cifar10" / "cifar-10-batches-bin", root / "stl10" / "stl10_binary"
    kinds = {
        "checkpoint": (root / "whole" / "ckpt.pt", files.read_checkpoint, True),
        "scores": (root / "filter" / "scores.pt",
                   lambda path: read_scores(path, photos, u, s, 0.5), True),
        "judge": (root / "judge.pt", judge, True),
        "diffusers .bin": (root / "bin" / weights, diffusers, True),
        "folder cache": (root / "photos" / "decoded_4x1.bin",
                         lambda path: vars(data.load("folder", path.parent, 4, 1)), True),
        "IDX .gz": (root / "idx" / f"{idx}.gz", lambda path: formats.read_idx(
            path, formats.IDX_SHA256["mnist"][3]).tolist(), True),
        "CelebA zip": (root / "celeba" / "img_align_celeba.zip", celeba, True),
        "CelebA attributes": (root / "celeba" / "list_attr_celeba.txt", named("celeba", 8), True),
        "CelebA parts": (root / "celeba" / "list_eval_partition.txt", named("celeba", 8), False),
        "CIFAR-10": (cifar10 / "data_batch_1.bin", named("cifar10"), False),
        "STL-10": (stl10 / "train_X.bin", named("stl10"), False),
        "STL-10 labels": (stl10 / "test_y.bin", named("stl10"), False),
        "config.json": (root / "bin" / "config.json", diffusers, False),
        "scheduler_config.json": (root / "bin" / "scheduler_config.json", diffusers, False),
        "log.csv": (root / "whole" / "log.csv", log, False)}
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_file
        path = (root / "safe" / weights).with_suffix(".safetensors")
        tensors = torch.load(root / "bin" / weights)
        save_file({name: x.contiguous() for name, x in tensors.items()}, path)
        (root / "safe" / weights).unlink()
        kinds["safetensors"] = (path, diffusers, False)
    for path in (root / "images").glob("*/0.png"):
        kinds[path.parent.name] = (
            path, lambda path: evaluate.read_images(path.parent, 3, 32), False)
    return {kind: (path, read, checksum, copy.deepcopy(read(path)))
            for kind, (path, read, checksum) in kinds.items()}


def content(folder: Path) -> list:
    """All that a training leaves, but for times and the name of the folder"""
    ckpt = files.read_checkpoint(folder / "ckpt.pt")
    ckpt["seconds"] = ckpt["args"]["out_dir"] = ckpt["args"]["resume"] = None
    with (folder / "log.csv").open() as file:
        log = [{name: row[name] for name in row if name not in ("seconds", "images_per_second")}
               for row in csv.DictReader(file)]
    pngs = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return [ckpt, log, pngs, [path.name for path in folder.glob("*.tmp")]]


# -----------------------------------------------------------------------------
# the faults

def interrupt(root: Path, train: list, n_kills: int) -> bool:
    """Kills trainings while they save, and at any time; signals while they save; then resumes."""
    choose, whole, kills, signals = random.Random(0), content(root / "whole"), [], []

    def resumed(out):
        found = outcome(*end(*start(*train, "--out_dir", out, "--resume")))
        return "silent" if found == "right" and not same(content(out), whole) else found

    for i in range(n_kills):
        out, act = root / f"kill_{i}", partial(send, signal.SIGKILL)
        if i % 2:    # at any time
            running = start(*train, "--out_dir", out)
            time.sleep(choose.random())
            os.kill(running[0], signal.SIGKILL)
        else:    # before a checkpoint, or grid, is opened or renamed; or while it is written
            moment = choose.randint(1, 28)
            if i % 4 and moment <= LAST_SAVE:
                act = partial(no_file_above, choose.randrange(10_000), deadly=True)
            running = start(*train, "--out_dir", out, first=at(moment, "ckpt|samples", act))
        status, said = end(*running)
        killed = i % 2 or status in (-signal.SIGKILL, -signal.SIGXFSZ)    # it may have been faster
        kills.append(resumed(out) if killed else f"not killed ({moment})")
    for number, moment in [(signal.SIGTERM, 2), (signal.SIGINT, 11)]:    # in the first, third save
        out = root / f"signal_{number}"
        status, said = end(*start(*train, "--out_dir", out,
                                  first=at(moment, "ckpt", partial(send, number))))
        step = files.read_checkpoint(out / "ckpt.pt")["step"]
        good = status == 128 + number and f"interrupted: step {step} is saved" in said
        signals.append(resumed(out) if good else f"exit status {status} ({said[-200:]})")
    return report("kills", kills) & report("signals", signals)


def fill_disks(root: Path, train: list) -> bool:
    """Writes each kind of file onto a disk that is full when it begins, or 60 bytes later."""
    disk, ckpt = root / "disk", root / "whole" / "ckpt.pt"
    out, picture, photos = disk / "out", disk / "out.png", [*PHOTOS, disk / "photos"]
    with tarfile.open(root / "cifar.tar.gz", "w:gz") as tar:
        tar.add(root / "cifar10" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    formats.ARCHIVES["cifar10"] |= dict(urls=[(root / "cifar.tar.gz").as_uri()])
    further = [*train, "--resume", "--max_steps", 8, "--out_dir"]
    shutil.copytree(root / "whole", root / "further")
    works(*further, root / "further")
    shutil.copytree(root / "photos", disk / "photos", ignore=lambda *_: ["decoded_4x1.bin"])
    draw = ["sample.py", "--ckpt", ckpt, "--n", 9, "--steps", 1, "--device", "cpu"]
    outcomes = []
    for i, (path, moment, *command) in enumerate([
            ("ckpt", 2, *further, out), ("samples_", 1, *further, out),    # of step 6, again
            ("samples_", 4, *further, out), ("before_after", 1, *further, out),
            ("log.csv", 2, *further, out), ("log.csv", 4, *train, "--out_dir", out),    # a row
            ("decoded_", 2, "data.py", *photos[2:], "--preview", picture),
            ("out.png", 1, "data.py", *photos[2:], "--preview", picture),
            ("tar.gz", 2, "data.py", "--dataset", "cifar10", "--data_dir", disk),
            ("scores.pt", 1, "pu_filter.py", *photos, "--steps", 1, "--out_dir", out),
            ("dropped.png", 1, "pu_filter.py", *photos, "--steps", 1, "--out_dir", out),
            ("evaluation", 1, "evaluate.py", "--images", root / "images" / "PNG", "--data_dir",
             root, "--dataset", "cifar10", "--device", "cpu", "--out_dir", out),
            ("00005.png", 1, *draw, "--out_dir", out), ("out.png", 1, *draw, "--grid", picture),
            ("pytorch_model", 1, *draw, "--save_diffusers", out),
            ("config.json", 1, *draw, "--save_diffusers", out)]):
        shutil.rmtree(out, ignore_errors=True)
        if "--resume" in command:
            shutil.copytree(root / "whole", out)
        first = at(moment, path, partial(no_file_above, i % 2 * 60))
        status, said = end(*start(*command, first=first))
        found = outcome(status, said)
        if os.strerror(errno.EFBIG) not in said or path not in said or list(disk.rglob("*.tmp")):
            found = f"{path} is not the problem, or left behind ({said[-200:]})"
        for png in disk.rglob("*.png"):
            Image.open(png).verify()    # no half files
        if (out / "ckpt.pt").exists():    # the training goes on as if nothing had been
            works(*command)
            if not same(content(out), content(root / "further")):
                found = "silent"
        outcomes.append(found)
    return report("full disks", outcomes)


def damage(raw: bytes, path: Path, read, checksum: bool, truth) -> str:
    """-> what comes of reading a damaged file, which is restored afterwards"""
    whole, quiet = path.read_bytes(), io.StringIO()
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        path.write_bytes(raw)
        try:
            if same(read(path), truth):
                return "right"
            return "silent" if checksum else "undetected"
        except (OSError, ValueError) as error:
            text = str(error)
            named = any(name in text for name in path.parts[-3:])
            return "sentence" if named and "\n" not in text else f"no good sentence ({error})"
        except Exception:
            traceback.print_exc(file=sys.__stderr__)
            return "traceback"
        finally:
            path.write_bytes(whole)


def flip_bits(kinds: dict, n: int) -> bool:
    """Flips one bit in each kind of file"""
    good, choose = True, random.Random(0)
    for kind, (path, *reading) in kinds.items():
        whole, outcomes = path.read_bytes(), []
        for bit in choose.sample(range(8 * len(whole)), min(n, 8 * len(whole))):
            raw = bytearray(whole)
            raw[bit // 8] ^= 1 << bit % 8
            outcomes.append(damage(raw, path, *reading))
        good &= report(f"bits of {kind}", outcomes)
    return good


def mutate(kinds: dict, n: int) -> bool:
    """Cuts, lengthens and overwrites files of all kinds in turn"""
    choose, outcomes = random.Random(0), []
    for i in range(n):
        path, *reading = list(kinds.values())[i % len(kinds)]
        raw = bytearray(path.read_bytes())
        first = choose.randrange(min(len(raw), choose.choice([8, 64, len(raw)])))
        length = choose.choice([1, 4, 100])
        noise = choose.randbytes(length)
        extreme = choose.choice(["00000000", "ffffffff", "7fffffff", "80000000", "ffffff7f"])
        part, new = choose.choice([
            (slice(first, None), b""), (slice(first, first + length), b""),
            (slice(first, first), noise), (slice(first, first + length), noise),
            (slice(first, first + 4), bytes.fromhex(extreme))])
        raw[part] = new
        outcomes.append(damage(raw, path, *reading))
    return report("mutated files", outcomes)


def try_flags(root: Path, n: int) -> bool:
    """Random flags of train.py, for one step; none may take more than 3 GB"""
    choose, outcomes = random.Random(0), []
    numbers = [*["1", "2", "4", "16", "0.5", "1/3"] * 3, "0", "-1", "1.5", "nan", "inf", "1e400",
               "", "x", "1000000", "2147483647", "99999999999999999999"]
    special = {"dataset": ["mnist", "cifar10", "celeba", "folder"], "data_dir": [root, root / "x"],
               "init_from": [root / "bin", root / "whole", "some/model", root, "x"],
               "scores": [root / "filter" / "scores.pt", root / "whole" / "ckpt.pt", "x"],
               "sensitive": ["odd", "even", "0", "4,7", "cat", "odd,even", "", ","],
               "device": ["cpu", "banana"]}
    actions = [action for action in recipe.train_flags("")._actions
               if action.dest not in ("help", "compile", "out_dir")]

    def first():
        runtime.SignalWatch.number = signal.SIGTERM    # as if it had come: the first step is last
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 3 * 2 ** 30,) * 2)

    for i in range(n):
        command = ["train.py", *choose.choice([["--device", "cpu"], [*PHOTOS, root / "photos"]])]
        for action in choose.sample(actions, choose.randint(1, 3)):
            values = special.get(action.dest) or action.choices or numbers
            value = [] if action.nargs == 0 else [choose.choice(list(values))]
            command += [choose.choice(action.option_strings), *value]
        out = root / f"flags_{i}"
        found = outcome(*end(*start(*command, "--out_dir", out, first=first)), 128 + signal.SIGTERM)
        if found == "right":
            files.read_checkpoint(out / "ckpt.pt")
        elif found == "sentence" and (out / "ckpt.pt").exists():
            found = "silent"
        if found not in ("right", "sentence"):
            print(*command, file=sys.stderr)
        outcomes.append(found)
    return report("flags", outcomes)


def main(kills: int, flips: int, mutations: int, flags: int):
    began, good = time.time(), True
    with tempfile.TemporaryDirectory() as root:
        root = data.DATA_DIR = Path(root)
        train = prepare(root)
        good &= interrupt(root, train, kills)
        good &= fill_disks(root, train)
        with contextlib.redirect_stderr(io.StringIO()):
            kinds = readers(root)
        good &= flip_bits(kinds, flips)
        good &= mutate(kinds, mutations)
        good &= try_flags(root, flags)
    print(f"{time.time() - began:.0f} seconds")
    sys.exit(not good)


if __name__ == "__main__":
    warnings.simplefilter("ignore")    # of Pillow, about mutated images
    main(**QUICK if "--quick" in sys.argv else FULL)
