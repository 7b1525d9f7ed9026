"""A function is replaced once, whatever kind it is and whatever else replaces it."""

import pickle

import pytest

from deltasam_fairseq.fairseq_patches.patching import is_patched, patch, replaced


class Owner:
    """To be patched."""

    def __init__(self):
        self.size = 1

    def method(self, x):
        return self.size + x

    @classmethod
    def of_class(cls, x):
        return cls.__name__, x

    @staticmethod
    def static(x):
        return x


def ten_more(original, *args):
    return original(*args[:-1], args[-1] + 10)


def doubled(original, *args):
    return original(*args[:-1], args[-1] * 2)


@pytest.fixture
def owner():
    return type("Owner", (Owner,), dict(vars(Owner)))


def test_each_kind_is_replaced_once(owner):
    for name in ("method", "of_class", "static"):
        assert not is_patched(owner, name, ten_more)
        for _ in range(2):
            patch(owner, name, ten_more)
        assert is_patched(owner, name, ten_more)
    assert owner().method(5) == 16
    assert owner.of_class(5) == owner().of_class(5) == ("Owner", 15)
    assert owner.static(5) == owner().static(5) == 15
    assert Owner.static(5) == 5 and not is_patched(Owner, "static", ten_more)


def test_two_replacements_nest_and_are_both_known(owner):
    """(5 * 2) + 10: the later one is called first."""
    patch(owner, "static", ten_more)
    patch(owner, "static", doubled)
    patch(owner, "static", ten_more)  # not the latest, and yet not again
    assert owner.static(5) == 20
    assert is_patched(owner, "static", ten_more) and is_patched(owner, "static", doubled)


def test_a_class_and_a_function_of_a_module(monkeypatch):
    import tests.fairseq_patches.test_patching as module

    monkeypatch.setattr(module, "Owner", Owner)  # to be put back
    patch(module, "Owner", lambda original: setattr(made := original(), "size", 7) or made)
    assert module.Owner().size == 7
    monkeypatch.setattr(module, "doubled", doubled)
    patch(module, "doubled", lambda original, *args: original(lambda x: -x, *args))
    assert module.doubled(5) == -10
    assert pickle.loads(pickle.dumps(module.doubled)) is module.doubled  # as spawning does


def test_a_name_that_is_not_there(owner):
    with pytest.raises(AttributeError):
        patch(owner, "nothing", ten_more)


def test_replaced_for_the_length_of_a_call(owner):
    before = owner.method
    with pytest.raises(KeyError), replaced(owner, "method", len):
        assert owner.method is len
        raise KeyError
    assert owner.method is before
    one = owner()
    with replaced(one, "method", len), replaced(one, "size", 2):
        assert one.method is len and one.size == 2
    assert vars(one) == {"size": 1}
