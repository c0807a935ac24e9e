# SPDX-License-Identifier: Apache-2.0
"""One run at a time per output: a file lock that ends with its process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PATIENCE_S = 2.0  # seconds to wait: the engines of a killed run hold its lock until they exit

_logger = logging.getLogger(__name__)


class OutputInUseError(OSError):
    """Another run writes to this output."""


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Hold the lock of ``output`` on the file ``path``, which is created, and removed if empty.

    Raises OutputInUseError if another run holds it.
    """
    file = _lock(path, output)
    try:
        yield
    finally:
        with suppress(OSError), file:
            if os.fstat(file.fileno()).st_size == 0 and _is_at(file, path):
                path.unlink()


def _lock(path: Path, output: Path) -> BinaryIO:
    patient_until = time.monotonic() + PATIENCE_S
    while True:
        file = path.open("ab")
        if _try_lock(file, output) and _is_at(file, path):
            return file
        file.close()
        if time.monotonic() > patient_until:
            raise OutputInUseError(
                f"another run writes to {output}; wait for it to end, or choose another output"
            )
        time.sleep(0.05)


def _try_lock(file: BinaryIO, output: Path) -> bool:
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        _logger.warning(
            "%s cannot be locked (%s); do not start another run that writes to it", output, error
        )
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether the open file is still at ``path``: another run may have replaced it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
