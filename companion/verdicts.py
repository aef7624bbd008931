"""Predict, measure, verdict: what chapters need to judge the documents' claims.

`verdict` puts one claim to the test; `save_verdicts` closes a chapter with the table of its
verdicts and keeps them for the page that shows them all. `fails` frames the code of an erratum,
which must fail.
"""

from __future__ import annotations

from companion.cases import Part, part
from companion.claims import CLAIMS, Claim, claim, claims_of
from companion.collecting import AllVerdicts, load_verdicts, save_verdicts, verdict_table
from companion.errata import ERRATA, Erratum, errata_of, erratum
from companion.failing import fails
from companion.judging import Verdict, verdict, verdict_on
from companion.verdict_tables import VerdictTable

__all__ = [
    "CLAIMS",
    "ERRATA",
    "AllVerdicts",
    "Claim",
    "Erratum",
    "Part",
    "Verdict",
    "VerdictTable",
    "claim",
    "claims_of",
    "errata_of",
    "erratum",
    "fails",
    "load_verdicts",
    "part",
    "save_verdicts",
    "verdict",
    "verdict_on",
    "verdict_table",
]
