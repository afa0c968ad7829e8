"""redis-server: the installed one, or Debian's, unpacked into a folder without installing it.

python -m tools.ndif.redis FOLDER    # while there is a network
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("redis-tools", "redis-server", "libjemalloc2", "liblzf1", "libatomic1")
MISSING = (
    "tools.ndif: redis-server is not installed, and Debian's packages cannot be had ({}). Likely"
    " cause: another system, or no network. Try: install redis-server with the system's packages"
)


class Missing(RuntimeError):
    """Something that the server needs is not on this machine."""


def server(folder: Path) -> list[str]:
    """The command that starts redis-server, fetched into the folder if it is not installed.

    Raises:
        Missing: if it is neither installed nor to be had.
    """
    if found := shutil.which("redis-server"):
        return [found]
    if not any(folder.rglob("redis-server")):
        fetch(folder)
    libraries = {str(path.parent) for path in folder.rglob("lib*.so*")}
    binary = next(path for path in folder.rglob("bin/redis-server"))
    return ["env", f"LD_LIBRARY_PATH={':'.join(sorted(libraries))}", str(binary)]


def fetch(folder: Path) -> None:
    """Download Debian's packages and unpack them."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if os.geteuid() == 0 and not any(Path("/var/lib/apt/lists").glob("*Packages*")):
            run(["apt-get", "update", "-qq"], folder)
        run(["apt-get", "download", "-qq", *PACKAGES], folder)
        for package in folder.glob("*.deb"):
            run(["dpkg", "-x", package.name, "."], folder)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise Missing(MISSING.format(said.strip().splitlines()[-1])) from error


def run(command: list[str], folder: Path) -> None:
    """Run a command there, without its output."""
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    try:
        server(Path(sys.argv[1]))
    except Missing as error:
        sys.exit(str(error))
