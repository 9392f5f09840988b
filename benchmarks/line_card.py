"""The model card of the line spectra's weights: ``python -m benchmarks.line_card``.

Its numbers are those of the experiment ``deepfreq`` as it is kept in the results.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from sbi_slotflow.pretraining import RECIPES

from .experiment import load
from .store import Result

NAME = "line-spectrum"
WEIGHTS = Path(__file__).parents[1] / "sbi_slotflow" / "weights"


def main() -> None:
    """Write the card."""
    result = Result(load("deepfreq"), "quick")
    weights = WEIGHTS / f"{NAME}.safetensors"
    card = {
        "name": NAME,
        "problem": "problems.line_spectrum()",
        "training": {
            "command": f"make pretrained NAME={NAME}",
            "seed of the first stage": 0,
            **asdict(RECIPES[NAME]),
        },
        "megabytes": round(weights.stat().st_size / 1e6, 2),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "measured": {
            "command": result.read_facts()["command"],
            **{
                claim["quantity"]: claim["ours"]
                for claim in result.read_facts()["claims"]
            },
        },
    }
    path = WEIGHTS / f"{NAME}.json"
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
