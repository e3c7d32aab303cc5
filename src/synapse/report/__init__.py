"""A run folder as a page, a comparison, sentences and figures; it reads the folder and nothing else."""

from synapse.report.compare import comparison_table as comparison_table
from synapse.report.compare import write_comparison as write_comparison
from synapse.report.findings import summary_lines as summary_lines
from synapse.report.html import write_report as write_report
from synapse.report.paper import paper_figures as paper_figures
