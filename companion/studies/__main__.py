"""`python -m companion.studies [name ...]`: run the studies that are missing or out of date."""

from __future__ import annotations

import argparse
import sys

import torch

from companion.studies.recording import load
from companion.studies.running import AnotherStudyRuns, DeviceIsMissing, run_study
from companion.studies.study import Study, find_study, study_names


def main(arguments: list[str] | None = None) -> int:
    """Run studies one after another. The exit code: 0, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m companion.studies", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="all, if none is given")
    parser.add_argument("--again", action="store_true", help="run even what is up to date")
    parser.add_argument("--list", action="store_true", help="say how each study stands")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    unknown = set(given.names) - set(study_names())
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; known are: {', '.join(study_names())}"
        )
    studies = [find_study(name) for name in given.names or study_names()]
    try:
        for study in studies:
            print(_state(study) if given.list else _done(study, given.again))
    except KeyboardInterrupt:
        print("stopped; the points that were done are kept: run it again to go on", file=sys.stderr)
        return 130
    except (AnotherStudyRuns, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _done(study: Study, again: bool) -> object:
    """The record of a study, run if need be; or why this machine cannot run it."""
    try:
        return run_study(study, again=again)
    except DeviceIsMissing as missing:
        return missing


def _state(study: Study) -> str:
    try:
        return f"{study.name}: {load(study).label}"
    except (ValueError, FileNotFoundError) as error:
        return f"{study.name}: {error}"


if __name__ == "__main__":
    sys.exit(main())
