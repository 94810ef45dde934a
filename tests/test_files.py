"""Whole or absent: files and folders under kills, full disks and several writers; and fingerprints of content."""

import html
import io
import json
import multiprocessing
import os
import posix
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from tests.support.reliability.file_kills import NEW, OLD, contents, fill, fill_pieces, forked
from video_trl import files
from video_trl.files import (
    atomic_file,
    atomic_folder,
    fingerprint,
    formula_free,
    hash_bytes,
    lock,
    partial_path,
    publish_folder,
    read_json,
    remove_leftovers,
    resumable_folder,
    unmarked,
    with_formula,
    without_secrets,
    write_atomically,
    write_json,
)


def at_each_step(work: str, directory: Path) -> None:
    command = [sys.executable, "-m", "tests.support.reliability.file_kills", work, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("before", ["new", "old"])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, before):
    at_each_step(f"{before} file", tmp_path)


def test_the_kills_would_find_a_file_that_is_written_in_place(tmp_path):
    at_each_step("file written in place", tmp_path)


@pytest.mark.parametrize("before", ["new", "old"])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path, before):
    at_each_step(f"{before} folder", tmp_path)


def limited(write: Callable[[], None]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError):
        write()


def test_a_full_disk_leaves_the_old_one_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "file", b"old")
    with atomic_folder(tmp_path / "folder") as partial:
        fill(partial, "old")
    assert forked(lambda: limited(lambda: write_atomically(tmp_path / "file", NEW))) == 0
    assert forked(lambda: limited(lambda: write_json(tmp_path / "file", ["x" * 2000]))) == 0
    assert forked(lambda: limited(lambda: fill_folder(tmp_path / "folder", "new" * 1000))) == 0
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old" and contents(tmp_path / "folder") == {"old"}


def fill_folder(folder: Path, content: str) -> None:
    with atomic_folder(folder) as partial:
        fill(partial, content)


def test_an_error_inside_leaves_the_old_one_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "file", OLD)
    for context in (atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder")):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == OLD


def test_the_disk_has_the_content_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    """As far as a test can see what a power cut would leave: the order in which the system is told."""
    steps = []

    def recorded(name: str) -> Callable[..., object]:
        function = getattr(posix, name)  # not what the tests have put in its place

        def call(*arguments: object, **options: object) -> object:
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[1])
            steps.append((name, "." if place.endswith(".partial") else os.path.relpath(place, tmp_path)))
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recorded(name))
    write_atomically(tmp_path / "one" / "file", NEW)
    assert steps == [("fsync", "."), ("replace", "one/file"), ("fsync", "one")]
    steps.clear()
    with atomic_folder(tmp_path / "two") as partial:
        fill(partial, "new")
    inside = [place for name, place in steps[:-2] if name == "fsync"]
    assert sorted(Path(place).name for place in inside) == ["", "a", "b", "inner"]
    assert steps[-2:] == [("rename", "two"), ("fsync", ".")]


def test_a_file_system_that_cannot_flush_folders_or_has_no_locks_still_gets_its_files(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write_atomically(tmp_path / "file", NEW)
    partial_path(tmp_path / "other").touch()
    remove_leftovers(tmp_path)
    assert (tmp_path / "file").read_bytes() == NEW and len(os.listdir(tmp_path)) == 2  # what may be in use stays


def write_many(path: Path, content: bytes) -> None:
    for _ in range(200):
        write_atomically(path, content)
        remove_leftovers(path.parent)  # takes nothing away from the other writer


def publish_many(path: Path, content: str) -> None:
    for _ in range(50):
        fill_folder(path, content)
        remove_leftovers(path.parent)


def run_together(*works: Callable[[], None]) -> list[multiprocessing.Process]:
    processes = [multiprocessing.get_context("fork").Process(target=work) for work in works]
    for process in processes:
        process.start()
    return processes


def test_two_writers_and_a_reader_see_whole_files_only(tmp_path):
    path = tmp_path / "folder" / "file"
    write_atomically(path, OLD)
    processes = run_together(lambda: write_many(path, OLD), lambda: write_many(path, NEW))
    seen = set()
    while any(process.is_alive() for process in processes):
        seen.add(path.read_bytes())
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen == {OLD, NEW} and os.listdir(path.parent) == ["file"]


def test_two_writers_replace_a_folder_and_one_of_them_is_there_in_the_end(tmp_path):
    path = tmp_path / "folder"
    processes = run_together(lambda: publish_many(path, "a"), lambda: publish_many(path, "b"))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(path) in ({"a"}, {"b"}) and os.listdir(tmp_path) == ["folder"]


def test_the_first_writer_wins_where_nothing_is_replaced(tmp_path):
    write_atomically(tmp_path / "file", b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"second", replace=False)
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "folder", replace=False) as slow:
        fill(slow, "second")
        with atomic_folder(tmp_path / "folder", replace=False) as fast:
            fill(fast, "first")
    assert (tmp_path / "file").read_bytes() == b"first" and contents(tmp_path / "folder") == {"first"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_pieces_of_a_folder_to_the_next_process(tmp_path):
    at_each_step("folder in pieces", tmp_path)


def test_a_failed_process_leaves_pieces_and_no_empty_folder(tmp_path):
    for number in range(2):
        with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "folder") as partial:
            for piece in range(number):
                write_atomically(partial / str(piece), NEW)
            raise KeyboardInterrupt
        assert len(list(tmp_path.iterdir())) == number
    fill_pieces(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path / "folder")) == ["0", "1", "2"] and os.listdir(tmp_path) == ["folder"]


def test_of_many_processes_one_fills_the_folder_and_the_others_wait(tmp_path):
    def fill_slowly() -> None:
        with resumable_folder(tmp_path / "folder") as partial:
            if partial is not None:
                (tmp_path / str(os.getpid())).touch()
                time.sleep(0.5)

    processes = run_together(*[fill_slowly] * 4)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and len(os.listdir(tmp_path)) == 2


def test_a_lock_names_who_has_it(tmp_path):
    held = lock(tmp_path / "lock", waiting="")
    with pytest.raises(TimeoutError, match=rf"lock is locked by pid {os.getpid()} on "):
        lock(tmp_path / "lock", seconds=0.1, waiting="Waiting.")
    held.release()
    lock(tmp_path / "lock", seconds=0, waiting="").release()


def test_a_removed_folder_is_whole_or_gone(tmp_path):
    at_each_step("removed folder", tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_any_new_file_or_of_the_one_before(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    (tmp_path / "file").chmod(0o640)
    write_atomically(tmp_path / "file", b"y")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/file")
    for content in (OLD, NEW):  # it leads nowhere at first
        write_atomically(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == content
    (tmp_path / "folder").symlink_to("disk/folder")
    for content in ("old", "new"):
        fill_folder(tmp_path / "folder", content)
        assert (tmp_path / "folder").is_symlink() and contents(tmp_path / "disk" / "folder") == {content}
    (tmp_path / "disk" / "partial").mkdir()
    publish_folder(tmp_path / "disk" / "partial", tmp_path / "folder")
    assert (tmp_path / "folder").is_symlink() and not contents(tmp_path / "disk" / "folder")
    assert sorted(os.listdir(tmp_path / "disk")) == ["file", "folder"]


def test_a_protected_file_a_folder_and_a_device_are_not_replaced(tmp_path):
    path = write_atomically(tmp_path / "file", OLD)
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="is protected"):
        write_atomically(path, NEW)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for other in ("folder", "pipe"):
        with pytest.raises(OSError, match="is a folder or a device"):
            write_atomically(tmp_path / other, NEW)
    with pytest.raises(NotADirectoryError):
        fill_folder(path, "new")
    assert path.read_bytes() == OLD and sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_a_name_as_long_as_a_file_system_takes_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 127)
    assert write_atomically(path, NEW).read_bytes() == NEW and len(os.listdir(tmp_path)) == 1


def test_leftovers_in_use_of_another_machine_or_of_the_user_stay(tmp_path, caplog):
    """A process waits inside of its writing; the other leftovers are of a killed one, of another host, and no such."""
    started, ready = multiprocessing.Event(), multiprocessing.Event()

    def write_slowly() -> None:
        with atomic_file(tmp_path / "file") as partial, atomic_folder(tmp_path / "folder"):
            partial.write_bytes(NEW)
            started.set()
            ready.wait(60)

    (process,) = run_together(write_slowly)
    assert started.wait(60)
    foreign = tmp_path / ".file.0000000011111111.partial"
    for path in (foreign, tmp_path / ".file.partial", tmp_path / ".hidden", partial_path(tmp_path / "file")):
        path.touch()
    (partial_path(tmp_path / "folder") / "inside").mkdir(parents=True)
    remove_leftovers(tmp_path)
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 5 and {foreign.name, ".file.partial", ".hidden"} < set(names)
    assert f"{foreign} is from another machine" in caplog.text
    ready.set()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "file").read_bytes() == NEW and (tmp_path / "folder").is_dir()


def test_threads_of_one_process_do_not_take_each_others_files(tmp_path):
    threads = [threading.Thread(target=write_many, args=(tmp_path / "file", NEW)) for _ in range(2)]
    faults = []
    threading.excepthook, before = (lambda arguments: faults.append(arguments.exc_value)), threading.excepthook
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.excepthook = before
    assert not faults and os.listdir(tmp_path) == ["file"]


def test_a_published_folder_replaces_one_that_is_not_empty_only_if_asked(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "final").mkdir()
    fill(tmp_path / "final", "old")
    with pytest.raises(FileExistsError):
        publish_folder(tmp_path / "partial", tmp_path / "final", replace=False)
    publish_folder(tmp_path / "partial", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"] and not os.listdir(tmp_path / "final")


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"text": "ein Ball fällt \ud83d", "numbers": [1, 0.5, None], "line": "\u2028"}
    assert read_json(write_json(tmp_path / "file.json", content, indent=1)) == content
    assert "fällt" in (tmp_path / "file.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert read_json(tmp_path / "file.json") == content
    (tmp_path / "of-windows.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "of-windows.json") == {"a": 1}
    for broken in (b'{"a": ', b"\xff"):
        (tmp_path / "broken.json").write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken\.json cannot be read as JSON"):
            read_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"absent\.json cannot be read as JSON"):
        read_json(tmp_path / "absent.json")


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_all_kinds_of_content_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "b" / "y").write_bytes(b"1")
    module, other = torch.nn.Linear(2, 2), torch.nn.Bilinear(1, 2, 2)
    renamed = torch.nn.Linear(2, 2)
    renamed.load_state_dict(module.state_dict())
    with torch.no_grad():
        other.weight.copy_(module.weight.view_as(other.weight))
        other.bias.copy_(module.bias)
        renamed.weight[0, 0] += 1e-6
    distinct = [
        (), (None,), ("",), (b"",), ("1",), (1,), (True,), (1.5,), ([],), ({},), ("", ""), ("ab", "c"), ("a", "bc"),
        (["ab", "c"],), ({"a": 1},), ({"a": 2},), ("\udc80",), (tmp_path / "a",), (tmp_path / "b",),
        (tmp_path / "a" / "x",), (memoryview(np.zeros((2, 3), np.uint8)),), (memoryview(np.zeros((3, 2), np.uint8)),),
        (memoryview(np.zeros((2, 3), np.int8)),), (torch.zeros(2),), (torch.zeros(2, 1),),
        (torch.zeros(2, dtype=torch.int32),), (torch.zeros(2, dtype=torch.bfloat16),), (torch.tensor([0.0, 1.0]),),
        (module,), (other,), (renamed,), (torch.zeros(()),), (torch.zeros(0),),
    ]  # fmt: skip
    hashes = [fingerprint(*parts) for parts in distinct]
    assert len(set(hashes)) == len(distinct)
    assert all(len(text) == 32 and set(text) <= set("0123456789abcdef") for text in hashes)


def test_equal_content_has_one_fingerprint(tmp_path):
    (tmp_path / "file").write_bytes(NEW)
    same = [tmp_path / "file", NEW, io.BytesIO(NEW)]
    with open(tmp_path / "file", "rb") as file:
        assert len({fingerprint(part) for part in [*same, file]}) == 1
    assert len({hash_bytes(part) for part in (NEW, io.BytesIO(NEW), open(tmp_path / "file", "rb"))}) == 1
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    weights = torch.arange(6.0).view(2, 3)
    assert fingerprint(weights.T) == fingerprint(weights.T.contiguous())
    assert fingerprint(weights.requires_grad_()) == fingerprint(weights.detach())


def test_every_byte_of_a_large_file_counts(tmp_path):
    """A model of which only the middle layers were trained has the head, the tail and the size of the old one."""
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "weights"
    path.touch()
    os.truncate(path, 80 << 20)
    before = fingerprint(tmp_path / "model")
    with open(path, "r+b") as file:
        file.seek(40 << 20)
        file.write(b"x")
    assert fingerprint(tmp_path / "model") != before


def test_fingerprints_of_this_version_stay(tmp_path):
    """Caches, manifests and votes are found again by them: a change of the way of hashing voids what people have."""
    (tmp_path / "file").write_bytes(b"content")
    values = [fingerprint(*parts) for parts in (("text",), ({"a": [1, 0.5]},), (tmp_path,), (torch.arange(3),))]
    assert values == EXPECTED
    # Draws of curation depend on this one, and people may make it with `b2sum -l 128`.
    assert hash_bytes(b"content") == "c681ff421fbd7af6dc373a7ced20fbeb"


EXPECTED = [
    "a98453a8d1cbbe9519da53972951e0f5",
    "57ce22366e62d00c45cf7115d296d658",
    "6548ced24ae4947f287b24b9df34a3cc",
    "08cf039b86258acf421ae4a24154dc95",
]


# ---- what others may see --------------------------------------------------------------------------------------------

SECRET = "s3cr3t-Value-0123456789"


@pytest.mark.parametrize(
    "settings",
    [
        {"token": SECRET},
        {"hub_token": SECRET, "apiKey": SECRET, "API_KEY": SECRET, "x-api-key": SECRET},
        {"model_init_kwargs": {"headers": {"authorization": f"Bearer {SECRET}", "X-Anything": SECRET}}},
        {"storage_options": {"token": SECRET, "s3": [{"aws_secret_access_key": SECRET}]}},
        {"extra_body": {"nested": [[{"api_key": SECRET}]]}, "password": {"of": SECRET}},
        {"headers": [["Cookie", SECRET], ("X-Gateway", SECRET)]},
        {"url": f"https://user:{SECRET}@host/v1?token={SECRET}&x=1"},
        {"options": f'{{"token": "{SECRET}", "n": 1}}', "line": f"--api_key={SECRET}"},
        {"text": f"Authorization: Bearer {SECRET}"},
        {"anything": "hf_" + SECRET.replace("-", ""), "other": "sk-" + SECRET},
        {"password": 12345678901},
        {"url": f"https://{SECRET}@host/v1", "sas": f"https://host/c?sv=1&sig={SECRET}"},
        {"storage": f"AccountName=a;AccountKey={SECRET};x=1", "connection_string": SECRET, "webhook_url": SECRET},
        {"proxy": {"user": "me", "pass": SECRET}, "sentry_dsn": SECRET, "jwt": SECRET},
        {"text": f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----"},
        {"args": ["eyJhbGciOi.eyJ" + SECRET.replace("-", "")], "git": "github_pat_" + SECRET.replace("-", "")},
    ],
)  # fmt: skip
def test_no_secret_of_any_depth_is_written(settings):
    shown = json.dumps(without_secrets(settings))
    assert SECRET not in shown and SECRET.replace("-", "") not in shown and "12345678901" not in shown


def test_what_is_no_secret_stays():
    settings = {
        "max_tokens": 5, "tokenizer": "a/b", "teacher_tokens": ["x"], "token": None, "use_auth": True, "seed": 1,
        "git": "ssh://git@github.com/a", "compass": 3, "forward_pass": "x",
        "base_url": "http://localhost:8000/v1", "keys": ["a"], "key": "chosen", "text": "one two", "lr": 1e-4,
    }  # fmt: skip
    assert without_secrets(settings) == settings
    assert without_secrets(without_secrets({"token": "x"})) == {"token": "<TOKEN>"}


@pytest.mark.parametrize(
    "text", ["=1", "+a", "-a", "@a", "\t=1", "\r=1", "'=1", "''=1", " =1", "'", "'a", "a=1", "", "\uff1d1"]
)
def test_cells_that_a_spreadsheet_would_run_come_back(text):
    cell = formula_free(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\uff1d")) and with_formula(cell) == text
    assert formula_free(-1.5) == -1.5


HOSTILE = [
    "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>",
    "<!-- evaluation -->x<!-- end of evaluation -->",
    "a | b\r\n\n# heading", "``` a ``` `b`",
    "[link](javascript:alert(3)) ![i](x)", "&lt;b&gt;",
    "http://evil.example www.evil.example",
    "$\\\\href{javascript:alert(4)}{x}$", "__a__ *b* ~~c~~",
    "\x00\x0b\u2028end", "a\\", "<https://evil.example>", "me@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_markdown_is_text(text):
    shown = unmarked(text)
    assert len(shown.splitlines()) == 1 and not set("<>`*$@") & set(shown) and "](" not in shown and "://" not in shown
    assert "|" not in shown.replace("\\|", "")
    assert html.unescape(shown).replace("\\|", "|") == " ".join(text.split()).replace("\x00", "\ufffd")
