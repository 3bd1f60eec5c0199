"""Scores and reports: lm-eval in process, bits per byte, divergence from a teacher, tables and HTML pages.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.eval.acceptance_call import acceptance
    from kdlib.eval.acceptance_measurement import AcceptanceResult
    from kdlib.eval.bpb import BitsPerByte, bits_per_byte
    from kdlib.eval.callback import EvaluateCallback
    from kdlib.eval.comparison import comparison_report
    from kdlib.eval.diffusion_bits import DiffusionBound, diffusion_bound
    from kdlib.eval.diffusion_call import diffusion
    from kdlib.eval.diffusion_result import DiffusionSweep
    from kdlib.eval.divergence import kl_to_teacher
    from kdlib.eval.harness import evaluate
    from kdlib.eval.jacobi_call import jacobi
    from kdlib.eval.jacobi_measurement import JacobiResult
    from kdlib.eval.page import Section
    from kdlib.eval.report import write_report
    from kdlib.eval.results import results_table, summary_rows, write_results

_HOME = {
    "AcceptanceResult": "acceptance_measurement",
    "BitsPerByte": "bpb",
    "DiffusionBound": "diffusion_bits",
    "DiffusionSweep": "diffusion_result",
    "EvaluateCallback": "callback",
    "JacobiResult": "jacobi_measurement",
    "Section": "page",
    "acceptance": "acceptance_call",
    "bits_per_byte": "bpb",
    "comparison_report": "comparison",
    "diffusion": "diffusion_call",
    "diffusion_bound": "diffusion_bits",
    "evaluate": "harness",
    "jacobi": "jacobi_call",
    "kl_to_teacher": "divergence",
    "results_table": "results",
    "summary_rows": "results",
    "write_report": "report",
    "write_results": "results",
}

__all__ = [
    "AcceptanceResult",
    "BitsPerByte",
    "DiffusionBound",
    "DiffusionSweep",
    "EvaluateCallback",
    "JacobiResult",
    "Section",
    "acceptance",
    "bits_per_byte",
    "comparison_report",
    "diffusion",
    "diffusion_bound",
    "evaluate",
    "jacobi",
    "kl_to_teacher",
    "results_table",
    "summary_rows",
    "write_report",
    "write_results",
]


__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})
