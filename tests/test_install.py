"""The wheel, installed in a clean environment and run from another folder, serves and runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.install


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """bin/ of an environment that holds our wheel; only the dependencies come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder / "dist", ROOT],
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    inside = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    # A .pth line adds the folder of the dependencies, but not the editable install in it.
    (inside / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    wheel = next((folder / "dist").glob("*.whl"))
    pip = [
        folder / "env" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--force-reinstall", wheel], check=True, capture_output=True)
    return folder / "env" / "bin"


def test_the_code_that_runs_is_the_wheel_s(installed, tmp_path):
    where = subprocess.run(
        [installed / "python", "-c", "import backend; print(backend.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_runs_the_bundled_model_from_another_folder(installed, tmp_path):
    out = tmp_path / "out.json"
    command = [
        installed / "quantarena",
        "run",
        "--model",
        "demo",
        "--recipe",
        "rtn(bits=4, group=64)",
    ]
    command += ["--metrics", "size,perplexity(limit=2)", "--json", out, "--home", tmp_path / "home"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    baseline, quantized = json.loads(out.read_text())
    assert baseline["recipe"] == "baseline"
    assert quantized["recipe"] == "rtn(bits=4,group=64)"
    values = {m["name"]: m["value"] for m in quantized["measurements"]}
    assert 4 < values["bits_per_weight"] < 5.5
    assert values["perplexity"] > 1


def test_serves_from_another_folder(installed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [installed / "quantarena", "serve", "--port", str(port), "--home", tmp_path / "home"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        page = wait_for_page(f"http://127.0.0.1:{port}/", server)
        assert "QuantArena" in page
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)


def wait_for_page(url: str, server: subprocess.Popen[str], seconds: float = 90) -> str:
    """The page, as soon as the server answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AssertionError(f"the server stopped: {server.communicate()[0]}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url} after {seconds} s")
