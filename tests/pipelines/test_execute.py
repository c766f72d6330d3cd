import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.execute import ATTEMPTS, Failed, Raised, Resources, Serial, Todo
from storage.errors import LockedError, RecipeError, SchemaError, ShardError


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("pipelines.execute.PAUSES", (0.01, 0.02))


def raising(*errors: Exception | None) -> Callable[[Resources], Callable[[int], int]]:
    """Work whose n-th call raises the n-th error, and which gives -item after that."""
    left = list(errors)

    def make(resources: Resources) -> Callable[[int], int]:
        def work(item: int) -> int:
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            return -item

        return work

    return make


class Unpicklable(Exception):
    def __init__(self, code: int, detail: object) -> None:
        super().__init__(f"code {code}")
        self.detail = detail


@given(st.lists(st.integers()))
def test_every_item_comes_back_once_with_its_result(items):
    assert sorted(Serial().map(raising(), items)) == sorted((item, -item) for item in items)


def test_make_is_called_once_and_not_before_the_first_next():
    calls = []

    def make(resources: Resources) -> Callable[[int], int]:
        calls.append(resources)
        return lambda item: item

    results = Serial(device="cuda", threads=3).map(make, [1, 2, 3])
    assert calls == []
    assert len(list(results)) == 3
    assert calls == [Resources("cpu", 3)]  # no GPU unless the map asks for one
    assert list(Serial().map(make, [])) == []
    assert len(calls) == 1
    list(Serial(device="cuda").map(make, [1], gpu=True))
    assert calls[1].device == "cuda"


def test_items_are_worked_on_as_results_are_asked_for():
    seen = []
    results = Serial().map(lambda resources: seen.append, [1, 2, 3])
    next(results)
    assert seen == [1]
    results.close()
    assert seen == [1]


def test_none_is_a_result():
    assert list(Serial().map(lambda resources: lambda item: None, [7])) == [(7, None)]


@pytest.mark.parametrize("error", [ShardError("busy"), OSError(5, "input/output error"), MemoryError()])
def test_what_may_pass_is_tried_again_and_others_do_not_wait_for_it(error):
    assert list(Serial().map(raising(error), [1, 2])) == [(2, -2), (1, -1)]
    assert list(Serial().map(raising(error, error), [1])) == [(1, -1)]
    [(item, failed)] = Serial().map(raising(*[error] * ATTEMPTS), [1])
    assert (item, type(failed), failed.attempts) == (1, Failed, ATTEMPTS)
    assert type(failed.error) is type(error)


@pytest.mark.parametrize("error", [SchemaError("two rows for one"), ValueError("a bug"), KeyError("x")])
def test_what_would_fail_again_is_tried_once(error):
    [(_, failed), other] = Serial().map(raising(error), [1, 2])
    assert failed.attempts == 1
    assert type(failed.error) is type(error)
    assert "in work" in failed.traceback
    assert other == (2, -2)


@pytest.mark.parametrize("error", [RecipeError("a: wrong", "b: wrong"), LockedError("run 3 writes it")])
def test_a_wrong_recipe_stops_the_map(error):
    with pytest.raises(type(error), match=str(error).splitlines()[0]) as caught:
        list(Serial().map(raising(None, error), [1, 2, 3]))
    assert str(caught.value) == str(error)


def test_an_error_that_does_not_pickle_is_kept_as_text():
    [(_, failed)] = Serial().map(raising(Unpicklable(7, lambda: None)), [1])
    assert str(pickle.loads(pickle.dumps(failed)).error) == "Unpicklable: code 7"
    assert "in work" in failed.traceback


@pytest.mark.parametrize("error", [RecipeError("no model"), ValueError("a bug")])
def test_an_error_of_make_is_the_callers(error):
    def make(resources: Resources) -> Callable[[int], int]:
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(Serial().map(make, [1]))


def test_a_gang_of_this_process_is_one_that_has_everything():
    assert Serial(device="cuda", threads=3).gang(lambda resources: resources) == Resources("cuda", 3, rank=0, world=1)
    assert Serial(device="cuda", threads=3).gang(lambda resources: resources.device, gpu=False) == "cpu"


def gang(*errors: Exception) -> int:
    make = raising(*errors)
    return Serial().gang(lambda resources: make(resources)(1))


def test_a_gang_is_begun_again_and_what_fails_it_is_raised():
    assert gang(*[OSError(5, "input/output error")] * (ATTEMPTS - 1)) == -1
    with pytest.raises(ShardError, match="busy"):
        gang(*[ShardError("busy")] * ATTEMPTS)
    with pytest.raises(RecipeError) as caught:
        gang(RecipeError("a: wrong", "b: wrong"))
    assert caught.value.problems == ("a: wrong", "b: wrong")
    with pytest.raises(KeyError) as bug:
        gang(KeyError("x"))
    assert "in work" in bug.value.__notes__[0]


def test_an_item_that_was_never_begun_is_next_and_loses_no_attempt():
    todo = Todo[str, int](["a", "b"])
    for _ in range(ATTEMPTS):
        assert todo.take() == 0
        todo.put_back(0)
    assert (todo.take(), todo.take(), todo.take()) == (0, 1, None)
    assert list(todo.settle(1, Raised(ShardError("busy"), "again"))) == []
    assert (len(todo), todo.unfinished) == (1, 2)
    assert 0 < todo.pause() <= 0.01
    [(item, failed)] = todo.settle(0, Raised(SchemaError("rows"), "fail"))
    assert (item, failed.attempts) == ("a", 1)
    assert (len(todo), todo.unfinished) == (1, 1)
