import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import psutil
import pytest

from flows.ray_executor import RayExecutor
from flows.ray_train import MemberRaised, judge, placement_groups
from pipelines.execute import ATTEMPTS, Failed, Resources, attempt, cpus
from storage.errors import RecipeError, SchemaError, ShardError

ITEMS = list(range(24))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("pipelines.execute.PAUSES", (0.01, 0.02))


@pytest.fixture(scope="module")
def ray():
    """A Ray of four places that believes in two GPUs; executors in this process share it."""
    import ray

    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def two(ray):
    with RayExecutor(2) as executor:
        yield executor


class Unpicklable(Exception):
    def __init__(self, code: int, detail: object) -> None:
        super().__init__(f"code {code}")
        self.detail = detail


def squaring(resources: Resources) -> Callable[[int], int]:
    return lambda item: item * item


def raising(item: object, error: Callable[[], BaseException], marks: Path | None = None, times: int = 99):
    """A `make` whose work notes each attempt at `item` in the folder `marks`, and raises at the first `times`."""

    def make(resources: Resources) -> Callable[[object], object]:
        def work(given: object) -> object:
            if given == item:
                if marks is not None:
                    (marks / f"{time.time_ns()}-{os.getpid()}").touch()
                if marks is None or len(list(marks.iterdir())) <= times:
                    raise error()
            return given

        return work

    return make


def deadly(resources: Resources) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_do_not_depend_on_the_number_of_workers(ray, workers):
    with RayExecutor(workers) as executor:
        assert sorted(executor.map(squaring, ITEMS)) == [(item, item * item) for item in ITEMS]
        assert list(executor.map(squaring, [])) == []
    assert ray.is_initialized()  # it did not start it


def test_make_is_called_once_per_worker_and_knows_its_threads(two):
    def make(resources: Resources) -> Callable[[int], tuple[tuple[int, int], Resources, str]]:
        load = os.getpid(), time.time_ns()
        return lambda item: (load, resources, os.environ["OMP_NUM_THREADS"])

    loads, resources, environment = map(set, zip(*(result for _, result in two.map(make, ITEMS)), strict=True))
    assert len(loads) == len({pid for pid, _ in loads}) <= 2
    threads = max(1, cpus() // 2)
    assert (resources, environment) == ({Resources("cpu", threads)}, {str(threads)})


def test_a_poison_item_fails_alone(two):
    outcomes = dict(two.map(deadly, ITEMS))
    failed = outcomes.pop(3)
    assert isinstance(failed, Failed)
    assert (type(failed.error), failed.attempts) == (ShardError, ATTEMPTS)
    assert "died" in str(failed.error)
    assert outcomes == {item: item for item in ITEMS if item != 3}


def test_a_transient_failure_is_tried_again(two, tmp_path):
    make = raising(1, lambda: OSError(5, "input/output error"), tmp_path, times=2)
    assert sorted(two.map(make, [0, 1, 2])) == [(0, 0), (1, 1), (2, 2)]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_broken_contract_is_not_tried_again(two, tmp_path):
    outcomes = dict(two.map(raising(1, lambda: SchemaError("2 rows for 1"), tmp_path), [0, 1, 2]))
    assert isinstance(outcomes[1].error, SchemaError)
    assert outcomes[1].attempts == len(list(tmp_path.iterdir())) == 1
    assert (outcomes[0], outcomes[2]) == (0, 2)


def test_a_bug_keeps_its_traceback_even_when_it_does_not_pickle(two):
    outcomes = dict(two.map(raising(1, lambda: Unpicklable(7, lambda: None)), [0, 1, 2]))
    assert str(outcomes[1].error) == "Unpicklable: code 7"
    assert "in work" in outcomes[1].traceback
    assert (outcomes[0], outcomes[2]) == (0, 2)


def test_a_result_that_does_not_pickle_fails_its_item_alone(two):
    def make(resources: Resources) -> Callable[[int], object]:
        return lambda item: Lock() if item == 1 else item

    outcomes = dict(two.map(make, [0, 1, 2]))
    assert isinstance(outcomes[1], Failed)
    assert (outcomes[0], outcomes[2]) == (0, 2)


def test_a_wrong_recipe_reaches_the_caller_from_work_and_from_make(two):
    with pytest.raises(RecipeError) as caught:
        list(two.map(raising(5, lambda: RecipeError("a: wrong", "b: wrong")), ITEMS))
    assert caught.value.problems == ("a: wrong", "b: wrong")

    def without_model(resources: Resources) -> Callable[[int], int]:
        raise RecipeError("model: no folder 'x'")

    with pytest.raises(RecipeError, match="no folder"):
        list(two.map(without_model, ITEMS))


def test_other_errors_of_make_reach_the_caller(two):
    def broken(resources: Resources) -> Callable[[int], int]:
        raise ValueError("bad weights")

    with pytest.raises(ValueError, match="bad weights") as caught:
        list(two.map(broken, ITEMS))
    assert "in broken" in caught.value.__notes__[0]

    def killed(resources: Resources) -> Callable[[int], int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return lambda item: item

    with pytest.raises(ShardError, match="3 workers died"):
        list(two.map(killed, ITEMS))


def test_a_worker_for_which_there_is_no_room_is_done_without(two, tmp_path):
    def make(resources: Resources) -> Callable[[int], int]:
        if list(tmp_path.iterdir()):
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "taken").touch()
        return lambda item: time.sleep(0.1) or item

    assert sorted(two.map(make, ITEMS)) == [(item, item) for item in ITEMS]


def test_no_more_is_begun_than_two_items_per_worker_ahead_of_the_caller(two, tmp_path):
    def make(resources: Resources) -> Callable[[int], int]:
        def work(item: int) -> int:
            (tmp_path / str(item)).touch()
            return item

        return work

    results = two.map(make, ITEMS)
    time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []  # nothing before the first next
    for taken, _ in enumerate(results, start=1):
        time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) <= taken + 2 * 2


def test_closing_ends_what_runs(two, tmp_path):
    def make(resources: Resources) -> Callable[[int], int]:
        def work(item: int) -> int:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(600 if item else 0)
            return item

        return work

    results = two.map(make, ITEMS)
    assert next(results) == (0, 0)
    results.close()
    gone([int(path.name) for path in tmp_path.iterdir()])


def gone(pids: list[int], seconds: float = 10) -> None:
    """Waits until no process of these ids runs."""
    end = time.monotonic() + seconds
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < end, f"still running: {alive}"
        time.sleep(0.05)


def test_each_worker_has_a_gpu_for_itself(ray):
    def make(resources: Resources) -> Callable[[int], tuple[str, str]]:
        def work(item: int) -> tuple[str, str]:
            time.sleep(0.05)
            return resources.device, os.environ["CUDA_VISIBLE_DEVICES"]

        return work

    with RayExecutor(4) as executor:
        assert {result for _, result in executor.map(make, ITEMS, gpu=True)} == {("cuda", "0"), ("cuda", "1")}
        assert {result for _, result in executor.map(device, [0, 1])} == {"cpu"}


def device(resources: Resources) -> Callable[[int], str]:
    return lambda item: resources.device


def test_a_gang_of_one_has_all_threads_and_is_begun_again(two, tmp_path):
    def work(resources: Resources) -> tuple[Resources, str, bool]:
        (tmp_path / str(os.getpid())).touch()
        if len(list(tmp_path.iterdir())) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return resources, os.environ["OMP_NUM_THREADS"], os.getpid() in given

    given = [os.getpid()]
    assert two.gang(work, gpu=False) == (Resources("cpu", cpus(), rank=0, world=1), str(cpus()), False)
    assert two.gang(lambda resources: resources.device, members=1) == "cuda"


def test_what_fails_a_gang_is_raised(two):
    with pytest.raises(RecipeError) as caught:
        two.gang(lambda resources: raising(1, lambda: RecipeError("a: wrong", "b: wrong"))(resources)(1), gpu=False)
    assert caught.value.problems == ("a: wrong", "b: wrong")
    with pytest.raises(ValueError, match="bad weights") as bug:
        two.gang(lambda resources: raising(1, lambda: ValueError("bad weights"))(resources)(1), gpu=False)
    assert "in work" in bug.value.__notes__[0]


def test_members_of_a_gang_are_one_torch_process_group_and_begun_again_when_one_dies(ray, two, tmp_path):
    def work(resources: Resources) -> tuple[Resources, float, str]:
        from torch import distributed, tensor

        (tmp_path / f"{resources.rank}-{os.getpid()}").touch()
        if resources.rank == 1 and len(list(tmp_path.glob("1-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks = tensor([resources.rank + 1.0])
        distributed.all_reduce(ranks)  # rank 0 waits here for the one that is killed
        return resources, ranks.item(), os.getcwd()

    results = two.gang(work, gpu=False, members=2)
    threads = max(1, cpus() // 2)
    assert results == (Resources("cpu", threads, rank=0, world=2), 3.0, os.getcwd())
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["0", "0", "1", "1"]
    assert placement_groups() == set()  # the places are free again
    assert sorted(two.map(squaring, ITEMS)) == [(item, item * item) for item in ITEMS]


def told(*failures: BaseException) -> tuple[Exception, Exception]:
    """What the driver is told of members that failed so; those that raised went through `attempt`."""

    def failure(error: BaseException) -> BaseException:
        if isinstance(error, Died):
            return error
        tried = attempt(lambda _: raising(1, lambda: error)(Resources("cpu", 1))(1), None)
        return pickle.loads(pickle.dumps(MemberRaised(tried)))

    return judge(SimpleNamespace(worker_failures=dict(enumerate(map(failure, failures)))), 3)


class Died(Exception):
    pass


def test_the_reason_why_a_group_ended():
    missed, busy, wrong = RuntimeError("connection"), ShardError("busy"), RecipeError("a: wrong")
    error, cause = told(ValueError("bug"))
    assert (type(error), str(error)) == (ValueError, "bug")
    assert "in work" in str(cause)
    assert str(told(Died(), missed)[0]) == "1 of 3 members died: killed, out of memory, or crashed"
    assert type(told(missed, Died())[0]) is ShardError
    assert str(told(missed, busy)[0]) == "busy"
    assert type(told(Died(), missed, wrong)[0]) is RecipeError


def test_joins_a_cluster_and_leaves_it_running(ray):
    done = run(
        f"""
from flows.ray_executor import RayExecutor
with RayExecutor(2, address={ray.get_runtime_context().gcs_address!r}) as executor:
    print(sorted(executor.map(lambda resources: abs, [-1, -2, -3])))
"""
    )
    assert (done.stdout, done.stderr) == ("[(-3, 3), (-2, 2), (-1, 1)]\n", "")
    assert ray.get(ray.put(1)) == 1


def test_an_address_without_a_cluster_is_the_users_error():
    done = run(
        """
from flows.ray_executor import RayExecutor
from storage.errors import RecipeError
with RayExecutor(2, address="127.0.0.1:1") as executor:
    try:
        list(executor.map(lambda resources: abs, [1]))
    except RecipeError as error:
        print("correct the address" in str(error))
"""
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
    with pytest.raises(RecipeError, match="serial"):
        RayExecutor(0)


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)


DRIVER = """
import os, signal, sys, threading
from pathlib import Path
from flows.ray_executor import RayExecutor

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it

def poisoned(resources):
    print("a scorer's own words")
    return lambda item: os.kill(os.getpid(), 9) if item == 3 else item

def endless(resources):
    def work(item):
        Path(folder, str(os.getpid())).touch()
        while True:
            pass
    return work

def first():
    print(len(list(executor.map(poisoned, range(9)))), flush=True)

folder = sys.argv[1]
with RayExecutor(2) as executor:
    task = threading.Thread(target=first)  # as Prefect runs a task: Ray must outlive the thread of the first map
    task.start()
    task.join()
    list(executor.map(endless, range(9)))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_prints_nothing_of_its_own_and_leaves_no_worker(how, tmp_path):
    driver = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DRIVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)
    services = [child.pid for child in psutil.Process(driver.pid).children()]
    try:
        os.killpg(driver.pid, how) if how == signal.SIGINT else driver.kill()
        out, err = driver.communicate(timeout=30)
    finally:
        driver.kill()  # its workers would keep the CPUs from all other tests
    assert (driver.returncode, out) == (-how, "9\n")
    assert err == "" or (how == signal.SIGINT and err.rstrip().endswith("KeyboardInterrupt"))
    gone(workers + services)
