"""Public data sets: a download that breaks, an archive that is wrong, a disk that is full never end in a folder."""

import hashlib
import io
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from audiomaepp import cli
from audiomaepp.config import Config
from audiomaepp.data import open_recordings, split
from audiomaepp.datasets import DATASETS, Dataset, data_home, files_digest, get_dataset
from audiomaepp.files import OutputError
from audiomaepp.source import Source, load_source, open_source, save_source


class Server(ThreadingHTTPServer):
    "A home on this machine: what it sends, and how it fails."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.limit, self.status = b"", None, 200
        self.ranges = self.length = True  # whether it can continue a file, and announces its length
        self.go, self.asked = threading.Event(), []  # what holds answers back, first byte of each request
        self.go.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/sounds.zip"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        home = self.server
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if home.ranges else None
        first = int(asked[1]) if asked else 0
        home.asked.append(first)
        if asked and first >= len(home.content):
            return self.send_error(416)
        if home.status != 200:
            return self.send_error(home.status)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(home.content) - 1}/{len(home.content)}")
        if home.length:
            self.send_header("Content-Length", str(len(home.content) - first))
        self.end_headers()
        rest = home.content[first:][: home.limit]
        self.wfile.write(rest[: len(rest) // 2])
        home.go.wait(60)
        self.wfile.write(rest[len(rest) // 2 :])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    home = Server()
    yield home
    home.go.set()
    home.shutdown()
    home.server_close()


def sound(seed, seconds=2.0, form="WAV", subtype=None):
    "A noise as the bytes of a file; noise does not compress, so an archive of a few is some hundred kB."
    file = io.BytesIO()
    wave = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    soundfile.write(file, wave, 16000, format=form, subtype=subtype)
    return file.getvalue()


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(files, *members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return file.getvalue()


FILES = {f"sounds-1f0c/audio/{label}/{i}.wav": sound(10 * k + i) for k, label in enumerate(("owl", "rain"))
         for i in range(3)} | {"sounds-1f0c/LICENSE": b"free", "sounds-1f0c/setup.py": b"code"}  # fmt: skip
ARCHIVE = zipped(FILES)
DIGEST = files_digest({name.partition("/")[2]: hashlib.md5(data).hexdigest() for name, data in FILES.items()})
TINY = Dataset("tiny", "noises", 6, 2, "", len(ARCHIVE), "CC0", "Nobody (2026)",
               {r"[^/]+/(audio/.+\.wav|LICENSE)": r"\1"}, digest=DIGEST)  # fmt: skip


@pytest.fixture
def home(server, tmp_path, monkeypatch):
    "An empty folder of data sets, and a set in the catalog that the server has."
    server.content = ARCHIVE
    monkeypatch.setitem(DATASETS, "tiny", replace(TINY, url=server.url))
    monkeypatch.setenv("AUDIOMAEPP_DATA", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sets"


def left(home):
    "What is in the folder of the data sets, without the lock and what has been downloaded."
    found = home.iterdir() if home.exists() else []
    return sorted(path.name for path in found if path.suffix not in (".lock", ".download"))


def unpacked(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WANTED = {name.partition("/")[2]: data for name, data in FILES.items() if "setup" not in name}


# ---- what works


def test_a_name_is_downloaded_once_and_opened(home, server, capfd):
    recordings = open_recordings("tiny")
    assert recordings.labels.tolist() == [0, 0, 0, 1, 1, 1] and recordings.classes == ["owl", "rain"]
    assert unpacked(home / "tiny") == WANTED and left(home) == ["tiny"] and not list(home.glob("*.download"))
    said = capfd.readouterr().err
    assert server.url in said and "License: CC0" in said and "Nobody (2026)" in said
    server.status = 500
    assert open_recordings("tiny").paths == recordings.paths and len(server.asked) == 1
    assert "License" not in capfd.readouterr().err


def test_a_folder_of_that_name_is_opened_as_a_path(home, server, tmp_path):
    (tmp_path / "tiny" / "frog").mkdir(parents=True)
    (tmp_path / "tiny" / "frog" / "a.wav").write_bytes(sound(0))
    (tmp_path / "tiny" / "toad").mkdir()
    (tmp_path / "tiny" / "toad" / "b.wav").write_bytes(sound(1))
    assert open_recordings("tiny").classes == ["frog", "toad"] and not server.asked
    assert Source("tiny").place == str(tmp_path / "tiny")


def test_a_local_copy_is_used_where_it_is(home, server):
    for path in (home / "tiny" / "frog" / "a.wav", home / "tiny" / "toad" / "b.wav"):
        path.parent.mkdir(parents=True)
        path.write_bytes(sound(0))
    assert open_recordings("tiny").paths == [str(home / "tiny/frog/a.wav"), str(home / "tiny/toad/b.wav")]
    assert not server.asked and left(home) == ["tiny"]


def test_without_the_variable_the_folder_is_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("AUDIOMAEPP_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert data_home().name == "audiomaepp" and data_home("~/x").is_absolute()


def test_an_archive_on_this_machine_needs_no_network(home, server, tmp_path):
    (tmp_path / "mine.zip").write_bytes(ARCHIVE)
    cli.main(["data", "get", "tiny", "--from", "mine.zip", "--to", str(tmp_path / "there"), "--quiet"])
    assert unpacked(tmp_path / "there" / "tiny") == WANTED and not server.asked and (tmp_path / "mine.zip").exists()
    (tmp_path / "other.zip").write_bytes(zipped(FILES | {"sounds-1f0c/audio/owl/0.wav": b"another"}))
    with pytest.raises(ValueError, match=r"other\.zip must be the archive of tiny with the files that its authors pub"):
        get_dataset("tiny", source=tmp_path / "other.zip", quiet=True)
    with pytest.raises(FileNotFoundError, match=r"got .*gone\.zip, which is no file"):
        get_dataset("tiny", source=tmp_path / "gone.zip", quiet=True)
    assert left(home) == [] and (tmp_path / "other.zip").exists()


def test_esc10_gets_the_table_that_its_archive_lacks(home, server, monkeypatch):
    ogg = {f"ESC-10-553/{folder}/{fold}-{i}-A.ogg": sound(i, 0.2, "OGG", "VORBIS")
           for i, folder in enumerate(("001 - Dog bark", "003 - Sea waves")) for fold in (1, 2)}  # fmt: skip
    server.content = zipped(ogg | {"ESC-10-553/README.md": b"authors", "ESC-10-553/ESC-10.png": b"picture"})
    sums = {f"audio/{name.partition('/')[2]}": hashlib.md5(data).hexdigest() for name, data in ogg.items()}
    monkeypatch.setitem(DATASETS, "esc10", replace(DATASETS["esc10"], url=server.url, digest=files_digest(sums)))
    recordings = open_recordings("esc10")
    rows = list(zip(recordings.table["label"], recordings.table["fold"], strict=True))
    assert rows == [("dog", 1), ("dog", 2), ("sea_waves", 1), ("sea_waves", 2)] and recordings.wav(0).shape == (3200,)
    assert split(recordings).words.startswith("fold 2 held out") and (home / "esc10" / "README.md").exists()


def test_speech_commands_are_split_by_their_own_lists(home, server, monkeypatch):
    names = ("yes/aa_nohash_0", "yes/bb_nohash_0", "no/aa_nohash_1", "no/bb_nohash_0", "no/cc_nohash_0",
             "_background_noise_/pink")  # fmt: skip
    server.content = tarred({f"./{name}.wav": sound(i, 0.1) for i, name in enumerate(names)} | {
        "./testing_list.txt": b"yes/bb_nohash_0.wav\nno/bb_nohash_0.wav\n", "./LICENSE": b"CC BY 4.0",
        "./validation_list.txt": b"no/cc_nohash_0.wav\n", "./.DS_Store": b""})  # fmt: skip
    entry = replace(DATASETS["speech_commands"], url=server.url, sha256=hashlib.sha256(server.content).hexdigest())
    monkeypatch.setitem(DATASETS, "speech_commands", entry)
    table = open_recordings("speech_commands").table
    assert sorted(table["label"]) == ["no", "no", "no", "yes", "yes"]
    train, test, _ = split(open_recordings("speech_commands"))
    assert {*test.table["group"]} == {"bb"} and {*train.table["group"]} == {"aa"} and len(train) == len(test) == 2
    assert not (home / "speech_commands" / ".DS_Store").exists()


def test_a_run_remembers_the_folder_and_the_patterns_of_a_public_set(home, server, monkeypatch, tmp_path):
    files = {f"fsdd-1/recordings/{digit}_{who}_{i}.wav": sound(i, 0.3) for digit in (0, 1) for who in ("ann", "bob")
             for i in range(2)}  # fmt: skip
    server.content = zipped(files)
    sums = {name.partition("/")[2]: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(DATASETS, "fsdd", replace(DATASETS["fsdd"], url=server.url, digest=files_digest(sums)))
    source = Source("fsdd")
    source.check()
    parts = open_source(source, Config.preset("nano"), quiet=True)
    assert parts.train.classes == ["0", "1"] and parts.test.table["group"].nunique() == 1
    save_source(source, tmp_path, parts, seed=0)
    monkeypatch.delitem(DATASETS, "fsdd")
    monkeypatch.setenv("AUDIOMAEPP_DATA", str(tmp_path / "elsewhere"))
    again = open_source(load_source(tmp_path), Config.preset("nano"), quiet=True)
    assert again.test.paths == parts.test.paths and again.test.labels.tolist() == parts.test.labels.tolist()


# ---- downloads that break


def test_a_broken_download_continues_where_it_stopped(home, server):
    server.limit = len(ARCHIVE) // 2
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED
    assert len(server.asked) == 3 and server.asked[0] == 0 < server.asked[1] < server.asked[2]


def test_a_home_that_cannot_continue_a_file_is_asked_from_the_beginning(home, server):
    server.limit, server.ranges = len(ARCHIVE) // 2, False
    with pytest.raises(ConnectionError, match=r"must be downloaded from http.* broken connection after 0\.\d MB; try"):
        get_dataset("tiny", quiet=True)
    assert left(home) == []
    server.limit = None
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED and set(server.asked) == {0}


@pytest.mark.parametrize("packed", [zipped, tarred])
def test_half_an_archive_without_a_length_is_no_archive(home, server, packed, monkeypatch):
    "HTTP itself cannot tell that a file is incomplete when its length was not announced."
    server.content = packed(FILES)
    server.limit, server.length = len(server.content) // 2, False
    with pytest.raises(ValueError, match=f"{server.url} must be an archive of recordings, got .*next call gets it"):
        get_dataset("tiny", quiet=True)
    assert left(home) == []
    server.limit = None
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED


def test_the_rest_of_another_version_is_not_joined_to_a_partial_file(home, server):
    server.limit = len(ARCHIVE) // 2
    new = zipped({name: data[::-1] for name, data in FILES.items()})
    asked = server.asked

    class Changes(list):
        def append(self, first):
            asked.append(first)
            server.content = ARCHIVE if len(asked) == 1 else new[: len(ARCHIVE)]

    server.asked = Changes()
    with pytest.raises(ValueError, match="next call gets it again"):
        get_dataset("tiny", quiet=True)
    assert asked[1] > 0 and left(home) == []
    server.asked, server.content, server.limit = [], ARCHIVE, None
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED and server.asked == [0]


def test_a_partial_file_that_is_too_long_is_thrown_away(home, server):
    name = hashlib.sha256(server.url.encode()).hexdigest()[:8]
    (home / ".tiny.download").mkdir(parents=True)
    (home / ".tiny.download" / f"{name}.part").write_bytes(ARCHIVE + b"more")
    with pytest.raises(ConnectionError, match="416"):
        get_dataset("tiny", quiet=True)
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED


def child(*line, said=subprocess.PIPE):
    "The command in a process of its own, with the small set in its catalog."
    code = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
from dataclasses import replace
from audiomaepp import cli, datasets
sys.path.insert(0, sys.argv[1])
from test_datasets import TINY
datasets.DATASETS["tiny"] = replace(TINY, url=sys.argv[2])
cli.main(sys.argv[3:])
"""
    here = os.path.dirname(__file__)
    return subprocess.Popen([sys.executable, "-c", code, here, *map(str, line)], text=True, stdout=subprocess.PIPE,
                            stderr=said, env=os.environ | {"TQDM_DISABLE": "1"})  # fmt: skip


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_download_continues(home, server):
    server.go.clear()
    process = child(server.url, "data", "get", "tiny")
    wait_for(lambda: any(path.stat().st_size for path in home.glob(".tiny.download/*.part")))
    process.kill()
    process.communicate()
    server.go.set()
    assert left(home) == []
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED and server.asked[0] == 0 < server.asked[1]


def test_ctrl_c_leaves_no_folder_and_says_that_the_part_is_kept(home, server):
    server.go.clear()
    process = child(server.url, "data", "get", "tiny")
    wait_for(lambda: any(path.stat().st_size for path in home.glob(".tiny.download/*.part")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "What has arrived is kept" in said and left(home) == []


def test_two_processes_download_once(home, server, tmp_path):
    server.go.clear()
    logs = [tmp_path / "first", tmp_path / "second"]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        both = [child(server.url, "data", "get", "tiny", said=log) for log in (first, second)]
        wait_for(lambda: sum("Another process downloads tiny" in log.read_text() for log in logs) == 1)
        wait_for(lambda: server.asked)
        server.go.set()
        ends = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0] and len(server.asked) == 1
    assert all(f"tiny is in {home / 'tiny'}" in out for out, _ in ends) and unpacked(home / "tiny") == WANTED


# ---- wrong archives


@pytest.mark.parametrize("entry", [dict(digest="0" * 64), dict(digest="", sha256="0" * 64)])
def test_a_wrong_checksum_leaves_nothing_behind(home, server, monkeypatch, entry):
    right, wrong = DATASETS["tiny"], replace(DATASETS["tiny"], **entry)
    monkeypatch.setitem(DATASETS, "tiny", wrong)
    with pytest.raises(ValueError, match=f"{server.url} must be the archive .*; use an undamaged copy"):
        get_dataset("tiny", quiet=True)
    assert left(home) == []
    monkeypatch.setitem(DATASETS, "tiny", right)
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED and server.asked == [0, 0]


def member(name, kind, link=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def zip_link(name, target):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, target)
    return file.getvalue()


EVIL = {
    "zip, up": zipped({"s/audio/../../../evil.wav": b"x"}),
    "zip, absolute": zipped({"/tmp/evil.wav": b"x"}),
    "zip, backslash": zipped({"s\\audio\\evil.wav": b"x"}),
    "zip, drive": zipped({"C:/evil.wav": b"x"}),
    "zip, link": zip_link("s/audio/evil.wav", "/etc/passwd"),
    "zip, bomb": zipped({"s/audio/evil.wav": bytes(10**7)}),
    "tar, up": tarred({"s/audio/../../../evil.wav": b"x"}),
    "tar, absolute": tarred({"/tmp/evil.wav": b"x"}),
    "tar, link": tarred({}, member("s/audio/evil.wav", tarfile.SYMTYPE, "/etc/passwd")),
    "tar, hard link": tarred({}, member("s/audio/evil.wav", tarfile.LNKTYPE, "../../x")),
    "tar, device": tarred({}, member("s/audio/evil.wav", tarfile.CHRTYPE)),
    "tar, pipe": tarred({}, member("s/audio/evil.wav", tarfile.FIFOTYPE)),
    "same name twice": tarred({"s/audio/a.wav": b"x", "t/audio/a.wav": b"y"}),
    "page": b"<html>sign in to the network of this hotel</html>",
    "empty": b"",
}


@pytest.mark.parametrize("archive", EVIL.values(), ids=EVIL)
def test_a_hostile_archive_writes_nothing(home, server, tmp_path, archive, monkeypatch):
    server.content = archive
    monkeypatch.setitem(DATASETS, "tiny", replace(DATASETS["tiny"], digest=""))  # a checksum would find it too
    with pytest.raises(ValueError, match=f"^{server.url} must be .*; use an undamaged copy"):
        get_dataset("tiny", quiet=True)
    assert left(home) == [] and not list(tmp_path.rglob("*evil*"))


# ---- full disks


@pytest.fixture
def limited():
    "Let no file grow above a size, which fails in the same place as a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_the_download_leaves_no_folder(home, server, limited):
    limited(len(ARCHIVE) // 2)
    with pytest.raises(OutputError, match=f"^{home / 'tiny'} cannot be written"):
        get_dataset("tiny", quiet=True)
    assert left(home) == []
    limited(resource.RLIM_INFINITY)
    assert unpacked(get_dataset("tiny", quiet=True)) == WANTED and server.asked[1] > 0


def test_a_full_disk_while_unpacking_keeps_the_archive(home, server, limited, monkeypatch):
    big = {"s/audio/big.wav": np.repeat(np.random.default_rng(0).integers(0, 255, 20_000, np.uint8), 15).tobytes()}
    server.content = zipped(big)
    monkeypatch.setitem(DATASETS, "tiny", replace(DATASETS["tiny"], digest=""))
    limited(150_000)
    with pytest.raises(OutputError, match=f"^{home / 'tiny'} cannot be written"):
        get_dataset("tiny", quiet=True)
    assert left(home) == []
    limited(resource.RLIM_INFINITY)
    assert unpacked(get_dataset("tiny", quiet=True)) == {"audio/big.wav": big["s/audio/big.wav"]}
    assert len(server.asked) == 1 and left(home) == ["tiny"]


def test_a_folder_that_cannot_be_written_is_named(home, server, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"notes\.txt.* cannot be written \(.*\); choose a path whose parents"):
        get_dataset("tiny", to=tmp_path / "notes.txt" / "sets", quiet=True)
    assert not server.asked


# ---- the command


def failed(line):
    with pytest.raises(SystemExit) as end:
        cli.main(line)
    return str(end.value)


def test_without_a_network_the_command_says_what_to_do(home, server, capfd):
    server.shutdown()
    server.server_close()
    said = failed(["data", "get", "tiny", "--json", "--quiet"])
    assert said == (f"audiomaepp: tiny must be downloaded from {server.url}, got no connection; try again, or get this "
                    "file on another machine and use audiomaepp data get tiny --from FILE")  # fmt: skip
    assert capfd.readouterr() == ("", "") and left(home) == []
    assert "got no connection" in failed(["train", "--data", "tiny", "--out", str(home / "run")])
    server.__init__()  # for the end of the fixture


def test_an_address_that_is_gone_is_named_with_the_answer(home, server):
    server.status = 404
    assert "got the answer 404 Not Found; try again" in failed(["data", "get", "tiny", "--quiet"])


def test_an_address_of_another_kind_is_refused(home):
    assert "got an address that is not one of http or https" in failed(["data", "get", "tiny", "--from", "ftp://x/y"])


def test_the_catalog_as_text_and_as_json(home, capfd):
    (home / "fsdd").mkdir(parents=True)
    (home / "fsdd" / "README.md").touch()
    cli.main(["data"])
    shown = capfd.readouterr().out
    assert "speech_commands" in shown and "CC BY-NC 3.0" in shown and str(home / "fsdd") in shown
    cli.main(["data", "--json", "--quiet"])
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)["datasets"]}
    assert rows["esc10"]["folder"] is None and rows["fsdd"]["folder"] == str(home / "fsdd")
    assert rows["esc50"]["clips"] == 2000 and rows["speech_commands"]["license"] == "CC BY 4.0"


def test_get_as_json_and_what_is_misspelled(home, server, capfd):
    cli.main(["data", "get", "tiny", "--json"])
    out, said = capfd.readouterr()
    assert json.loads(out) == {"folders": {"tiny": str(home / "tiny")}} and "License: CC0" in said
    assert "did you mean tiny?" in failed(["data", "get", "tinny"])
    assert "names must have at least one of esc10" in failed(["data", "get"])
    assert "data must be followed by get, got 'tiny'" in failed(["data", "tiny"])
    assert "must follow get" in failed(["data", "list", "tiny"])
    assert "names must be one of" in failed(["data", "get", "tiny", "fsdd", "--from", "x.zip"])
