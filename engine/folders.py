"""Tell which files of a checkpoint folder are read: of which parts, in which variant, with which
digest.

A part is a folder of the checkpoint, such as `unet`. Its weights may lie there in several
precisions: plain (`model.safetensors`), and as variants (`model.fp16.safetensors`). The plain ones
are read where they are; else the variant. Pickles are never read. Nothing is loaded here: it knows
neither torch nor diffusers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.errors import CheckpointCorrupt
from engine.headers import LFS_TELLS, is_lfs_pointer

READ_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
INDEX = "model_index.json"
NOT_LOADED = "safety_checker"  # what may be seen is decided elsewhere in the house
# The parts that a native family reads, by family.
PARTS: dict[str, tuple[str, ...]] = {
    "sd": ("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    "sdxl": (
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "unet",
        "vae",
    ),
    "sd3": (
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "transformer",
        "vae",
    ),
    "flux": (
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "vae",
    ),
}
# Those that a checkpoint of the family may lack.
OPTIONAL_PARTS: dict[str, frozenset[str]] = {"sd3": frozenset({"text_encoder_3", "tokenizer_3"})}
# Variants in the order in which one is taken where several are and no plain weights.
VARIANTS = ("fp16", "bf16", "fp32")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5}(?:\.(?P<old_variant>\w+))?)?\.safetensors"
)
_INDEX = re.compile(r".+\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")


def part_names(family: str, path: Path) -> tuple[str, ...]:
    """Name the parts that a family reads of this checkpoint, in the order of their names.

    A native family's are known; those of the others stand in the checkpoint's index. Raises
    `CheckpointCorrupt` where that cannot be read.
    """
    if family not in PARTS:
        return tuple(sorted(classes_of(read_index(path))))
    optional = OPTIONAL_PARTS.get(family, frozenset())
    return tuple(part for part in PARTS[family] if part not in optional or (path / part).is_dir())


def read_index(path: Path) -> dict[str, Any]:
    """Read a checkpoint's model_index.json. Raises `CheckpointCorrupt`."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointCorrupt(INDEX, _in_words(problem)) from problem
    if not isinstance(index, dict):
        raise CheckpointCorrupt(INDEX, "is no object")
    return index


def classes_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return library and class of every part that is read, as an index names them.

    Raises `CheckpointCorrupt` for a part that is no folder of the checkpoint itself.
    """
    classes = {}
    for name, place in index.items():
        is_private = name.startswith("_") or name == NOT_LOADED
        if not is_private and isinstance(place, list) and place != [None, None]:
            if name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
                raise CheckpointCorrupt(INDEX, f"names a part {name[:64]!r}, which is no folder")
            library, kind = map(str, place) if len(place) == 2 else ("", "")
            classes[name] = (library, kind)
    return classes


# --- the files of one part ---


def variant_of(part: Path) -> str | None:
    """Name the variant of a part's weights that is read; None: the plain ones.

    Raises `CheckpointCorrupt` where nothing says which.
    """
    names = [file.name for file in _files(part) if file.suffix == ".safetensors"]
    found = {_variant_in(name) for name in names} - {None}
    if not found or len(found) < len({_variant_in(name) for name in names}):
        return None
    for variant in (*VARIANTS, *found):
        if variant in found and (variant in VARIANTS or len(found) == 1):
            return variant
    reason = f"holds weights only as the variants {', '.join(sorted(map(str, found)))}; keep one"
    raise CheckpointCorrupt(part.name, reason)


def read_files(part: Path) -> list[Path]:
    """List the files of a part that are read: of its weights, one variant alone."""
    variant = variant_of(part)
    return [file for file in _files(part) if _is_read(file.name, variant)]


def unread_files(part: Path) -> list[Path]:
    """List the files of a part that are never read: other variants, pickles, pictures."""
    read = set(read_files(part))
    return [file for file in sorted(part.glob("*")) if file.is_file() and file not in read]


def check_weights(path: Path, part: str) -> None:
    """Raise `CheckpointCorrupt`, naming file and way out, where a part's weights are not all there.

    path: of the checkpoint.
    """
    folder = path / part
    files = read_files(folder) if folder.is_dir() else []
    weights = {file.name for file in files if file.suffix == ".safetensors"}
    if not weights:
        raise _weights_missing(path, part)
    for name in sorted(weights):
        if is_lfs_pointer(folder / name):
            raise CheckpointCorrupt(f"{part}/{name}", LFS_TELLS)
    for index in (file for file in files if _INDEX.fullmatch(file.name)):
        for shard in sorted(_shards(part, index) - weights):
            reason = f"is missing, and {index.name} lists it; fetch the checkpoint again"
            raise CheckpointCorrupt(f"{part}/{shard}", reason)


def convert_command(path: Path) -> str:
    """Return the command that writes a checkpoint of pickles anew as safetensors, beside it."""
    where = str(path.absolute())
    program = (
        "import sys; from diffusers import DiffusionPipeline as P; "
        "P.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    return shlex.join([sys.executable, "-c", program, where, f"{where}-safetensors"])


def _weights_missing(path: Path, part: str) -> CheckpointCorrupt:
    folder = path / part
    if not folder.is_dir() or not any(folder.iterdir()):
        return CheckpointCorrupt(part, "is missing or empty")
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if not pickles:
        return CheckpointCorrupt(part, "holds no weights (*.safetensors)")
    reason = (
        "is a pickle, and pickles are never read, for they can run code; if you trust where it "
        f"comes from, convert the checkpoint: {convert_command(path)}"
    )
    return CheckpointCorrupt(f"{part}/{pickles[0]}", reason)


def _shards(part: str, index: Path) -> set[str]:
    """Return the files that an index of shards lists. Raises `CheckpointCorrupt`."""
    try:
        return {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = f"cannot be read: {problem}"
        raise CheckpointCorrupt(f"{part}/{index.name}", reason) from problem


def _files(part: Path) -> list[Path]:
    return sorted(
        file for file in part.glob("*") if file.is_file() and file.suffix in READ_SUFFIXES
    )


def _is_read(name: str, variant: str | None) -> bool:
    if name.endswith(".safetensors"):
        return _variant_in(name) == variant
    index = _INDEX.fullmatch(name)
    return index is None or index["variant"] == variant


def _variant_in(name: str) -> str | None:
    """Name the variant that a file of weights is of; None: a plain one.

    Whatever has a dot before its suffix is a variant, if of an unknown name.
    """
    match = _WEIGHTS.fullmatch(name)
    if match is not None:
        return match["variant"] or match["old_variant"]
    stem = name.removesuffix(".safetensors")
    return stem.partition(".")[2] or None


# --- digests ---


def hash_files(path: Path, parts: Iterable[str], *, threads: int = 1) -> dict[str, str]:
    """Return the sha256 of every file of these parts that is read, by its name relative to `path`.

    threads: files hashed at once; a thread that hashes does not hold the interpreter.  Raises
    `CheckpointCorrupt` for a checkpoint that is no folder, or lacks one of them.
    """
    names = files_read(path, parts)
    # The largest first, or it would be left for last and alone.
    by_size = sorted(names, key=lambda name: (path / name).stat().st_size, reverse=True)
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        hashed = pool.map(lambda name: sha256_of(path / name), by_size)
        digests = dict(zip(by_size, hashed, strict=True))
    return {name: digests[name] for name in names}


def files_read(path: Path, parts: Iterable[str]) -> list[str]:
    """Name every file of these parts that is read, relative to `path`. Raises as `hash_files`."""
    if not path.is_dir():
        raise CheckpointCorrupt(str(path), _not_a_folder(path))
    found: list[str] = []
    for part in parts:
        files = read_files(path / part)
        if not files:
            if any((path / part).glob("*")):
                check_weights(path, part)
            raise CheckpointCorrupt(part, "is missing or empty")
        found += [f"{part}/{file.name}" for file in files]
    return found


def digest_of(found: dict[str, str]) -> str:
    """Give one hex sha256 for all files, independent of where they lie."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file, hex. Raises `CheckpointCorrupt`."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as problem:
        raise CheckpointCorrupt(file.name, _in_words(problem)) from problem


def _not_a_folder(path: Path) -> str:
    if path.suffix == ".safetensors" and path.is_file():
        return "is a single file; make a folder of it: ./darkroom models import FILE NAME"
    return "is not a folder" if path.exists() else "is not there"


def _in_words(problem: Exception) -> str:
    return (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
