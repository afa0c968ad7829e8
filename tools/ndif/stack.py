"""The server's processes: started, waited for, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from . import redis
from .deployments import Deployment
from .reaper import marked
from .redis import Missing
from .space import free_ports

HERE = Path(__file__).resolve().parent
PATIENCE = 300.0
"""Seconds for a part of the server to come up: 10 on an idle machine, 100 on a busy one."""


class Failed(RuntimeError):
    """A part of the server did not come up; the message has the end of its log."""


class Stack:
    """The released server, up for as long as a ``with`` block lasts.

    Call ``space.isolate`` before, or Ray listens on the machine's own address.

    Args:
        folder: an empty folder for logs and Ray's files, which is also the mark in the environment
            of every process of the stack. Its path must be short: Ray's sockets lie in it.
        venv: the environment that the server is installed in.
        deployments: models to deploy at once.
        settings: more of the server's environment variables.

    Attributes:
        url: of the API.
        published: the ports that clients ask: the API's, and the object store's.
        seconds: how long each step took.
    """

    def __init__(
        self,
        folder: Path,
        venv: Path,
        deployments: Iterable[Deployment] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.venv, self.deployments = folder, venv, tuple(deployments)
        names = ("redis", "store", "api", "gcs", "ray", "dashboard", "grpc", "agent", "metrics")
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.url = f"http://127.0.0.1:{self._ports['api']}"
        self.published = (self._ports["api"], self._ports["store"])
        self.environment = self._environment() | dict(settings or {})
        self.seconds: dict[str, float] = {}
        self._reaper: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []
        self._apis: list[subprocess.Popen[bytes]] = []
        if not (venv / "bin" / "ndif").exists():
            raise Missing(
                f"tools.ndif: {venv} has no NDIF server in it. Try: make {venv.name}/.stamp"
            )

    def __enter__(self) -> Stack:
        for name in ("bin", "log", "ray", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "reaper.py"), str(self.folder)]
        self._reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._timed("redis and the object store", self._start_stores)
            self._start_api()  # it waits for Ray, and takes as long to start
            self.start_ray()
            self._timed("API", self._wait_for_api)
            self.deploy(self.deployments)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            self._reaper.wait()
        for process in self._started:
            process.wait()

    # ---------------------------------------------------------------- parts

    def start_ray(self) -> None:
        """Start Ray and the controller, which has no deployments then."""
        self._timed("Ray", self._start_ray)
        module = "ndif.services.ray.deployments.controller.controller"
        self._timed("controller", lambda: self.run("controller", ["python", "-m", module]))

    def stop_ray(self) -> None:
        """End Ray, as a crash of its node would: controller and actors go with it."""
        self.run("ray-stop", ["ray", "stop", "--force"])

    def stop_api(self) -> None:
        """End the API, as a crash of its machine would: nobody is answered, jobs run on."""
        for process in self._apis:
            process.kill()
            process.wait()
        for pid in self.processes("ndif.services.api"):  # gunicorn's workers
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._apis.clear()

    def start_api(self) -> None:
        """Start the API again, and wait until it answers."""
        self._start_api()
        self._wait_for_api()

    def deploy(self, deployments: Iterable[Deployment]) -> None:
        """Deploy models by the released command, and wait until they are loaded."""
        specs = [deployment.spec() for deployment in deployments]
        if specs:
            file = self.folder / "deploy.yaml"
            file.write_text(json.dumps({"models": specs}))  # JSON is YAML
            self._timed("deployments", lambda: self.run("deploy", ["ndif", "deploy", "-f", file]))

    def evict(self, deployment: Deployment) -> None:
        """Take a model off the server by the released command."""
        self.run("evict", ["ndif", "evict", "--model-key", deployment.key])

    def run(self, name: str, command: list[str | Path]) -> str:
        """Run a command in the server's environment; what it printed.

        Raises:
            Failed: if it failed, with the end of what it printed.
        """
        done = subprocess.run(
            self._located(command), env=self.environment, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        with (self.folder / "log" / f"{name}.log").open("a") as log:
            log.write(done.stdout)
        if done.returncode != 0:
            raise Failed(f"tools.ndif: {name} ended with {done.returncode}\n{self.logs()}")
        return done.stdout

    def logs(self, lines: int = 15) -> str:
        """The ends of all logs, for a failure's report."""
        ends = []
        for path in sorted((self.folder / "log").glob("*.log")):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            ends.append("\n".join([f"--- {path.name}", *end]))
        return "\n".join(ends)

    def processes(self, text: str) -> list[int]:
        """The stack's processes whose command line has this text."""
        found = []
        for pid in marked(str(self.folder)):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            found += [pid] if text in line else []
        return found

    # ---------------------------------------------------------------- how

    def _environment(self) -> dict[str, str]:
        """The server's whole environment: nothing of the caller's but where programs lie."""
        ports = {name: f"127.0.0.1:{port}" for name, port in self._ports.items()}
        path = [self.folder / "bin", (self.venv / "bin").resolve(), os.environ.get("PATH", "")]
        return {
            "PATH": os.pathsep.join(map(str, path)),  # the sandbox's runners inherit it, and HOME
            "HOME": str(self.folder / "home"),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "PYTHONPATH": str(HERE / "far"),
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else runners miss their 30 seconds to start
            "NDIF_REDIS_URL": f"redis://{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://{ports['store']}",
            "NDIF_OBJECT_STORE_ACCESS_KEY": "key",
            "NDIF_OBJECT_STORE_SECRET_KEY": "secret",
            "NDIF_RAY_ADDRESS": f"ray://{ports['ray']}",
            "NDIF_API_URL": self.url,
            "NDIF_DEFAULT_PADDING_BIAS": "1000000",
            "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "RAY_ADDRESS": ports["gcs"],
            "GUNICORN_CMD_ARGS": f"--bind={ports['api']}",  # else every interface
        }

    def _located(self, command: list[str | Path]) -> list[str]:
        program = (self.venv / "bin" / command[0]).absolute()
        return [str(program if program.exists() else command[0]), *map(str, command[1:])]

    def _start(self, name: str, command: list[str | Path]) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self._located(command), env=self.environment, cwd=self.folder, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def _start_stores(self) -> None:
        port = str(self._ports["redis"])
        options = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        server = redis.server(self.venv / "redis")
        started = [self._start("redis", [*server, *options])]
        store = ["moto_server", "-H", "127.0.0.1", "-p", str(self._ports["store"])]
        started.append(self._start("store", store))
        address = self.environment["NDIF_OBJECT_STORE_URL"]
        self._until(lambda: _answers(address + "/moto-api/"), "the object store", started)

    def _start_ray(self) -> None:
        ports, resources = self._ports, {"head": 10, "cuda_memory_bytes": 40 * 10**9}
        resources["cpu_memory_bytes"] = 8 * 10**9
        self.run("ray", [
            "ray", "start", "--head", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
            f"--port={ports['gcs']}", f"--ray-client-server-port={ports['ray']}",
            "--num-cpus=8", "--num-gpus=1", f"--resources={json.dumps(resources)}",
            f"--object-store-memory={200 * 10**6}", f"--temp-dir={self.folder / 'ray'}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports['dashboard']}",
            f"--dashboard-agent-grpc-port={ports['grpc']}",
            f"--dashboard-agent-listen-port={ports['agent']}",
            f"--metrics-export-port={ports['metrics']}",
        ])  # fmt: skip

    def _start_api(self) -> None:
        config = ["--config", "python:ndif.services.api.gunicorn_conf"]
        self._apis.append(self._start("api", ["gunicorn", *config, "ndif.services.api.app:app"]))

    def _wait_for_api(self) -> None:
        self._until(self.connected, "the API", self._apis)

    def connected(self) -> bool:
        """Whether the API answers, and says that it reaches Ray."""
        return _answers(self.url + "/connected")

    def _until(
        self, ready: Callable[[], bool], name: str, started: list[subprocess.Popen[bytes]]
    ) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if any(one.poll() is not None for one in started) or time.monotonic() > deadline:
                raise Failed(f"tools.ndif: {name} did not come up\n{self.logs()}")
            time.sleep(0.2)

    def _timed(self, name: str, step: Callable[[], object]) -> None:
        start = time.monotonic()
        step()
        self.seconds[name] = round(time.monotonic() - start, 1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status < 400
    except (urllib.error.URLError, OSError):
        return False
