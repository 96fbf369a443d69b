# SPDX-License-Identifier: GPL-2.0-or-later
"""Step 2 of a merge: write into the merged image what it lacks, each cluster compared with its digest."""

from collections.abc import Callable, Iterator, Sequence

from backupctl.digests import clusters
from backupctl.digests.clusters import Clusters, Records
from backupctl.errors import DamageFound, moving
from backupctl.images.open_image import OpenImage
from backupctl.operations import endpoints
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.repository.merge import Merge
from backupctl.sizes import Range
from backupctl.transfer import sink
from backupctl.transfer.batch import Part
from backupctl.transfer.copy import Copy
from backupctl.transfer.verify_filter import VerifyFilter

_WINDOW_RECORDS = 1 << 16
_SHOWN = 4


def copy_layer(
    one: Merge,
    image: OpenImage,
    *,
    check: Callable[[], None],
    progress: Callable[[int, int], None],
) -> int:
    """Write into `image`, which `Merge.mark` has opened; returns how many bytes.

    check: called at least every 100 ms; what it raises ends the copy. progress: called with the bytes done
    and their total. Raises DamageFound, ReadFailed, WriteFailed, RepositoryError.
    """
    read = one.layers[:1] if one.in_place else one.layers
    total = sum(len(part) for part in one.written()) * clusters.CLUSTER_BYTES

    def on_mismatch(ranges: Sequence[Range]) -> None:
        raise _damage(read, ranges)

    def on_unreadable(numbers: Clusters) -> None:
        if source.refused is not None:
            raise source.refused
        raise _damage(read, clusters.ranges(numbers, one.size))

    verify = VerifyFilter(chain.effective_content(read, one.size), on_mismatch, one.size, zeroes=True)
    with (
        moving(str(one.upper.path), str(one.image)),
        endpoints.read_chain(read) as source,
        endpoints.write_images(
            (image,), check, in_use=one.in_place, flush_seconds=sink.DISK_SECONDS
        ) as target,
    ):
        # A short last cluster is written whole, with zeroes behind it, where lower's image is larger. That
        # image is cut later, and its old bytes would come back when the disk grows again.
        copied = Copy(
            source,
            target,
            check=check,
            progress=lambda done_bytes: progress(done_bytes, total),
            filter_records=verify,
            on_unreadable=on_unreadable,
        ).run(part for records in one.written() for part in _parts(records))
    return copied.copied_bytes + copied.zero_bytes


def _damage(read: Sequence[Layer], ranges: Sequence[Range]) -> DamageFound:
    damaged = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in ranges[:_SHOWN])
    layers = " or ".join(str(layer.path) for layer in read[:2])
    return DamageFound(
        f"the layer {layers} is damaged and is not merged: bytes {damaged} are not what was read from the VM"
    )


def _parts(records: Records) -> Iterator[Part]:
    """Yield what records name: data to be read, and zeroes."""
    for first in range(0, len(records), _WINDOW_RECORDS):
        part = records[first : first + _WINDOW_RECORDS]
        numbers, zero = part["cluster"], clusters.is_zero(part)
        yield Part(numbers[~zero], zero=False)
        yield Part(numbers[zero], zero=True)
