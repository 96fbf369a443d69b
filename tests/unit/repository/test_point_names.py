# SPDX-License-Identifier: GPL-2.0-or-later
"""Points by id, unique prefix, `latest~N` and time."""

from datetime import UTC, datetime

import pytest

from backupctl.errors import AmbiguousPoint, InvalidName, NoSuchPoint
from backupctl.names import PointId, VmName
from backupctl.repository import markers, point_names
from tests.unit.points import P1, P2, P3, disk_entry

IDS = (P1, P2, P3)


def resolved(wanted: str, ids=IDS) -> PointId:
    return point_names.resolve(wanted, ids, VmName("web"))


@pytest.mark.parametrize(
    ("wanted", "point"),
    [
        (P2, P2),
        ("20260102", P2),
        ("20260103T", P3),
        ("20260103T0000", P3),
        ("latest", P3),
        ("latest~0", P3),
        ("latest~2", P1),
        ("at:20260102T000000Z", P2),
        ("at:20260102T235959Z", P2),
        ("at:20991231T000000Z", P3),
    ],
)
def test_a_name_means_one_point(wanted, point):
    assert resolved(wanted) == point


def test_a_prefix_of_several_points_lists_them():
    with pytest.raises(AmbiguousPoint) as caught:
        resolved("202601")
    assert all(point in caught.value.message for point in IDS)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("wanted", ["2027", "latest~3", "at:20251231T235959Z", "20260104T000000Z"])
def test_a_name_of_no_point_is_an_error(wanted):
    with pytest.raises(NoSuchPoint):
        resolved(wanted)
    with pytest.raises(NoSuchPoint):
        resolved(wanted, ())


@pytest.mark.parametrize(
    "wanted",
    [
        "",
        "202",
        "newest",
        "latest~",
        "latest~-1",
        "latest~1\n",
        "20260102t",
        "../x",
        "20261399T000000Z",
        "at:",
        "at:2026",
        "at:20261399T000000Z",
        "٢٠٢٦",
    ],
)
def test_what_names_no_point_is_refused(wanted):
    with pytest.raises(InvalidName):
        resolved(wanted)


def test_the_name_of_a_time_is_in_utc():
    assert point_names.at(datetime(2026, 1, 2, tzinfo=UTC)) == "at:20260102T000000Z"


def test_a_dropped_point_is_not_counted(builder):
    for point in IDS:
        builder.point(point, (disk_entry(), [(0, b"x")]))
    markers.put(builder.directory.path / P2, markers.RETIRED)
    assert builder.directory.point("latest~1").id == P1
    assert builder.directory.point("at:20260102T120000Z").id == P1
    with pytest.raises(NoSuchPoint):
        builder.directory.point("20260102")
