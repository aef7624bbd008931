"""Long experiments, run ahead by `python -m companion.studies` and kept as JSON beside their code.

A study is one module with a `STUDY`: a function of a seed, the settings it is run with, and the
seeds. A page shows what was recorded, with the machine and the date, and runs one small point live
to check it against the record.
"""

from companion.studies.recording import Agreement, Point, Recorded, load
from companion.studies.running import run_study
from companion.studies.study import Study, find_study, study_names

__all__ = [
    "Agreement",
    "Point",
    "Recorded",
    "Study",
    "find_study",
    "load",
    "run_study",
    "study_names",
]
