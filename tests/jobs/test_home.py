"""Who owns a home, and how to reach them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest
from scene import ROOT, wait_for

from jobs.home import Ownership, home_folder, owned, server

OWN = """
import sys, time
from pathlib import Path
from jobs.home import Ownership
owner = Ownership(Path(sys.argv[1]))
owner.announce("http://127.0.0.1:7860", "secret")
print("ready", flush=True)
time.sleep(3600)
"""


def test_the_home_is_as_given_else_as_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTARENA_HOME", str(tmp_path / "from environment"))
    assert home_folder() == tmp_path / "from environment"
    assert home_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("QUANTARENA_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home_folder() == tmp_path / "data" / "quantarena"
    assert (tmp_path / "data" / "quantarena" / "runs").is_dir()


def test_a_home_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made .* --home"):
        home_folder(tmp_path / "file" / "home")


def test_a_second_server_is_refused_with_the_pid_of_the_first(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", OWN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as first:
        try:
            assert first.stdout.readline() == b"ready\n"
            with pytest.raises(ValueError, match=f"process {first.pid}, http://127.0.0.1:7860"):
                Ownership(tmp_path)
            found = server(tmp_path)
            assert (found.url, found.pid, found.token) == (
                "http://127.0.0.1:7860",
                first.pid,
                "secret",
            )
            assert stat.S_IMODE((tmp_path / "server.json").stat().st_mode) == 0o600
        finally:
            os.kill(first.pid, signal.SIGKILL)
    # What a killed server left does not mislead, and the home can be taken at once.
    assert wait_for(lambda: not owned(tmp_path))
    assert server(tmp_path) is None
    with Ownership(tmp_path):
        assert server(tmp_path) is None
        assert owned(tmp_path)


def test_who_leaves_lets_go(tmp_path):
    with Ownership(tmp_path) as owner:
        owner.announce("http://127.0.0.1:1", "")
        assert server(tmp_path).pid == os.getpid()
    assert server(tmp_path) is None
    assert not (tmp_path / "server.json").exists()
    with Ownership(tmp_path):
        pass
