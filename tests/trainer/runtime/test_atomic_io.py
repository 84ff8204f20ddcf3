"""Atomic writes."""

import pytest

from expo.runtime.atomic_io import write_whole


def test_an_interrupted_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def die(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, die)
    assert path.read_text() == "old"
    write_whole(path, lambda temporary: temporary.write_text("new"))
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"
