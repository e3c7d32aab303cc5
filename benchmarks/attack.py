"""Measures attacks of synapse against plain ones: the same weights, features, examples and threads.

Ends with status 1 where a peer was not measured, or where a side's answer is not good enough.
"""

import os
import sys
import warnings
from collections.abc import Sequence

import transformers
from attack_workloads import WORKLOADS
from command_line import Script, rounds
from probe_results import ProbeResult, markdown_table

from probe import Measurement

PEERS = {
    "plain torch": "peers.plain_bits:PlainBits",
    "scipy SLSQP": "peers.scipy_pairs:Slsqp",
    "scipy L-BFGS-B, dual": "peers.scipy_pairs:DualLbfgs",
    "DeepFool, plain torch": "peers.plain_deepfool:DeepFool",
}
"""The peers and where their sides are; a workload names those that can do it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, write it, and return the exit status."""
    script = Script((__doc__ or "").split("\n")[0], WORKLOADS, list(PEERS), "attack", ProbeResult, markdown_table)
    options = script.parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    def measure(name: str) -> ProbeResult:
        workload = WORKLOADS[name]
        race = Measurement(
            workload=workload,
            peers={peer: PEERS[peer] for peer in workload.peers if not options.peers or peer in options.peers},
            quick=options.quick,
            threads=options.threads,
            repeats=rounds(options),
            memory=options.memory,
        )
        return race.result()

    return script.run(options, options.workloads or list(WORKLOADS), measure, lambda name: WORKLOADS[name].peers)


if __name__ == "__main__":
    sys.exit(main())
