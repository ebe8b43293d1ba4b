"""A generator of broken inputs, the same in every run: option files, images, checkpoints, states and LMDBs.

A case makes its files in a folder and returns what to do with them. That ends in a right result, or in a ``UserError``.
"""

import io
import os
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import partial, reduce
from itertools import product
from operator import getitem
from typing import NamedTuple

import cv2
import lmdb
import numpy as np
import torch
import yaml
from PIL import Image

from tests.conftest import photograph, set_option
from tlw_basicsr.data.resumable import CheckedDataset


class Case(NamedTuple):
    """``make(folder, generator, given)`` makes the files and returns what to do; ``given`` has what is whole."""

    name: str
    kind: str
    make: Callable
    must_fail: bool | None = None  # None where either end is right


JUNK = [
    -1, 0, 1.5, 10**400, float("nan"), float("inf"), "", "text", "../x", "a\nb", "\x07", "x" * 5000, [], [1, "a"], {},
    {"type": "L1Loss"}, {"type": None}, None, True, "日本", [[]], "1e-4x", b"bytes",
]  # fmt: skip


def places(section, into=dict, prefix=()):
    """The places of all values in nested dicts, or also in lists."""
    for key, value in section.items() if isinstance(section, dict) else enumerate(section):
        yield (*prefix, key)
        if isinstance(value, into):
            yield from places(value, into, (*prefix, key))


def yaml_value(folder, rng, given):
    """One value of a right file is junk, gone, or under another name."""
    opt = deepcopy(given["options"])
    # iterations are what they are asked for, and a plugin is another's code
    place = rng.choice([p for p in places(opt) if p[-1] not in ("total_iter", "path")])
    way = rng.randrange(6)
    if way == 1:
        name = rng.choice(["", 3, None, "x" + place[-1], "ключ"])
        set_option(opt, (*place[:-1], name), reduce(getitem, place, opt))
    set_option(opt, place, rng.choice(JUNK) if way > 1 else ...)
    return training(folder, given, yaml.safe_dump(opt, sort_keys=False, allow_unicode=True).encode())


def training(folder, given, content):
    """A training by the file of this content."""
    path = folder / "options.yml"
    path.write_bytes(content)
    return lambda: given["train"](folder, path)


INSERTED = [b"\xff\xfe", b"\x00", b"!!python/name:os.system ", b"&a [*a]", b"{", b"\t", b"? ", b"---\n", b"%YAML 9\n"]


def yaml_text(folder, rng, given):
    """The text is cut, has other bytes, or lines in another order."""
    content = bytearray(yaml.safe_dump(given["options"], sort_keys=False).encode())
    way = rng.randrange(4)
    if way == 0:
        content = content[: rng.randrange(len(content) - 20)]
    elif way == 1:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif way == 2:
        position = rng.randrange(len(content))
        content[position:position] = rng.choice(INSERTED)
    else:
        lines = content.split(b"\n")
        rng.shuffle(lines)
        content = b"\n".join(lines)
    return training(folder, given, content)


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
TEXTS = {  # and what the message has
    "endless": ("a: &a {b: *a}", ""),
    "deep": ("[" * 20000, ""),
    "binary": ("\x00\x01\x02", ""),
    "date": ("name: 2020-13-45", ""),
    "two files": ("a: 1\n---\nb: 2", ""),
    "merge": ("<<: 3", ""),
    "key is a list": ("? [1, 2]\n: 3", ""),
    "number": ("5", "must hold options"),
    "octal": ("name: 0o777777777777777777777777", ""),
    "surrogate": ('name: "\\ud800"', ""),
    "cut": ("name: [1, 2", "line 1"),
    "key twice": ("name: a\nname: b", "the key 'name' is given twice"),
    "key twice in a line": ("a: {b: 1, c: 2, b: 3}", "the key 'b' is given twice"),
    "list": ("- a\n- b", "must hold options"),
    "empty": ("", "must hold options"),
    "code": ("name: !!python/object/apply:os.system ['echo run > run.txt']", "could not determine a constructor"),
    "tab": ("a: &a [*a]\nb: \t x", "not valid YAML"),
    "bomb": ("a0: &a0 {x: 1}\n" + BOMB, "aliases"),
    "large": ("a: [" + "0, " * 2_000_000 + "0]", "has 6,000,006 bytes; accepted are at most 262,144"),
}


def option_case(place, value, prepare=lambda folder: None):
    """One option of a right file is another."""

    def make(folder, rng, given):
        opt = deepcopy(given["options"])
        set_option(opt, place, value)
        prepare(folder)
        return training(folder, given, yaml.safe_dump(opt, sort_keys=False, allow_unicode=True).encode())

    return make


PLUGINS = [
    5, "text", {}, [5], [None], [["x"]], ["../x"], [".x"], [""], ["x."], ["x y"], ["a\0b"], ["x" * 5000], ["日本"],
]  # fmt: skip
CODE = {
    "syntax": "def", "error": "raise KeyError('a\\nb')", "exit": "import sys\nsys.exit(0)", "zero": "1 / 0",
    "bytes": "\0", "import": "import no_such_module", "recursion": "def f(): f()\nf()",
}  # fmt: skip


def plugins():
    for number, value in enumerate(PLUGINS):
        yield Case(f"plugins {number}", "plugins", option_case("plugins", value), must_fail=True)
    for name, code in CODE.items():
        file = f"bad_plugin_{name}.py"  # a module is imported once
        write = partial(lambda folder, file, code: (folder / file).write_text(code), file=file, code=code)
        yield Case(f"plugins {name}", "plugins", option_case("plugins", [file[:-3]], write), must_fail=True)


PATHS = [
    "~no-such-user/x", "~no-such-user", "/dev/zero", "/", ".", "a\0b", "x" * 5000, "日本", "/proc/self/mem", "pipe",
]  # fmt: skip
PATH_KEYS = [
    "path:pretrain_network_g", "path:resume_state", "datasets:train:meta_info_file", "datasets:train:dataroot_gt",
]  # fmt: skip


def paths():
    """Places of files and folders that name something else; ``pipe`` is one that nobody writes to."""
    for key, (number, value) in product(PATH_KEYS, enumerate(PATHS)):
        make = option_case(key, value, lambda folder: os.mkfifo(folder / "pipe"))
        yield Case(f"path {key} {number}", "path", make, must_fail=True)


TEMPLATES = [
    "{0.x}", "{", "}", "{}{}", "{:>9999999999}", "{:x}", "{!r}", "{0}", "{a}", "{{}}", "}{", "x", "", 5, ["{}"],
]  # fmt: skip


def templates():
    for (number, value), kind in product(enumerate(TEMPLATES), ("BicubicSRDataset", "PairedImageDataset")):

        def make(folder, rng, given, value=value, kind=kind):
            train = {**given["options"]["datasets"]["train"], "type": kind, "filename_tmpl": value}
            lq = {"dataroot_lq": train["dataroot_gt"]} if kind == "PairedImageDataset" else {}
            return option_case("datasets:train", {**train, **lq})(folder, rng, given)

        yield Case(f"filename_tmpl {kind} {number}", "filename_tmpl", make, must_fail=True)


def encoded(image, kind, **params):
    """The bytes of a file; ``image`` is uint8, or an image of PIL's."""
    stream = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(stream, kind, **params)
    return stream.getvalue()


def validation_data(root, backend):
    """The data set of a validation of these images."""
    opt = {"name": "bad", "type": "BicubicSRDataset", "dataroot_gt": str(root), "io_backend": {"type": backend}}
    return CheckedDataset({**opt, "phase": "val", "scale": 2}, "datasets.val")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, data=b"", bits=8, color=2):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def broken_image(folder, rng, given):
    """A file of some format, cut, with other bytes, or with another's beginning."""
    image = photograph("astronaut", rng.randrange(300), rng.randrange(300), 32, 40)
    suffix, kind = rng.choice(
        [("png", "PNG"), ("jpg", "JPEG"), ("bmp", "BMP"), ("tif", "TIFF"), ("webp", "WEBP"), ("ppm", "PPM")]
    )
    content = bytearray(encoded(image, kind))
    way = rng.randrange(4)
    if way == 0:
        content = content[: rng.randrange(len(content))]
    elif way == 1:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif way == 2:
        content = bytearray(rng.randbytes(rng.randrange(200)))
    else:
        content[: rng.randrange(4, 30)] = rng.randbytes(rng.randrange(30))
    return reads(folder, f"image.{suffix}", bytes(content))


def reads(folder, name, content, expected=None, tolerance=0.0):
    """The image goes through the data set as in a validation; what it gives is ``expected``, uint8 RGB."""
    root = folder / "images"
    root.mkdir()
    (root / name).write_bytes(content)

    def act():
        item = validation_data(root, "disk")[0]
        gt = item["gt"].permute(1, 2, 0).numpy() * 255
        assert np.isfinite(gt).all() and item["lq"].shape[1] * 2 == gt.shape[0]
        if expected is not None:
            assert gt.shape == expected.shape
            assert np.abs(gt - expected).max() <= tolerance + 1e-3

    return act


def image_fixed(name, content, expected=None, tolerance=0.0):
    return lambda folder, rng, given: reads(folder, name, content, expected, tolerance)


def pil(content):
    """PIL's own conversion to 8-bit RGB."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def fixed_images():
    """Ordinary images of every kind with what they must give, and files that are none."""
    rgb = photograph("coffee", 100, 200, 32, 48)
    grey = np.ascontiguousarray(rgb[..., 1])
    three = np.dstack([grey] * 3)
    wide = rgb.astype(np.uint16) * 257 + 3
    palette = encoded(Image.fromarray(rgb).quantize(64), "PNG")
    bits = encoded(Image.fromarray(grey).convert("1"), "PNG")
    cmyk = encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95)
    grey_jpeg, progressive = encoded(grey, "JPEG"), encoded(rgb, "JPEG", progressive=True)
    more = [Image.fromarray(np.roll(rgb, 8 * i, axis=1)) for i in (1, 2)]
    animation = {"save_all": True, "append_images": more, "duration": 100}
    gif = encoded(rgb, "GIF", **animation)
    exif = Image.Exif()
    exif[0x0112] = 6
    right = [
        ("rgb.png", encoded(rgb, "PNG"), rgb, 0),
        ("grey.png", encoded(grey, "PNG"), three, 0),
        ("rgba.png", encoded(np.dstack([rgb, 255 - grey]), "PNG"), rgb, 0),
        ("grey and alpha.png", encoded(np.dstack([grey, 255 - grey]), "PNG"), three, 0),
        ("16 bit.png", cv2.imencode(".png", wide[..., ::-1])[1].tobytes(), rgb, 0),
        ("16 bit grey.png", cv2.imencode(".png", wide[..., 1])[1].tobytes(), three, 0),
        ("16 bit.tif", cv2.imencode(".tif", wide[..., ::-1])[1].tobytes(), rgb, 0),
        ("palette.png", palette, pil(palette), 0),
        ("one bit.png", bits, pil(bits), 0),
        ("cmyk.jpg", cmyk, pil(cmyk), 4),
        ("grey.jpg", grey_jpeg, pil(grey_jpeg), 2),
        ("progressive.jpg", progressive, pil(progressive), 3),
        ("rgb.bmp", encoded(rgb, "BMP"), rgb, 0),
        ("rgb.tif", encoded(rgb, "TIFF"), rgb, 0),
        ("rgb.ppm", encoded(rgb, "PPM"), rgb, 0),
        ("grey.pgm", encoded(grey, "PPM"), three, 0),
        ("lossless.webp", encoded(rgb, "WEBP", lossless=True), rgb, 0),
        ("a png named.jpg", encoded(rgb, "PNG"), rgb, 0),
        ("animated.webp", encoded(rgb, "WEBP", lossless=True, **animation), rgb, 0),
        ("animated.png", encoded(rgb, "PNG", **animation), rgb, 0),
    ]
    wrong = {
        "empty.png": b"",
        "text.png": b"I am a text",
        "html.jpg": b"<!DOCTYPE html><html>not found</html>",
        "zero wide.png": png_of(0, 32),
        "zero high.png": png_of(32, 0),
        "no data.png": png_of(32, 32),
        "little data.png": png_of(32, 32, b"\0" * 100),
        "huge.png": png_of(2**31 - 1, 2**31 - 1),
        "large.png": png_of(30_000, 30_000),
        "tall.png": png_of(8, 2**30),
        "bad depth.png": png_of(32, 32, b"\0" * 4000, bits=7),
        "bad colour.png": png_of(32, 32, b"\0" * 4000, color=5),
        "bomb.png": png_of(20_000, 20_000, b"\0" * 10_000_000),
        "tiny.png": encoded(rgb[:3, :3], "PNG"),
        "animation.gif": gif,
        "zip.png": b"PK\x03\x04" + b"\0" * 60,
        "head.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF",
        "head.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "head.tif": b"II*\0\x08\0\0\0",
        "head.bmp": b"BM" + b"\0" * 60,
    }
    either = {"gif named.png": gif, "exif.png": encoded(rgb, "PNG", exif=exif)}
    return [
        *(Case(f"image {name}", "image", image_fixed(name, *more), must_fail=False) for name, *more in right),
        *(
            Case(f"image {name}", "image", image_fixed(name, content), must_fail=True)
            for name, content in wrong.items()
        ),
        *(Case(f"image {name}", "image", image_fixed(name, content)) for name, content in either.items()),
    ]


def exif_of(endian, kind, count, value):
    """EXIF with an orientation of any type."""
    order = {"II": "<", "MM": ">"}[endian]
    entry = struct.pack(f"{order}HHHI", 1, 0x0112, kind, count) + value.ljust(4, b"\0")[:4]
    return b"Exif\0\0" + endian.encode() + struct.pack(f"{order}HI", 42, 8) + entry + b"\0\0\0\0"


# type, count and value of the orientation
ORIENTATIONS = {
    "text": (2, 2, b"6\0"),
    "raw text": (2, 2, b"\6\0"),
    "bytes": (7, 2, b"\6\0"),
    "swapped": (7, 2, b"\0\6"),
    "one byte": (7, 1, b"\6"),
    "byte": (1, 1, b"\6"),
    "float": (11, 1, struct.pack("<f", 6)),
    "none": (3, 0, b"\6"),
    "two": (3, 2, b"\6\0\1\0"),
    "large": (3, 1, b"\x36\0"),
    "zero": (3, 1, b"\0\0"),
    "turned": (3, 1, b"\6\0"),
}


def exif_bytes(folder, rng, given):
    kind, count = rng.randrange(1, 14), rng.choice([0, 1, 2, 4, 2**31])
    head = exif_of(rng.choice(["II", "MM"]), kind, count, rng.randbytes(4))
    content = bytearray(head + rng.randbytes(rng.randrange(40)))
    content[rng.randrange(6, len(content))] = rng.randrange(256)
    image = photograph("coffee", 100, 200, 32, 48)
    return reads(folder, "image.jpg", encoded(image, "JPEG", exif=bytes(content)))


def exif():
    """Orientations that are numbers, text, bytes and fractions; what must come is what OpenCV makes of them."""
    image = photograph("coffee", 100, 200, 32, 48)
    for (name, value), endian, suffix in product(ORIENTATIONS.items(), ("II", "MM"), ("JPEG", "WEBP")):
        content = encoded(image, suffix, exif=exif_of(endian, *value))
        expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        make = image_fixed(f"image.{suffix.lower()}", content, expected)
        yield Case(f"exif {name} {endian} {suffix}", "exif", make, must_fail=False)
    for number in range(20):
        yield Case(f"exif bytes {number}", "exif", exif_bytes)


class Code:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


def rezipped(content, edit=lambda name, data: data, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as a, zipfile.ZipFile(stream, "w", compression) as b:
        for member in a.infolist():
            data = edit(member.filename, a.read(member))
            if data is not None:
                b.writestr(member.filename, data)
    return stream.getvalue()


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def broken_bytes(rng, content):
    """A file cut, with other bytes, with something in it, or with one member of its archive changed."""
    way = rng.randrange(5)
    if way == 0:
        return content[: rng.randrange(len(content))]
    if way == 1:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 10)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == 2:
        position = rng.randrange(len(content))
        return content[:position] + rng.randbytes(50) + content[position:]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        victim = rng.choice([n for n in archive.namelist() if "data" in n])
    if way == 3:
        return rezipped(content, lambda n, d: None if n == victim else d)
    return rezipped(content, lambda n, d: d[: len(d) // 2] if n == victim else d)


VALUES = [
    None, -1, 0, 2**70, float("nan"), "text", [], {}, [None], {"a": None}, True, torch.zeros(0), torch.ones(7),
    torch.full((4, 3, 3, 3), torch.nan), torch.ones(4, 3, 3, 3, dtype=torch.int64), torch.ones(1).expand(10**5, 10**5),
    torch.eye(3).to_sparse(), torch.eye(3, dtype=torch.complex64), torch.empty(3, device="meta"),
]  # fmt: skip


DTYPES = [torch.complex64, torch.float8_e5m2, torch.int32, torch.bool, torch.float64, torch.float16]
NAMES = ["get_lr", "step", "items", "copy", "state", "params", "optimizer", "last_epoch", "lr", "_metadata", 0, -1, ""]


def broken_content(rng, content):
    """One value is another, gone, twice there, under another name or of another kind."""
    content = deepcopy(content)
    place = rng.choice(list(places(content, (dict, list))))
    section, way = reduce(getitem, place[:-1], content), rng.randrange(6)
    value = section[place[-1]]
    if way == 0:
        del section[place[-1]]
    elif way == 1 and isinstance(section, dict):
        section[rng.choice(NAMES)] = rng.choice([section.pop(place[-1]), rng.choice(VALUES)])
    elif way == 1:
        section.append(value)
    elif way == 2 and torch.is_tensor(value):
        section[place[-1]] = rng.choice([value.to(rng.choice(DTYPES)), value[..., None]])
    else:
        section[place[-1]] = rng.choice(VALUES)
    return saved(content)


OPTIMIZER, MOMENTS = ("optimizers", 0), ("optimizers", 0, "state", 0)
CHANGED = {  # what in a state has once crashed or misled a training
    "params 0 is a list": ((*OPTIMIZER, "param_groups", 0, "params", 0), []),
    "complex step": ((*MOMENTS, "step"), torch.tensor(1j)),
    "complex moment": ((*MOMENTS, "exp_avg"), torch.zeros(4, 3, 3, 3, dtype=torch.complex64)),
    "float8 moment": ((*MOMENTS, "exp_avg"), torch.zeros(4, 3, 3, 3).to(torch.float8_e4m3fn)),
    "moment of another shape": ((*MOMENTS, "exp_avg_sq"), torch.ones(3)),
    "amsgrad": ((*OPTIMIZER, "param_groups", 0, "amsgrad"), True),
    "tensor for lr": ((*OPTIMIZER, "param_groups", 0, "lr"), torch.ones(2)),
    "lr of 1e300": ((*OPTIMIZER, "param_groups", 0, "lr"), 1e300),
    "get_lr": (("schedulers", 0, "get_lr"), 3),
    "milestones": (("schedulers", 0, "milestones"), {7: 10**9, 3: 1}),
    "gamma": (("schedulers", 0, "gamma"), torch.ones(3)),
    "restarts": (("schedulers", 0, "restarts"), (0, 5)),
    "base_lrs": (("schedulers", 0, "base_lrs"), []),
    "count of text": (("accumulated",), [{"count": "x", "gradients": []}, None]),
    "gradients": (("accumulated",), [{"count": 1, "gradients": [torch.ones(1)] * 99}, None]),
    "numpy of floats": (("random", 0, "numpy"), ("MT19937", [2**70] * 624, 1, 0, 0.0)),
    "python": (("random", 0, "python"), (3, (1,) * 625, None)),
    "torch": (("random", 0, "torch"), torch.zeros(3, dtype=torch.uint8)),
    "cuda": (("random", 0, "cuda"), [3]),
    "k": (("tlw", "k"), "x"),
    "position": (("position", "iters_per_epoch"), "x"),
    "iter": (("iter",), 10**18),
    "options": (("options", "network_g", "num_feat"), torch.ones(3)),
    "options of a terminal": (("options", "train", "pixel_opt"), "\x1b[2J\n2026-01-01 00:00:00,000 ERROR: x"),
    "best": (("best_metric_results",), {"val": {"psnr": {"better": "higher", "val": "x", "iter": 1}}}),
    "guard": (("guard", "in_row"), "x"),
    "scaler": (("amp",), {"scaler": {"scale": "x"}}),
}


def changed(content, place, value):
    """The bytes of ``content`` with another value at a place."""
    set_option(content, place, value)
    return saved(content)


def hidden(content):
    """BUILD on an OrderedDict gives it attributes, which hide its methods."""
    content = OrderedDict(content)
    content.__dict__.update({"get": 3, "keys": 3, "copy": 3})
    return saved(content)


ATTACKS = {name: partial(changed, place=place, value=value) for name, (place, value) in CHANGED.items()}
ATTACKS["BUILD"] = hidden


def attack_case(attack):
    return lambda folder, rng, given: given["use"](folder, "state", attack(deepcopy(given["state"])))


WAYS = {"bytes": lambda rng, content: broken_bytes(rng, saved(content)), "value": broken_content}


def file_case(target, way):
    """A broken network, state or weights of the distance, at its place in a training that is to use it."""
    return lambda folder, rng, given: given["use"](folder, target, WAYS[way](rng, given[target]))


FILES = {
    "text": lambda content: b"I am a text",
    "empty": lambda content: b"",
    "code": lambda content: saved({**content, "more": Code()}),
    "code in the old format": lambda content: saved({**content, "more": Code()}, _use_new_zipfile_serialization=False),
    "cut in the old format": lambda content: saved(content, _use_new_zipfile_serialization=False)[:-60],
    "bomb": lambda content: rezipped(
        saved(content), lambda n, d: b"\0" * 50_000_000 if n.endswith("data/0") else d, zipfile.ZIP_DEFLATED
    ),
    "no data": lambda content: rezipped(saved(content), lambda n, d: b"" if n.endswith("data/0") else d),
    "script": lambda content: script(),
    "a zip": lambda content: rezipped(saved(content), lambda n, d: d if n.endswith("version") else None),
    "a list": lambda content: saved([1, 2]),
    "a tensor": lambda content: saved(torch.zeros(3)),
    "nothing in it": lambda content: saved({}),
    "an image": lambda content: encoded(photograph(), "PNG"),
    "a pickle": lambda content: b"\x80\x04cposix\nsystem\n(X\x09\x00\x00\x00touch rantR.",
    "deep": lambda content: b"\x80\x02" + b"]" * 10 + b"(" * 100_000,
    # is read as it is without
    "compressed": lambda content: rezipped(saved(content), compression=zipfile.ZIP_DEFLATED),
}


def fixed_file(target, name):
    def make(folder, rng, given):
        return given["use"](folder, target, FILES[name](given[target]))

    return make


def script():
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


DIGITS = [
    "1.png (²,64,3) 1", "1.png (٣,64,3) 1", "1.png (３２,40,3) 1", f"1.png ({'9' * 5000},40,3) 1", "1.png (32,40,①) 1",
    "1.png (+32,40,3) 1", "1.png (3_2,40,3) 1", "...png (32,40,3) 1", "../1.png (32,40,3) 1", "a/../../1.png (32,40,3) 1",
    "/1.png (32,40,3) 1", "a/...png (32,40,3) 1",
]  # fmt: skip


DATABASES = {  # how the database is broken
    "cut": lambda rng, content: content[: rng.randrange(0, len(content) - 5000)],
    "head": lambda rng, content: content[:16] + rng.randbytes(8192 - 16) + content[8192:],
    "text": lambda rng, content: b"text",
}
LINES = {  # how the second line of meta_info.txt is
    "key": lambda rng: "other.png (32,40,3) 1",
    "line": lambda rng: rng.choice(
        ["1.png", "1.png (a,b,3) 1", "1 (32,40,3)", "1.png ()", "\x00", "1.png (32)", "é.png (32,40,3) 1"]
    ),
    "size": lambda rng: f"1.png ({rng.choice(['3,3', '999,40', '0,0', '9' * 30 + ',4'])},3) 1",
    **{f"as {number}": lambda rng, line=line: line for number, line in enumerate(DIGITS)},
}
METAS = {"no meta": None, "empty meta": b"", "binary meta": random.Random(0).randbytes(100)}


def lmdb_case(way):
    def make(folder, rng, given):
        root = folder / "data.lmdb"
        image = encoded(photograph("astronaut", 0, 150, 32, 40), "PNG")
        broken = {"image": image[: rng.randrange(1, len(image) - 50)], "empty image": b""}.get(way, image)
        with lmdb.open(str(root), map_size=2**24) as env, env.begin(write=True) as txn:
            for key, value in {b"0": image, b"1": broken, b"2": image}.items():
                txn.put(key, value)
        lines = [f"{number}.png (32,40,3) 1" for number in range(3)]
        if way in LINES:
            lines[1] = LINES[way](rng)
        meta, data = root / "meta_info.txt", root / "data.mdb"
        meta.write_text("\n".join(lines))
        if way in DATABASES:
            data.write_bytes(DATABASES[way](rng, data.read_bytes()))
        if way in METAS:
            meta.unlink() if METAS[way] is None else meta.write_bytes(METAS[way])

        def act():
            images = validation_data(root, "lmdb")
            for number in range(len(images)):
                assert images[number]["gt"].shape == (3, 32, 40)

        return act

    return make


def cases():
    """All cases, in the same order in every run."""
    many = [
        *(Case(f"yaml value {n}", "yaml", yaml_value) for n in range(60)),
        *(Case(f"yaml text {n}", "yaml", yaml_text) for n in range(30)),
        *(Case(f"broken image {n}", "image", broken_image) for n in range(60)),
        *fixed_images(),
        *(Case(f"unicode digits {n}", "unicode digits", lmdb_case(f"as {n}"), True) for n in range(len(DIGITS))),
        *plugins(),
        *paths(),
        *templates(),
        *exif(),
    ]
    for target, number in (("network", 25), ("state", 25), ("weights", 5)):
        many += [Case(f"{target} {way} {n}", target, file_case(target, way)) for way in WAYS for n in range(number)]
        files = FILES if target != "weights" else [*list(FILES)[:8], "compressed"]
        many += [Case(f"{target} {name}", target, fixed_file(target, name), name != "compressed") for name in files]
    numbers = {"image": 3, "empty image": 1, "key": 1, "line": 6, "size": 4, "cut": 6, "head": 3, "text": 1}
    for way, number in (numbers | dict.fromkeys(METAS, 1)).items():
        must_fail = None if way == "size" else True
        many += [Case(f"lmdb {way} {n}", "lmdb", lmdb_case(way), must_fail) for n in range(number)]
    many += [Case(f"attack {name}", "attack", attack_case(attack)) for name, attack in ATTACKS.items()]
    return [*many, Case("lmdb whole", "lmdb", lmdb_case("nothing"), must_fail=False)]


def generator_of(case):
    """The random numbers of a case alone, the same in every run."""
    return random.Random(zlib.crc32(case.name.encode()))
