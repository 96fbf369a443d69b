# SPDX-License-Identifier: GPL-2.0-or-later
"""A point's disk as one image of its own, by `qemu-img convert` from a chain given link by link.

The target is a plain file or a block device that the caller has made, checked and will fsync.
"""

import json
import os
import re
import selectors
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from backupctl.errors import WriteFailed
from backupctl.repository import images, qemu

_WATCH_SECONDS = 0.1
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


def convert(
    chain: Sequence[Path],
    target: Path,
    image_format: str,
    *,
    onto_device: bool,
    check: Callable[[], None],
    progress: Callable[[float], None],
) -> None:
    """Write the content of a chain (newest first) into `target`, sparsely.

    onto_device: write into what is there, zeroes too, rather than making a new image. check: called
    every 100 ms; what it raises ends the child. progress: told the part done, from 0 to 1.
    Raises WriteFailed, RepositoryError.
    """
    command = [qemu.img_program(), "convert", "-p", "-W", "-m", "8", "-O", image_format]
    command += ["-n"] if onto_device else []
    source = f"json:{json.dumps(images.blockdev(chain))}"
    with tempfile.TemporaryFile() as complaints:
        child = qemu.start([*command, source, str(target)], complaints=complaints, output=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout as output:
            try:
                for part in _parts(output, check):
                    progress(part)
                status = child.wait(60)
            except BaseException:
                child.kill()
                child.wait()
                raise
        if status != 0:
            raise WriteFailed(f"qemu-img could not write {target}: {qemu.said(complaints)}")


def _parts(output: IO[bytes], check: Callable[[], None]) -> Iterator[float]:
    """Yield the parts done that `qemu-img -p` prints, until it closes its output."""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            check()
            if not selector.select(_WATCH_SECONDS):
                continue
            text = os.read(output.fileno(), 4096)
            if not text:
                return
            for percent in _PERCENT.findall(text):
                yield float(percent) / 100
