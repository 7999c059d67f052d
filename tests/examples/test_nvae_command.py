"""``python -m examples.nvae`` from the outside, and every kind of data it takes or refuses."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.nvae.__main__ import main
from examples.nvae.data import DataError, load

ROOT = Path(__file__).parents[2]
QUICK = ("--steps", "4", "--plain-steps", "4", "--samples", "2", "--batch-size", "20")


def idx(path: Path, count: int = 30, height: int = 28, width: int = 28) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width), np.uint8)
    raw = struct.pack(">BBBBIII", 0, 0, 8, 3, count, height, width) + pixels.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return pixels


def image_folder(
    folder: Path, mode: str, size: tuple[int, int] = (20, 17), count: int = 12
) -> None:
    folder.mkdir(exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "examples.nvae", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "1", "--groups", "1,1,1"), "a step of one image of one pixel"),
        (("--output", __file__), "File exists"),
        (("--learning-rate", "1e9", "--steps", "60"), "try a lower --learning-rate"),
    ],
)
def test_what_can_not_be_trained_is_said_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = {"--output": str(tmp_path / "out"), **dict(zip(arguments[::2], arguments[1::2]))}
    quick = dict(zip(QUICK[::2], QUICK[1::2]))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([part for option in {**quick, **given}.items() for part in option])


def test_digits() -> None:
    pytest.importorskip("sklearn")
    images = load(None)
    assert images.train.shape == (1500, 1, 8, 8) and images.test.shape == (297, 1, 8, 8)
    assert images.train.max() == 16 and images.levels == 17
    assert torch.equal(images.train, load(None).train)
    assert not torch.equal(images.train, load(None, seed=1).train)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files(tmp_path: Path, suffix: str) -> None:
    train = idx(tmp_path / f"train-images-idx3-ubyte{suffix}", 30)
    idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", 10)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"labels are not read")
    images = load(tmp_path)
    assert images.train.shape == (30, 1, 32, 32) and images.test.shape == (10, 1, 32, 32)
    assert (images.train[:, 0, 2:30, 2:30].numpy() == train).all()
    assert images.train.sum() == train.sum()  # the border is 0
    assert images.levels == 256


def test_one_mnist_file_is_split(tmp_path: Path) -> None:
    path = tmp_path / "some-images.ubyte"
    idx(path, 30, 5, 7)
    for images in (load(path), load(tmp_path)):
        assert images.train.shape == (25, 1, 8, 8) and len(images.test) == 5


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
def test_image_folders(tmp_path: Path, mode: str, channels: int) -> None:
    image_folder(tmp_path, mode)
    images = load(tmp_path)
    assert images.train.shape == (10, channels, 16, 16) and len(images.test) == 2
    assert load(tmp_path, size=8).train.shape[2:] == (8, 8)


def test_colour_is_kept_where_only_some_images_have_it(tmp_path: Path) -> None:
    image_folder(tmp_path, "L", count=3)
    pixels = np.random.default_rng(0).integers(0, 256, (17, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "z.png")
    assert load(tmp_path).channels == 3


def test_what_is_wrong_with_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither images .* nor MNIST-format files"):
        load(tmp_path)
    short = tmp_path / "train-images-idx3-ubyte"
    idx(short)
    short.write_bytes(short.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"says 30 images of 28 x 28, which takes 23536 bytes"):
        load(tmp_path)
    short.write_bytes(b"\0\0\x08\x01" + bytes(20))
    with pytest.raises(DataError, match="is no IDX file of images"):
        load(short)
    broken = tmp_path / "train.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="can't read"):
        load(broken)
    folder = tmp_path / "images"
    image_folder(folder, "L")
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"can't read the image .*bad\.png"):
        load(folder)
    wide = tmp_path / "wide"
    image_folder(wide, "L")
    Image.fromarray(np.full((17, 20), 60_000, np.uint16)).save(wide / "wide.png")
    with pytest.raises(DataError, match=r"wide\.png has more than 8 bits a pixel \(I;16\)"):
        load(wide)
    none = tmp_path / "train-images-idx3-ubyte"
    idx(none, count=0)
    with pytest.raises(DataError, match="has no pixels: 0 images of 28 x 28"):
        load(none)
    one = tmp_path / "one"
    image_folder(one, "L", count=1)
    with pytest.raises(DataError, match="one has 1 images; at least 2 are needed"):
        load(one)


def test_the_command_on_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("--output", str(tmp_path), *QUICK)
    assert done.returncode == 0, done.stderr
    for part in ("1500 images for training", "independent pixels", "plain VAE", "NVAE, attention"):
        assert part in done.stdout
    assert "Training NVAE 4/4" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["factorised"] == pytest.approx(27.2, abs=0.3)
    assert set(report["models"]) == {"NVAE, attention", "plain VAE"}
    with Image.open(tmp_path / "nvae.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(100_000) or []) > 20
    assert torch.load(tmp_path / "nvae.pt")


def test_the_command_on_coloured_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path / "images", "RGB")
    main(
        [
            "--data",
            str(tmp_path / "images"),
            "--output",
            str(tmp_path / "out"),
            "--mixer",
            "conv",
            "--flow",
            *QUICK,
        ]
    )
    out = capsys.readouterr().out
    assert "3 x 16 x 16, 256 grey levels" in out and "plain VAE" not in out
    assert (tmp_path / "out" / "nvae.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "error: --data nowhere does not exist"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--temperature", "inf"], "--temperature must be positive and finite"),
        (["--spectral", "-1"], "--spectral must be at least 0"),
        (["--size", "0"], "error: --size must be at least 1; got 0"),
        (["--size", "16"], "--size is for a folder of images; the set of digits has its own"),
        (["--groups", "2,x"], "'2,x' is no list of positive numbers such as 2,2"),
        (["--groups", "1,1,1,1"], "error: size must be a multiple of 16"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def test_what_the_picture_needs_is_missed_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(SystemExit, match=r"needs matplotlib: pip install 'fastattn\[examples\]'"):
        main(["--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
