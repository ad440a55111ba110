"""The default launch parameters, and which of them a file or a caller may choose."""

from __future__ import annotations

import dataclasses

import pytest

from mac_kernels import MacConfig
from mac_kernels.launch import LaunchParams, block_n, default_launch, fitting
from mac_kernels.tuned import launch_problems

H100, CONFIG = 132, MacConfig()
ROOM = 2  # of the SMs every second one: a cluster cannot use those that its part of the GPU has left over


@pytest.mark.parametrize("sms", [2, 108, H100, 148])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_defaults_are_valid_for_every_batch(sms: int, page_size: int) -> None:
    for groups in (0, 1, 4, 8, 9, 16, 17, 33, 66, 67, 132, 133, 512, 4096):
        launch = default_launch(groups, CONFIG, sms, page_size)
        assert launch_problems(launch) == [] and launch.cluster_size > 0
        if launch.cluster_size > 2:
            assert groups * launch.cluster_size * ROOM <= sms, "larger clusters would wait for each other"


@pytest.mark.parametrize("groups, size", [(1, 8), (8, 8), (9, 4), (16, 4), (17, 2), (66, 2), (67, 1), (256, 1)])
def test_clusters_shrink_as_groups_grow(groups: int, size: int) -> None:
    assert default_launch(groups, CONFIG, H100, 16).cluster_size == size


def test_only_short_pages_and_few_groups_take_larger_tiles() -> None:
    tiles = {(groups, page): default_launch(groups, CONFIG, H100, page).rest_tile_bytes >> 10
             for groups in (8, 64) for page in (1, 8, 16, 64)}  # fmt: skip
    assert {of for of, size in tiles.items() if size == 64} == {(8, 1), (8, 8)} and set(tiles.values()) == {32, 64}
    assert block_n(32 << 10, 128, 2) == 64 and block_n(64 << 10, 128, 2) == 128


def test_nothing_but_the_tiles_depends_on_the_page_size() -> None:
    for groups in (4, 40, 200):
        by_page = {
            dataclasses.replace(default_launch(groups, CONFIG, H100, page), rest_tile_bytes=1) for page in (1, 16)
        }
        assert len(by_page) == 1


def test_tiles_of_the_rest_fit_into_shared_memory() -> None:
    for groups, page, shared, tile in (
        (8, 1, 227, 64),
        (8, 1, 163, 64),
        (8, 1, 99, 32),
        (8, 16, 99, 32),
        (64, 1, 99, 32),
    ):
        launch = default_launch(groups, CONFIG, H100, page)
        fitted = fitting(launch, shared << 10)
        assert fitted == dataclasses.replace(launch, rest_tile_bytes=tile << 10)


@pytest.mark.parametrize("field, value", [("cluster_size", 3), ("cluster_size", 16), ("front_warps", 2)])
def test_what_the_front_cannot_be_launched_with_is_refused(field: str, value: int) -> None:
    assert [f"{field}={value}" in problem for problem in launch_problems(LaunchParams(**{field: value}))] == [True]


@pytest.mark.parametrize("size", [0, 1, 2, 4, 8])
def test_every_cluster_size_may_come_from_a_file(size: int) -> None:
    assert launch_problems(LaunchParams(cluster_size=size, front_warps=4)) == []
