"""`dualedit serve` as a user runs it."""

import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from dualedit.cli import main
from dualedit.cli.serve import is_loopback


def test_it_says_where_it_listens_and_ends_on_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "dualedit.cli", "serve", "--model", "toy", "--port", "0", "--no-page"]
    process = subprocess.Popen(
        [*command, "-e", str(tmp_path / "edits")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DUALEDIT_TOKEN": "mine"},
    )  # fmt: skip
    try:
        told = [process.stdout.readline() for _ in range(3)]
        assert told[0].startswith("Serving embedded with the edits in ") and told[2].split()[1] == "mine"
        address = told[1].split()[1]
        assert address.startswith("http://127.0.0.1:") and address.endswith("/v1")
        with urllib.request.urlopen(address + "/models", timeout=60) as answer:
            assert b'"embedded"' in answer.read()
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port 70000: pass a number from 0 to 65535"),
        (["--batch", "0"], "--batch 0: pass a whole number"),
        (["--method", "other"], "--method other: choose one of"),
    ],
)
def test_what_cannot_be(options, words, capsys):
    assert main(["serve", "--no-page", *options]) == 2
    assert words in capsys.readouterr().err


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.com", "")))
