"""Run a study: point after point, each kept as it comes, so an interruption costs one point.

While it runs, its points are in a scratch file; only a finished study replaces the record.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from companion.hardware import devices, machine_card
from companion.storage import save_json
from companion.studies.recording import Point, Recorded, load, processor, read_record
from companion.studies.study import FOLDER, Study, find_study


class AnotherStudyRuns(RuntimeError):
    """Two at a time would spoil each other's clocks and files."""


class DeviceIsMissing(RuntimeError):
    """The study is about a device that this machine lacks; its record stays as it is."""


SCRATCH = Path(__file__).parents[2] / "runs" / "studies"  # not tracked by git


def run_study(
    study: str | Study,
    *,
    folder: str | Path = FOLDER,
    scratch: str | Path = SCRATCH,
    again: bool = False,
    progress: bool = True,
) -> Recorded:
    """Run what is missing of a study and record it; `again` runs all of it anew.

    Points of an earlier run are taken over if code, settings, data and processor are the same.
    Raises ValueError for an unknown study, AnotherStudyRuns while one does, and DeviceIsMissing.
    """
    study = find_study(study) if isinstance(study, str) else study
    if study.needs not in (None, *devices()):
        raise DeviceIsMissing(f"{study.name} needs a {study.needs} device; its record stays")
    record, partial = (Path(place) / f"{study.name}.json" for place in (folder, scratch))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _alone(partial.with_name("lock")):
        if again or up_to_date(study, folder) is None:
            _run_points(study, record, partial, again, progress)
    return load(study, folder)


def up_to_date(study: Study, folder: str | Path = FOLDER) -> Recorded | None:
    """The record of a study, if it is there, whole and not stale."""
    try:
        recorded = load(study, folder)
    except (FileNotFoundError, ValueError):
        return None
    return None if recorded.stale else recorded


def _run_points(study: Study, record: Path, partial: Path, again: bool, progress: bool) -> None:
    about = {
        "study": study.name,
        "title": study.title,
        "settings": study.settings,
        "hash": study.hash(),  # of the code as it is now, even if it changes during the run
        "card": machine_card(study.needs or "cpu").as_dict(),
    }
    done: dict[tuple[str, int], Point] = {}
    for path in () if again else (record, partial):
        done |= _earlier(study, processor(about["card"]), path)
    missing = [point for point in study.points if point not in done]
    with tqdm(missing, disable=not progress, unit="point", desc=study.name) as bar:
        for setting, seed in bar:
            bar.set_postfix_str(f"{setting}, seed {seed}")
            start = time.monotonic()
            results = study.run(setting, seed)
            seconds = round(time.monotonic() - start, 2)
            done[setting, seed] = Point(setting, seed, seconds, results)
            _save(partial, study, about, done)
    _save(record, study, about, done)
    partial.unlink(missing_ok=True)


def _earlier(study: Study, machine: object, path: Path) -> dict[tuple[str, int], Point]:
    """Points of an earlier run that still count."""
    try:
        recorded = read_record(path, study)
    except (FileNotFoundError, ValueError):
        return {}
    usable = not recorded.stale and processor(recorded.card) == machine
    return {(p.setting, p.seed): p for p in recorded.points} if usable else {}


def _save(path: Path, study: Study, about: dict, done: dict[tuple[str, int], Point]) -> None:
    points = [asdict(done[point]) for point in study.points if point in done]
    save_json(path, {**about, "points": points})


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the system frees when this process ends, however it ends."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise AnotherStudyRuns(f"another study is running ({lock} is held); wait for it") from None
