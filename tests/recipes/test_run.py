"""A run's folder: done stages are not done again, and nobody else's files are touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fastattn.recipes.arguments import weights_digest
from fastattn.recipes.errors import OutputError
from fastattn.recipes.run import CHECKPOINTS, Run

ARGUMENTS = {"model": "m", "lengths": (1, 2)}


def test_done_stages_are_taken_from_disk(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute(folder: Path) -> dict[str, object]:
        calls.append(folder.name)
        return {"value": 7}

    for _ in range(2):
        run = Run(tmp_path / "out", ARGUMENTS)
        assert run.stage("one", compute)["value"] == 7
    assert calls == ["one"]
    assert list(run.done) == ["one"]


def test_an_interrupted_stage_finds_its_folder_again(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> dict[str, object]:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, ARGUMENTS).stage("one", interrupted)
    run = Run(tmp_path, ARGUMENTS)
    assert run.done == {}
    results = run.stage("one", lambda folder: {"half": (folder / "half").read_text()})
    assert results["half"] == "done" and results["seconds"] >= 0


def test_checkpoints_stay_until_the_stage_is_marked_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(folder: Path) -> dict[str, object]:
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        return {}

    run, kept = Run(tmp_path, ARGUMENTS), tmp_path / "run" / "one" / CHECKPOINTS
    with monkeypatch.context() as full:
        full.setattr(os, "replace", raise_no_space)
        with pytest.raises(OutputError, match="No space left"):
            run.stage("one", compute)
    assert kept.is_dir()
    Run(tmp_path, ARGUMENTS).stage("one", compute)
    assert not kept.exists()


def raise_no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_changed_weights_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    (tmp_path / "teacher_logits_0.safetensors").write_bytes(b"no weights")
    before = weights_digest(tmp_path)
    (tmp_path / "teacher_logits_0.safetensors").unlink()
    assert weights_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_digest(tmp_path) != before


def test_other_arguments_need_restart(tmp_path: Path) -> None:
    Run(tmp_path, ARGUMENTS).stage("one", lambda _: {})
    other = {**ARGUMENTS, "model": "n"}
    with pytest.raises(OutputError, match="model was 'm', now 'n'.*--restart"):
        Run(tmp_path, other)
    assert list(Run(tmp_path, ARGUMENTS).done) == ["one"]
    assert Run(tmp_path, other, restart=True).done == {}
    assert Run(tmp_path, other).done == {}


def test_restart_does_not_delete_what_it_is_given(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(out, ARGUMENTS).stage("softmax", lambda _: {})
    link = tmp_path / "link"
    link.symlink_to(out)
    for model in (out / "run" / "softmax", out, link / "run" / "softmax"):
        with pytest.raises(OutputError, match="--restart would delete model .*another --output"):
            Run(out, ARGUMENTS, restart=True, inputs={"model": model})
    assert (out / "run" / "softmax").is_dir()
    assert list(Run(out, ARGUMENTS, inputs={"model": out}).done) == ["softmax"]
    Run(out, ARGUMENTS, restart=True, inputs={"model": tmp_path / "outside"})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk(tmp_path: Path, error: Exception) -> None:
    def compute(folder: Path) -> dict[str, object]:
        raise error

    with pytest.raises(OutputError, match="can't write to .*one"):
        Run(tmp_path, ARGUMENTS).stage("one", compute)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def compute(folder: Path) -> dict[str, object]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Run(tmp_path, ARGUMENTS).stage("one", compute)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(OutputError, match="not empty and holds no run of ours .thesis.tex"):
            Run(tmp_path, ARGUMENTS, restart)
    with pytest.raises(OutputError, match="is a file"):
        Run(tmp_path / "thesis.tex", ARGUMENTS)


def test_damaged_record(tmp_path: Path) -> None:
    Run(tmp_path, ARGUMENTS)
    (tmp_path / "run" / "run.json").write_text('{"arguments": {')
    with pytest.raises(OutputError, match="damaged"):
        Run(tmp_path, ARGUMENTS)
    Run(tmp_path, ARGUMENTS, restart=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"] == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't write to .*Permission denied"):
        Run(tmp_path / "out", ARGUMENTS)


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write to .*Not a directory"):
        Run(tmp_path / "file" / "out", ARGUMENTS)
