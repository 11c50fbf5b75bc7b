"""Small data sets with odd names, odd files and odd layouts, and a configuration that reads each.

A part of them are folders of images, the others .npz files.
"""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.configurations import QUICK, Case, draw_key, list_keys, split_case
from tests.fuzz.pictures import ODD, SOUND, Writer, write_sound
from tests.fuzz.values import ODD_NUMBERS

_NAMES: tuple[bytes, ...] = (
    b"cat", b"dog", b"Cat", b"CAT", b"0", b"-1", b"1e3", b"null", b"true", b"~", b"a b", b" lead",
    b"trail ", b"new\nline", b"tab\t", b"-dash", b"--help", b"[bracket]", b"[bold]red",
    b"{brace}", b"*", b"?", b"a:b", b"a,b", b"a=b", b"%s", b"'quote'", b'"double"', b"back\\slash",
    b"#hash", b"&amp", b"x" * 255, "é".encode(), "e\u0301".encode(), "日本".encode(), b"\xff\xfe",
    "\U0001f600".encode(), "\u202eabc".encode(), b"\x1b[31m", b"\x01", b".hidden", b"__MACOSX",
    b"train", b"test", b"a.png", b"con", b"..a", b"\r", "\u2028".encode(), b"\xed\xb3\xbf",
)  # fmt: skip
_SUFFIXES = (b".png", b".png", b".png", b".jpg", b".PNG", b".jpeg", b".gif", b".tif", b".webp",
             b".bmp", b".ppm", b".ico", b".txt", b"", b".png ", b".eps", b".npy")  # fmt: skip
_TEST_NAMES = (b"test", b"test", b"test", b"val", b"valid", b"validation", b"Test", b"testing")


def make_data(dice: random.Random, folder: Path) -> Case:
    """Write a data set into a folder, and return the case of a run that reads it."""
    values: dict[str, Any] = {
        key: value for key, value in QUICK.items() if key not in ("data.samples", "data.image_size")
    }
    values["data.batch_size"] = 2
    if dice.random() < 0.3:
        values["data.name"] = "npz"
        values["data.root"] = "set.npz"
        _write_archive(folder / "set.npz", dice)
    else:
        values["data.name"] = "imagenet" if dice.random() < 0.1 else "image_folder"
        root = dice.choice(_NAMES) if dice.random() < 0.2 else b"images"
        values["data.root"] = os.fsdecode(root)
        _write_images(os.path.join(os.fsencode(folder), root), dice)

    # Most images have one size then, and the network takes no time.
    if dice.random() < 0.7:
        values["data.image_size"] = 8
    keys = [key for key in list_keys("data.") if key not in ("data.root", "data.name")]
    for key in dice.sample(keys, dice.choice((0, 0, 1, 1, 2, 3))):
        values[key] = draw_key(key, dice)
    if dice.random() < 0.1:
        values["model.num_classes"] = draw_key("model.num_classes", dice)
    if dice.random() < 0.1:
        values["data.classes"] = [os.fsdecode(name) for name in dice.sample(_NAMES, 3)]
    return split_case(values, dice)


# -- folders of images --------------------------------------------------------------------------


def _write_images(root: bytes, dice: random.Random) -> None:
    """Write train and test folders. Most have few faults, so that later steps are reached too."""
    fault = dice.choice((0.0, 0.0, 0.05, 0.3))
    test = dice.choice(_TEST_NAMES)
    if dice.random() < 0.85:
        test = b"test"
    os.makedirs(root)
    classes = dice.sample(_NAMES, dice.choice((1, 2, 2, 3, 4)))
    if dice.random() < 0.4:
        classes = [b"cat", b"dog"]
    parts = [b"train", test]
    if dice.random() < fault:
        parts = dice.choice(([b"train"], [], [test], [b"train", b"test", b"val", b"extra"]))
    for part in parts:
        names = classes
        if dice.random() < fault:
            names = dice.sample(_NAMES, 2)
        os.makedirs(os.path.join(root, part), exist_ok=True)
        for name in names:
            _write_class(os.path.join(root, part, name), dice, fault)
        if dice.random() < fault:
            _write_file(os.path.join(root, part), dice, fault)
    if dice.random() < fault:
        _add_oddity(root, dice)


def _write_class(folder: bytes, dice: random.Random, fault: float) -> None:
    """Write the folder of a class, or what stands in its place."""
    if os.path.lexists(folder):
        return
    if dice.random() < fault / 3:
        dice.choice(ODD)(folder, dice)
        return
    os.mkdir(folder)
    if dice.random() < fault / 3:
        return
    for number in range(dice.choice((1, 2, 3, 4, 6))):
        write_sound(os.path.join(folder, b"%d.png" % number), dice)
    for _ in range(dice.choice((0, 1, 3))):
        _write_file(folder, dice, fault)
    if dice.random() < fault:
        inner = os.path.join(folder, dice.choice(_NAMES))
        if not os.path.lexists(inner):
            os.mkdir(inner)
            _write_file(inner, dice, fault)


def _write_file(folder: bytes, dice: random.Random, fault: float) -> None:
    """Write one file with a name and a content of its own."""
    name = dice.choice(_NAMES)[:240] + dice.choice(_SUFFIXES)
    path = os.path.join(folder, name)
    writers: Sequence[Writer] = ODD if dice.random() < 2 * fault else SOUND
    if not os.path.lexists(path):
        dice.choice(writers)(path, dice)


def _add_oddity(root: bytes, dice: random.Random) -> None:
    """Add something that is no class and no image to a part."""
    train = os.path.join(root, b"train")
    oddities: Sequence[Callable[[], Any]] = (
        lambda: os.symlink(root, os.path.join(train, b"loop")),
        lambda: os.symlink(train, os.path.join(root, b"again")),
        lambda: os.symlink(b"self", os.path.join(train, b"self")),
        lambda: os.makedirs(os.path.join(train, *[b"deep"] * 300)),
        lambda: os.mkfifo(os.path.join(train, b"pipe")),
        lambda: os.chmod(train, 0),
        lambda: os.rename(train, train + b"ing"),
        lambda: write_sound(os.path.join(root, b"readme.png"), dice),
    )
    try:
        dice.choice(oddities)()
    except OSError:  # there is no such part, or the name is taken
        return


# -- .npz files ---------------------------------------------------------------------------------


def _write_archive(path: Path, dice: random.Random) -> None:
    """Write x_train, y_train, x_test and y_test, or something else, with a fault in one of two."""
    size = dice.choice((8, 8, 9, 12))
    shape = dice.choice(((size, size, 3), (size, size, 1), (size, size), (size, 2 * size, 3)))
    generator = np.random.default_rng(dice.randrange(2**32))
    arrays: dict[str, Any] = {}
    for part, count in (("train", dice.choice((2, 8, 24))), ("test", dice.choice((1, 4)))):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, *shape)).astype(np.uint8)
        arrays[f"y_{part}"] = generator.integers(0, dice.choice((1, 2, 3)), count)
    if dice.random() < 0.1:
        dice.choice(_WHOLE_FILES)(path, arrays, dice)
        return
    if dice.random() < 0.5:
        name = dice.choice(sorted(arrays))
        changed = dice.choice(_ARRAYS)(arrays[name], dice)
        if changed is None:
            del arrays[name]
        else:
            arrays[name] = changed
    save = dice.choice((np.savez, np.savez_compressed))
    save(path, **arrays)


_ARRAYS: tuple[Callable[[Any, random.Random], Any], ...] = (
    lambda array, dice: None,
    lambda array, dice: array.astype(dice.choice(("f4", "f8", "i1", ">i8", "u8", "?", "c8", "S3"))),
    lambda array, dice: array.astype(object),
    lambda array, dice: array[:0],
    lambda array, dice: array[:-1],
    lambda array, dice: np.asarray(3),
    lambda array, dice: np.asarray("text"),
    lambda array, dice: array[..., None],
    lambda array, dice: array[..., None, None, None],
    lambda array, dice: array.reshape(-1),
    lambda array, dice: -array.astype(np.int64) - 1,
    lambda array, dice: array.astype(np.int64) + dice.choice((100, 2**31, 2**40, 2**62)),
    lambda array, dice: np.full_like(array, dice.choice((0, 7, 255))),
    lambda array, dice: np.asfortranarray(array),
    lambda array, dice: array[::-1],
    lambda array, dice: np.full(len(array), dice.choice([n for n in ODD_NUMBERS if n == n])),
    lambda array, dice: np.zeros(len(array), [("a", "u1"), ("b", "f4")]),
    lambda array, dice: np.array(["2024-01-01"] * len(array), "datetime64[D]"),
    lambda array, dice: np.concatenate([array, array], axis=-1),
    lambda array, dice: np.atleast_2d(array)[:, :1],
    lambda array, dice: array[:, :0] if array.ndim > 1 else array[:0],
)


def _save_pieces(path: Path, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _header(shape: str, dtype: str = "|u1") -> bytes:
    """Return the start of a .npy file that claims a shape, with no values after it."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _spoil_file(path: Path, arrays: Any, dice: random.Random) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    content = bytearray(file.getvalue())
    for _ in range(dice.choice((1, 5, 50))):
        content[dice.randrange(len(content))] = dice.randrange(256)
    path.write_bytes(bytes(content[: dice.choice((len(content), dice.randrange(len(content))))]))


_CLAIMS = ("(10000000, 1000, 1000, 3)", "(-1,)", "(8, 8, 8, 3)", "()", "x", "(10**9,)", "(2, 0)")
_DTYPES = ("|u1", "<i8", "|O", "|V0", "<U1000000", "xx")
_WHOLE_FILES: tuple[Callable[[Path, Any, random.Random], Any], ...] = (
    _spoil_file,
    _spoil_file,
    lambda path, arrays, dice: path.write_bytes(b""),
    lambda path, arrays, dice: path.write_bytes(b"text\n"),
    lambda path, arrays, dice: path.mkdir(),
    lambda path, arrays, dice: os.mkfifo(path),
    lambda path, arrays, dice: os.symlink("/dev/zero", path),
    lambda path, arrays, dice: os.symlink(path.name, path),
    lambda path, arrays, dice: np.save(path.open("wb"), arrays["x_train"]),
    lambda path, arrays, dice: np.save(path.open("wb"), np.array([None]), allow_pickle=True),
    lambda path, arrays, dice: _save_pieces(path, {f"{name}.npy": b"" for name in arrays}),
    lambda path, arrays, dice: _save_pieces(path, dict.fromkeys(arrays, b"text")),
    lambda path, arrays, dice: _save_pieces(
        path,
        {f"{name}.npy": _header(dice.choice(_CLAIMS), dice.choice(_DTYPES)) for name in arrays},
    ),
    lambda path, arrays, dice: _save_pieces(
        path, {f"{name}.npy": _header("(8, 100000, 1000, 3)") + bytes(10**7) for name in arrays}
    ),
)
