r"""The paper's architecture as options of :class:`~sbi_slotflow.slot_nn`.

Where the paper's text and its authors' code differ, this preset follows

- the text: couplings (the code has masked autoregressive layers with reversed instead
  of random permutations);
- the text: signals are cosines (the code generates sines); the encoder does not care,
  the simulator does;
- both: convolution strides 2, 2, 1 with kernels 8, 8, 5 (section 3.1; section 3.6 has
  kernel 8 and stride 2 throughout);
- the code: a global context of 2 x 256, which with the flow's residual networks gives
  the 31 million parameters (eq. 12 has 256);
- the code: frequencies are centred on the middle of the band, 2.75 Hz (the text says so
  too, but its formula subtracts 2.7);
- the text: weights w_phi = 2 and w_f = 3, Hungarian matching, the flow's loss averaged
  over components, no K in the slot contexts, tail bound 2 (which the weighted phase
  circle touches);
- neither for the noise: instead of regressing a sampled sigma, sigma has a density
  trained by likelihood, read from convolutions of its own.
"""

from typing import Any

from .circle import CircleChart
from .dual_stream import DualStreamEncoder

__all__ = ["PAPER", "CircleChart", "DualStreamEncoder"]

PAPER: dict[str, Any] = {
    "chart": "circle",
    "matching": "hungarian",
    "slots": "global",
    "phase_weight": 2.0,
    "frequency_weight": 3.0,
    "condition_on_cardinality": False,
    "mean_flow_loss": True,
    "hidden_features": 256,
    "trunk_features": None,
    "flow_layers": 8,
    "flow_hidden_features": 768,
    "flow_bins": 48,
    "flow_blocks": 2,
    "flow_network": "residual",
    "tail_bound": 2.0,
    "location_scale": False,
    "z_score_x": False,
    "encoder_options": {
        "channels": (32, 64, 128),
        "kernels": (8, 8, 5),
        "strides": ((2, 2, 1), (2, 2, 1)),
        "context_features": 512,
        "noise_stack": True,
        "residual": False,
        "centre_phase": False,
        "bands": None,
    },
}
"""Fields of :class:`~sbi_slotflow.slot_nn`."""
