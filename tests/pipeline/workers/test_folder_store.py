"""The store of runs whose workers are replaced: facts as files, and a barrier that counts ranks."""

from __future__ import annotations

import threading
from pathlib import Path

from localpipe.pipeline.workers.folder_store import FACTS_FOLDER, FolderStore
from localpipe.pipeline.workers.mesh import Mesh, open_run_store


def test_facts_are_replaced_whole(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.set("end/0", "one")
    store.set("end/0", "two")
    assert store.get("end/0") == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_fact_is_waited_for(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert not store.check(["a", "b"])
    threading.Timer(0.1, lambda: store.set("a", "1")).start()
    assert store.get("a") == b"1" and not store.check(["a", "b"])


def test_a_worker_that_arrives_twice_opens_no_barrier(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first, second = (Mesh(rank, 2, store, local=True) for rank in range(2))
    threads = []
    for _ in range(2):  # the second one is its replacement
        threads.append(threading.Thread(target=first.barrier, args=("end",), daemon=True))
        threads[-1].start()
    threads[0].join(0.1)
    assert all(thread.is_alive() for thread in threads)
    second.barrier("end")
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_workers_open_the_store_that_their_launcher_has_made(tmp_path: Path) -> None:
    assert not isinstance(open_run_store(tmp_path), FolderStore)
    (tmp_path / FACTS_FOLDER).mkdir()
    assert isinstance(open_run_store(tmp_path), FolderStore)
