"""Work spread over processes by Ray: a pool of workers that are given shards, watched, and replaced when they die.

    driver  ── load(make) ──>  worker 1   item being worked on, one item behind it
            ── do(item) ────>  worker 2   ...
            <── Done | Raised

A worker does its items in the order in which it got them. So when one dies (a segfault in a parser, the out-of-memory
killer), the first item without an answer was the one being worked on: that counts as an attempt; the one behind it was
never begun and goes back unharmed. Judging errors, retries and pauses are pipelines.execute's.

Each map has fresh processes: the memory of one stage's model is free before the next stage begins.
"""

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Generic, Self

from flows.ray_train import placement_groups, train
from pipelines.execute import ATTEMPTS, Done, Failed, Item, Raised, Resources, Result, Todo, attempt, cpus, only
from storage.errors import RecipeError, ShardError

OBJECT_STORE_BYTES = 128 << 20  # items and results are small; documents travel in shards
IN_FLIGHT = 2  # items per worker: the one behind is there when the first is done


class RayExecutor:
    """An executor on a local Ray of its own, or on the cluster at `address`; a context manager.

    Ray starts at the first map that has items (2 to 3 s) and ends with the context. It is shared when this process is
    already connected to one. On a cluster, corpusmill is installed on every node and shards are read and written on
    storage that all nodes see.

    With `gpu=True` a worker has a GPU for itself, as "cuda", and there are no more workers than GPUs; without GPUs it
    is as if it had not been asked. What workers print goes to Ray's log files (/tmp/ray/session_latest/logs).

    Two maps at once share the workers' places: the second begins where the first no longer needs them.
    """

    def __init__(self, workers: int, address: str | None = None) -> None:
        if workers < 1:
            raise RecipeError(f"workers: {workers} is no pool; 0 on the command line means the serial executor")
        self.workers = workers
        self.address = address
        self._lock, self._gangs = Lock(), Lock()
        self._keeper: ThreadPoolExecutor | None = None
        self._connected: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._keeper is not None:
            import ray

            self._keeper.submit(ray.shutdown).result()
            self._keeper.shutdown()
            self._keeper = self._connected = None

    def map(
        self, make: Callable[[Resources], Callable[[Item], Result]], items: Sequence[Item], *, gpu: bool = False
    ) -> Iterator[tuple[Item, Result | Failed]]:
        """See pipelines.execute.Executor. `make`, items and results are pickled; functions of scripts travel whole.

        Raises:
            RecipeError: Ray does not start, or a worker raised it.
            ShardError: workers die while `make` runs.
        """
        if items:
            ray = self._start()
            yield from _map(ray, make, items, *self._places(ray, len(items), gpu))

    def gang(self, work: Callable[[Resources], Result], *, gpu: bool = True, members: int | None = None) -> Result:
        """See pipelines.execute.Executor. `work` and its result are pickled. No more members than workers.

        `members` is by default the number of GPUs, and 1 where there is none or where none is asked for. One member is
        a worker like a map's; several are Ray Train's, and one more process, which needs no place, leads them.
        """
        ray = self._start()
        size, resources, options = self._places(ray, members or (_gpus(ray) if gpu else 0) or 1, gpu)
        if size == 1:
            return only(_map(ray, lambda resources: lambda _: work(resources), [None], size, resources, options))
        with self._gangs:  # each takes all the GPUs
            lead = partial(train, work, size, _environment(resources.threads), options, placement_groups())
            return only(_map(ray, lambda resources: lambda _: lead(resources), [None], 1, resources, {"num_cpus": 0}))

    def _start(self) -> ModuleType:
        """Ray, connected.

        The kernel kills Ray's processes when the *thread* that started them ends (PR_SET_PDEATHSIG). So they die with a
        driver that is killed (its workers within 3 s; two idle agents of Ray's give up after a minute); and so that
        they do not die with a Prefect task, a thread of our own starts them.
        """
        for name, value in _BEFORE_IMPORT.items():
            os.environ.setdefault(name, value)
        import ray

        with self._lock:
            if self._keeper is None and not ray.is_initialized():
                self._keeper = ThreadPoolExecutor(1, thread_name_prefix="ray-keeper")
                self._connected = self._keeper.submit(_connect, ray, self.address, self.workers)
        if self._connected is not None:
            try:
                self._connected.result()
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                remedy = "correct the address" if self.address else "--workers 0 runs without it"
                raise RecipeError(f"Ray does not start ({remedy}): {error}") from error
        return ray  # type: ignore[no-any-return]

    def _places(self, ray: ModuleType, items: int, gpu: bool) -> tuple[int, Resources, dict[str, Any]]:
        """The pool's size, what each worker is given, and what Ray sets aside for it."""
        size = min(self.workers, items)
        gpus = _gpus(ray) if gpu else 0
        size = min(size, gpus) if gpus else size
        options: dict[str, Any] = {"num_gpus": 1 if gpus else 0, "num_cpus": 1}
        threads = cpus() // size
        if self.address is not None:
            nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            nodes = [count for count in nodes if count] or [1]
            threads = min(sum(nodes) // size, *nodes)  # a worker fits on any node
            options |= {"num_cpus": max(1, threads), "scheduling_strategy": "SPREAD"}
        return size, Resources("cuda" if gpus else "cpu", max(1, threads)), options


_BEFORE_IMPORT = {  # Ray reads its environment when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # SIGTERM ends the driver without a C++ stack trace
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # we say it ourselves, of the item
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would copy the working directory to every worker
}


def _connect(ray: ModuleType, address: str | None, workers: int) -> None:
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {
            "address": "local",  # whatever RAY_ADDRESS says
            "num_cpus": workers,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    elif address.rpartition(":")[2].isdigit() and "://" not in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
    ray.init(**where, logging_level="error", log_to_driver=False)


def _gpus(ray: ModuleType) -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _map(
    ray: ModuleType,
    make: Callable[[Resources], Callable[[Item], Result]],
    items: Sequence[Item],
    size: int,
    resources: Resources,
    options: dict[str, Any],
) -> Iterator[tuple[Item, Result | Failed]]:
    """A map on `size` workers, each given `resources`, for each of which Ray sets `options` aside."""
    todo = Todo[Item, Result](items)
    pool = _Pool[Item, Result](ray, make, items, size, resources, options)
    try:
        while todo.unfinished:
            pool.fill(todo)
            for number, tried in pool.answers(todo):
                yield from todo.settle(number, tried)
    finally:
        pool.kill()


class _Process:
    """What runs in a worker process."""

    def __init__(self, paths: list[str], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        sys.path.extend(path for path in paths if path not in sys.path)

    def load(self, make: Callable[[Resources], Callable[[Any], Any]], resources: Resources) -> Done[None] | Raised:
        def load(resources: Resources) -> None:
            self._work = make(resources)

        return attempt(load, resources)

    def do(self, item: Any) -> Done[Any] | Raised:
        return attempt(self._work, item)


class _Worker:
    """A worker process as the driver sees it."""

    def __init__(self, process: Any, loading: Any) -> None:
        self.process = process
        self.loading = loading  # the future of load(); None when it is ready for items
        self.items: deque[tuple[int, Any]] = deque()  # (number, future), in the order in which they are done

    @property
    def ready(self) -> bool:
        return self.loading is None

    @property
    def next(self) -> Any:
        """The future that is ready first; None for an idle worker."""
        return self.items[0][1] if self.items else self.loading


class _Pool(Generic[Item, Result]):
    """The workers of one map."""

    def __init__(
        self,
        ray: ModuleType,
        make: Callable[[Resources], Callable[[Item], Result]],
        items: Sequence[Item],
        size: int,
        resources: Resources,
        options: dict[str, Any],
    ) -> None:
        self.ray, self.make, self.items, self.size, self.resources = ray, make, items, size, resources
        self.process = ray.remote(_Process).options(**options)
        self.workers: list[_Worker] = []
        self.lost_loading = 0  # workers that died in `make`, since one last came through

    def fill(self, todo: Todo[Item, Result]) -> None:
        """As many workers as there is work for, and items for each: first one, then one behind it.

        None is laid behind another when there are few left, so that it does not wait while a worker is idle.
        """
        wanted = min(self.size, todo.unfinished)
        for worker in [worker for worker in self.workers if not worker.items][: max(0, len(self.workers) - wanted)]:
            self._drop(worker)
        while len(self.workers) < wanted:
            paths = [os.path.abspath(path) for path in sys.path if Path(path).exists()]  # the user's own scorers
            process = self.process.remote(paths, _environment(self.resources.threads))
            self.workers.append(_Worker(process, process.load.remote(self.make, self.resources)))
        for depth in range(IN_FLIGHT):
            for worker in self.workers:
                if worker.ready and len(worker.items) == depth and (not depth or len(todo) > self.size):
                    number = todo.take()
                    if number is None:
                        return
                    worker.items.append((number, worker.process.do.remote(self.items[number])))

    def answers(self, todo: Todo[Item, Result]) -> Iterator[tuple[int, Done[Result] | Raised]]:
        """Waits until a worker answers or dies, or a retry is due; yields what came of items."""
        futures = {worker.next: worker for worker in self.workers if worker.next is not None}
        if not futures:
            time.sleep(todo.pause() or 0)
            return
        idle = len(futures) < len(self.workers)  # else nobody could take a retry that is due
        for future in self.ray.wait(list(futures), timeout=todo.pause() if idle else None)[0]:
            worker = futures[future]
            tried, lost = self._answer(future)
            if not worker.ready:
                self._loaded(tried, lost)
                worker.loading = None
            else:
                number, _ = worker.items.popleft()
                yield number, tried
            if lost:
                for number, _ in reversed(worker.items):
                    todo.put_back(number)
                self._drop(worker)

    def kill(self) -> None:
        """End the workers, in the middle of what they do."""
        if self.ray.is_initialized():
            for worker in list(self.workers):
                self._drop(worker)

    def _answer(self, future: Any) -> tuple[Done[Any] | Raised, bool]:
        """What a worker says of a future, and whether the worker is lost."""
        try:
            return self.ray.get(future), False
        except self.ray.exceptions.RayTaskError as error:  # outside of `attempt`: what was sent does not pickle
            return Raised(ShardError(f"cannot be sent between processes: {error.cause}"), "fail", str(error)), False
        except self.ray.exceptions.RayError as error:
            return Raised(ShardError("its worker died: killed, out of memory, or crashed"), "again", str(error)), True

    def _loaded(self, tried: Done[Any] | Raised, lost: bool) -> None:
        """Raises what keeps every worker from its work; goes on with fewer when there is no room for one more."""
        self.lost_loading = self.lost_loading + 1 if lost else 0
        if self.lost_loading == ATTEMPTS:
            self.size, self.lost_loading = len(self.workers) - 1, 0  # the others may yet come through
            if not self.size:
                raise ShardError(f"{ATTEMPTS} workers died before their first item; fewer workers need less memory")
        if isinstance(tried, Raised) and not lost:
            if not isinstance(tried.error, RecipeError):
                tried.error.add_note(f"while a worker was made ready:\n{tried.traceback}")
            raise tried.error

    def _drop(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        self.ray.kill(worker.process)


def _environment(threads: int) -> dict[str, str]:
    """Set before torch, Arrow and tokenizers are loaded, which read it then."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    habits = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return dict.fromkeys(names, str(threads)) | habits
