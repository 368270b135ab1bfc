"""
Files, whole or not at all: written under another name first, and verified when they are read.
"""
import csv
import os
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from runtime import OUT_OF_MEMORY, say

CHECKPOINT = set("args config ema fingerprint loss_prior model n_summed optimizer pu_start rng "
                 "scaler seconds step sums typical".split())    # what train.py saves


# -----------------------------------------------------------------------------
# any file

def regular(path: Path) -> Path:
    """-> path. Raises OSError where it is a folder, or a FIFO or a device, which could be read for
    ever."""
    if path.is_dir():
        raise OSError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file: remove it, or put one in its place")
    return path


def write_whole(path: Path, write, keep: Path = None, sync: bool = True):
    """Calls write(temporary path), then renames, so that path never holds half a file, even after
    a power cut (sync: False, faster, where that does not matter). What it held before stays under
    the name `keep`, if that is given.
    Raises OSError naming path where it cannot be written; no temporary file stays behind."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(part)
        if sync:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
        with suppress(OSError):    # Windows and some network file systems cannot
            if sync:
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
    except OSError as error:
        if error.errno is None or error.filename not in (None, part, str(part)):
            raise    # it is not about writing
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def remove_stale(folder: Path, pattern: str):
    """Removes the temporary files that killed processes left, but not those of running ones."""
    for path in folder.glob(pattern):
        with suppress(OSError):    # another process may have renamed or removed it
            if time.time() - path.stat().st_mtime > 600:    # seconds without a new byte
                path.unlink()


def save_whole(state, path: Path, keep: Path = None):
    """torch.save by write_whole: see there. It also knows a full disk, which torch.save hides."""
    def write(part):
        with part.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:    # raised while the error of the file was handled
                raise (error.__context__ or error) from None
    write_whole(path, write, keep)


def load_verified(path: Path, kind: str = "a file of torch.save") -> object:
    """Reads what torch.save wrote, onto the CPU, and checks what torch.load does not: the checksums
    in this zip archive, and that all numbers are finite. kind: what it should be, for the error.
    Raises OSError where the file is missing, damaged, or something else."""
    with regular(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                # No checksum covers external_attr, which is 0. With its bit 16, a folder's, tensors
                # would get no data, but what their memory happens to hold.
                if archive.testzip() or any(part.external_attr for part in archive.infolist()):
                    raise zipfile.BadZipFile
            file.seek(0)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:    # torch.load raises whatever its readers raise
            if OUT_OF_MEMORY.search(repr(error)):
                raise
            raise OSError(f"{path} is not {kind}, or is damaged") from None
    if not finite(loaded):
        raise OSError(f"{path} holds numbers that are not finite")
    return loaded


def finite(tree) -> bool:
    """Are all numbers finite in the tensors of nested dicts and lists?"""
    if isinstance(tree, torch.Tensor):
        return bool(tree.isfinite().all())
    branches = tree.values() if isinstance(tree, dict) else tree
    return not isinstance(tree, (dict, list)) or all(map(finite, branches))


# -----------------------------------------------------------------------------
# the folder of a training run

def lock_folder(folder: Path):
    """Makes a folder, and keeps other runs out -> a file, which must stay open until this run ends.
    Raises ValueError where another run uses the folder, OSError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise OSError(f"--out_dir {folder} cannot be written: {error.strerror}") from None
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ["ckpt", "log", "samples_", "before_after"]:
            for part in folder.glob(f"{name}*.tmp"):    # of a run that was killed while it saved
                part.unlink()
    except BlockingIOError:
        raise ValueError(f"another run uses {folder}: wait, or name another folder") from None
    except (ImportError, OSError):    # Windows and some network file systems: all may use it
        pass
    return file


def read_checkpoint(path: Path) -> dict:
    """Reads what train.py saved, onto the CPU. Raises OSError where path holds nothing like it."""
    kind = "a checkpoint of train.py"
    try:
        ckpt = load_verified(path, kind)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: train.py writes it at its first sample grid") from None
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("args"), dict):
        raise OSError(f"{path} is not {kind}")
    if missing := CHECKPOINT - ckpt.keys():
        raise OSError(f"{path} is not {kind}, or of another version: it lacks {min(missing)}")
    return ckpt


def read_newest(path: Path, previous: Path) -> dict:
    """-> the checkpoint at path; where that is missing or damaged, the one before it, and says so.
    Raises OSError where there is neither."""
    try:
        return read_checkpoint(path)
    except OSError as error:
        if not previous.exists():
            raise
        say(f"{error}; the checkpoint before it, {previous}, is used instead")
    ckpt = read_checkpoint(previous)
    with suppress(FileNotFoundError):    # the next save would keep it in the place of the good one
        path.rename(path.with_name("ckpt_damaged.pt"))
    return ckpt


def open_log(path: Path, columns: list, last_step: int):
    """Opens a log of rows with these columns, the first of which is "step", to go on behind
    last_step -> a function that writes a row, a dict. Rows after last_step go, for they come again;
    rows that are damaged go, too. Cells without a value are empty."""
    rows = []
    csv.field_size_limit(2 ** 31 - 1)    # of a damaged file
    if path.exists():
        with path.open(newline="", errors="replace") as file:
            for row in csv.DictReader(file, columns, quoting=csv.QUOTE_NONE):
                whole = None not in row and None not in row.values() and row["step"].isdecimal()
                if whole and int(row["step"]) <= last_step:
                    rows.append(row)

    def rewrite(part):
        with part.open("w", newline="") as file:
            log = csv.DictWriter(file, columns)
            log.writeheader()
            log.writerows(rows)

    write_whole(path, rewrite)
    log = csv.DictWriter(path.open("a", newline="", buffering=1), columns)

    def write_row(row):
        try:
            log.writerow(row)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from None

    return write_row
