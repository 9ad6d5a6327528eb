"""A second home for checkpoints, in an object store or on another disk: whatever fsspec has a protocol for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint.commit import PARTIAL, sync_folder
from engine.checkpoint.manifest import COMPLETE, MANIFEST, blocks, decode, seal
from engine.checkpoint.reader import bad_blocks, damaged
from engine.errors import CheckpointError

OPTION = "checkpoint.mirror"
_STEP = re.compile(r"step-\d{8,}$")


class Mirror:
    """The folder of checkpoints at a URL such as `s3://bucket/run` or `file:///mnt/backup/run`.

    The marker of a checkpoint is put there last, so that one without it is not finished. Nothing is ever removed.
    """

    def __init__(self, url: str) -> None:
        """Raises CheckpointError 643: no such protocol, or its package is missing."""
        import fsspec

        self._url = url.rstrip("/")
        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError, OSError) as error:
            way_out = "Install the package that it names, or use checkpoint.mirror=null"
            raise CheckpointError.of(643, OPTION, url, f"fsspec cannot open it ({error})", way_out) from error

    def begin(self, folder: Path) -> None:
        """Remove the marker of what is there under the name of `folder`. Raises OSError."""
        try:
            if self._fs.exists(f"{self._root}/{folder.name}/{COMPLETE}"):
                self._fs.rm_file(f"{self._root}/{folder.name}/{COMPLETE}")
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def put(self, folder: Path, *names: str) -> None:
        """Copy files of the checkpoint `folder`, in this order. Raises OSError."""
        target = f"{self._root}/{folder.name}"
        try:
            self._fs.makedirs(target, exist_ok=True)
            for name in names:
                self._fs.put_file(str(folder / name), f"{target}/{name}")
        except OSError:
            raise
        except Exception as error:  # Stores have exceptions of their own.
            raise OSError(f"{type(error).__name__}: {error}") from error

    def steps(self) -> list[str]:
        """Names of the finished checkpoints, the newest first. Raises CheckpointError 644: no answer."""
        try:
            if not self._fs.isdir(self._root):
                return []
            found = [Path(path).name for path in self._fs.ls(self._root, detail=False)]
            steps = sorted((name for name in found if _STEP.match(name)), key=lambda name: -int(name[5:]))
            return [name for name in steps if self._fs.exists(f"{self._root}/{name}/{COMPLETE}")]
        except Exception as error:
            raise self._silent(error) from error

    def fetch(self, name: str, into: Path, say: Callable[[str], None]) -> Path:
        """Copy checkpoint `name` into the folder `into`; whole or not there at all. What an earlier try brought stays.

        Raises:
            CheckpointError: 644 the store does not answer or the disk is full, 632 its files are damaged, 633 and 634
                see `decode`.
        """
        source, target = f"{self._root}/{name}", into / name
        partial = target.with_name(name + PARTIAL)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            content: bytes = self._fs.cat_file(f"{source}/{MANIFEST}")
            marker: bytes = self._fs.cat_file(f"{source}/{COMPLETE}")
            if seal(content).encode() != marker.strip():
                raise OSError(f"{MANIFEST} is not what {COMPLETE} records")
            manifest = decode(content, Path(name), OPTION)
            for number, file in enumerate(manifest.files, start=1):
                own = partial / file.name
                if not own.is_file() or own.stat().st_size != file.size:
                    say(f"fetching {self._url}/{name}: file {number} of {len(manifest.files)}, {file.size:,} bytes")
                    self._fs.get_file(f"{source}/{file.name}", str(own))
            bad = bad_blocks(partial, blocks(manifest.files))
            if bad:
                shutil.rmtree(partial)
                raise damaged(Path(f"{self._url}/{name}"), bad, OPTION)
            (partial / MANIFEST).write_bytes(content)
            (partial / COMPLETE).write_bytes(marker)
            for path in partial.iterdir():
                with open(path, "rb") as opened:
                    os.fsync(opened.fileno())
            os.rename(partial, target)
            sync_folder(into)
        except CheckpointError:
            raise
        except Exception as error:
            raise self._silent(error) from error
        return target

    def _silent(self, error: Exception) -> CheckpointError:
        rule = f"it cannot be read ({type(error).__name__}: {error})"
        way_out = "See that it is there and may be read, or use checkpoint.mirror=null"
        return CheckpointError.of(644, OPTION, self._url, rule, way_out)
