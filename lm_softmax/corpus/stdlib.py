"""`python-stdlib`: the corpus that every machine has, the source of Python's standard library."""

import hashlib
import sysconfig
from pathlib import Path

NAME = "python-stdlib"
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",  # the wheels of ensurepip
}


def read_stdlib(root: Path | None = None) -> dict[str, list[str]]:
    """Text of the standard library's `*.py` files without its tests, one row a file.

    A file belongs to a split by a hash of its name: about 90 % to train, 5 % to validation and
    5 % to test. The rows of a split are in the order of that hash, so that neighbours have
    nothing to do with each other. About 12 MB of text in all.

    Args:
        root: Folder of the library; that of the running Python if None.

    Raises:
        ValueError: If there are no source files.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[tuple[float, str, str]]] = {"train": [], "validation": [], "test": []}
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        # _sysconfigdata: how this very Python was compiled
        if _LEFT_OUT & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        try:
            text = file.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue  # sources in another encoding, and dangling links
        place = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[-4:]) / 2**32
        split = "train" if place < 0.9 else "validation" if place < 0.95 else "test"
        splits[split].append((place, name.as_posix(), text))
    if not all(splits.values()):
        raise ValueError(
            f"{NAME} needs the source files of Python's standard library, which are not in"
            f" {str(root)!r}: give a corpus of your own by path or data_files"
        )
    return {split: [text for *_, text in sorted(rows)] for split, rows in splits.items()}
