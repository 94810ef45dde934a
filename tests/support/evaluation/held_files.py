"""What happens to a file of answers while it is held, and files that are none."""

import os
import shutil


def _replaced(path):
    """An editor's way to save: another file takes the name. It had been opened before the last vote."""
    lines = path.read_bytes().splitlines(keepends=True)
    (path.parent / "copy").write_bytes(b"".join(lines[:-1]))
    os.replace(path.parent / "copy", path)


def _moved(path):
    path.rename(path.with_name("elsewhere.jsonl"))


def _without_last_newline(path):
    path.write_bytes(path.read_bytes().rstrip(b"\n"))


CHANGES = {
    "replaced": _replaced,
    "deleted": os.unlink,
    "moved": _moved,
    "folder deleted": lambda path: shutil.rmtree(path.parent),
    "emptied": lambda path: os.truncate(path, 0),
    "last vote cut out": lambda path: os.truncate(path, path.read_bytes().rstrip(b"\n").rfind(b"\n") + 1),
    "cut in the middle of a vote": lambda path: os.truncate(path, path.stat().st_size - 30),
    "no last newline": _without_last_newline,
    "lines of another system": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "touched": os.utime,
}


OTHER_FILES = {
    "a line of JSON": b'{"model": "tiny", "layers": 2}',
    "lines of JSON": b'{"prompt": "a"}\n{"prompt": "b"}\n',
    "text": b"first line\nlast line without an end",
    "a table": b"prompt,score\na,0.9\nb,0.",
    "bytes": bytes(range(256)) * 4,
    "half a header": b'{"format": 1, "study"',
    "another format": b'{"format": 2, "study": "x", "runs": [], "questions": "gsb", "pairs": 1}\n{"half',
    "questions of no study": b'{"format": 1, "study": "x", "runs": [], "questions": ["gsb"], "pairs": 1}\n',
    "nothing but spaces": b"  \n \n",
    "deep": b"[" * 100_000,
    "a damaged line": b"{HEADER}\nnot json\nlast",
    "a vote that is none": b'{HEADER}\n{"rater": ["Ada"]}\n{"half',
}
