"""An SSH server on this machine, for the tests: its keys, its configuration and its process end with the test."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""


@dataclass(frozen=True)
class Server:
    """Where it listens, the key that it takes, and a folder with an `ssh` that knows it, to be put on the PATH."""

    address: str
    identity: Path
    programs: Path


def lacking() -> str:
    """Say what keeps a server from being started here; empty if nothing does."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    return f"{', '.join(missing)} not installed" if missing else ""


@contextlib.contextmanager
def serve(folder: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run a server whose sessions have these variables."""
    folder.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (folder / "sshd_config").write_text(f"{CONFIG.format(port=port, folder=folder)}SetEnv {variables}\n")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    programs = folder / "bin"
    programs.mkdir()
    wrapper = f'#!/bin/bash\nexec {shutil.which("ssh")} -o UserKnownHostsFile={folder}/known_hosts "$@"\n'
    (programs / "ssh").write_text(wrapper)
    (programs / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # it will not start without
    with (folder / "sshd.log").open("w") as log:
        words = [shutil.which("sshd", path=_PATH), "-D", "-e", "-f", folder / "sshd_config"]
        process = subprocess.Popen(words, stdout=log, stderr=log)  # pyright: ignore[reportArgumentType]
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < end, (folder / "sshd.log").read_text()
            time.sleep(0.1)
        yield Server(f"{getpass.getuser()}@127.0.0.1:{port}", folder / "user_key", programs)
    finally:
        process.terminate()
        process.wait()
