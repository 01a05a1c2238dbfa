import itertools

import pytest

from hf_warmup.trainer.wrapping import wrap


class Counter:
    def add(self, number):
        return number


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_wrappers_may_end_in_any_order(order):
    counter, seen = Counter(), []

    def watch(i):
        return wrap(counter, "add", lambda add, number: seen.append(i) or add(number) + 10**i)

    ends = [watch(i) for i in range(3)]
    assert counter.add(0) == 111
    left = [0, 1, 2]
    for i in order:
        ends[i]()
        left.remove(i)
        seen.clear()
        assert counter.add(0) == sum(10**j for j in left)
        assert seen == left[::-1]
    assert "add" not in vars(counter)


def test_an_object_is_afterwards_what_it_was():
    counter = Counter()
    wrap(counter, "add", lambda add, number: add(number) + 1)()
    assert "add" not in vars(counter)
    counter.add = own = lambda number: -number
    wrap(counter, "add", lambda add, number: add(number) + 1)()
    assert counter.add is own
