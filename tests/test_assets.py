import http.server
import io
import json
import os
import stat
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import pytest

from vlahub import assets, cli
from vlahub.assets import AssetPack
from vlahub.catalog import UnknownId


def lacks(folder: Path) -> list[str]:
    return [name for name in ("scenes/kitchen.xml", "objects/bowl.xml") if not (folder / name).is_file()]


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """A pack called demo, looked for below tmp_path."""
    monkeypatch.setenv("VLAHUB_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    pack = AssetPack("demo", "A kitchen.", "lab/demo-assets", f"{__name__}:lacks", "CC0", 1, archives=("objects.zip",), elsewhere=(str(tmp_path / "other"),))
    monkeypatch.setitem(assets.PACKS, "demo", pack)
    return pack


def fill(folder: Path) -> Path:
    for name in ("scenes/kitchen.xml", "objects/bowl.xml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("<mujoco/>")
    return folder


def zipped(name: str = "objects/bowl.xml", mode: int = 0o644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        archive.writestr(entry, "<mujoco/>")
    return buffer.getvalue()


def test_places_are_looked_at_in_order(demo, tmp_path):
    assert assets.find("demo") is None
    snapshot, other = tmp_path / "hub" / "datasets--lab--demo-assets" / "snapshots" / "abc", tmp_path / "other"
    for folder in (other, snapshot, tmp_path / "assets" / "demo"):
        assert fill(folder) == assets.find("demo")
    (tmp_path / "assets" / "demo" / "objects" / "bowl.xml").unlink()
    assert assets.find("demo") == snapshot  # half a release is none


def test_the_command_says_where_it_looked(demo, tmp_path, capsys):
    (tmp_path / "assets" / "demo" / "scenes").mkdir(parents=True)
    assert cli.main(["assets", "demo"]) == 1
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'assets' / 'demo'}: lacks scenes/kitchen.xml, objects/bowl.xml" in shown and f"{tmp_path / 'other'}: does not exist" in shown
    assert "vlahub assets demo --download" in shown and "CC0" in shown
    fill(tmp_path / "here")
    assert cli.main(["assets", "demo", "--dir", str(tmp_path / "here")]) == 0
    assert cli.main(["assets"]) == 0
    shown = capsys.readouterr().out
    assert "demo: A kitchen." in shown and "libero: " in shown


def test_mistakes_are_named(demo, tmp_path, capsys, monkeypatch):
    with pytest.raises(UnknownId, match="did you mean 'demo'"):
        assets.pack_of("dmeo")
    assert cli.main(["assets", "--download"]) == 2 and "say which assets" in capsys.readouterr().err
    with pytest.raises(ValueError, match="registered already"):
        assets.register_assets(AssetPack("demo", "Another.", "lab/other", "a:b", "CC0", 1))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to .*--dir"):
        assets.download("demo", tmp_path / "file" / "demo")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(OSError, match="demo needs up to 1 MB, and .* has 0 MB free"):
        assets.download("demo", tmp_path / "demo")


@pytest.mark.parametrize("content, words", [(zipped("../out.xml"), "outside"), (zipped(mode=stat.S_IFLNK | 0o777), "outside"), (b"PK\3\4 half", "damaged")])
def test_bad_archives_are_refused(tmp_path, content, words):
    (tmp_path / "demo").mkdir()
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        assets.unpack(tmp_path / "bad.zip", tmp_path / "demo")
    assert not (tmp_path / "out.xml").exists() and not list((tmp_path / "demo").iterdir())


# ------------------------------------------------------------------------------------------------ a hub on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's library asks for when it downloads the dataset lab/demo-assets."""

    files: dict[str, bytes] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        start = f"/datasets/lab/demo-assets/resolve/{self.commit}/"
        if path == "/api/datasets/lab/demo-assets/revision/main":
            body = json.dumps({"id": "lab/demo-assets", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}).encode()
        elif path == f"/api/datasets/lab/demo-assets/tree/{self.commit}":
            body = json.dumps([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()]).encode()
        elif path.removeprefix(start) in self.files:
            body = self.files[path.removeprefix(start)]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(path) & 0xFFFFFFFF:040x}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *words) -> None:
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def command(endpoint: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """`vlahub assets demo --download` in a process of its own, because the hub's library reads its address when it is imported."""
    code = (
        "import sys; from vlahub import cli; from vlahub.assets import AssetPack, register_assets\n"
        f"register_assets(AssetPack('demo', 'A kitchen.', 'lab/demo-assets', '{__name__}:lacks', 'CC0', 1, ('*.xml', '*.zip'), ('objects.zip',)))\n"
        f"sys.exit(cli.main({['assets', 'demo', '--download', *words]!r}))"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "VLAHUB_ASSETS": str(tmp_path / "assets")}
    environment = {key: value for key, value in environment.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")} | {"HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_a_release_is_downloaded_unpacked_and_checked(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "files", {"scenes/kitchen.xml": b"<mujoco/>", "objects.zip": zipped(), "films/long.mp4": b"0" * 100})
    ran = command(hub, tmp_path)
    folder = tmp_path / "assets" / "demo"
    assert ran.returncode == 0, ran.stderr
    assert f"complete: {folder}" in ran.stdout and "Licence: CC0" in ran.stdout
    assert not lacks(folder) and not (folder / "objects.zip").exists() and not (folder / "films").exists()


def test_a_release_that_is_not_whole_is_no_success(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "files", {"scenes/kitchen.xml": b"<mujoco/>"})
    ran = command(hub, tmp_path, "--dir", str(tmp_path / "mine"))
    assert ran.returncode == 2 and "lacks objects/bowl.xml" in ran.stderr and "Traceback" not in ran.stderr
    assert (tmp_path / "mine" / "scenes" / "kitchen.xml").exists()


def test_without_a_network_it_says_what_to_do(tmp_path):
    ran = command("http://127.0.0.1:9", tmp_path)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "lab/demo-assets could not be downloaded" in ran.stderr and "--dir DIR/demo" in ran.stderr and "VLAHUB_ASSETS=DIR" in ran.stderr
