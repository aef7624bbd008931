"""What a study is: a function, its settings and its seeds, and a hash of all three."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path

from companion.checks import require, require_known, require_whole
from companion.fingerprint import code_fingerprint, digest

FOLDER = Path(__file__).parent  # of the studies and their records
MACHINERY = ("__init__", "__main__", "recording", "running", "study", "texts")

Results = Mapping[str, float | list[float]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A long experiment. `point(seed=..., **setting)` measures one point and returns numbers."""

    title: str
    point: Callable[..., Results]  # a function at the top level of its module
    settings: Mapping[str, Mapping[str, object]]  # by name: what `point` is called with
    seeds: tuple[int, ...]
    files: tuple[Path, ...] = ()  # data that the results depend on, beside the code
    needs: str | None = None  # the kind of device it is about, if only one will do: "cuda"

    def __post_init__(self) -> None:
        require(len(self.settings) > 0, "a study has 0 settings; at least one is needed")
        require(len(self.seeds) > 0, "a study has 0 seeds; at least one is needed")
        repeated = len(set(self.seeds)) < len(self.seeds)
        require(not repeated, f"the seeds {self.seeds} repeat; each must be another")
        for seed in self.seeds:
            require_whole("seed", seed, least=0)

    @property
    def name(self) -> str:
        """The name of the module that holds the study, without its package."""
        return self.point.__module__.rpartition(".")[-1]

    @property
    def points(self) -> list[tuple[str, int]]:
        """Every (setting, seed); all settings with the first seed come first."""
        return [(setting, seed) for seed, setting in product(self.seeds, self.settings)]

    def hash(self) -> str:
        """Fingerprint of the point's code, all it reaches, the settings and the data files."""
        place = f"{self.point.__module__}:{self.point.__qualname__}"
        settings = json.dumps(self.settings, sort_keys=True)
        return digest([code_fingerprint(place, files=self.files), settings])

    def run(self, setting: str, seed: int) -> Results:
        """Measure one point.

        Raises ValueError for an unknown setting, and unless the results are finite numbers by name.
        """
        require_known("setting", setting, self.settings)
        results = self.point(seed=seed, **self.settings[setting])
        _check_results(results)
        return results


def study_names(folder: Path = FOLDER) -> list[str]:
    """Names of all studies in the package."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in MACHINERY)


def find_study(name: str) -> Study:
    """The study of this name. Raises ValueError for an unknown one."""
    require_known("study", name, study_names())
    return import_module(f"companion.studies.{name}").STUDY


def _check_results(results: object) -> None:
    named = isinstance(results, Mapping) and all(isinstance(name, str) for name in results)
    require(named and len(results) > 0, f"a point gave {results!r}; numbers by name are expected")
    for name, value in results.items():
        numbers: Iterable = value if isinstance(value, list) else [value]
        good = all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
        require(good, f"{name} is {value!r}; finite numbers are expected")
