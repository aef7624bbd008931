"""Fetch the book's four JavaScript libraries once, so that its pages load nothing from outside.

    python tools/assets.py

npm brings each package at its exact version, the hash below is checked, and the files that a
page can ask for are unpacked into `book/_static/vendor` (ignored by git). `book/_extensions`
uses that folder when it is there; without npm the pages load the same libraries from their
public networks, and this command says so. Standard library only.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

VENDOR = Path(__file__).resolve().parent.parent / "book" / "_static" / "vendor"

# folder: (package, version, sha512, wanted files, unwanted among them)
LIBRARIES = {
    "mathjax": (
        "mathjax",
        "3.2.2",
        "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
        ("es5/tex-mml-chtml.js", "es5/[aisu]*/*", "es5/output/chtml*", "LICENSE"),
        ("es5/input/asciimath.js", "es5/input/mml*"),
    ),
    "mermaid": (
        "mermaid",
        "11.17.2",
        "V6K3C8EBdEsPFZXSKMJe6ppQOENxuHARr9GvHX4hh47lAbhMRD9qf4oEK7LoaRQxULMa80/qt5gHO73aCleBBg==",
        ("dist/mermaid.esm.min.mjs", "dist/chunks/mermaid.esm.min/*", "LICENSE"),
        ("*.map",),
    ),
    "requirejs": (
        "requirejs",
        "2.3.8",
        "7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw==",
        ("require.js", "LICENSE"),
        (),
    ),
    "widgets": (
        "@jupyter-widgets/html-manager",
        "1.0.15",
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
        ("dist/embed-amd.js", "dist/*.woff2", "LICENSE"),
        (),
    ),
}


class AssetError(Exception):
    """A library could not be had; the message says which and why."""


def pinned():
    """What the stamp of a complete vendor folder says: every package, version and hash."""
    return "\n".join(" ".join(library[:3]) for library in LIBRARIES.values())


def complete(vendor):
    """Does `vendor` hold exactly the pinned libraries?"""
    stamp = vendor / "pinned.txt"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == pinned()


def fetch(npm, package, version, folder):
    """Let npm put one package's archive into `folder`; return its path."""
    command = [npm, "pack", "--silent", f"{package}@{version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, cwd=str(folder), capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise AssetError(f"npm could not fetch {package} {version}: {done.stderr.strip()[-300:]}")
    return archives[0]


def check_hash(archive, sha512):
    """Refuse an archive whose SHA-512 (base64) is not the pinned one."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != sha512:
        raise AssetError(f"{archive.name} has the SHA-512 {found}, pinned is {sha512}")


def unpack(archive, wanted, unwanted, folder):
    """Write the archive's wanted files below `folder`, without its top folder `package/`."""
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            chosen = any(fnmatch(str(name), pattern) for pattern in wanted)
            if not member.isfile() or not chosen or ".." in name.parts:
                continue
            if any(fnmatch(str(name), pattern) for pattern in unwanted):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.extractfile(member).read())


def build(npm, vendor):
    """Fetch, check and unpack every library, then put the whole folder in place at once."""
    vendor.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(vendor.parent), prefix=".vendor-") as scratch:
        fresh = Path(scratch) / "vendor"
        for name, (package, version, sha512, wanted, unwanted) in LIBRARIES.items():
            downloads = Path(scratch) / name
            downloads.mkdir()
            archive = fetch(npm, package, version, downloads)
            check_hash(archive, sha512)
            unpack(archive, wanted, unwanted, fresh / name)
        (fresh / "pinned.txt").write_text(pinned(), encoding="utf-8")
        shutil.rmtree(vendor, ignore_errors=True)
        os.replace(fresh, vendor)


def ensure(vendor=VENDOR):
    """Have the libraries in `vendor`, or say what the pages do without them."""
    if complete(vendor):
        return
    instead = "the pages will load these libraries from their public networks"
    if (vendor / "pinned.txt").exists():
        instead = "the pages will use the copies fetched earlier"
    npm = shutil.which("npm")
    if npm is None:
        print(f"==> npm is not there to fetch MathJax and others: {instead}", flush=True)
        return
    print("==> fetching MathJax, Mermaid, RequireJS and the widget manager with npm", flush=True)
    try:
        build(npm, vendor)
    except AssetError as problem:
        print(f"==> {problem}\n==> {instead}", flush=True)


if __name__ == "__main__":
    ensure()
