"""What a quarter of the memory is taken of."""

import os

import pytest
import torch

from retrofit.running import memory


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks another way")
def test_the_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path):
    none, some = tmp_path / "none", tmp_path / "some"
    monkeypatch.setattr(memory, "LIMITS", ())
    whole = memory.memory_of(torch.device("cpu"))
    assert whole > 1 << 28
    none.write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", (str(none), str(tmp_path / "missing")))
    assert memory.memory_of(None) == whole
    some.write_text("123456789\n")
    monkeypatch.setattr(memory, "LIMITS", (str(none), str(some)))
    assert memory.memory_of(None) == 123456789


def test_where_the_system_does_not_tell_it_is_not_much(monkeypatch):
    monkeypatch.setattr(memory, "LIMITS", ())
    monkeypatch.delattr(os, "sysconf")
    assert memory.memory_of(None) == 8 << 30
