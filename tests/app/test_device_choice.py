"""Processes take devices in turn; the locks are real, the devices are not."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from dop_search.app import begin as devices

FOUR = ["gpu-a", "gpu-b", "gpu-c", "gpu-d"]
FORK = multiprocessing.get_context("fork")


def work(pipe: Connection, identities: list[str], folder: Path) -> None:
    taken = [devices.take_device(identities, folder) for _ in range(2)]  # a second search of the same process
    pipe.send(taken)
    pipe.recv()


def start(identities: list[str], folder: Path) -> tuple[Connection, multiprocessing.Process, list[str]]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=work, args=(theirs, identities, folder))
    process.start()
    return ours, process, ours.recv()


def test_workers_take_devices_in_turn_and_one_that_ends_frees_its_own(tmp_path: Path) -> None:
    workers = [start(FOUR, tmp_path) for _ in range(6)]
    assert [taken for _, _, taken in workers] == [[f"cuda:{place}"] * 2 for place in (0, 1, 2, 3, 0, 1)]
    workers[2][1].kill()
    workers[2][1].join()
    workers.append(start(FOUR, tmp_path))
    assert workers[-1][2] == ["cuda:2"] * 2
    workers.append(start(FOUR[2:], tmp_path))  # CUDA_VISIBLE_DEVICES=2,3: what it calls cuda:0 is the third
    assert workers[-1][2] == ["cuda:0"] * 2
    workers.append(start(FOUR, tmp_path))
    assert workers[-1][2] == ["cuda:3"] * 2
    for pipe, process, _ in workers:
        if process.is_alive():
            pipe.send(None)
        process.join(timeout=10)


def test_a_chosen_device_and_a_machine_with_one_are_left_alone() -> None:
    assert devices.own_device("cpu") == "cpu"
    assert devices.own_device("cuda:3") == "cuda:3"
    assert devices.own_device("auto", "balanced") == "auto"
