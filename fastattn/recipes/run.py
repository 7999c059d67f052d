"""A run's folder: its stages, each saved when done, so that an interrupted run goes on.

``run.json`` holds the arguments and the results of the stages done. A stage works in a folder of
its own; only when its results are on disk is it marked as done, by one atomic replacement of
``run.json``. The same command again finds the mark and takes the results; a stage that was
interrupted finds its own half-done folder and may go on from there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastattn.recipes.errors import OutputError

FOLDER = "run"
FILE = "run.json"
# What is in the messages of safetensors and of torch.save on a full disk.
UNWRITTEN = ("No space left", "Disk quota", "PytorchStreamWriter failed", "unexpected pos")
CHECKPOINTS = "checkpoints"  # of a stage: what it goes on from until it is done
Results = dict[str, Any]


class Run:
    """The stages of one run below ``output/run``.

    Args:
        arguments: everything that the results depend on, as JSON values.
        restart: forget the stages of an earlier run in ``output`` instead of going on with them.
        inputs: what the stages read, by the name of its argument; a restart must not delete it.

    Raises:
        OutputError: the folder can't be written to, holds files that no run of ours made,
            holds a run with other arguments, or is to be restarted and holds its own inputs.
    """

    def __init__(
        self,
        output: Path,
        arguments: dict[str, Any],
        restart: bool = False,
        inputs: dict[str, Path] | None = None,
    ) -> None:
        self.output = output
        self.folder = output / FOLDER
        self._file = self.folder / FILE
        # What JSON makes of them: a tuple, say, comes back as a list.
        arguments = json.loads(json.dumps(arguments))
        if restart:
            _check_outside(output, inputs or {})
        try:
            earlier = self._open(restart)
            if earlier is None:
                self._record: dict[str, Any] = {"arguments": arguments, "stages": {}}
                self._write()
            else:
                _check_same(output, earlier["arguments"], arguments)
                self._record = earlier
                self._write()  # finds out now that the folder is read-only, not in an hour
        except OSError as error:
            raise OutputError(f"can't write to {output}: {error.strerror or error}") from error

    @property
    def done(self) -> dict[str, Results]:
        """Results of the stages that are done, in order."""
        return dict(self._record["stages"])

    def stage(self, name: str, compute: Callable[[Path], Results], given: Any = None) -> Results:
        """The results of a stage: those saved, or those of ``compute(folder of the stage)``.

        ``seconds`` is added to the results; a stage that was interrupted counts from its restart.
        ``given``: a JSON value that this stage alone depends on; with another it is computed anew.
        """
        given = json.loads(json.dumps(given))
        saved = self._record["stages"].get(name)
        if saved is None or saved.get("given") != given:
            folder = self.folder / name
            start = time.monotonic()
            try:
                folder.mkdir(exist_ok=True)
                results = compute(folder)
                results["seconds"] = time.monotonic() - start
                if given is not None:
                    results["given"] = given
                self._record["stages"][name] = results
                self._write()
                # Only now: until then an interrupted stage goes on from them.
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            except OSError as error:
                raise OutputError(f"can't write to {folder}: {error.strerror or error}") from error
            except (SafetensorError, RuntimeError) as error:
                if not any(words in str(error) for words in UNWRITTEN):
                    raise
                raise OutputError(f"can't write to {folder}: {error}") from error
        return dict(self._record["stages"][name])

    def _open(self, restart: bool) -> dict[str, Any] | None:
        """The record of an earlier run, or None in a folder that is now empty of one."""
        if self.output.exists() and not self.output.is_dir():
            raise OutputError(f"output folder {self.output} is a file")
        self.output.mkdir(parents=True, exist_ok=True)
        if self._file.is_file():
            if not restart:
                try:
                    return dict(json.loads(self._file.read_text()))
                except ValueError as error:
                    raise OutputError(
                        f"{self._file} is damaged ({error}): start over with --restart"
                    ) from error
            shutil.rmtree(self.folder)
        elif names := sorted(path.name for path in self.output.iterdir()):
            raise OutputError(
                f"output folder {self.output} is not empty and holds no run of ours "
                f"({', '.join(names[:5])}): give another, or empty it"
            )
        self.folder.mkdir(exist_ok=True)
        return None

    def _write(self) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._record, indent=2) + "\n")
        os.replace(partial, self._file)


def _check_outside(output: Path, inputs: dict[str, Path]) -> None:
    for name, path in inputs.items():
        lost = output / FOLDER if name != "model" else output  # the result replaces the model
        if path.resolve().is_relative_to(lost.resolve()):
            raise OutputError(
                f"--restart would delete {name} {path}, which lies in --output {output}: "
                f"give another --output, or copy {name} elsewhere first"
            )


def _check_same(output: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    differing = [name for name in saved | given if saved.get(name) != given.get(name)]
    if differing:
        lines = "; ".join(f"{n} was {saved.get(n)!r}, now {given.get(n)!r}" for n in differing)
        raise OutputError(
            f"{output} holds a run with other arguments ({lines}): give another --output, "
            "the same arguments to go on, or --restart to start over"
        )
