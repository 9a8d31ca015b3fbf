"""A file is written completely or not at all."""

from pathlib import Path

import pytest

from vlm_fast.atomic_write import write_atomically


def test_file_is_replaced_in_utf8(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old", "new \N{GREEK SMALL LETTER ALPHA}\n"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def interrupted(self, text, **options):
        self.write_bytes(text.encode()[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
